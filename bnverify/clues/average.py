"""Recognise what a running average does wrong, and what is averaged."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from bnverify.clues.observed import (
    LOOSE,
    Clues,
    Leaves,
    ObservedCase,
    U,
    equal,
    floats,
    largest,
    narrow_type,
    raw,
)
from bnverify.laws.arithmetic import folded, moments
from bnverify.lazy import jnp
from bnverify.pytree import form
from bnverify.reruns import huge, old_weight, other_statistic, own_weight, with_statistics
from bnverify.statistic_names import moments_among

ROUNDED_SUM = 4e-6
"""The tolerance of a moment over many rows, relative to the largest mean square."""


def average(observed: ObservedCase) -> Clues:
    """Return how the average of the statistics differs from an exponential moving average."""
    t = observed.t
    if form(t.after.batch_stats) != form(t.before.batch_stats):
        return {}
    old, new = floats(t.before.batch_stats), floats(t.after.batch_stats)
    zero = floats(t.reruns["zero_statistics"].state.batch_stats)
    high = floats(t.reruns["huge_statistics"].state.batch_stats)
    written = {name: np.concatenate([np.ravel(new[name]), np.ravel(zero[name])]) for name in new}
    kinds = {name: narrow_type(values, largest(written)) for name, values in written.items()}
    if any(kinds.values()):
        rounded = [name for name, kind in kinds.items() if kind]
        return {"average": "rounded", "rounded": rounded, "average_type": kinds[rounded[0]]}
    types = {n: leaf.dtype for n, leaf in raw(t.before.batch_stats).items()}
    weight = {n: old_weight(zero[n], high[n], types[n]) for n in old}
    idle = {n: (new[n] == old[n]) & (zero[n] == 0) & (weight[n] == 1) for n in old}
    still = [name for name, rests in idle.items() if np.all(rests)]
    if still:
        everything = len(still) == len(idle)
        return {"average": "unchanged" if everything else "partly unchanged", "idle": still}
    entries = [f"{n}{np.argwhere(rests)[0].tolist()}" for n, rests in idle.items() if rests.any()]
    if entries:
        return {"average": "partly unchanged", "idle": entries}
    return _weights(observed, old, new, zero, high, weight)


def _weights(
    observed: ObservedCase, old: Leaves, new: Leaves, zero: Leaves, high: Leaves, weight: Leaves
) -> Clues:
    """Recognise an average by the weight of the old value in each leaf."""
    if all(equal(m, 0.0, 1.0) for m in weight.values()):
        return {"average": "forgets"}
    raws = [
        raw(tree)
        for tree in (
            observed.t.before.batch_stats,
            observed.t.after.batch_stats,
            observed.t.reruns["zero_statistics"].state.batch_stats,
            observed.t.reruns["huge_statistics"].state.batch_stats,
        )
    ]
    others = raw(with_statistics(observed.t.before, other_statistic).batch_stats)
    rerun = raw(observed.t.reruns["other_statistics"].state.batch_stats)
    nonlinear = []
    for name in old:
        was, became, low, top = (tree[name] for tree in raws)
        again = folded(others[name], rerun[name], low, top)
        if max(float(folded(was, became, low, top)[0]), float(again[0])) > 1:
            nonlinear.append(name)
    if nonlinear:
        # An average of standard deviations is linear in the square roots.
        for name in nonlinear:
            root = (np.sqrt(high[name]) - np.sqrt(zero[name])) / np.sqrt(huge(raws[0][name].dtype))
            straight = root * np.sqrt(old[name]) + np.sqrt(zero[name])
            if equal(np.sqrt(new[name]), straight, straight, 1e-4) and "mean" not in name:
                return {"average": "of roots", "bent": nonlinear}
        return {"average": "bent", "bent": nonlinear, "momentum": _median(weight[nonlinear[0]])}
    declared = observed.calls.subject.momentum
    common = _median(np.concatenate([np.ravel(m) for m in weight.values()]))
    expected = common if declared is None else declared
    wrong = {n: _median(m) for n, m in weight.items() if not equal(m, expected, 1.0, 8 * U)}
    if not wrong:
        return {}
    found = {"momentum": next(iter(wrong.values())), "declared": expected, "leaves": list(wrong)}
    kinds: dict[str, Callable[[float], bool]] = {
        "reversed": lambda m: abs(m - (1 - expected)) < LOOSE,
        "squared": lambda m: abs(m - expected**2) < LOOSE,
        "rounded momentum": lambda m: m == float(np.float32(expected).astype(jnp.bfloat16)),
    }
    for kind, fits in kinds.items():
        if all(map(fits, wrong.values())):
            return {"average": kind, **found}
    return {"average": "another momentum", **found}


def _median(values: Any) -> float:
    return float(np.median(values))


def recorded_moments(observed: ObservedCase) -> Clues:
    """Return what is recorded instead of the mean and variance of a layer's input."""
    if observed.calls.subject.layer_inputs is None:
        return {}
    known = observed.bounds(observed.t.before, observed.case, {"layer_inputs"})
    zero = raw(observed.t.reruns["zero_statistics"].state.batch_stats)
    high = raw(observed.t.reruns["huge_statistics"].state.batch_stats)
    layers = {}
    for path, given in known.layer_inputs.items():
        head = f"{path}/" if path else ""
        own = [n for n in zero if n.startswith(head) and "/" not in n.removeprefix(head)]
        names = moments_among({name.removeprefix(head): name for name in own})
        if given.weights is None and len(names) == 2:
            pairs = ((zero[names[m]][0], high[names[m]][0]) for m in ("mean", "var"))
            layers[path] = _Layer.of(given, *pairs)
    for path, layer in layers.items():
        others = {name: other for name, other in layers.items() if name != path}
        if found := layer.recognised(others, observed.rows):
            return {"moments_of": path, **found}
    return {}


