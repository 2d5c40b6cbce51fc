"""What the numbers of a violating case say: what a step has done in place of what it should.

A law says that something is off. A person then looks at the numbers: the update is -1 times what it
should be, the recorded variance is N / (N - 1) times the batch's. So does this module. On one case that
breaks a law it runs the step and the evaluation a few more times, with the programs that are compiled
already, and compares what came out with what known mistakes would give. What it recognises it returns as
plain data, from which ``bnverify.diagnose`` concludes the mistake.

Each reader returns what it recognised, or nothing; the first possibility that fits is told. Only steps
that break a law are read, so a clue never accuses anybody by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np

from bnverify.case import Case
from bnverify.judge import RoundingBounds, some_direction
from bnverify.laws.arithmetic import folded, moments
from bnverify.lazy import jax, jnp
from bnverify.observe import FEW_ROWS, CompiledSubject, observe, optimizer_update
from bnverify.pytree import form, is_floating, path_name, stack, take
from bnverify.reruns import (
    huge,
    old_weight,
    other_param,
    other_statistic,
    own_statistics,
    own_weight,
    with_params,
    with_statistics,
)
from bnverify.subject import State
from bnverify.transition import Outcome, Transition

Clues = dict[str, Any]
"""What was recognised, by name: numbers, texts and lists of names, as JSON holds them."""

Leaves = dict[str, Any]
"""Path of a leaf -> its values in float64."""

U = 2.0**-24
FEW = 64 * U
"""The roundings of a handful of float32 operations, relative to their operands."""

LOOSE = 1e-5
"""Relative: what a float32 sum of some rows, or a loss, may be off by, far below any mistake's size."""

ROUNDED_SUM = 4e-6
"""Relative to the largest mean square: what a moment of many rows may be off by."""

NEEDS = (
    "step:zero_statistics",
    "step:huge_statistics",
    "step:other_statistics",
    "step:zero_lr",
    "expected_update",
)
GRADIENT_LAWS = frozenset({"gradients_are_gradients_of_the_loss"})
MODE_LAWS = frozenset(
    {
        "eval_at_the_batchs_own_moments_is_the_training_loss",
        "eval_rows_are_independent",
        "eval_loss_equals_the_hand_derivation",
        "training_loss_equals_the_hand_derivation",
        "targets_belong_to_their_rows",
    }
)
MOMENT_LAWS = frozenset({"batch_moments_are_the_layers_own", "momentum_is_as_declared"})
DOUBLED = ("step:doubled_batch",)
BLIND = "evaluation ignores the statistics here"
VAGUE = frozenset({"other", "differ", BLIND})
DOUBLING = "doubling_the_batch_changes_nothing"


def clues(
    calls: CompiledSubject, bounds: RoundingBounds, cases: Iterable[Case], broken: Collection[str]
) -> Clues:
    """Return what is recognised in some cases: of each reader, the first that is not vague.

    Args:
        calls: the subject's functions.
        bounds: reads the traced step in float64; of the same subject.
        cases: single cases, the most telling first.
        broken: the names of the broken laws: what has no bearing on them is not read.
    """
    told: dict[str, Clues] = {}
    for case in cases:
        one = stack([case])
        few = case.shape[0] <= FEW_ROWS and DOUBLING in broken
        seen = _Seen(calls, bounds, one, observe(calls, one, {*NEEDS, *DOUBLED[: int(few)]}))
        for read, laws in READERS.items():
            if laws and laws.isdisjoint(broken):
                continue
            try:
                with np.errstate(all="ignore"):
                    found = read(seen)
            except Exception:  # noqa: BLE001 - whatever a user's code raises for other inputs
                found = {}
            known = told.get(read.__name__)
            clear = found and not VAGUE & set(map(str, found.values()))
            if found and (known is None or clear and VAGUE & set(map(str, known.values()))):
                told[read.__name__] = found
    return {name: value for found in told.values() for name, value in found.items()}


def general_cases(shape: tuple[int, int]) -> list[Case]:
    """Return cases of a shape in which nothing is special, at the first step and at a later one.

    What is wrong is told by numbers best where no feature is constant and no gradient 0, as they are in
    the smallest counterexample.
    """
    rng = np.random.default_rng(0)
    rows, features = shape
    x, y = rng.normal(0.5, 1, (rows, features)), rng.normal(0.25, 1, rows)
    return [Case.of(5, x, y, 0.125, warmup=warmup) for warmup in (0, 2)]


