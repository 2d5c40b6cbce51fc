"""Initial states compared: the same numbers, other random bits, or another distribution."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from bnverify.upgrade import witness
from bnverify.upgrade.difference import Difference

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bnverify.upgrade.recorded import Recorded

SIGMAS = 6.0
"""How many standard errors apart two means over seeds are called different: by chance, 1 in 5e8."""

LAST_PLACES = 16
"""Units in the last place of the leaf's largest value within which an initial value is the same.

A random bit pattern becomes a number by a dozen elementary functions, each good to a place or two.
"""

_AVERAGES = ("mean", "mean square", "mean fourth power")
_SEEDS = 512  # those of `draws`, which this module must not import: it imports jax


def differences(old: Recorded, new: Recorded) -> Iterator[Difference]:
    """Yield what changed in the states that ``init`` makes from the same seeds."""
    subject = new.manifest["subject"]
    for leaf in _leaves(old, new):
        apart, units = _apart(old, new, leaf, "init")
        if not apart:
            continue
        name = f"init/{leaf}"
        if units <= LAST_PLACES:
            text = f"initial values agree to {units:.0f} units in the last place"
            yield Difference(kind="rounding", subject=subject, leaf=name, text=text)
            continue
        changed = _distribution(old, new, leaf)
        if changed is not None:
            size, moment, text = changed
            yield Difference(
                kind="meaning",
                subject=subject,
                leaf=name,
                size=size,
                text=f"initial values are drawn from another distribution: {text}",
                witness=witness.of_draws(old, new, leaf, moment, _SEEDS, SIGMAS),
            )
            continue
        yield Difference(
            kind="initialisation", subject=subject, leaf=name, text=_why(old, new, leaf)
        )


def _leaves(old: Recorded, new: Recorded) -> list[str]:
    if not new.manifest["shapes"]:
        return []
    before, after = old.under("shape0/init"), new.under("shape0/init")
    return [leaf for leaf in before if leaf in after]


def _apart(old: Recorded, new: Recorded, leaf: str, which: str) -> tuple[bool, float]:
    """Return whether any initial value differs, and by how many units of the leaf's last place."""
    units, apart = 0.0, False
    for shape in range(len(new.manifest["shapes"])):
        before = old.arrays[f"shape{shape}/init/{leaf}"]
        after = new.arrays.get(f"shape{shape}/{which}/{leaf}")
        if after is None or before.shape != after.shape:
            continue
        left, right = before.astype(np.float64), after.astype(np.float64)
        same = (left == right) | (np.isnan(left) & np.isnan(right))
        if same.all():
            continue
        apart = True
        if before.dtype.kind != "f" or not np.isfinite(left - right).all():
            return True, np.inf
        last = np.finfo(before.dtype).eps * max(np.abs(left).max(), np.finfo(before.dtype).tiny)
        units = max(units, float(np.abs(left - right).max() / last))
    return apart, units


def _distribution(old: Recorded, new: Recorded, leaf: str) -> tuple[float, int, str] | None:
    """Return how many standard errors apart the draws are, in which average, and how in words."""
    before, after = old.arrays.get(f"draws/{leaf}"), new.arrays.get(f"draws/{leaf}")
    if before is None or after is None or before.shape != (2, 3) or after.shape != (2, 3):
        return None
    means, spread = (before[0], after[0]), before[1] + after[1]
    with np.errstate(all="ignore"):
        error = np.sqrt(spread / _SEEDS)
        # Constants (zeros, ones) have no spread: there any change beyond rounding is one.
        floor = 2.0**-20 * np.maximum(np.abs(before[0]), np.abs(after[0]))
        apart = np.abs(means[0] - means[1]) / np.maximum(np.maximum(error, floor), 1e-300)
    worst = int(np.nanargmax(apart))
    if not apart[worst] > SIGMAS:
        return None
    words = f"{_AVERAGES[worst]} {means[0][worst]:.4g} became {means[1][worst]:.4g}"
    return None if not np.isfinite(apart[worst]) else (float(apart[worst]), worst, words)


def _why(old: Recorded, new: Recorded, leaf: str) -> str:
    flag = "jax_threefry_partitionable"
    then, now = old.manifest["flags"].get(flag), new.manifest["flags"].get(flag)
    text = "other random numbers from the same seed, of the same distribution"
    recorded = any(
        f"shape{s}/same_stream/{leaf}" in new.arrays for s in range(len(new.manifest["shapes"]))
    )
    if then != now and recorded:
        apart, units = _apart(old, new, leaf, "same_stream")
        if not apart or units <= LAST_PLACES:
            return f"{text}: {flag} was {then}, is {now}, and is all that changed"
    return text
