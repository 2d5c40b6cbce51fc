"""Compare the Optax optimizers in a user's optimizer with the formulas of their papers.

While a user's function creates an optimizer, the calls of Optax's functions are recorded with their
arguments. Each such call is then repeated for two params, a matrix and a vector, and the updates are compared
with those of ``bnverify.optimizers``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bnverify.adapters.programs import RATE
from bnverify.jaxpr.rounding import evaluate
from bnverify.jaxpr.tracing import trace
from bnverify.model import PaperCheck
from bnverify.optimizers import PAPERS, Paper, expected

UPDATES = 8
"""The number of updates compared: with its defaults, radam's variance is tractable from the sixth on."""

SHAPES = {"matrix": (3, 2), "vector": (3,)}
MASKS = frozenset({"mask", "weight_decay_mask"})
"""Parameters that select the params to decay, which make no difference to the formula for one param."""


@dataclass(frozen=True)
class Made:
    """A call of an Optax function.

    Attributes:
        function: the function.
        name: its name.
        arguments: its arguments by name, including defaults.
    """

    function: Callable[..., Any]
    name: str
    arguments: Mapping[str, Any]


def paper_checks(optimizer: Callable[[Any], Any] | None) -> Iterator[PaperCheck]:
    """Yield how the Optax optimizers that a function creates compare with their papers' formulas.

    Args:
        optimizer: learning rate -> ``optax.GradientTransformation``; None if it is unknown.
    """
    told: set[PaperCheck] = set()
    for made in _made(optimizer) if optimizer is not None else []:
        paper = PAPERS[made.name]
        values = _values(made, paper)
        if values is not None:
            check = PaperCheck(f"optax.{made.name}", paper.source, _difference(made, paper, values))
            if check not in told:
                yield check
            told.add(check)


def _difference(made: Made, paper: Paper, values: Mapping[str, Any]) -> str:
    """Return the first update that differs from the formula, in words; "" if none does."""
    rng = np.random.default_rng(0)
    params = {n: np.asarray(rng.normal(size=s), np.float32) for n, s in SHAPES.items()}
    grads = {n: _decades(rng, (UPDATES, *s)) for n, s in SHAPES.items()}
    arguments = {n: None if n in MASKS else value for n, value in made.arguments.items()}
    updates = _updates(made.function(**arguments), params, grads)
    for name, param in params.items():
        wide = param.astype(np.float64), list(grads[name].astype(np.float64))
        exact, allowed = expected(paper, values, *wide)
        off = np.abs(updates[name] - exact) > allowed
        off |= ~np.isfinite(updates[name])
        off[: paper.first - 1] = False
        if off.any():
            at = tuple(int(i) for i in np.argwhere(off)[0])
            given = ", ".join(f"{g:.3g}" for g in grads[name][(slice(at[0] + 1), *at[1:])])
            got = f"update {at[0] + 1} of a {name} with gradients {given} is"
            return f"{got} {updates[name][at]:.6g}, but the formula gives {exact[at]:.6g}"
    return ""


def _updates(tx: Any, params: Any, grads: Any) -> Any:
    """Return an optimizer's updates for stacked gradients, in float64: a tree like ``grads``."""

    def run(params: Any, grads: Any) -> Any:
        def turn(carry: Any, gradient: Any) -> Any:
            params, state = carry
            update, state = tx.update(gradient, state, params)
            return (jax.tree_util.tree_map(jnp.add, params, update), state), update

        return jax.lax.scan(turn, (params, tx.init(params)), grads)[1]

    return evaluate(trace(run, params, grads), params, grads)


def _decades(rng: np.random.Generator, shape: tuple[int, ...]) -> Any:
    """Return gradients of very different sizes, because epsilon only matters for small ones."""
    signs = rng.choice([-1.0, 1.0], shape)
    sizes = 10.0 ** (rng.uniform(-8, 1, shape[1:]) + rng.uniform(-0.5, 0.5, shape))
    return np.asarray(signs * sizes, np.float32)


def _values(made: Made, paper: Paper) -> dict[str, Any] | None:
    """Return the hyperparameters of a formula; None if it does not cover the call."""
    values: dict[str, Any] = {}
    defaults = inspect.signature(made.function).parameters
    for name, value in made.arguments.items():
        if name in paper.flags or (value is None and name in paper.numbers):
            values[name] = value
        elif name in paper.numbers or name == "learning_rate":
            try:
                values[name] = float(value)
            except (TypeError, jax.errors.JAXTypeError):  # a schedule or a tracer
                return None
        elif name not in MASKS and not _is_same(value, defaults[name].default):
            return None
    return values


def _is_same(value: Any, default: Any) -> bool:
    return value is default or (isinstance(value, int | float | str) and value == default)


def _made(optimizer: Callable[[Any], Any]) -> list[Made]:
    """Return the calls of Optax's functions that create an optimizer."""
    args: tuple[Any, ...] = (np.float32(RATE),)
    options: dict[str, Any] = {}
    function: Any = optimizer
    while _name(function) is None and isinstance(function, partial):
        args, options = (*function.args, *args), {**function.keywords, **options}
        function = function.func
    name = _name(function)
    with _noting() as seen:
        # An Optax function is called by its name, since only the function of that name is recorded.
        make = function if name is None else getattr(optax, name)
        try:
            make(*args, **options)
        except Exception:  # noqa: BLE001 - whatever a user's function raises
            return []
    return seen


def _name(function: Any) -> str | None:
    """Return the name of an Optax function that has a paper; None for any other function."""
    return next((name for name in PAPERS if getattr(optax, name, None) is function), None)


@contextmanager
def _noting() -> Iterator[list[Made]]:
    """Record the calls of Optax's functions within this context."""
    seen: list[Made] = []

    def noting(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(function)

        def call(*args: Any, **options: Any) -> Any:
            bound = signature.bind(*args, **options)
            bound.apply_defaults()
            seen.append(Made(function, name, bound.arguments))
            return function(*args, **options)

        call.__signature__ = signature  # type: ignore[attr-defined]  # for inject_hyperparams
        return call

    with ExitStack() as stack:
        for name in filter(partial(hasattr, optax), PAPERS):
            stand_in = noting(name, getattr(optax, name))
            stack.enter_context(mock.patch.object(optax, name, stand_in))
        yield seen