def tree_clues(t: Transition) -> Clues:
    """Return how the trees of a step differ in their leaves from what they should be.

    Args:
        t: a transition, of which shapes are enough.
    """
    found: Clues = {}
    if t.info.grads is not None:
        kind, leaves = _compared(t.info.grads, t.before.params)
        if kind:
            found |= {"gradient_tree": kind, "gradient_tree_leaves": leaves}
    kind, leaves = _compared(t.after.batch_stats, t.before.batch_stats)
    if kind:
        found |= {"statistics_tree": kind, "statistics_tree_leaves": leaves}
    return found


def _compared(actual: Any, expected: Any) -> tuple[str, list[str]]:
    """Return in what way a tree's leaves differ from the expected ones, and which do."""
    one, other = (
        [path_name(path) for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0]]
        for tree in (actual, expected)
    )
    missing, added = [n for n in other if n not in one], [n for n in one if n not in other]
    if missing and all(any(a.endswith("/" + name) for a in added) for name in missing):
        return "nested", missing
    if missing:
        return "fewer leaves", missing
    return ("more leaves", added) if added else ("", [])


def _floats(tree: Any) -> Leaves:
    """Return the floating-point leaves of the only case of a stacked tree."""
    paths, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {
        path_name(path): np.asarray(leaf)[0].astype(np.float64)
        for path, leaf in paths
        if is_floating(leaf)
    }


def _equal(actual: Any, expected: Any, scale: Any, places: float = FEW) -> bool:
    """Return whether two arrays agree within ``places`` of ``scale``."""
    return bool(np.all(np.abs(actual - expected) <= places * np.abs(scale) + 1e-37))


def _all_equal(actual: Leaves, expected: Leaves, *operands: Leaves) -> bool:
    """Return whether trees agree within a few roundings of what they were computed from."""
    if actual.keys() != expected.keys():
        return False
    return all(
        _equal(actual[name], expected[name], sum(np.abs(tree[name]) for tree in operands))
        for name in actual
    )


def _holds_digits(values: Any, dtype: Any, places: float) -> bool:
    """Return whether values that float32 would spread are all ones that a narrower type holds."""
    rounded = values.astype(dtype).astype(np.float64)
    near = np.abs(values - rounded) <= places * np.abs(values)
    few = np.abs(values * 256) == np.round(np.abs(values * 256))  # held by chance: 0, 1, 0.5
    return bool(np.all(near | ~np.isfinite(rounded)) and np.sum(~few) >= 2)


def _narrow(values: Any, largest: float, places: float = 0.0) -> str:
    """Return the name of the narrow type that holds all ``values``, or nothing.

    Args:
        values: which ones.
        largest: the largest magnitude around: what is small beside it is noise, of few digits.
        places: how far they may be off, relative to themselves.
    """
    values = np.ravel(values)
    values = values[np.abs(values) > 1e-5 * largest]
    types = (("bfloat16", jnp.bfloat16), ("float16", np.float16))
    return next((name for name, dtype in types if _holds_digits(values, dtype, places)), "")


def _largest(leaves: Leaves) -> float:
    return max((float(np.max(np.abs(leaf), initial=0)) for leaf in leaves.values()), default=0.0)


@dataclass
class _Seen:
    """One case, what was observed of it, and how to ask for more.

    Attributes:
        calls: the subject's functions.
        bounds: reads the traced step.
        case: stacked, a single one.
        t: the observed transition.
    """

    calls: CompiledSubject
    bounds: RoundingBounds
    case: Case
    t: Transition

    @property
    def rows(self) -> int:
        """N."""
        return self.case.shape[0]

    @property
    def rate(self) -> float:
        """The learning rate."""
        return float(self.case.lr[0])

    @cached_property
    def initial(self) -> State:
        """The state before the first step."""
        return self.calls.init(self.case)

    def update(self, params: Any, opt_state: Any) -> State:
        """Return the params and the optimizer's state after its update by the step's gradient."""
        given = State(params, None, opt_state)
        return optimizer_update(self.calls, self.case, self.t.info.grads, given)

    @property
    def expected(self) -> State:
        """What the optimizer makes of the step's gradient."""
        expected: State = self.t.facts["expected_update"]
        return expected

    @cached_property
    def twice(self) -> State:
        """What it makes of it when it is asked a second time."""
        return self.update(self.expected.params, self.expected.opt_state)

    @cached_property
    def fresh(self) -> State:
        """What it makes of it in its initial state."""
        return self.update(self.t.before.params, self.initial.opt_state)

    @cached_property
    def own(self) -> State:
        """The state before the step, with the batch's own moments as its statistics."""
        return own_statistics(self.t.reruns, self.t.before)

    def loss_of(self, state: State, **batch: Any) -> float:
        """Return the eval loss of a state, on the case's batch or another one."""
        return float(np.ravel(self.calls.evaluate(state, self.case._replace(**batch)))[0])


