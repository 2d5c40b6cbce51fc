"""How a model is told whether it trains: the argument, found by its name."""

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
"""Whether it trains -> the arguments that say so."""


def named(names: tuple[str, ...]) -> Mode:
    """Return the mode that sets arguments of these names, inverted where they mean inference.

    Raises:
        ValueError: a name says neither training nor inference.
    """
    for name in names:
        if name not in (*TRAINING, *INFERENCE):
            raise ValueError(
                f"train_argument is {name!r}, which does not say whether True means training; "
                f"pass a function, lambda train: {{{name!r}: train}} or its opposite"
            )
    return lambda train: {name: train if name in TRAINING else not train for name in names}


def call_mode(function: Callable[..., Any], given: str | Mode | None = None) -> Mode:
    """Return how ``function`` is told that it trains.

    Args:
        function: what is called: a module's ``__call__``.
        given: the argument's name, or a function from "it trains" to keyword arguments; None
            looks for the names in ``TRAINING`` and ``INFERENCE``. All that are found are set.

    Raises:
        ValueError: ``given`` is a name that says neither training nor inference.
    """
    if callable(given):
        return given
    if given is not None:
        return named((given,))
    return named(known_names(inspect.signature(function).parameters))


def known_names(names: Any) -> tuple[str, ...]:
    """Return those of ``names`` that say whether a model trains."""
    return tuple(name for name in names if name in (*TRAINING, *INFERENCE))


def trains(values: Mapping[str, Any]) -> bool | None:
    """Return what named values say about training; None where they say nothing."""
    for name in known_names(values):
        if isinstance(values[name], bool):
            return values[name] if name in TRAINING else not values[name]
    return None
