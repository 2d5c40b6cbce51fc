"""The names by which a running mean and a running variance are recognised.

Flax calls them ``mean`` and ``var``; other layers ``running_mean``, ``moving_variance`` or ``ra_var``. A
statistic with any other name is still checked as a moving average, but not compared with a moment.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypeVar

Moment = Literal["mean", "var"]
T = TypeVar("T")

_MOMENTS: dict[str, Moment] = {"mean": "mean", "var": "var", "variance": "var"}
_BESIDE = frozenset({"running", "moving", "ra", "ema", "avg", "average", "pop", "population"})
"""Words that may stand before or after the name of a moment: all of them mean "running"."""


def moment_of(path: str) -> Moment | None:
    """Return which moment a statistic is, by its name; None if its name does not tell.

    Args:
        path: its path or the last part of it: "running_mean". ``mean_sq`` and ``log_var`` are neither.
    """
    name = path.rpartition("/")[2]
    words = [word for word in name.lower().split("_") if word not in _BESIDE]
    return _MOMENTS.get(words[0]) if len(words) == 1 else None


def moments_among(leaves: Mapping[str, T]) -> dict[str, T]:
    """Return the mean and the variance among a layer's statistics, as {"mean": leaf, "var": leaf}.

    A moment that no name or several names stand for is left out.

    Args:
        leaves: name or path -> leaf.
    """
    found: dict[str, list[T]] = {}
    for path, leaf in leaves.items():
        if moment := moment_of(path):
            found.setdefault(moment, []).append(leaf)
    return {moment: each[0] for moment, each in found.items() if len(each) == 1}


def has_both(names: Iterable[Any]) -> bool:
    """Return whether a layer with statistics of these names has one mean and one variance."""
    return len(moments_among({str(name): None for name in names})) == 2
