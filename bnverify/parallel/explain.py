"""From the difference between many devices and one to the mistake that makes it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from bnverify.lazy import jax
from bnverify.parallel.differences import disagreeing, worst
from bnverify.parallel.subject import DEVICES
from bnverify.pytree import path_name
from bnverify.transition import Transition


def explain(
    seen: Any, t: Transition, residuals: Mapping[str, float], *, unequal: bool
) -> tuple[str, str]:
    """Return the likeliest mistake and in what the outcome differs."""
    off = [name for name, value in residuals.items() if value > 1]
    reason = "; ".join(f"{name} off by {residuals[name]:.3g} times the rounding" for name in off)
    if unequal:
        return ("unequal_shards" if "batch_stats" in off else "mean_of_means"), reason
    apart = disagreeing(seen)
    if any(path.startswith("batch_stats") for path in apart):
        return "statistics_not_synchronised", reason
    if "batch_stats" in off:
        return _explain_statistics(seen, t), reason
    if any(path.startswith("params") for path in apart):
        return "gradients_not_synchronised", reason
    if off == ["loss"]:
        return "mean_of_means", reason
    return ("gradients_summed" if _summed(seen, t) else "wrong_gradient"), reason


def explain_apart(seen: Any) -> tuple[str, str]:
    """Return the likeliest mistake where devices differ, and in which leaves they do."""
    apart = disagreeing(seen)
    statistics = any(path.startswith("batch_stats") for path in apart)
    mistake = "statistics_not_synchronised" if statistics else "gradients_not_synchronised"
    return mistake, f"{', '.join(apart[:3])} differs between devices"


def _explain_statistics(seen: Any, t: Transition) -> str:
    """Tell averaged variances from statistics of one shard: there the means are right."""
    actual = jax.tree_util.tree_flatten_with_path(seen[0].batch_stats)[0]
    expected = jax.tree_util.tree_leaves(t.after.batch_stats)
    noise = jax.tree_util.tree_leaves(t.noise.state.batch_stats)
    off = {
        path_name(path).rpartition("/")[2]
        for (path, leaf), value, allowed in zip(actual, expected, noise, strict=True)
        if worst(leaf, value, allowed) > 1
    }
    return "variances_averaged" if off == {"var"} else "statistics_not_synchronised"


def _summed(seen: Any, t: Transition) -> bool:
    """Return whether params moved DEVICES times as far as they should have, within a tenth."""
    moved = _length(seen[0].params, t.before.params, 0)
    right = _length(
        jax.tree_util.tree_map(lambda leaf: leaf[None], t.after.params), t.before.params, 0
    )
    return bool(right > 0 and abs(moved / right - DEVICES) < 0.1 * DEVICES)


def _length(stacked: Any, before: Any, index: int) -> float:
    pairs = zip(jax.tree_util.tree_leaves(stacked), jax.tree_util.tree_leaves(before), strict=True)
    squares = (np.sum((leaf[index].astype(np.float64) - was) ** 2) for leaf, was in pairs)
    return float(np.sqrt(sum(squares)))
