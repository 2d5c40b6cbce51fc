"""The argument that selects train or eval mode, found by its name."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

TRAINING = ("train", "training", "is_training", "is_train", "train_mode")
INFERENCE = (
    "use_running_average",
    "use_running_avg",
    "deterministic",
    "eval_mode",
    "is_eval",
    "inference",
    "testing",
)

Mode: TypeAlias = Callable[[bool], Mapping[str, bool]]
"""Function from "train mode" (a bool) to the keyword arguments that select it."""


def named(names: tuple[str, ...]) -> Mode:
    """Return the mode that sets these arguments, inverted if they mean inference.

    Raises:
        ValueError: the meaning of a name is unknown.
    """
    for name in names:
        if name not in (*TRAINING, *INFERENCE):
            raise ValueError(
                f"train_argument is {name!r}, and it is unknown whether True means training; pass a "
                f"function, lambda train: {{{name!r}: train}} or its opposite"
            )
    return lambda train: {name: train if name in TRAINING else not train for name in names}


def call_mode(function: Callable[..., Any], given: str | Mode | None = None) -> Mode:
    """Return how to select train mode in a call of ``function``.

    Args:
        function: a module's ``__call__``.
        given: the argument's name, or a function from a bool to keyword arguments; None: all
            parameters with names in ``TRAINING`` and ``INFERENCE`` are set.

    Raises:
        ValueError: the meaning of the name ``given`` is unknown.
    """
    if callable(given):
        return given
    if given is not None:
        return named((given,))
    return named(known_names(inspect.signature(function).parameters))


def known_names(names: Any) -> tuple[str, ...]:
    """Return those of ``names`` that select train or eval mode."""
    return tuple(name for name in names if name in (*TRAINING, *INFERENCE))


def trains(values: Mapping[str, Any]) -> bool | None:
    """Return whether named values select train mode; None if they do not tell."""
    for name in known_names(values):
        if isinstance(values[name], bool):
            return values[name] if name in TRAINING else not values[name]
    return None
