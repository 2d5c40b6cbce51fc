"""What adapters are given, looked at before anything runs: later it fails inside a trace."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Collection
from typing import Any

from bnverify import flax_module, probe
from bnverify.unusable import Unusable

FUNCTIONS = {
    "optimizer": (
        1,
        "a function of the learning rate, like optax.sgd or lambda lr: optax.adam(lr)",
    ),
    "loss": (2, "a function (outputs, targets) -> scalar"),
    "batch": (2, "a function (x, y) -> the model's batch"),
    "create": (None, "a function that makes the train state"),
    "make": (None, "a function that makes the model and its optimizer"),
    "train_step": (None, "a function, the loop's own training step"),
    "eval_step": (None, "a function, the loop's own evaluation"),
}
"""Name of an argument -> how many arguments that function takes (None: told by their names), and what
it is."""


def functions(**given: Any) -> None:
    """Refuse arguments that are not the functions of ``FUNCTIONS``.

    Raises:
        Unusable: naming the argument and what it must be.
    """
    for name, function in given.items():
        count, meant = FUNCTIONS[name]
        if not callable(function):
            raise Unusable(f"{name} must be {meant}, got {_described(function)}")
        if count is not None and not _takes(function, count):
            called = getattr(function, "__name__", type(function).__name__)
            raise Unusable(f"{name} must be {meant}; {called} takes other arguments")


def sizes(features: int | Collection[int] | None) -> tuple[int, ...] | None:
    """Return the feature sizes that a user named, as a tuple; None: any.

    Raises:
        Unusable: they are no positive whole numbers.
    """
    if features is None:
        return None
    try:
        single = not isinstance(features, Collection)
        found = tuple(map(operator.index, [features] if single else features))  # type: ignore[arg-type]
    except TypeError:
        found = ()
    if not found or min(found) < 1:
        raise Unusable(f"features must be the D that the model takes, or several, got {features!r}")
    return found


def linen_module(module: Any) -> None:
    """Refuse what is no linen module.

    Raises:
        Unusable: saying what it is, and what to pass.
    """
    kind = flax_module.kind(module)
    if kind == "linen" and isinstance(module, type):
        raise Unusable(f"linen takes a module, not its class: {flax_module.wrapped(module)}")
    if kind == "nnx":
        raise Unusable(f"that is an nnx module: {flax_module.wrapped(module)}")
    if kind is None:
        raise Unusable(f"linen takes a flax.linen module, got {_described(module)}")


def nnx_maker(make_module: Any) -> None:
    """Refuse what makes no nnx module.

    Raises:
        Unusable: saying what it is, and what to pass.
    """
    kind = flax_module.kind(make_module)
    if kind == "linen":
        raise Unusable(f"that is a linen module: {flax_module.wrapped(make_module)}")
    if kind == "nnx" and not isinstance(make_module, type):
        raise Unusable(
            "nnx makes the module anew for every seed, so it takes the class, or a function of "
            f"rngs: {flax_module.wrapped(make_module)}"
        )
    if not callable(make_module):
        raise Unusable(f"nnx takes what makes an nnx module, got {_described(make_module)}")


def _takes(function: Any, count: int) -> bool:
    try:
        signature = inspect.signature(function)
    except ValueError:  # some builtins have none
        return True
    return probe.accepts(signature, *["any"] * count)


def _described(value: Any) -> str:
    simple = value is None or isinstance(value, str | int | float)
    return repr(value) if simple else f"a {type(value).__name__}"