def _noise(kept: Any, own: Any, size: Any) -> Any:
    """Return how far a moment may be from the layer's own: 1 - m is as uncertain as m, which errs by 4 u."""
    share = np.maximum(np.abs(1 - kept), 4 * U)
    return ROUNDED_SUM * size + 4 * U / share * np.abs(own)


def _off(entered: Any, kept: Any, own: Any, size: Any) -> Any:
    """Return where what entered an average is not its layer's own moment, weighted by 1 - m."""
    share = 1 - kept
    return np.abs(entered - share * own) > np.abs(share) * _noise(kept, own, size)


@dataclass
class _Layer:
    """One normalisation layer: its input and what it recorded, in float64.

    Attributes:
        given: the input, (R, *features).
        mean: its mean, (*features).
        var: its biased variance, (*features).
        recorded: the recorded mean and variance: what was added to the average, over its weight.
        entered: the new statistics from old statistics of 0: weight times moment.
        kept: the measured weights of the old mean and variance.
    """

    given: Any
    mean: Any
    var: Any
    recorded: tuple[Any, Any]
    entered: tuple[Any, Any]
    kept: tuple[Any, Any]

    @classmethod
    def of(cls, given: Any, *measured: tuple[Any, Any]) -> _Layer:
        """Return the layer, from its input and the step's results for statistics of 0 and huge ones."""
        own = moments(given)
        recorded, entered, kept = [], [], []
        for low, high in measured:
            shape = own.mean[0].shape  # a layer may keep its statistics as (1, C)
            zero, top = (each.astype(np.float64).reshape(shape) for each in (low, high))
            recorded.append(zero / own_weight(zero, top, low.dtype, np))
            entered.append(zero)
            kept.append(old_weight(zero, top, low.dtype))
        value = np.asarray(given.value)[0]
        trees = (tuple(part) for part in (recorded, entered, kept))
        return cls(value, own.mean[0], own.var[0], *trees)

    @property
    def size(self) -> tuple[Any, Any]:
        """The scales of rounding errors in the mean and the variance."""
        square = np.max(self.var + self.mean**2)
        return np.sqrt(square), square

    def is_recorded(self, mean: Any, var: Any, places: float = LOOSE) -> bool:
        """Return whether these are the recorded mean and variance."""
        pairs = zip(self.recorded, (mean, var), self.size, strict=True)
        return all(equal(got, value, size, places) for got, value, size in pairs)

    def recognised(self, others: Mapping[str, _Layer], batch: int) -> Clues:
        """Return what is recorded, if it is not the input's mean and variance."""
        measured = list(zip(self.entered, self.kept, self._own, self.size, strict=True))
        if not any(_off(*each).any() for each in measured):
            return {}
        kinds = (self._factors, self._rounding, self._other_variance, self._rows)
        for kind in kinds:
            if found := kind():
                return found
        for name, other in others.items():
            if self.mean.shape == other.mean.shape and self.is_recorded(other.mean, other.var):
                return {"moments": "another layer", "layer": name}
        if self.is_recorded(
            *(np.full_like(m, v) for m, v in zip(self._own, self._all, strict=True))
        ):
            return {"moments": "all axes"}
        ordered = (np.sort(np.ravel(value)) for value in (*self.recorded, *self._own))
        mean, var, own_mean, own_var = ordered
        if equal(mean, own_mean, self.size[0], LOOSE) and equal(var, own_var, self.size[1], LOOSE):
            return {"moments": "channels in another order"}
        return self._scaled_mean() or {"moments": "other"}

    def _scaled_mean(self) -> Clues:
        """Recognise a mean whose divisor is not the number of values: a multiple in all channels."""
        recorded, square = self.recorded[0], float(np.sum(self.mean**2))
        factor = float(np.sum(recorded * self.mean)) / square if square else 0.0
        fits = equal(recorded, factor * self.mean, self.size[0], LOOSE)
        if self.mean.size > 1 and fits and abs(factor) > LOOSE and abs(factor - 1) > LOOSE:
            return {"moments": "scaled mean", "moments_factor": factor}
        return {}

    @property
    def _own(self) -> tuple[Any, Any]:
        return self.mean, self.var

    @property
    def _all(self) -> tuple[float, float]:
        return float(np.mean(self.given)), float(np.var(self.given))

    def _factors(self) -> Clues:
        """Recognise the right moments with another weight than 1 - momentum."""
        rows, sums, factors = len(self.given), {}, {}
        for name, entered, kept, own, size in zip(
            ("mean", "variance"), self.entered, self.kept, self._own, self.size, strict=True
        ):
            share, noise = 1 - kept, _noise(kept, own, size)
            off = _off(entered, kept, own, size)
            if not off.any():
                continue
            square = float(np.sum((share * own)[off] ** 2))
            factor = float(np.sum((entered * share * own)[off])) / square if square else 0.0
            fits = equal(entered[off], (factor * share * own)[off], (share * noise)[off], 1.0)
            if not fits or abs(factor) < LOOSE:
                return {}
            factors[name], sums[name] = factor, float(np.median(kept + factor * share))
        if not factors:
            return {}
        found: Clues = {"moments_factor": next(iter(factors.values()))}
        unbiased = rows > 1 and abs(next(iter(factors.values())) * (rows - 1) / rows - 1) < 1e-4
        if "mean" not in factors and unbiased:
            return {"moments": "sample variance", **found}
        return {"moments": "weights", "moments_sum": next(iter(sums.values())), **found}

    def _rounding(self) -> Clues:
        """Recognise moments rounded to a narrower dtype."""
        for recorded, own, size in zip(self.recorded, self._own, self.size, strict=True):
            if equal(recorded, own, size, LOOSE):
                continue
            off = np.max(np.abs(recorded - own)) <= 2.0**-6 * size
            kind = narrow_type(recorded, np.max(np.abs(recorded)), 16 * U)
            if off and kind:
                return {"moments": "rounded", "moments_type": kind}
        return {}

    def _other_variance(self) -> Clues:
        """Recognise the right mean with another quantity instead of the variance."""
        (mean, var), (of_mean, of_var) = self.recorded, self.size
        if equal(mean, self.var, of_var, LOOSE) and equal(var, self.mean, of_mean, LOOSE):
            return {"moments": "another quantity", "quantity": "the batch's mean"}
        if not equal(mean, self.mean, of_mean, 2 * LOOSE):
            return {}
        deviation = np.abs(self.given - self.mean)
        quantities = {
            "the standard deviation": np.sqrt(self.var),
            "the mean of squares, the mean not taken off": self.var + self.mean**2,
            "the square of the mean absolute deviation": np.mean(deviation, axis=0) ** 2,
        }
        for name, value in quantities.items():
            if equal(var, value, np.max(np.abs(value)), 2 * LOOSE):
                return {"moments": "another quantity", "quantity": name}
        for count in (2, 4, 8):
            strided = [self.given[first::count] for first in range(min(count, len(self.given)))]
            for parts in (np.array_split(self.given, len(strided)), strided):
                weighted = sum(len(part) * part.var(axis=0) for part in parts) / len(self.given)
                if equal(var, weighted, of_var, LOOSE):
                    return {"moments": "shards' variances", "shards": count}
        added = float(np.median(var - self.var))
        if added > 0 and equal(var, self.var + added, of_var, ROUNDED_SUM):
            return {"moments": "another quantity", "quantity": f"the batch's plus {added:.3g}"}
        return {"moments": "another quantity", "quantity": "another quantity than the batch's"}

    def _rows(self) -> Clues:
        """Recognise the moments of some of the rows, or of a batch padded with zeros."""
        rows = len(self.given)
        for count in range(1, rows):
            for first in (0, rows - count):
                part = self.given[first : first + count]
                if self.is_recorded(part.mean(axis=0), part.var(axis=0)):
                    return {
                        "moments": "part of the rows",
                        "rows": f"{first + 1} to {first + count} of {rows}",
                    }
        for more in range(1, rows + 8):
            share = rows / (rows + more)
            mean = share * self.mean
            if self.is_recorded(mean, share * (self.var + self.mean**2) - mean**2):
                return {"moments": "padding", "padding": more}
        return {}
