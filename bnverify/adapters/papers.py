"""The optimizers of Optax's that a user makes, held to the formulas of their papers.

Which they are is not guessed from what they do: it is seen as they are made. While a user's function makes
an optimizer, Optax's functions note what they are called with. Each such call is made once more for two
params, a matrix and a vector, and its updates are compared with ``bnverify.optimizers``.
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
"""How many updates are compared: radam's variance is tractable from the sixth on."""

SHAPES = {"matrix": (3, 2), "vector": (3,)}
MASKS = frozenset({"mask", "weight_decay_mask"})
"""Parameters that say which params a decay reaches: of no account for the formula of one param."""


@dataclass(frozen=True)
class Made:
    """A call of a function of Optax's.

    Attributes:
        function: the function.
        name: its name.
        arguments: what it was called with, by name, defaults included.
    """

    function: Callable[..., Any]
    name: str
    arguments: Mapping[str, Any]


def paper_checks(optimizer: Callable[[Any], Any] | None) -> Iterator[PaperCheck]:
    """Yield how Optax's optimizers that a function makes compare with their papers' formulas.

    Args:
        optimizer: learning rate -> ``optax.GradientTransformation``; None: hidden.
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
    """Return the first update that is not the formula's; empty where all are."""
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
            got = f"update {at[0] + 1} of a {name} for gradients of {given} is"
            return f"{got} {updates[name][at]:.6g}, by the formula {exact[at]:.6g}"
    return ""


def _updates(tx: Any, params: Any, grads: Any) -> Any:
    """Return an optimizer's updates for stacked gradients, without rounding: a tree like ``grads``."""

    def run(params: Any, grads: Any) -> Any:
        def turn(carry: Any, gradient: Any) -> Any:
            params, state = carry
            update, state = tx.update(gradient, state, params)
            return (jax.tree_util.tree_map(jnp.add, params, update), state), update

        return jax.lax.scan(turn, (params, tx.init(params)), grads)[1]

    return evaluate(trace(run, params, grads), params, grads)


def _decades(rng: np.random.Generator, shape: tuple[int, ...]) -> Any:
    """Return gradients of very different sizes: an epsilon shows beside small ones alone."""
    signs = rng.choice([-1.0, 1.0], shape)
    sizes = 10.0 ** (rng.uniform(-8, 1, shape[1:]) + rng.uniform(-0.5, 0.5, shape))
    return np.asarray(signs * sizes, np.float32)


def _values(made: Made, paper: Paper) -> dict[str, Any] | None:
    """Return the hyperparameters of a formula; None where it does not cover a call."""
    values: dict[str, Any] = {}
    defaults = inspect.signature(made.function).parameters
    for name, value in made.arguments.items():
        if name in paper.flags or (value is None and name in paper.numbers):
            values[name] = value
        elif name in paper.numbers or name == "learning_rate":
            try:
                values[name] = float(value)
            except (TypeError, jax.errors.JAXTypeError):  # a schedule, or a number of a trace
                return None
        elif name not in MASKS and not _is_same(value, defaults[name].default):
            return None
    return values


def _is_same(value: Any, default: Any) -> bool:
    return value is default or (isinstance(value, int | float | str) and value == default)


def _made(optimizer: Callable[[Any], Any]) -> list[Made]:
    """Return the calls of Optax's functions by which an optimizer is made."""
    args: tuple[Any, ...] = (np.float32(RATE),)
    options: dict[str, Any] = {}
    function: Any = optimizer
    while _name(function) is None and isinstance(function, partial):
        args, options = (*function.args, *args), {**function.keywords, **options}
        function = function.func
    name = _name(function)
    with _noting() as seen:
        # One of Optax's own is called by its name, under which it notes the call.
        make = function if name is None else getattr(optax, name)
        try:
            make(*args, **options)
        except Exception:  # noqa: BLE001 - whatever a user's function raises
            return []
    return seen


def _name(function: Any) -> str | None:
    """Return under which name Optax has a function with a paper; None: it is none of these."""
    return next((name for name in PAPERS if getattr(optax, name, None) is function), None)


@contextmanager
def _noting() -> Iterator[list[Made]]:
    """Note the calls of Optax's functions while the context is open."""
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