# The update of the params.


def _update(seen: _Seen) -> Clues:
    """What became of the params in place of the optimizer's update."""
    before, after = _floats(seen.t.before.params), _floats(seen.t.after.params)
    if before.keys() != after.keys():
        return {}
    found: Clues = {}
    rest = _factor(before, _floats(seen.t.reruns["zero_lr"].state.params))
    if rest is not None and abs(rest - 1) > LOOSE:
        found["factor_at_rate_zero"] = rest
    if "expected_update" not in seen.t.facts:
        return found | ({"params": "unchanged"} if _all_equal(after, before) else {})
    expected = _floats(seen.expected.params)
    if _all_equal(after, expected, before, expected):
        return found
    step = {name: expected[name] - before[name] for name in before}
    moved = {name: after[name] - before[name] for name in before}
    still = [n for n in before if np.all(moved[n] == 0) and np.any(step[n] != 0)]
    rest_follows = all(
        _equal(after[n], expected[n], abs(before[n]) + abs(expected[n]))
        for n in before
        if n not in still
    )
    top = _largest(after)
    narrow = [n for n in before if _narrow(after[n], top) and not _narrow(expected[n], top)]
    if narrow:
        return found | {"params": "rounded", "params_type": _narrow(after[narrow[0]], top)}
    if still and rest_follows:
        everything = all(np.all(each == 0) for each in moved.values())
        return found | {"params": "unchanged" if everything else "partly unchanged", "still": still}
    return found | _other_update(seen, before, after, step, moved)


def _other_update(seen: _Seen, before: Leaves, after: Leaves, step: Leaves, moved: Leaves) -> Clues:
    """Recognise params that moved, and not as the optimizer says."""
    size = {name: np.abs(before[name]) + np.abs(after[name]) for name in before}
    grads = _floats(seen.t.info.grads)
    along = _factor(grads, moved, size) if grads.keys() == before.keys() else None
    factor = _factor(step, moved, size)
    expected = {name: before[name] + step[name] for name in before}
    possible = _at_other_inputs(seen, before, after)
    if factor is not None:
        possible = _of_the_update(factor, seen.rate)
    elif along is not None:
        possible = _of_the_gradient(along, seen.rate)
    elif decays := _decays(before, after, expected):
        return {"params": "decayed", "decayed": decays}
    if along is not None and _near(along, 1):
        return {"params": "gradient added", "factor": along}
    return next(possible, {"params": "other"})


def _near(factor: float, expected: float) -> bool:
    return abs(factor - expected) < 1e-3 * abs(expected)


def _of_the_update(factor: float, rate: float) -> Iterator[Clues]:
    """Yield what it is to move by the optimizer's update times a factor."""
    if _near(factor, -1):
        yield {"params": "opposite", "factor": factor}
    if _near(factor, 2):
        yield {"params": "twice", "factor": factor}
    if rate and _near(factor, rate):
        yield {"params": "rate twice", "factor": factor}
    yield {"params": "scaled", "factor": factor}


def _of_the_gradient(factor: float, rate: float) -> Iterator[Clues]:
    """Yield what it is to move by the gradient times a factor, where the optimizer says otherwise."""
    if rate and _near(factor, -rate):
        yield {"params": "plain descent"}


def _at_other_inputs(seen: _Seen, before: Leaves, after: Leaves) -> Iterator[Clues]:
    """Yield what the params were updated from, where it is not the state that was given."""
    if _all_equal(after, _floats(seen.twice.params), before, after):
        yield {"params": "twice", "factor": 2.0}
    if _all_equal(after, _floats(seen.fresh.params), before, after):
        yield {"params": "fresh optimizer"}
    rest = seen.case._replace(lr=np.zeros_like(seen.case.lr))
    still = _floats(seen.t.reruns["zero_lr"].state.params)
    elsewhere = _floats(seen.calls.step(with_params(seen.t.before, other_param), rest).state.params)
    if _all_equal(still, elsewhere, still) and not _all_equal(still, before, before):
        yield {"params": "another start"}


