"""What the running statistics must be after a history of steps, found without knowing the model.

From zero statistics a step writes (1 - m) b, from huge ones S it writes m S + (1 - m) b. So m and
every b of a history are measured beside it, and after k steps the statistics must be

    m^k s_0 + sum over i of m^(k - i) (1 - m) b_i.

In float64, p_i = m p_(i-1) + (1 - m) b_i. Each step may err by 8 u (|m p_(i-1)| + |(1 - m) b_i|),
as in ``batch_stats_change_only_by_ema``, and hands m times its error on: e_i = m e_(i-1) + that.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from bnverify.lazy import jax, jnp
from bnverify.pytree import is_floating, path_name
from bnverify.reruns import huge, old_weight, with_statistics
from bnverify.subject import State

Step = Callable[[State], State]
Wide = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Leaf:
    """The history of one statistic.

    Attributes:
        path: where in ``batch_stats``.
        momentum: the measured weight of the old value, elementwise.
        expected: what the statistic must be.
        allowed: how far it may be from that.
        unit: the rounding unit of its dtype.
        before: what it had to be before the last step.
        own: what the last batch adds, (1 - m) b.
    """

    path: str
    momentum: Wide
    expected: Wide
    allowed: Wide
    unit: float
    before: Wide
    own: Wide

    def suspects(self) -> dict[str, Wide]:
        """Return mistake -> what this statistic would be now if the last step had made it."""
        m = self.momentum
        return {
            "ema_applied_twice": m * self.expected + self.own,
            "new_statistics_dropped": self.before,
            "statistics_reinitialised": self.own / (1 - m),
        }


@dataclass(frozen=True)
class Fold:
    """The history of all floating-point statistics since they were first seen.

    Attributes:
        leaves: one for each statistic; None until the first step, none after one that changed
            which statistics there are.
    """

    leaves: tuple[Leaf, ...] | None = None

    def after(self, state: State, step: Step) -> Fold:
        """Return the history after one more step.

        Args:
            state: the state before the step.
            step: the step on its batch, state -> state.
        """
        zeros = _statistics(step(with_statistics(state, np.zeros_like)))
        if self.leaves == () or _places(zeros) != _places(_statistics(state)):
            return replace(self, leaves=())
        leaves = self.leaves
        if leaves is None:
            high = step(with_statistics(state, lambda v: np.full(v.shape, huge(v.dtype))))
            leaves = _begin(state, zeros, _statistics(high))
        with np.errstate(all="ignore"):  # what overflows is not compared
            return replace(
                self,
                leaves=tuple(
                    _next(leaf, zero) for leaf, (_, zero) in zip(leaves, zeros, strict=True)
                ),
            )

    def worst(self, state: State) -> tuple[float, str]:
        """Return the worst error of ``state`` in units of the error allowed, and where it is.

        -1 where there is nothing to compare.
        """
        worst, where = -1.0, ""
        for leaf, (_, value) in zip(self.leaves or (), _statistics(state), strict=False):
            found = _residual(leaf, leaf.expected, value)
            if found > worst:
                worst, where = found, leaf.path
        return worst, where

    def suspect(self, state: State) -> str:
        """Return the mistake in the last step that explains the statistics of ``state``, or ""."""
        explained: dict[str, float] = {}
        for leaf, (_, value) in zip(self.leaves or (), _statistics(state), strict=False):
            actual = np.asarray(value, np.float64)
            with np.errstate(all="ignore"):
                off = np.max(np.abs(actual - leaf.expected))
                for name, suspected in leaf.suspects().items():
                    left = np.max(np.abs(actual - suspected))
                    explained[name] = max(explained.get(name, 0.0), float(left - off / 64))
        name = min(explained, key=lambda each: explained[each])
        return name if explained[name] <= 0 else ""


def _residual(leaf: Leaf, expected: Wide, value: Any) -> float:
    actual = np.asarray(value, np.float64)
    compared = np.isfinite(expected) & np.isfinite(leaf.allowed)
    if not compared.any() or actual.shape != expected.shape:
        return -1.0 if actual.shape == expected.shape else float("inf")
    with np.errstate(all="ignore"):
        error = np.abs(actual - expected)
        ratio = np.where(error == 0, 0.0, error / leaf.allowed)
    ratio = np.where(np.isfinite(actual), ratio, np.inf)
    return float(np.max(ratio[compared]))


def _statistics(state: State) -> list[tuple[str, Any]]:
    leaves = jax.tree_util.tree_flatten_with_path(state.batch_stats)[0]
    return [(path_name(path), leaf) for path, leaf in leaves if is_floating(leaf)]


def _places(statistics: list[tuple[str, Any]]) -> list[Any]:
    return [(path, np.shape(leaf)) for path, leaf in statistics]


def _begin(
    state: State, zeros: list[tuple[str, Any]], highs: list[tuple[str, Any]]
) -> tuple[Leaf, ...]:
    leaves = []
    now = _statistics(state)
    for (path, old), (_, zero), (_, high) in zip(now, zeros, highs, strict=True):
        start = np.asarray(old, np.float64)
        wide_zero, wide_high = np.asarray(zero, np.float64), np.asarray(high, np.float64)
        momentum = old_weight(wide_zero, wide_high, zero.dtype)
        unit = float(jnp.finfo(zero.dtype).eps) / 2
        leaves.append(Leaf(path, momentum, start, np.zeros_like(start), unit, start, start))
    return tuple(leaves)


def _next(leaf: Leaf, zero: Any) -> Leaf:
    own = np.asarray(zero, np.float64)
    kept = leaf.momentum * leaf.expected
    tiny = float(jnp.finfo(zero.dtype).tiny)
    step = 8 * leaf.unit * (np.abs(kept) + np.abs(own)) + tiny
    allowed = np.abs(leaf.momentum) * leaf.allowed + step
    return replace(leaf, expected=kept + own, allowed=allowed, before=leaf.expected, own=own)
