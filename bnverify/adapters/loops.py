"""A user's own training loop as a Subject: what TrainState and nnx loops have in common."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from bnverify.adapters import reasons
from bnverify.adapters.canonical import INITIAL_RATE, Optimizer
from bnverify.adapters.explain import explaining
from bnverify.adapters.flows import reached
from bnverify.adapters.layers import Recording, layer_inputs, survey
from bnverify.adapters.objective import has_penalty
from bnverify.subject import State, StepInfo, Subject

Example = tuple[State, Any, Any]
"""A state and a batch, x and y, of shapes without values."""


class Loop(Protocol):
    """The functions of a Subject made of a user's, and what they can show."""

    @property
    def takes_rate(self) -> bool:
        """Whether the learning rate can be set from outside."""

    @property
    def optimizer_of(self) -> Optimizer | None:
        """Learning rate -> the user's optimizer; None where it is not shown."""

    def init(self, seed: Any, x: Any) -> State:
        """Return the state before the first step."""

    def step(self, state: State, x: Any, y: Any, lr: Any) -> tuple[State, StepInfo]:
        """Take one training step."""

    def evaluate(self, state: State, x: Any, y: Any) -> Any:
        """Return the loss in eval mode, (1,)."""

    def after_eval(self, state: State, x: Any, y: Any) -> State | None:
        """Return the state that evaluation leaves; None: it returns none."""

    def noted(self, recording: Recording, state: State, x: Any, y: Any) -> Any:
        """Take a step and note its layers."""

    def initial_opt_state(self, lr: Any, sizes: tuple[int, int]) -> Any:
        """Return the first optimizer state, made for a learning rate."""


def example(loop: Loop, sizes: tuple[int, int]) -> Example:
    """Return a state of ``loop`` and a batch of shapes without values."""
    shape: Any = jax.ShapeDtypeStruct
    x, y = shape(sizes, "float32"), shape(sizes[:1], "float32")
    return jax.eval_shape(loop.init, shape((), "int32"), x), x, y


def loop_subject(
    loop: Loop,
    sizes: tuple[int, int],
    *,
    name: str,
    features: tuple[int, ...] | None,
    penalty: bool | None,
    same_loss: bool,
    exempt: Mapping[str, str],
    with_optimizer: Callable[[Optimizer], Subject] | None = None,
) -> Subject:
    """Return a user's loop as a Subject, with all that its traces show.

    Args:
        loop: the loop.
        sizes: (N, D) of the traces.
        name: how reports call it.
        features: the D that it accepts; None: any.
        penalty: whether the loss that is differentiated has a term of params alone that the
            reported one lacks; None: found by running two batches.
        same_loss: whether both steps report one formula.
        exempt: law name -> why it does not apply.
        with_optimizer: see ``Subject``.
    """
    given = example(loop, sizes)
    recording = Recording()
    with explaining("the training step"):
        jaxpr = jax.make_jaxpr(partial(loop.noted, recording))(*given)
    seen = survey(jaxpr, recording, given[0])
    info = jax.eval_shape(partial(_step, loop), *given)[1]
    found = _exempt(loop, given) | reasons.of_survey(seen)
    if info.grads is not None and info.loss is not None:
        if penalty is None:
            penalty = has_penalty(loop.init, loop.step, sizes)
        if penalty:
            found |= reasons.penalty()
    claims = {
        "lr": loop.takes_rate and not _keeps_rate(loop, sizes),
        "row_losses": True,
        "eval_is_training_loss": same_loss,
    }
    inputs = partial(_layer_inputs, loop)
    after_eval: Any = loop.after_eval if _returns_state(loop, given) else None
    return Subject(
        name=name,
        init=loop.init,
        step=loop.step,
        evaluate=loop.evaluate,
        features=features,
        optimizer=loop.optimizer_of,
        exempt={**found, **exempt},
        momentum=seen.momentum,
        layer_inputs=inputs if jax.eval_shape(inputs, *given) else None,
        after_eval=after_eval,
        with_optimizer=with_optimizer,
        shows=frozenset(claim for claim, holds in claims.items() if holds),
    )


def _step(loop: Loop, state: State, x: Any, y: Any) -> tuple[State, StepInfo]:
    return loop.step(state, x, y, INITIAL_RATE)


def _layer_inputs(loop: Loop, state: State, x: Any, y: Any) -> Any:
    recording = Recording()
    return layer_inputs(partial(loop.noted, recording), recording, (state, x, y))


def _returns_state(loop: Loop, given: Example) -> bool:
    found: list[bool] = []

    def evaluate(state: State, x: Any, y: Any) -> None:
        found.append(loop.after_eval(state, x, y) is not None)

    jax.eval_shape(evaluate, *given)
    return found[0]


def _keeps_rate(loop: Loop, sizes: tuple[int, int]) -> bool:
    """Return whether the optimizer's state holds the rate, so that later ones do not count."""
    jaxpr = jax.make_jaxpr(lambda lr: loop.initial_opt_state(lr, sizes))(INITIAL_RATE)
    return any(reached(jaxpr, {0}))


def _exempt(loop: Loop, given: Example) -> dict[str, str]:
    """Return the laws that other variables and random numbers break."""

    def trained(state: State, x: Any, y: Any) -> Any:
        after, info = _step(loop, state, x, y)
        loss = jnp.zeros(()) if info.loss is None else info.loss
        return loss, after.batch_stats, after.extra

    def evaluated(state: State, x: Any, y: Any) -> Any:
        return loop.evaluate(state, x, y), state.batch_stats, state.extra

    found = reasons.of_pass(jax.make_jaxpr(evaluated)(*given), given[0], train=False)
    return found | reasons.of_pass(jax.make_jaxpr(trained)(*given), given[0], train=True)