def _factor(base: Leaves, actual: Leaves, size: Leaves | None = None) -> float | None:
    """Return the one number k with ``actual`` = k ``base`` in all leaves; None where there is none.

    Args:
        base: what is scaled.
        actual: what came out.
        size: in units of which it is rounded; itself, where None.
    """
    square = sum(float(np.sum(base[name] ** 2)) for name in base)
    if not square or not np.isfinite(square):
        return None
    factor = sum(float(np.sum(base[name] * actual[name])) for name in base) / square
    size = size or {name: np.abs(base[name]) + np.abs(actual[name]) for name in base}
    fits = all(
        _equal(actual[n], factor * base[n], FEW * size[n] + LOOSE * np.abs(factor * base[n]), 1.0)
        for n in base
    )
    # A movement that rounding hides in the params fits any factor.
    seen = any(np.any(np.abs(actual[n]) + np.abs(base[n]) > 64 * U * size[n]) for n in base)
    return factor if fits and seen else None


def _decays(before: Leaves, after: Leaves, expected: Leaves) -> dict[str, float]:
    """Return leaf -> the factor of itself by which it was moved besides; nothing where some was not."""
    found = {}
    for name, old in before.items():
        extra = after[name] - expected[name]
        size = FEW * (np.abs(old) + np.abs(expected[name]))
        if np.all(np.abs(extra) <= size):
            continue
        square = float(np.sum(old**2))
        factor = float(np.sum(extra * old)) / square if square else 0.0
        if not factor or not _equal(extra, factor * old, size + 1e-3 * np.abs(factor * old), 1.0):
            return {}
        found[name] = factor
    return found


def _between_traces(seen: _Seen) -> Clues:
    """A batch of every row twice: the same gradient, and yet another update."""
    doubled: Outcome = seen.t.reruns["doubled_batch"]
    before, after = _floats(seen.t.before.params), _floats(seen.t.after.params)
    other = _floats(doubled.state.params)
    grads, others = _floats(seen.t.info.grads), _floats(doubled.info.grads)
    once = {name: after[name] - before[name] for name in before}
    again = {name: other[name] - before[name] for name in before}
    size = {name: np.abs(before[name]) + np.abs(after[name]) for name in before}
    factor = _factor(once, again, size)
    alike = all(_equal(others[n], grads[n], LOOSE * np.max(np.abs(grads[n])), 100.0) for n in grads)
    if alike and factor is not None and abs(factor - 1) > 1e-3:
        return {"update_of_another_trace": factor}
    return {}


# The optimizer's state.


def _optimizer_state(seen: _Seen) -> Clues:
    """What became of the optimizer's state in place of the one that its update returns."""
    trees = [
        tree.opt_state
        for tree in (seen.t.before, seen.t.after, seen.expected, seen.twice, seen.initial)
    ]
    if len({str(form(tree)) for tree in trees}) > 1:
        return {}
    leaves = [jax.tree_util.tree_leaves(take(tree, 0)) for tree in trees]
    fresh = jax.tree_util.tree_leaves(take(seen.fresh.opt_state, 0))
    wrong = []
    for row in zip(*leaves, fresh, strict=True):
        values = [np.asarray(leaf, np.float64) for leaf in row]
        old, new, expected = values[:3]
        scale = max(np.max(np.abs(old), initial=0), np.max(np.abs(expected), initial=0))
        if not _equal(new, expected, scale):
            wrong.append((*values, scale))
    if not wrong:
        return {}
    names = {"old": 0, "twice": 3, "cleared": 4, "fresh": 5}
    for name, place in names.items():
        if all(_equal(row[1], row[place], row[-1]) for row in wrong):
            return {"opt_state": name}
    if all(any(_equal(row[1], row[place], row[-1]) for place in (4, 5)) for row in wrong):
        return {"opt_state": "fresh"}
    numbers = np.concatenate([np.ravel(row[1]) for row in wrong])
    kind = _narrow(numbers, np.max(np.abs(numbers)))
    return {"opt_state": "rounded", "opt_state_type": kind} if kind else {"opt_state": "other"}


# The running statistics.


