"""The canonical training step of a model with BatchNorm: read this file first.

A Flax module with BatchNorm has two kinds of variables. ``params`` are trained: gradients are taken
with respect to them, and the optimizer updates them. ``batch_stats`` are written by the forward pass
in train mode and must never reach the optimizer. Each numbered comment below marks a place where
mistakes raise no error.

Source: Ioffe & Szegedy 2015 (https://arxiv.org/abs/1502.03167); Flax, "Applying batch
normalization" (https://flax.readthedocs.io/en/latest/guides/training_techniques/batch_norm.html).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from bnverify import oracle
from bnverify.model import Case, LayerInput, State, StepInfo, Subject, Tree

HIDDEN = oracle.HIDDEN
MOMENTUM = oracle.MOMENTUM  # as in Flax: the weight of the old value


class Model(nn.Module):
    """Dense -> BatchNorm -> ReLU -> Dense(1): x (N, D) -> predictions (N, 1)."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Return the predictions, (N, 1)."""
        x = nn.Dense(HIDDEN)(x)
        # 1. Training normalises by the batch's own moments, evaluation by the running statistics.
        x = nn.BatchNorm(use_running_average=not train, momentum=MOMENTUM)(x)
        x = nn.relu(x)
        return nn.Dense(1)(x)


MODEL = Model()


def init(tx: optax.GradientTransformation, seed: Any, x: Any) -> State:
    """Return the initial state.

    Args:
        tx: the optimizer.
        seed: int32 scalar.
        x: (N, D) float32; only its shape matters.
    """
    variables = MODEL.init(jax.random.PRNGKey(seed), x, train=False)
    params, batch_stats = variables["params"], variables["batch_stats"]
    # 2. The optimizer is initialised on params alone, never on all variables.
    return State(params, batch_stats, tx.init(params))


def loss_fn(params: Tree, batch_stats: Tree, x: Any, y: Any) -> tuple[jax.Array, Tree]:
    """Return the training loss, a scalar, and the new batch_stats."""
    # 3. Train mode writes batch_stats, so the collection must be declared mutable.
    out, updated = MODEL.apply(
        {"params": params, "batch_stats": batch_stats}, x, train=True, mutable=["batch_stats"]
    )
    # 4. Reshape (N, 1) to (N,) before subtracting y: (N, 1) - (N,) would broadcast to (N, N).
    preds = out.reshape(-1)
    return jnp.mean((preds - y) ** 2), updated["batch_stats"]


def step(tx: optax.GradientTransformation, state: State, x: Any, y: Any) -> tuple[State, StepInfo]:
    """Take one training step.

    Args:
        tx: the optimizer.
        state: the old state.
        x: (N, D) float32.
        y: (N,) float32.

    Returns:
        The new state, and the loss (a scalar) with its gradient (a tree like params).
    """
    # 5. Differentiate with respect to argument 0, params, only; has_aux returns batch_stats.
    grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
    (loss, batch_stats), grads = grad_fn(state.params, state.batch_stats, x, y)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    # 6. The optimizer updates params; batch_stats is replaced; all three are returned.
    return State(params, batch_stats, opt_state), StepInfo(loss, grads)


def evaluate(state: State, x: Any, y: Any) -> jax.Array:
    """Return the mean squared error in eval mode, shape (1,); batch_stats is only read."""
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    out, _ = MODEL.apply(variables, x, train=False, mutable=["batch_stats"])
    return jnp.mean((out.reshape(-1) - y) ** 2).reshape(1)


def train_step(seed: float, x_batch: Any, y_batch: Any, lr: float) -> jax.Array:
    """Initialise, take one step of SGD, and return the loss after it in eval mode.

    Args:
        seed: a real number, truncated to an int32 seed.
        x_batch: (N, D), real and finite.
        y_batch: (N,), real and finite.
        lr: the learning rate, at least 0.

    Returns:
        (1,) float32, the mean squared error after the step.

    Raises:
        InvalidCase: an argument is not as described; the message names it, its value and the limit.
    """
    case = Case.of(seed, x_batch, y_batch, lr)
    tx = optax.sgd(case.lr)
    state = init(tx, case.seed, case.x)
    state, _ = step(tx, state, case.x, case.y)
    return evaluate(state, case.x, case.y)


# The same step as a Subject.


def layer_inputs(state: State, x: Any, y: Any) -> dict[str, LayerInput]:
    """Return the input of the normalisation layer in the training step: x W + b, (N, HIDDEN)."""
    _, captured = MODEL.apply(
        {"params": state.params, "batch_stats": state.batch_stats},
        x,
        train=True,
        mutable=["batch_stats", "intermediates"],
        capture_intermediates=lambda module, _: module.name == "Dense_0",
    )
    (hidden,) = captured["intermediates"]["Dense_0"]["__call__"]
    return {"BatchNorm_0": LayerInput(hidden)}


def make_subject(
    optimizer: Callable[[Any], optax.GradientTransformation] = optax.sgd, name: str = "sgd"
) -> Subject:
    """Return the reference step with ``optimizer``, a function of the learning rate."""
    return Subject(
        name=f"reference[{name}]",
        init=lambda seed, x: init(optimizer(0.0), seed, x),
        step=lambda state, x, y, lr: step(optimizer(lr), state, x, y),
        evaluate=evaluate,
        optimizer=optimizer,
        momentum=MOMENTUM,
        layer_inputs=layer_inputs,
        after_eval=_after_eval,
        with_optimizer=lambda other: make_subject(other, name=f"{name}, probed"),
        biases_before_norm=("Dense_0/bias",),
        solution=train_step if optimizer is optax.sgd else None,
        oracle=oracle,
    )


def _after_eval(state: State, x: Any, y: Any) -> State:
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    _, updated = MODEL.apply(variables, x, train=False, mutable=["batch_stats"])
    return state._replace(batch_stats=updated["batch_stats"])


def sgd() -> Subject:
    """Return the canonical step with plain SGD."""
    return make_subject()


def momentum() -> Subject:
    """Return the canonical step with SGD and momentum 0.9."""
    return make_subject(lambda lr: optax.sgd(lr, momentum=0.9), "momentum")


def adam() -> Subject:
    """Return the canonical step with Adam."""
    return make_subject(optax.adam, "adam")


def adamw() -> Subject:
    """Return the canonical step with AdamW and a weight decay of 1e-2."""
    return make_subject(lambda lr: optax.adamw(lr, weight_decay=1e-2), "adamw")


VARIANTS = (sgd, momentum, adam, adamw)
