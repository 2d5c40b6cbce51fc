"""The moving average that a step keeps, measured from outside.

From statistics of 0 a step writes (1 - m) b, from a huge S it writes m S + (1 - m) b.
"""

from __future__ import annotations

from typing import Any

from bnverify.laws.residuals import floats, residual, smallest, unit, wide
from bnverify.lazy import jnp
from bnverify.pytree import is_floating
from bnverify.reruns import huge, old_weight
from bnverify.transition import Transition


def momenta(t: Transition) -> list[Any]:
    """Return the measured weight m of the old value, elementwise, a list over leaves."""
    zeros = floats(t.reruns["zero_statistics"].state.batch_stats)
    highs = floats(t.reruns["huge_statistics"].state.batch_stats)
    return [_momentum(zero, high) for zero, high in zip(zeros, highs, strict=True)]


def measurable(zero: Any) -> Any:
    """Return where (1 - m) b is so small beside S that m is read to the last place."""
    return jnp.abs(wide(zero)) <= unit(zero) * huge(zero.dtype)


def folded(old: Any, new: Any, zero: Any, high: Any) -> Any:
    """Return how far ``new`` is from m ``old`` + (1 - m) b, over the error allowed.

    ``batch_stats_change_only_by_ema`` derives the error: 8 u (|m old| + |(1 - m) b|).

    Args:
        old: what a step started from; a leaf of any dtype, of which only floating ones average.
        new: what it made of it.
        zero: what it makes of 0.
        high: what it makes of S.
    """
    if not is_floating(old):
        return residual(0.0, 0.0, 0.0)
    kept = _momentum(zero, high) * wide(old)
    scale = jnp.abs(kept) + jnp.abs(wide(zero))
    allowed = jnp.where(measurable(zero), 8 * unit(new) * scale + smallest(new), jnp.inf)
    return residual(new, kept + wide(zero), allowed)


def _momentum(zero: Any, high: Any) -> Any:
    return old_weight(wide(zero), wide(high), zero.dtype)
