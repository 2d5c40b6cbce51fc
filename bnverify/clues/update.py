"""Recognise what happens to the params, the optimizer's state and the gradient."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from bnverify.clues.observed import (
    FEW,
    LOOSE,
    Clues,
    Leaves,
    ObservedCase,
    U,
    all_equal,
    equal,
    floats,
    largest,
    narrow_type,
)
from bnverify.judge import some_direction
from bnverify.lazy import jax
from bnverify.model import Outcome
from bnverify.pytree import form, is_floating, path_name, take
from bnverify.reruns import other_param, with_params


def update(observed: ObservedCase) -> Clues:
    """Return what happened to the params instead of the optimizer's update."""
    before, after = floats(observed.t.before.params), floats(observed.t.after.params)
    if before.keys() != after.keys():
        return {}
    found: Clues = {}
    rest = _factor(before, floats(observed.t.reruns["zero_lr"].state.params))
    if rest is not None and abs(rest - 1) > LOOSE:
        found["factor_at_rate_zero"] = rest
    if "expected_update" not in observed.t.facts:
        rests = observed.rate > 0 and all_equal(after, before)
        return found | ({"params": "unchanged"} if rests else {})
    expected = floats(observed.expected.params)
    if all_equal(after, expected, before, expected):
        return found
    step = {name: expected[name] - before[name] for name in before}
    moved = {name: after[name] - before[name] for name in before}
    still = [n for n in before if np.all(moved[n] == 0) and np.any(step[n] != 0)]
    rest_follows = all(
        equal(after[n], expected[n], abs(before[n]) + abs(expected[n]))
        for n in before
        if n not in still
    )
    top = largest(after)
    narrow = [n for n in before if narrow_type(after[n], top) and not narrow_type(expected[n], top)]
    if narrow:
        return found | {"params": "rounded", "params_type": narrow_type(after[narrow[0]], top)}
    if still and rest_follows:
        everything = all(np.all(each == 0) for each in moved.values())
        return found | {"params": "unchanged" if everything else "partly unchanged", "still": still}
    return found | _other_update(observed, before, after, step, moved)


def _other_update(
    observed: ObservedCase, before: Leaves, after: Leaves, step: Leaves, moved: Leaves
) -> Clues:
    """Recognise params that moved in another way than the optimizer's update."""
    size = {name: np.abs(before[name]) + np.abs(after[name]) for name in before}
    grads = floats(observed.t.info.grads)
    along = _factor(grads, moved, size) if grads.keys() == before.keys() else None
    factor = _factor(step, moved, size)
    expected = {name: before[name] + step[name] for name in before}
    possible = _at_other_inputs(observed, before, after)
    if factor is not None:
        possible = _of_the_update(factor, observed.rate)
    elif along is not None:
        possible = _of_the_gradient(along, observed.rate)
    elif decays := _decays(before, after, expected):
        return {"params": "decayed", "decayed": decays}
    if along is not None and _near(along, 1):
        return {"params": "gradient added", "factor": along}
    return next(possible, {"params": "other"})


def _near(factor: float, expected: float) -> bool:
    return abs(factor - expected) < 1e-3 * abs(expected)


def _of_the_update(factor: float, rate: float) -> Iterator[Clues]:
    """Yield what it means to move by a factor times the optimizer's update."""
    if _near(factor, -1):
        yield {"params": "opposite", "factor": factor}
    if _near(factor, 2):
        yield {"params": "twice", "factor": factor}
    if rate and _near(factor, rate):
        yield {"params": "rate twice", "factor": factor}
    yield {"params": "scaled", "factor": factor}


def _of_the_gradient(factor: float, rate: float) -> Iterator[Clues]:
    """Yield what it means to move by a factor times the gradient instead."""
    if rate and _near(factor, -rate):
        yield {"params": "plain descent"}


def _at_other_inputs(observed: ObservedCase, before: Leaves, after: Leaves) -> Iterator[Clues]:
    """Yield which other params or optimizer state the update started from."""
    if all_equal(after, floats(observed.twice.params), before, after):
        yield {"params": "two updates"}
    if all_equal(after, floats(observed.fresh.params), before, after):
        yield {"params": "fresh optimizer"}
    rest = observed.case._replace(lr=np.zeros_like(observed.case.lr))
    still = floats(observed.t.reruns["zero_lr"].state.params)
    elsewhere = floats(
        observed.calls.step(with_params(observed.t.before, other_param), rest).state.params
    )
    if all_equal(still, elsewhere, still) and not all_equal(still, before, before):
        yield {"params": "another start"}


