"""How a leaf of the state moves since: as far as before, so many times as far, or not at all.

A step takes a leaf from s to o in the old environment and, from the same s, to n in the new one. Two
sentences explain most changes of a training step, and both are tested on every recorded value:

    n - s = r (o - s)                   each step moves it r times as far: another momentum, or rate
    n - k o = m (1 - k) s               the batch's part is k times what it was, with a momentum m;
                                        k = N / (N - 1): variance is divided by N - 1 where it was by N

A sentence is said where no value contradicts it: what is left over lies within the rounding noise
of both sides, everywhere. r and m are fitted by least squares, in units of that noise.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from bnverify.upgrade.values import Floats, rows

if TYPE_CHECKING:
    from bnverify.upgrade.recorded import Recorded

_DIGITS = 1e3
"""How many times the noise a term must be, in the root of its sum of squares, for its factor to be
known to three digits."""


def explanation(old: Recorded, new: Recorded, leaf: str) -> str:
    """Return in words how the leaf moves since; "" where neither sentence explains every value.

    Args:
        old: a recording.
        new: its replay.
        leaf: a leaf of the state that differs.
    """
    values = [_values(old, new, leaf, shape) for shape in range(len(new.manifest["shapes"]))]
    if not values or any(part.shape[1] == 0 for part in values):
        return ""
    before, then, now, noise = np.concatenate(values, axis=1)
    averaged = leaf.startswith("batch_stats/")
    factor = _factor(then - before, now - before, noise)
    if factor is not None:
        return _moves(factor, averaged)
    if not averaged:
        return ""
    sizes = [
        np.full(part.shape[1], float(n)) for part, (n, _) in zip(values, _sizes(new), strict=True)
    ]
    count = np.concatenate(sizes)
    if count.min() < 2:
        return ""
    for k, words in (
        (count / (count - 1), "N - 1 where it was by N"),
        ((count - 1) / count, "N where it was by N - 1"),
    ):
        # With no s to speak of, no m is asked for: then k alone must explain the values.
        momentum = _factor((1 - k) * before, now - k * then, (1 + k) * noise)
        if momentum is not None and 0 <= momentum <= 1:
            return f"in every case as if the variance were divided by {words}"
    return ""


def _sizes(new: Recorded) -> list[tuple[int, int]]:
    return [(n, d) for n, d in new.manifest["shapes"]]


def _values(old: Recorded, new: Recorded, leaf: str, shape: int) -> Floats:
    """Return (4, n): before, after in the old environment, in the new one, noise; where it is known."""
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
    """Return r where now = r then within the noise everywhere, and the values tell r; else None."""
    known, told = then / noise, now / noise
    weight = float(np.sum(known**2))
    if not np.isfinite(weight) or weight < _DIGITS**2:
        return None
    factor = float(np.sum(known * told)) / weight
    holds = bool((np.abs(told - factor * known) <= 1 + abs(factor)).all())
    return factor if holds else None


def _moves(factor: float, averaged: bool) -> str:
    if abs(factor) < 1 / _DIGITS:
        return "in every case it stays what it was before the step"
    if averaged:
        return f"in every case the batch weighs {factor:.4g} times what it did: another momentum"
    way = ", the other way" if factor < 0 else ""
    return f"in every case it moves {abs(factor):.4g} times as far as it did{way}"
