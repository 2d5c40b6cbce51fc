"""One function of seed, batch and learning rate as a Subject: what can be checked from outside."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bnverify.adapters.batches import rows
from bnverify.adapters.explain import explaining
from bnverify.adapters.linen import linen
from bnverify.adapters.watching import starts_like, watched
from bnverify.laws import LAWS
from bnverify.subject import State, StepInfo, Subject

Solution = Callable[..., Any]

AGREEMENT = ("solution_is_init_step_evaluate", "float_seeds_act_as_their_integer_part")
OUTSIDE = (
    "float_seeds_act_as_their_integer_part",
    "eval_loss_is_finite",
    "eval_loss_has_shape_one",
    "eval_repeats_to_the_bit",
    "row_order_changes_nothing",
    "same_input_repeats_to_the_bit",
    "step_leaves_its_inputs_alone",
)
SEEDS = (0.0, 1.0, 2.0)  # stand for all, where a function needs its seed as a Python number


def solution(
    function: Solution,
    *,
    batch: Callable[[Any, Any], tuple[Any, Any]] = rows,
    name: str | None = None,
    exempt: Mapping[str, str] | None = None,
) -> Subject:
    """Return a function that initialises, trains one step and evaluates as a Subject.

    It is run twice on a small batch. If it goes through a linen module that it initialises by
    ``module.init(jax.random.PRNGKey(int(seed)), x)``, it is held to the canonical step (plain SGD,
    mean squared error) around that very module: in every case its result must agree within
    rounding. If not, only what holds of any such function is asked: a finite number of shape
    (1,), the same for the same input and for another order of the rows.

    Args:
        function: ``(seed: float, x_batch (N, D), y_batch (N,), lr: float) -> (1,)``.
        batch: what it makes of x and y before its module sees them.
        name: how reports call it; None: the function's name.
        exempt: law name -> why it does not apply.

    Raises:
        SubjectError: the function raises what a common mistake raises.
    """
    label = str(name or getattr(function, "__name__", type(function).__name__))
    given = dict(exempt or {})
    with explaining(label):
        canonical = _canonical(function, batch)
    if canonical is not None:
        return replace(
            canonical,
            name=label,
            solution=function,
            exempt={**_all_but(AGREEMENT, "it only has to agree with the canonical step"), **given},
        )
    return Subject(
        name=label,
        init=_init,
        step=_step,
        evaluate=partial(_evaluate, function),
        exempt={**_all_but(OUTSIDE, "one function shows nothing but its result"), **given},
        solution=function,
        shows=frozenset(),
    )


def _canonical(function: Solution, batch: Callable[..., Any]) -> Subject | None:
    """Return the canonical step around the module that ``function`` goes through."""
    generator = np.random.default_rng(0)
    subject = None
    for seed in (0, 7):
        x = generator.standard_normal((4, 6)).astype(np.float32)
        y = generator.standard_normal(4).astype(np.float32)
        result, watch = watched(function, float(seed), x, y, 0.0)
        if not watch.modules:
            return None
        try:
            subject = subject or linen(watch.modules[-1], batch=batch)
            if not starts_like(subject, seed, x, y, result, watch):
                return None
        except (ValueError, TypeError):  # a module that the canonical step does not fit
            return None
    return subject


def _all_but(names: tuple[str, ...], reason: str) -> dict[str, str]:
    return {law: reason for law in LAWS if law not in names}


def _init(seed: Any, x: Any) -> State:
    return State((), (), (), {"seed": jnp.asarray(seed, jnp.int32), "lr": jnp.float32(0)})


def _step(state: State, x: Any, y: Any, lr: Any) -> tuple[State, StepInfo]:
    # The function itself steps: what it needs for that is remembered until it is evaluated.
    extra = {**state.extra, "lr": jnp.asarray(lr, jnp.float32)}
    return state._replace(extra=extra), StepInfo(None, None)


def _evaluate(function: Solution, state: State, x: Any, y: Any) -> Any:
    seed, lr = state.extra["seed"], state.extra["lr"]
    if not any(isinstance(value, jax.core.Tracer) for value in (seed, lr, x, y)):
        return jnp.asarray(function(float(seed), np.asarray(x), np.asarray(y), float(lr)))
    try:
        return function(seed, x, y, lr)
    except (jax.errors.ConcretizationTypeError, jax.errors.TracerIntegerConversionError):
        branches = [partial(function, fixed) for fixed in SEEDS]
        return jax.lax.switch(seed % len(SEEDS), branches, x, y, lr)