def _average(seen: _Seen) -> Clues:
    """What average the statistics keep."""
    t = seen.t
    if form(t.after.batch_stats) != form(t.before.batch_stats):
        return {}
    old, new = _floats(t.before.batch_stats), _floats(t.after.batch_stats)
    zero = _floats(t.reruns["zero_statistics"].state.batch_stats)
    high = _floats(t.reruns["huge_statistics"].state.batch_stats)
    kinds = {name: _narrow(values, _largest(new)) for name, values in new.items()}
    if any(kinds.values()):
        rounded = [name for name, kind in kinds.items() if kind]
        return {"average": "rounded", "rounded": rounded, "average_type": kinds[rounded[0]]}
    types = {n: leaf.dtype for n, leaf in _raw(t.before.batch_stats).items()}
    weight = {n: old_weight(zero[n], high[n], types[n]) for n in old}
    idle = {
        n: (new[n] == old[n]) & ((zero[n] == 0) & (weight[n] == 1) | (old[n] != 0)) for n in old
    }
    moments_are_zero = {n: np.all(zero[n] == 0) & np.all(weight[n] != 1) for n in old}
    idle = {n: still & ~moments_are_zero[n] for n, still in idle.items()}
    if idle and all(np.all(still) for still in idle.values()):
        return {"average": "unchanged", "idle": list(idle)}
    some = [name for name, still in idle.items() if np.all(still)]
    if some:
        return {"average": "partly unchanged", "idle": some}
    some = [n for n in old if np.any(idle[n] & (weight[n] == 1) & (zero[n] == 0))]
    if some:
        return {"average": "partly unchanged", "idle": some}
    return _weights(seen, old, new, zero, high, weight)


def _weights(
    seen: _Seen, old: Leaves, new: Leaves, zero: Leaves, high: Leaves, weight: Leaves
) -> Clues:
    """Recognise an average by the weight of the old value, leaf by leaf."""
    if all(_equal(m, 0.0, 1.0) for m in weight.values()):
        return {"average": "forgets"}
    raws = [
        _raw(tree)
        for tree in (
            seen.t.before.batch_stats,
            seen.t.after.batch_stats,
            seen.t.reruns["zero_statistics"].state.batch_stats,
            seen.t.reruns["huge_statistics"].state.batch_stats,
        )
    ]
    others = _raw(with_statistics(seen.t.before, other_statistic).batch_stats)
    rerun = _raw(seen.t.reruns["other_statistics"].state.batch_stats)
    bent = []
    for name in old:
        was, became, low, top = (raw[name] for raw in raws)
        again = folded(others[name], rerun[name], low, top)
        if max(float(folded(was, became, low, top)[0]), float(again[0])) > 1:
            bent.append(name)
    if bent:
        # An average of deviations is straight in the roots.
        for name in bent:
            root = (np.sqrt(high[name]) - np.sqrt(zero[name])) / np.sqrt(huge(raws[0][name].dtype))
            straight = root * np.sqrt(old[name]) + np.sqrt(zero[name])
            if _equal(np.sqrt(new[name]), straight, straight, 1e-4) and "mean" not in name:
                return {"average": "of roots", "bent": bent}
        return {"average": "bent", "bent": bent, "momentum": _median(weight[bent[0]])}
    declared = seen.calls.subject.momentum
    common = _median(np.concatenate([np.ravel(m) for m in weight.values()]))
    expected = common if declared is None else declared
    wrong = {n: _median(m) for n, m in weight.items() if not _equal(m, expected, 1.0, 8 * U)}
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


def _raw(tree: Any) -> dict[str, Any]:
    """Return path -> the stacked leaf, of the floating-point ones."""
    paths, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {path_name(path): np.asarray(leaf) for path, leaf in paths if is_floating(leaf)}


# What enters the average.


def _moments(seen: _Seen) -> Clues:
    """What is recorded in place of the mean and the variance of a layer's input."""
    if seen.calls.subject.layer_inputs is None:
        return {}
    known = seen.bounds(seen.t.before, seen.case, {"layer_inputs"})
    zero = _raw(seen.t.reruns["zero_statistics"].state.batch_stats)
    high = _raw(seen.t.reruns["huge_statistics"].state.batch_stats)
    layers = {}
    for path, given in known.layer_inputs.items():
        names = [f"{path}/mean", f"{path}/var"]
        if given.weights is None and set(names) <= set(zero):
            layers[path] = _Layer.of(given, *((zero[name][0], high[name][0]) for name in names))
    for path, layer in layers.items():
        others = {name: other for name, other in layers.items() if name != path}
        if found := layer.recognised(others, seen.rows):
            return {"moments_of": path, **found}
    return {}


