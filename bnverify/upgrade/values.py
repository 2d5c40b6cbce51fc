"""How far apart the values of two recordings are, in units of rounding noise. NumPy alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from collections.abc import Mapping

    from bnverify.upgrade.recorded import Recorded

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Place:
    """Where in a recording a value stands.

    Attributes:
        shape: index of the shape.
        step: index of the step.
        case: index of the case.
        leaf: the leaf's path.
        element: its index in the leaf.
        old: the value recorded.
        new: the value replayed.
        allowed: how far apart rounding may take them.
        size: how far apart they are in units of ``allowed``; infinite where one is not finite.
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
    """How far apart two recordings are in one leaf.

    Attributes:
        worst: the place where they are farthest apart; None where all values are equal.
        simplest: the place to show: in the smallest case that is beyond the noise; else None.
        compared: how many values have digits to compare on both sides, or are equal.
        total: how many values there are.
        unknown: how many differ where neither side knows its noise.
    """

    worst: Place | None
    simplest: Place | None
    compared: int
    total: int
    unknown: int


def allowed(
    old: Floats, new: Floats, old_noise: Floats | None, new_noise: Floats | None, tiny: float
) -> Floats:
    """Return how far apart rounding may take values: each side may err by its own noise.

    Where one side's noise is not known (NaN, or None for all), the other's stands for both. The
    smallest normal number is always allowed: below it releases flush to zero, or do not.
    """
    nowhere = np.full(np.shape(old), np.nan)
    left = nowhere if old_noise is None else old_noise.astype(np.float64)
    right = nowhere if new_noise is None else new_noise.astype(np.float64)
    left, right = np.where(np.isnan(left), right, left), np.where(np.isnan(right), left, right)
    together: Floats = left + right + tiny
    return together


def sizes(old: Floats, new: Floats, bound: Floats) -> Floats:
    """Return the distances in units of ``bound``: NaN where nothing can be compared, 0 if equal."""
    with np.errstate(all="ignore"):
        distance = np.abs(old - new)
        distance = np.where(np.isfinite(distance), distance, np.inf)
        ratio = np.where(bound > 0, distance / bound, np.inf)
        # Infinite noise: no digits to compare. NaN: not known.
        ratio = np.where(np.isinf(bound) | np.isnan(bound), np.nan, ratio)
    found: Floats = np.where((old == new) | (np.isnan(old) & np.isnan(new)), 0.0, ratio)
    return found


def distances(old: Recorded, new: Recorded) -> dict[str, Distance]:
    """Return leaf -> how far apart its values are, over all shapes, steps and cases.

    Leaves that are not on both sides, or of another shape there, are left out.
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
    """Return leaf -> (old values, new values, how far apart rounding may take them)."""
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
    if array.dtype.kind == "c":  # no step of ours has complex leaves; their size is compared
        array = np.abs(array)
    wide: Floats = array.astype(np.float64)
    return wide


def _tiny(dtype: Any) -> float:
    if dtype.kind not in "fV":
        return 0.0
    try:
        return float(np.finfo(dtype).tiny)
    except ValueError:  # bfloat16 and its kin: the exponents of float32, or fewer
        return float(np.finfo(np.float32).tiny)


def _distance(
    leaf: str, rows: list[tuple[int, int, Floats, Floats, Floats]], old: Recorded
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


def _complexity(old: Recorded, shape: int, case: int) -> tuple[float, ...]:
    """Return how hard a case is to read: its size, how many numbers it takes, how extreme."""
    x, y = (old.arrays[f"shape{shape}/case/{name}"][case] for name in ("x", "y"))
    numbers = np.concatenate([x.ravel(), y.ravel()])
    magnitude = float(np.max(np.abs(numbers), initial=0.0))
    extreme = abs(np.log10(magnitude)) if magnitude else 9.0
    return float(x.size), float(len(np.unique(numbers))), round(extreme, 3)
