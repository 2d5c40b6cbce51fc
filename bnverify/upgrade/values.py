"""The distance between two recordings in units of rounding noise, and what explains it.

Imports no jax: comparing needs neither of the two environments.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from collections.abc import Mapping

    from bnverify.upgrade.recording import Recording

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Place:
    """One value in two recordings.

    Attributes:
        shape: the index of the shape.
        step: the index of the step.
        case: the index of the case.
        leaf: the leaf's path.
        element: the index in the leaf.
        old: the recorded value.
        new: the replayed value.
        allowed: how much they may differ because of rounding.
        size: their distance in units of `allowed`; infinite if one is not finite.
    """

    shape: int
    step: int
    case: int
    leaf: str
    element: tuple[int, ...]
    old: float
    new: float
    allowed: float
    size: float


@dataclass(frozen=True)
class Distance:
    """The distance between two recordings in one leaf.

    Attributes:
        worst: the place with the largest distance; None if all values are equal.
        simplest: the simplest case that exceeds the noise, to report; None if there is none.
        compared: how many values can be compared or are equal.
        total: how many values there are.
        unknown: how many values differ whose noise is unknown on both sides.
    """

    worst: Place | None
    simplest: Place | None
    compared: int
    total: int
    unknown: int


def allowed(
    old: Floats, new: Floats, old_noise: Floats | None, new_noise: Floats | None, tiny: float
) -> Floats:
    """Return how much values may differ because of rounding: the sum of both sides' noise.

    If one side's noise is unknown (NaN, or None for all), the other's is used for both. The
    smallest normal number is always allowed, because releases differ in whether they flush
    subnormal numbers.
    """
    nowhere = np.full(np.shape(old), np.nan)
    left = nowhere if old_noise is None else old_noise.astype(np.float64)
    right = nowhere if new_noise is None else new_noise.astype(np.float64)
    left, right = np.where(np.isnan(left), right, left), np.where(np.isnan(right), left, right)
    together: Floats = left + right + tiny
    return together


def sizes(old: Floats, new: Floats, bound: Floats) -> Floats:
    """Return distances in units of `bound`: 0 where equal, NaN where they cannot be compared."""
    with np.errstate(all="ignore"):
        distance = np.abs(old - new)
        distance = np.where(np.isfinite(distance), distance, np.inf)
        ratio = np.where(bound > 0, distance / bound, np.inf)
        # An infinite bound leaves no digits to compare; NaN is unknown.
        ratio = np.where(np.isinf(bound) | np.isnan(bound), np.nan, ratio)
    found: Floats = np.where((old == new) | (np.isnan(old) & np.isnan(new)), 0.0, ratio)
    return found


def distances(old: Recording, new: Recording) -> dict[str, Distance]:
    """Return leaf -> distance of its values, over all shapes, steps and cases.

    Leaves that are missing on one side, or have another shape there, are left out.
    """
    leaves: dict[str, list[tuple[int, int, Floats, Floats, Floats]]] = {}
    for shape in range(len(new.manifest["shapes"])):
        for step in range(min(old.manifest["steps"], new.manifest["steps"])):
            home = f"shape{shape}/step{step}"
            sides = [(r.under(f"{home}/value"), r.under(f"{home}/noise")) for r in (old, new)]
            for leaf, row in rows(*sides).items():
                leaves.setdefault(leaf, []).append((shape, step, *row))
    return {leaf: _distance(leaf, rows, old) for leaf, rows in leaves.items()}


Side = tuple["Mapping[str, Any]", "Mapping[str, Any]"]


def rows(old: Side, new: Side) -> dict[str, tuple[Floats, Floats, Floats]]:
    """Return leaf -> (old values, new values, how much they may differ because of rounding)."""
    rows = {}
    for leaf, before in old[0].items():
        after = new[0].get(leaf)
        if after is None or after.shape != before.shape:
            continue
        noises = (old[1].get(leaf), new[1].get(leaf))
        tiny = max(_tiny(before.dtype), _tiny(after.dtype))
        left, right = _wide(before), _wide(after)
        rows[leaf] = left, right, allowed(left, right, *noises, tiny)
    return rows


def _wide(array: Any) -> Floats:
    if array.dtype.kind == "c":  # complex leaves are compared by absolute value
        array = np.abs(array)
    wide: Floats = array.astype(np.float64)
    return wide


def _tiny(dtype: Any) -> float:
    if dtype.kind not in "fV":
        return 0.0
    try:
        return float(np.finfo(dtype).tiny)
    except ValueError:  # an ml_dtypes dtype; its exponent has at most float32's range
        return float(np.finfo(np.float32).tiny)


def _distance(
    leaf: str, rows: list[tuple[int, int, Floats, Floats, Floats]], old: Recording
) -> Distance:
    worst: Place | None = None
    simplest: tuple[tuple[float, ...], Place] | None = None
    compared = total = unknown = 0
    for shape, step, before, after, bound in rows:
        size = sizes(before, after, bound)
        total += size.size
        compared += int(np.count_nonzero(~np.isnan(size)))
        unknown += int(np.count_nonzero(np.isnan(bound) & np.isnan(size)))
        for case in range(len(size)):
            here = np.nan_to_num(size[case], nan=-1.0, posinf=np.inf)
            if not here.size or here.max() <= 0:
                continue
            index = tuple(int(i) for i in np.unravel_index(int(np.argmax(here)), here.shape))
            values = (float(a[case][index]) for a in (before, after, bound, size))
            place = Place(shape, step, case, leaf, index, *values)
            if worst is None or place.size > worst.size:
                worst = place
            if place.size > 1:
                rank = (step, *_complexity(old, shape, case), -place.size)
                if simplest is None or rank < simplest[0]:
                    simplest = rank, place
    return Distance(worst, simplest[1] if simplest else None, compared, total, unknown)


def _complexity(old: Recording, shape: int, case: int) -> tuple[float, ...]:
    """Return sort keys for how hard a case is to read: size, distinct numbers, magnitude."""
    x, y = (old.arrays[f"shape{shape}/case/{name}"][case] for name in ("x", "y"))
    numbers = np.concatenate([x.ravel(), y.ravel()])
    magnitude = float(np.max(np.abs(numbers), initial=0.0))
    extreme = abs(np.log10(magnitude)) if magnitude else 9.0
    return float(x.size), float(len(np.unique(numbers))), round(extreme, 3)


# What explains a change: each step moves the leaf r times as far, or not at all, or the variance is
# divided by N - 1 instead of N.
#
# A step takes a leaf from s to o in the old environment and, from the same s, to n in the new one.
# Two hypotheses explain most changes of a training step, and both are tested on every value:
#
#     n - s = r (o - s)         each step moves it r times as far: another momentum or learning rate
#     n - k o = m (1 - k) s     the batch's contribution is k times as large, with momentum m;
#                               k = N / (N - 1): the variance is divided by N - 1 instead of N
#
# A hypothesis is reported only if no value contradicts it: the residual is within the rounding
# noise of both sides everywhere. r and m are fitted by least squares, weighted by that noise.

_DIGITS = 1e3
"""A factor is known to three digits if its term is this many times the noise (Euclidean norms)."""


def explanation(old: Recording, new: Recording, leaf: str) -> str:
    """Return what explains the change of a leaf, or "" if neither hypothesis fits every value.

    Args:
        old: a recording.
        new: its replay.
        leaf: a leaf of the state that differs.
    """
    values = [_four(old, new, leaf, shape) for shape in range(len(new.manifest["shapes"]))]
    if not values or any(part.shape[1] == 0 for part in values):
        return ""
    before, then, now, noise = np.concatenate(values, axis=1)
    averaged = leaf.startswith("batch_stats/")
    factor = _factor(then - before, now - before, noise)
    if factor is not None:
        return _moves(factor, averaged)
    if not averaged:
        return ""
    shapes = new.manifest["shapes"]
    batch = [np.full(part.shape[1], float(n)) for part, (n, _) in zip(values, shapes, strict=True)]
    count = np.concatenate(batch)
    if count.min() < 2:
        return ""
    for k, words in (
        (count / (count - 1), "N - 1 instead of N"),
        ((count - 1) / count, "N instead of N - 1"),
    ):
        # If s is too small to fit m, this is None, and k alone does not explain the values.
        momentum = _factor((1 - k) * before, now - k * then, (1 + k) * noise)
        if momentum is not None and 0 <= momentum <= 1:
            return f"in every case as if the variance were divided by {words}"
    return ""


def _four(old: Recording, new: Recording, leaf: str, shape: int) -> Floats:
    """Return (4, n): s, o, n and noise of all values whose noise is known."""
    found = [np.empty((4, 0))]
    for step in range(min(old.manifest["steps"], new.manifest["steps"])):
        home = f"shape{shape}/step{step}"
        sides = [(r.under(f"{home}/value"), r.under(f"{home}/noise")) for r in (old, new)]
        start = old.before(shape, step).get(leaf)
        if leaf not in (both := rows(*sides)) or start is None:
            return np.empty((4, 0))
        four = np.stack([start.astype(np.float64), *both[leaf]]).reshape(4, -1)
        found.append(four[:, np.isfinite(four).all(axis=0) & (four[3] > 0)])
    return np.concatenate(found, axis=1)


def _factor(then: Floats, now: Floats, noise: Floats) -> float | None:
    """Return r if now = r * then within the noise everywhere and r is well known, else None."""
    known, changed = then / noise, now / noise
    weight = float(np.sum(known**2))
    if not np.isfinite(weight) or weight < _DIGITS**2:
        return None
    factor = float(np.sum(known * changed)) / weight
    holds = bool((np.abs(changed - factor * known) <= 1 + abs(factor)).all())
    return factor if holds else None


def _moves(factor: float, averaged: bool) -> str:
    if abs(factor) < 1 / _DIGITS:
        return "in every case the step leaves it unchanged"
    if averaged:
        return f"in every case the batch has {factor:.4g} times the weight it had: another momentum"
    direction = ", in the opposite direction" if factor < 0 else ""
    return f"in every case it moves {abs(factor):.4g} times as far as before{direction}"
