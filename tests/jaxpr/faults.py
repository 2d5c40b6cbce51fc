"""The reference step with one fault each, for the tests of data flow."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import optax

from bnverify import reference
from bnverify.model import State, StepInfo, Subject

MODEL = reference.MODEL


def apply(params, batch_stats, x, train):
    """Return predictions (N,) and the new statistics."""
    variables = {"params": params, "batch_stats": batch_stats}
    out, new = MODEL.apply(variables, x, train=train, mutable=["batch_stats"])
    return out.reshape(-1), new["batch_stats"]


def step_with(loss_fn):
    """Return the canonical SGD step around another loss function."""

    def step(state, x, y, lr):
        grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
        (loss, stats), grads = grad_fn(state.params, state.batch_stats, x, y)
        updates, opt_state = optax.sgd(lr).update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return State(params, stats, opt_state), StepInfo(loss, grads)

    return step


def eval_mode_in_training() -> Subject:
    """Return a step that trains with the running statistics and does not update them."""

    def loss_fn(params, batch_stats, x, y):
        out, stats = apply(params, batch_stats, x, train=False)
        return jnp.mean((out - y) ** 2), stats

    return replace(reference.sgd(), name="eval mode in training", step=step_with(loss_fn))


def loss_reads_old_statistics() -> Subject:
    """Return a step whose loss depends on the old statistics."""

    def loss_fn(params, batch_stats, x, y):
        out, stats = apply(params, batch_stats, x, train=True)
        old = batch_stats["BatchNorm_0"]["mean"]
        return jnp.mean((out - y) ** 2) + jnp.sum(old * params["Dense_0"]["bias"]), stats

    return replace(reference.sgd(), name="loss reads old statistics", step=step_with(loss_fn))


def statistics_in_the_optimizer() -> Subject:
    """Return a step whose optimizer also trains the statistics."""
    optimizer = lambda lr: optax.sgd(lr, momentum=0.9)  # noqa: E731

    def init(seed, x):
        state = reference.sgd().init(seed, x)
        variables = {"params": state.params, "batch_stats": state.batch_stats}
        return state._replace(opt_state=optimizer(0.0).init(variables))

    def step(state, x, y, lr):
        def loss_fn(variables):
            out, stats = apply(variables["params"], variables["batch_stats"], x, train=True)
            return jnp.mean((out - y) ** 2), stats

        variables = {"params": state.params, "batch_stats": state.batch_stats}
        (loss, stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(variables)
        variables["batch_stats"] = stats
        updates, opt_state = optimizer(lr).update(grads, state.opt_state, variables)
        new = optax.apply_updates(variables, updates)
        return State(new["params"], new["batch_stats"], opt_state), StepInfo(loss, grads["params"])

    return replace(reference.sgd(), name="statistics in the optimizer", init=init, step=step)


def evaluation_writes() -> Subject:
    """Return a step whose evaluation runs in train mode and keeps the updated statistics."""

    def evaluate(state, x, y):
        out, _ = apply(state.params, state.batch_stats, x, train=True)
        return jnp.mean((out - y) ** 2).reshape(1)

    def after_eval(state, x, y):
        del y
        _, stats = apply(state.params, state.batch_stats, x, train=True)
        return state._replace(batch_stats=stats)

    return replace(
        reference.sgd(), name="evaluation writes", evaluate=evaluate, after_eval=after_eval
    )