@dataclass
class _Layer:
    """One normalisation: what it was given and what it recorded, in float64.

    Attributes:
        given: (R, *features).
        mean: of it, (*features).
        var: of it, biased.
        recorded: the recorded mean and variance: what enters the average over its weight.
        entered: what the step made of statistics of 0: weight times moment.
        kept: the measured weight of the old mean and variance.
    """

    given: Any
    mean: Any
    var: Any
    recorded: tuple[Any, Any]
    entered: tuple[Any, Any]
    kept: tuple[Any, Any]

    @classmethod
    def of(cls, given: Any, *measured: tuple[Any, Any]) -> _Layer:
        """Return it, from its input and what the step makes of statistics of 0 and huge ones."""
        own = moments(given)
        recorded, entered, kept = [], [], []
        for low, high in measured:
            zero, top = low.astype(np.float64), high.astype(np.float64)
            recorded.append(zero / own_weight(zero, top, low.dtype, np))
            entered.append(zero)
            kept.append(old_weight(zero, top, low.dtype))
        value = np.asarray(given.value)[0]
        trees = (tuple(part) for part in (recorded, entered, kept))
        return cls(value, own.mean[0], own.var[0], *trees)

    @property
    def size(self) -> tuple[Any, Any]:
        """In units of which rounding moves the mean and the variance."""
        square = np.max(self.var + self.mean**2)
        return np.sqrt(square), square

    def is_recorded(self, mean: Any, var: Any, places: float = LOOSE) -> bool:
        """Return whether these are the recorded moments."""
        pairs = zip(self.recorded, (mean, var), self.size, strict=True)
        return all(_equal(seen, value, size, places) for seen, value, size in pairs)

    def recognised(self, others: Mapping[str, _Layer], batch: int) -> Clues:
        """Return what is recorded, where it is not the input's mean and variance."""
        if self.is_recorded(self.mean, self.var, ROUNDED_SUM):
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
        if _equal(mean, own_mean, self.size[0], LOOSE) and _equal(
            var, own_var, self.size[1], LOOSE
        ):
            return {"moments": "channels in another order"}
        return {"moments": "other"}

    @property
    def _own(self) -> tuple[Any, Any]:
        return self.mean, self.var

    @property
    def _all(self) -> tuple[float, float]:
        return float(np.mean(self.given)), float(np.var(self.given))

    def _factors(self) -> Clues:
        """The moments themselves, by another weight than 1 - m."""
        rows, sums, factors = len(self.given), {}, {}
        for name, entered, kept, own, size in zip(
            ("mean", "variance"), self.entered, self.kept, self._own, self.size, strict=True
        ):
            share, noise = 1 - kept, ROUNDED_SUM * size
            off = np.abs(entered - share * own) > np.abs(share) * noise
            if not off.any():
                continue
            square = float(np.sum((share * own)[off] ** 2))
            factor = float(np.sum((entered * share * own)[off])) / square if square else 0.0
            if not _equal(entered[off], (factor * share * own)[off], (share * noise)[off], 1.0):
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
        """Moments of few digits."""
        for recorded, own, size in zip(self.recorded, self._own, self.size, strict=True):
            if _equal(recorded, own, size, LOOSE):
                continue
            off = np.max(np.abs(recorded - own)) <= 2.0**-6 * size
            kind = _narrow(recorded, np.max(np.abs(recorded)), 16 * U)
            if off and kind:
                return {"moments": "rounded", "moments_type": kind}
        return {}

    def _other_variance(self) -> Clues:
        """The right mean, or at least moments, and something else in the variance's place."""
        (mean, var), (of_mean, of_var) = self.recorded, self.size
        if _equal(mean, self.var, of_var, LOOSE) and _equal(var, self.mean, of_mean, LOOSE):
            return {"moments": "another quantity", "quantity": "mean and variance swapped"}
        if not _equal(mean, self.mean, of_mean, 2 * LOOSE):
            return {}
        deviation = np.abs(self.given - self.mean)
        quantities = {
            "its root, the standard deviation": np.sqrt(self.var),
            "the mean of squares, the mean not taken off": self.var + self.mean**2,
            "the square of the mean absolute deviation": np.mean(deviation, axis=0) ** 2,
        }
        for name, value in quantities.items():
            if _equal(var, value, np.max(np.abs(value)), 2 * LOOSE):
                return {"moments": "another quantity", "quantity": name}
        for count in (2, 4, 8):
            parts = np.split(self.given, count) if len(self.given) % count == 0 else []
            if parts and _equal(
                var, np.mean([p.var(axis=0) for p in parts], axis=0), of_var, LOOSE
            ):
                return {"moments": "shards' variances", "shards": count}
        return {"moments": "another quantity", "quantity": ""}

    def _rows(self) -> Clues:
        """The moments of a part of the rows, or of more rows than the batch has."""
        rows = len(self.given)
        for count in range(1, rows):
            for first in (0, rows - count):
                part = self.given[first : first + count]
                if self.is_recorded(part.mean(axis=0), part.var(axis=0)):
                    return {"moments": "part of the rows", "rows": [first, first + count]}
        for more in range(1, rows + 8):
            share = rows / (rows + more)
            mean = share * self.mean
            if self.is_recorded(mean, share * (self.var + self.mean**2) - mean**2):
                return {"moments": "padding", "padding": more}
        return {}