def _factor(base: Leaves, actual: Leaves, size: Leaves | None = None) -> float | None:
    """Return the number k with ``actual`` = k ``base`` in all leaves, or None.

    Args:
        base: the expected values.
        actual: the actual values.
        size: the scale of rounding errors; None: that of the values.
    """
    square = sum(float(np.sum(base[name] ** 2)) for name in base)
    if not square or not np.isfinite(square):
        return None
    factor = sum(float(np.sum(base[name] * actual[name])) for name in base) / square
    size = size or {name: np.abs(base[name]) + np.abs(actual[name]) for name in base}
    fits = all(
        equal(actual[n], factor * base[n], FEW * size[n] + LOOSE * np.abs(factor * base[n]), 1.0)
        for n in base
    )
    # A movement smaller than the rounding of the params would fit any factor.
    visible = any(np.any(np.abs(actual[n]) + np.abs(base[n]) > 64 * U * size[n]) for n in base)
    return factor if fits and visible else None


def _decays(before: Leaves, after: Leaves, expected: Leaves) -> dict[str, float]:
    """Return leaf -> the multiple of itself added to the update; {} if something else was added."""
    found = {}
    for name, old in before.items():
        extra = after[name] - expected[name]
        size = FEW * (np.abs(old) + np.abs(expected[name]))
        if np.all(np.abs(extra) <= size):
            continue
        square = float(np.sum(old**2))
        factor = float(np.sum(extra * old)) / square if square else 0.0
        if not factor or not equal(extra, factor * old, size + 1e-3 * np.abs(factor * old), 1.0):
            return {}
        found[name] = factor
    return found


def update_of_another_trace(observed: ObservedCase) -> Clues:
    """Recognise a doubled batch that has the same gradient but a different update."""
    doubled: Outcome = observed.t.reruns["doubled_batch"]
    before, after = floats(observed.t.before.params), floats(observed.t.after.params)
    other = floats(doubled.state.params)
    grads, others = floats(observed.t.info.grads), floats(doubled.info.grads)
    once = {name: after[name] - before[name] for name in before}
    again = {name: other[name] - before[name] for name in before}
    size = {name: np.abs(before[name]) + np.abs(after[name]) for name in before}
    factor = _factor(once, again, size)
    same_gradient = all(
        equal(others[n], grads[n], LOOSE * np.max(np.abs(grads[n])), 100.0) for n in grads
    )
    if same_gradient and factor is not None and abs(factor - 1) > 1e-3:
        return {"update_of_another_trace": factor}
    return {}


def optimizer_state(observed: ObservedCase) -> Clues:
    """Return what happens to the optimizer's state instead of its update.

    The step starts from a state that differs from the initial one and from that after one update,
    so that keeping, clearing and recreating it can be told apart.
    """
    once = observed.expected.opt_state
    if form(once) != form(observed.t.before.opt_state):
        return {}
    old = jax.tree_util.tree_map(lambda v: (1.5 * v).astype(v.dtype) if is_floating(v) else v, once)
    new = observed.calls.step(
        observed.t.before._replace(opt_state=old), observed.case
    ).state.opt_state
    expected = observed.update(observed.t.before.params, old)
    twice = observed.update(expected.params, expected.opt_state).opt_state
    trees = [old, new, expected.opt_state, twice, observed.initial.opt_state]
    if len({str(form(tree)) for tree in trees}) > 1:
        return {}
    leaves = [jax.tree_util.tree_leaves(take(tree, 0)) for tree in trees]
    fresh = jax.tree_util.tree_leaves(take(observed.fresh.opt_state, 0))
    wrong: list[tuple[list[Any], float]] = []
    for row in zip(*leaves, fresh, strict=True):
        values = [np.asarray(leaf, np.float64) for leaf in row]
        size = max(float(np.max(np.abs(values[place]), initial=0)) for place in (0, 2))
        if not equal(values[1], values[2], size):
            wrong.append((values, size))
    if not wrong:
        return {}
    names = {"old": (0,), "twice": (3,), "cleared": (4,), "fresh": (4, 5)}
    for name, places in names.items():
        if all(any(equal(row[1], row[place], size) for place in places) for row, size in wrong):
            return {"opt_state": name}
    numbers = np.concatenate([np.ravel(row[1]) for row, _ in wrong])
    kind = narrow_type(numbers, float(np.max(np.abs(numbers))))
    return {"opt_state": "rounded", "opt_state_type": kind} if kind else {"opt_state": "other"}


def gradient(observed: ObservedCase) -> Clues:
    """Return the factor between each leaf's gradient and the slope of the reported loss."""
    grads, params = observed.t.info.grads, observed.t.before.params
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
    noise = LOOSE * largest(floats(grads))
    slopes = observed.bounds.slopes(observed.t.before, observed.case, directions)
    for name, grad, direction, slope in zip(
        names, jax.tree_util.tree_leaves(grads), along, slopes, strict=True
    ):
        got = float(np.sum(np.asarray(grad[0], np.float64) * direction))
        want, allowed = float(slope.value[0]), float(slope.allowed[0])
        allowed += LOOSE * float(np.max(np.abs(grad[0]))) * direction.size
        if not bool(slope.reliable[0]) or max(abs(got), abs(want)) <= noise:
            continue  # nothing to compare, as for a bias before a normalisation
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
