"""The canonical training step for a linen or nnx module."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import jax
import optax

from bnverify.adapters.declared import Declarations, declared_by
from bnverify.adapters.explain import explaining
from bnverify.adapters.look import completed
from bnverify.adapters.programs import RATE, sizes_of
from bnverify.adapters.traced import Flows
from bnverify.model import State, StepInfo, Subject, Tree

CLAIMS = frozenset({"lr", "row_losses", "eval_is_training_loss"})

Optimizer = Callable[[Any], optax.GradientTransformation]
Loss = Callable[[Any, Any], Any]
Batch = Callable[[Any, Any], tuple[Any, Any]]


class Pass(NamedTuple):
    """One forward pass: outputs, targets, and the new batch_stats and extra."""

    outputs: Any
    targets: Any
    batch_stats: Tree
    extra: Tree


class Model(Protocol):
    """A model whose variables are split into the parts of a State."""

    def init(self, seed: Any, x: Any) -> tuple[Tree, Tree, Tree]:
        """Return the initial params, statistics and extra."""

    def apply(self, state: State, x: Any, y: Any, *, train: bool) -> Pass:
        """Return one forward pass on the batch made from x and y."""


@dataclass(frozen=True, eq=False)
class Step:
    """The canonical step; ``bnverify.reference`` comments on each of its lines."""

    model: Model
    optimizer: Optimizer
    loss: Loss

    @explaining("init")
    def init(self, seed: Any, x: Any) -> State:
        """Return the initial state."""
        params, batch_stats, extra = self.model.init(seed, x)
        return State(params, batch_stats, self.optimizer(RATE).init(params), extra)

    @explaining("the training step")
    def step(self, state: State, x: Any, y: Any, lr: Any) -> tuple[State, StepInfo]:
        """Take one training step."""

        def loss_fn(params: Any) -> tuple[Any, Any]:
            done = self.model.apply(state._replace(params=params), x, y, train=True)
            return self.loss(done.outputs, done.targets), (done.batch_stats, done.extra)

        (loss, new), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
        tx = self.optimizer(lr)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        batch_stats, extra = new
        return State(params, batch_stats, opt_state, extra), StepInfo(loss, grads)

    @explaining("evaluation")
    def evaluate(self, state: State, x: Any, y: Any) -> Any:
        """Return the loss in eval mode, (1,)."""
        done = self.model.apply(state, x, y, train=False)
        return self.loss(done.outputs, done.targets).reshape(1)

    @explaining("evaluation")
    def after_eval(self, state: State, x: Any, y: Any) -> State:
        """Return the state after evaluation."""
        done = self.model.apply(state, x, y, train=False)
        return state._replace(batch_stats=done.batch_stats, extra=done.extra)

    def keeps_rate(self, sizes: tuple[int, int]) -> bool:
        """Return whether the optimizer state stores the learning rate, so that later ones are ignored."""
        shape: Any = jax.ShapeDtypeStruct
        seed, x = shape((), "int32"), shape(sizes, "float32")
        params = jax.eval_shape(self.init, seed, x).params
        flows = Flows(jax.make_jaxpr(lambda lr, p: self.optimizer(lr).init(p))(RATE, params))
        return bool(set(flows.outputs) & flows.reached(flows.inputs[:1]))


def subject(
    model: Model,
    *,
    name: str,
    optimizer: Optimizer,
    loss: Loss,
    batch: Batch,
    features: tuple[int, ...] | None,
    declared: Declarations,
) -> Subject:
    """Return the canonical training step of ``model``, completed by an analysis of its traces."""
    said = declared_by(declared)
    said = replace(said, penalty=False)  # the canonical step differentiates the reported loss
    step = Step(model, optimizer, loss)

    def probed(other: Optimizer) -> Subject:
        another = f"{name}, another optimizer"
        return subject(
            model,
            name=another,
            optimizer=other,
            loss=loss,
            batch=batch,
            features=features,
            declared=declared,
        )

    found = Subject(
        name=name,
        init=step.init,
        step=step.step,
        evaluate=step.evaluate,
        features=features,
        optimizer=optimizer,
        after_eval=step.after_eval,
        with_optimizer=probed,
        capabilities=CLAIMS - {"lr"} if step.keeps_rate(sizes_of(features)) else CLAIMS,
    )
    return completed(found, said, batch=batch)