# Training and evaluation: at the batch's own moments they compute one loss.


def _modes(seen: _Seen) -> Clues:
    """Which change of the evaluation makes it the training loss."""
    loss, size = np.ravel(seen.t.info.loss), np.ravel(seen.t.eval_loss)
    if loss.size != 1 or size.size != 1:
        return {}
    kind = str(np.asarray(seen.t.eval_loss).dtype)
    if kind in {"bfloat16", "float16"}:
        return {"modes": "rounded loss", "modes_type": kind}
    train, own = float(loss[0]), seen.loss_of(seen.own)
    if not np.isfinite(train) or not np.isfinite(own):
        return {"modes": "not finite"} if np.isfinite(train) != np.isfinite(own) else {}
    found: Clues = {"modes_ratio": own / train} if train else {}
    if abs(own - train) <= 1e-6 * abs(train):
        return found
    found["modes"] = next(iter(_alike(seen, train, own)), "differ")
    return found


def _alike(seen: _Seen, train: float, own: float) -> Iterator[str]:
    """Yield the names of changes that make the evaluation the training loss, the surest first."""
    if seen.rows > 1 and (_same(own, train * seen.rows) or _same(train, own * seen.rows)):
        yield "sum in evaluation" if own > train else "sum in training"
    if seen.rows > 1 and len(np.unique(seen.case.y)) > 1:
        yield from _alike_for_other_targets(seen, train, own)
    yield from _alike_in_fewer_digits(seen, train, own)
    if _same(own**2, train):
        yield "root in evaluation"
    yield from _alike_at_other_moments(seen, train, own)
    if _same(_mean_of_rows(seen), train):
        yield "rows by themselves"
    if seen.loss_of(with_statistics(seen.own, other_statistic)) == own:
        yield BLIND


def _same(value: float, expected: float) -> bool:
    return abs(value - expected) <= LOOSE * max(abs(value), abs(expected))


def _alike_for_other_targets(seen: _Seen, train: float, own: float) -> Iterator[str]:
    """Yield by which targets evaluation gives the training loss."""
    y = seen.case.y
    orders = [y[..., ::-1], *(np.roll(y, by, axis=-1) for by in (1, -1))]
    moved = [seen.loss_of(seen.own, y=order) for order in orders]
    if any(_same(loss, train) for loss in moved):
        yield "targets moved"
    mean = np.broadcast_to(y.mean(axis=-1, keepdims=True), y.shape).astype(y.dtype)
    at_mean, spread = seen.loss_of(seen.own, y=mean), float(np.var(np.asarray(y, np.float64)))
    # Over all pairs, the mean squared error is that from the mean target and the targets' variance.
    if spread > 1e-3 * abs(train) and _same(train, at_mean + spread):
        yield "broadcast in training"
    if all(_same(loss, own) for loss in moved):
        yield "broadcast in evaluation"
    if _same(at_mean, train) or _same(seen.loss_of(seen.own, y=np.zeros_like(y)), train):
        yield "targets replaced"


def _alike_in_fewer_digits(seen: _Seen, train: float, own: float) -> Iterator[str]:
    """Yield what has to be rounded for the evaluation to give the training loss."""
    x, y = seen.case.x, seen.case.y
    for change in (np.trunc, np.round, np.floor):
        if np.any(change(y) != y) and _same(seen.loss_of(seen.own, y=change(y)), train):
            yield "rounded targets"
    for kind in (np.float16, jnp.bfloat16):
        rounded = x.astype(kind).astype(np.float32)
        # What follows is not rounded alike to the last place: most of the difference is enough.
        left = abs(seen.loss_of(seen.own, x=rounded) - train)
        if np.any(rounded != x) and left <= 0.02 * abs(own - train):
            yield "rounded inputs"
        narrow = _changed(seen, partial(_rounded, kind))
        reads = seen.loss_of(with_statistics(seen.own, other_statistic)) != own
        if reads and seen.loss_of(narrow) == own:
            yield "rounded statistics in evaluation"


def _rounded(kind: Any, name: str, value: Any) -> Any:
    del name
    return value.astype(kind)


def _changed(seen: _Seen, change: Callable[[str, Any], Any]) -> State:
    """Return the state at the batch's own moments, each changed by ``change`` of its name and value."""

    def leaf(path: Any, value: Any) -> Any:
        return change(path_name(path), value).astype(value.dtype) if is_floating(value) else value

    stats = jax.tree_util.tree_map_with_path(leaf, seen.own.batch_stats)
    return seen.own._replace(batch_stats=stats)


def _alike_at_other_moments(seen: _Seen, train: float, own: float) -> Iterator[str]:
    """Yield at which moments evaluation gives the training loss."""

    def near(state: State) -> bool:
        left = abs(seen.loss_of(state) - train)
        return left <= max(LOOSE * abs(train), 1e-3 * abs(own - train)) < abs(own - train)

    if seen.rows > 1:
        scale = seen.rows / (seen.rows - 1)
        if near(_changed(seen, lambda name, v: v * scale if name.endswith("var") else v)):
            yield "sample variance"
    if near(_one_moment(seen)):
        yield "one moment for all channels"


def _one_moment(seen: _Seen) -> State:
    """Return the state whose every channel has the mean and variance of all channels together."""
    leaves = _raw(seen.own.batch_stats)

    def change(name: str, value: Any) -> Any:
        if name.endswith("mean"):
            return np.full_like(value, np.mean(value))
        layer = name.rpartition("/")[0]
        means = leaves.get(f"{layer}/mean", np.zeros(1))
        return np.full_like(value, np.mean(value) + np.var(means))

    return _changed(seen, change)


def _mean_of_rows(seen: _Seen) -> float:
    """Return the mean of the training losses of batches that repeat one row; NaN of many rows."""
    if not 1 < seen.rows <= 4 * FEW_ROWS:
        return np.nan
    losses = []
    for row in range(seen.rows):
        x = np.broadcast_to(seen.case.x[:, row : row + 1], seen.case.x.shape)
        y = np.broadcast_to(seen.case.y[:, row : row + 1], seen.case.y.shape)
        info = seen.calls.step(seen.t.before, seen.case._replace(x=x, y=y)).info
        losses.append(float(np.ravel(info.loss)[0]))
    return float(np.mean(losses))


# The gradient.


def _gradient(seen: _Seen) -> Clues:
    """By which factor the gradient of each leaf differs from the slope of the reported loss."""
    grads, params = seen.t.info.grads, seen.t.before.params
    if form(grads) != form(params):
        return {}
    leaves, structure = jax.tree_util.tree_flatten(params)
    names = [path_name(path) for path, _ in jax.tree_util.tree_flatten_with_path(params)[0]]
    along = jax.tree_util.tree_leaves(some_direction(params))
    directions = [
        jax.tree_util.tree_unflatten(
            structure, [d if place == n else np.zeros_like(d) for n, d in enumerate(along)]
        )
        for place in range(len(leaves))
    ]
    factors: dict[str, float] = {}
    noise = LOOSE * _largest(_floats(grads))
    slopes = seen.bounds.slopes(seen.t.before, seen.case, directions)
    for name, grad, direction, slope in zip(
        names, jax.tree_util.tree_leaves(grads), along, slopes, strict=True
    ):
        got = float(np.sum(np.asarray(grad[0], np.float64) * direction))
        want, allowed = float(slope.value[0]), float(slope.allowed[0])
        allowed += LOOSE * float(np.max(np.abs(grad[0]))) * direction.size
        if not bool(slope.reliable[0]) or max(abs(got), abs(want)) <= noise:
            continue  # nothing to compare: such as the bias before a normalisation
        right = abs(got - want) <= allowed
        factors[name] = 1.0 if right else got / (want or allowed)
    wrong = {name: factor for name, factor in factors.items() if factor != 1}
    if not wrong:
        return {}
    values = list(wrong.values())
    if np.ptp(values) <= 1e-3 * np.max(np.abs(values)):
        everywhere = wrong.keys() == factors.keys()
        kind = "scaled" if everywhere else "some leaves"
        return {"gradient": kind, "gradient_leaves": list(wrong), "gradient_factor": values[0]}
    return {"gradient": "some leaves", "gradient_leaves": list(wrong)}


READERS: dict[Callable[[_Seen], Clues], frozenset[str]] = {
    _between_traces: frozenset({DOUBLING}),
    _update: frozenset(),
    _optimizer_state: frozenset(),
    _average: frozenset(),
    _moments: MOMENT_LAWS,
    _modes: MODE_LAWS,
    _gradient: GRADIENT_LAWS,
}
"""Each reader -> the laws that it bears on; none: any."""
