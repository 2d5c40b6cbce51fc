"""Counterfactual inputs: the changed states and cases on which a step or evaluation is run again.

The changes are made in NumPy, so nothing is compiled for them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np

from bnverify.lazy import jax, jnp
from bnverify.model import Case, Outcome, State, Subject, Tree
from bnverify.pytree import is_floating, path_name

Inputs = tuple[State, Case]

Seen = Mapping[str, Outcome]

LONG_SEED = np.int32(2**24 + 1)
"""A seed that float32 cannot represent: it reveals functions that convert their seed to float32."""

HALVES_LOST = np.int32(2**23 + 1)
"""A seed that float32 can represent, but not with a fraction."""


def with_statistics(state: State, change: Callable[[Any], Any]) -> State:
    """Return ``state`` with ``change`` applied to every floating-point statistic."""
    return state._replace(batch_stats=_changed(state.batch_stats, change))


def with_params(state: State, change: Callable[[Any], Any]) -> State:
    """Return ``state`` with ``change`` applied to every floating-point param."""
    return state._replace(params=_changed(state.params, change))


def _changed(tree: Tree, change: Callable[[Any], Any]) -> Tree:
    def leaf(value: Any) -> Any:
        return change(value).astype(value.dtype) if is_floating(value) else value

    with np.errstate(over="ignore"):  # twice a large float16 overflows and is then not compared
        return jax.tree_util.tree_map(leaf, tree)


def huge(dtype: Any) -> float:
    """Return a huge statistic for a dtype: a power of two, far from overflow."""
    return float(2.0 ** int(0.8 * jnp.finfo(dtype).maxexp))


def other_statistic(value: Any) -> Any:
    """Return a different value for a statistic; it is positive, so it may be a variance."""
    return 2 * abs(value) + 1


FAR = 2.0**13
"""How many times as large as what a batch adds an old statistic is, to tell its digits."""


def far_statistic(entered: Any) -> Any:
    """Return an old value beside which what a batch adds to it is small, in its last binary places.

    Args:
        entered: what the step writes over an old value of 0; where that is 0, the old value is 1.
    """
    return np.where(entered == 0, 1, FAR * entered).astype(entered.dtype)


def other_param(value: Any) -> Any:
    """Return a different value, of similar magnitude, for a param."""
    return 0.5 - 0.75 * value


def other_inputs(case: Case) -> Case:
    """Return the case with 1, 2 or 3 added to each input, differently in neighbouring rows.

    A normalisation would undo the same shift of all rows.
    """
    rows, features = case.shape
    moves = 1 + np.add.outer(np.arange(rows), np.arange(features)) % 3
    return case._replace(x=case.x + moves.astype(np.float32))


def constant_features(case: Case) -> Case:
    """Return the case with features that are the same in all rows: 1000.1, 0.1 or somewhat more.

    All of them for an even seed; for an odd one the first, and the others vary as before.
    """
    features, seed = np.arange(case.shape[1]), np.asarray(case.seed)[..., None, None]
    held = np.where(features % 2 == 0, 1000.1, 0.1) * (1 + seed % 97 / 97)
    some = (seed % 2 == 0) | (features == 0)
    return case._replace(x=np.where(some, held, case.x).astype(np.float32))


def other_padding(case: Case, weights: Any) -> Case:
    """Return the case with other inputs in the rows of weight 0.

    Args:
        case: the case.
        weights: how much each row counts, (..., N).
    """
    padding = np.asarray(weights)[..., None] == 0
    return case._replace(x=np.where(padding, other_inputs(case).x, case.x))


def other_targets(case: Case) -> Case:
    """Return the same case with 1 added to each target."""
    return case._replace(y=case.y + np.float32(1))


NUDGES = 3


SHAKEN = 2.0**-6
"""If a gradient has a larger relative error than this, its update is not predicted."""


def nudged(value: Any, pattern: int, by: float | None = None) -> Any:
    """Return ``value``, (K, ...), with each element perturbed, up or down.

    The pattern of signs is the same in all K cases.

    Args:
        value: the value to perturb.
        pattern: the number of the pattern of signs.
        by: the relative size of the perturbation; None: 8 u.
    """
    by = 4 * float(jnp.finfo(value.dtype).eps) if by is None else by
    index = np.arange(value.shape[-1] if value.ndim > 1 else 1)
    signs = 1 - 2 * ((index * (2654435769, 0, 1)[pattern] >> (4 if pattern == 0 else 0)) % 2)
    moved = value * (1 + by * signs)
    return moved.reshape(value.shape)


def nudged_inputs(grads: Tree, state: State) -> list[tuple[Tree, State]]:
    """Return perturbed (grads, state) pairs: first the gradients, then the optimizer state if any."""
    nudge = partial(nudged, pattern=0)
    found = [(_changed(grads, nudge), state)]
    if any(map(is_floating, jax.tree_util.tree_leaves(state.opt_state))):
        found.append((grads, state._replace(opt_state=_changed(state.opt_state, nudge))))
    return found


def shaken(grads: Tree) -> Tree:
    """Return gradients of which each element is off by ``SHAKEN`` of itself."""
    return _changed(grads, partial(nudged, pattern=0, by=SHAKEN))


def reverse_rows(case: Case) -> Case:
    """Return the same batch with its rows in reverse order."""
    return case._replace(x=case.x[..., ::-1, :], y=case.y[..., ::-1])


def double_batch(case: Case) -> Case:
    """Return the case with every row twice."""
    return case._replace(
        x=np.concatenate([case.x, case.x], axis=-2), y=np.concatenate([case.y, case.y], axis=-1)
    )


def shift(case: Case) -> Any:
    """Return the shift of the biases before a normalisation, in proportion to the batch, (...,)."""
    return 0.25 * abs(case.x).mean(axis=(-2, -1))


def shift_biases(subject: Subject, state: State, by: Any) -> State:
    """Return ``state`` with ``by`` added to every bias right before a normalisation."""

    def leaf(path: Any, value: Any) -> Any:
        if path_name(path) not in subject.biases_before_norm:
            return value
        return (value + np.expand_dims(by, -1)).astype(value.dtype)

    return state._replace(params=jax.tree_util.tree_map_with_path(leaf, state.params))


def old_weight(zero: Any, high: Any, dtype: Any) -> Any:
    """Return m of new = m * old + (1 - m) * b, from the new values for old = 0 and old = huge.

    Args:
        zero: the new statistic after a step from 0, any shape, float64.
        high: the new statistic after a step from ``huge(dtype)``, likewise.
        dtype: the dtype of the statistic.
    """
    return (high - zero) / huge(dtype)


def own_weight(zero: Any, high: Any, dtype: Any, xp: Any) -> Any:
    """Return 1 - m; see :func:`old_weight`.

    If a decimal with four places is within rounding of the measured value, it is returned instead:
    people write 0.99, and the subtraction 1 - m would lose two digits.

    Args:
        zero: see :func:`old_weight`.
        high: see :func:`old_weight`.
        dtype: the dtype of the statistic.
        xp: numpy or jax.numpy.
    """
    weight = 1 - old_weight(zero, high, dtype)
    decimal = xp.round(weight * 1e4) / 1e4
    near = abs(weight - decimal) <= 4 * float(jnp.finfo(dtype).eps)
    return xp.where(near, decimal, weight)


def own_statistics(seen: Seen, state: State) -> State:
    """Return ``state`` with the batch's own moments b as statistics; new(0) = (1 - m) b gives b."""

    def leaf(old: Any, zero: Any, high: Any) -> Any:
        if not is_floating(old):
            return old
        zero, high = zero.astype(np.float64), high.astype(np.float64)
        # If a statistic never changes, 1 - m is 0; the quotient is then not compared.
        with np.errstate(all="ignore"):
            return (zero / own_weight(zero, high, old.dtype, np)).astype(old.dtype)

    own = jax.tree_util.tree_map(
        leaf,
        state.batch_stats,
        seen["zero_statistics"].state.batch_stats,
        seen["huge_statistics"].state.batch_stats,
    )
    return state._replace(batch_stats=own)


def far_statistics(seen: Seen, state: State) -> State:
    """Return ``state`` with statistics far larger than what the batch adds to them."""

    def leaf(old: Any, entered: Any) -> Any:
        return far_statistic(entered) if is_floating(old) else old

    with np.errstate(over="ignore"):
        entered = seen["zero_statistics"].state.batch_stats
        return state._replace(batch_stats=jax.tree_util.tree_map(leaf, state.batch_stats, entered))


def _rest(case: Case) -> Case:
    return case._replace(lr=np.zeros_like(case.lr))


RERUNS: dict[str, Callable[[State, Case], Inputs]] = {
    "zero_statistics": lambda s, c: (with_statistics(s, np.zeros_like), c),
    "huge_statistics": lambda s, c: (
        with_statistics(s, lambda v: np.full(v.shape, huge(v.dtype))),
        c,
    ),
    "other_statistics": lambda s, c: (with_statistics(s, other_statistic), c),
    "other_params": lambda s, c: (with_params(s, other_param), c),
    "other_inputs": lambda s, c: (s, other_inputs(c)),
    "other_targets": lambda s, c: (s, other_targets(c)),
    "reversed_targets": lambda s, c: (s, c._replace(y=c.y[..., ::-1])),
    "zero_lr": lambda s, c: (s, _rest(c)),
    "reversed_rows": lambda s, c: (s, reverse_rows(c)),
    "doubled_batch": lambda s, c: (s, double_batch(c)),
    "constant_features": lambda s, c: (s, constant_features(c)),
}
"""Re-runs of the same step on changed inputs."""

LATER_RERUNS: dict[str, Callable[[Seen, State, Case], Inputs]] = {
    "own_statistics": lambda seen, s, c: (own_statistics(seen, s), _rest(c)),
    "second_step": lambda seen, s, c: (seen["zero_lr"].state, _rest(c)),
    "far_statistics": lambda seen, s, c: (far_statistics(seen, s), c),
}
"""Re-runs whose inputs depend on earlier re-runs: the batch's own moments, a second step, statistics far
larger than what a batch adds."""


def _nudge(pattern: int) -> Callable[[Seen, State, State, Case], Inputs]:
    return lambda seen, before, after, c: (
        with_statistics(own_statistics(seen, before), lambda v: nudged(v, pattern)),
        c,
    )


EVALS: dict[str, Callable[[Seen, State, State, Case], Inputs]] = {
    "other_statistics": lambda seen, before, after, c: (
        with_statistics(after, other_statistic),
        c,
    ),
    "other_inputs": lambda seen, before, after, c: (after, other_inputs(c)),
    "other_targets": lambda seen, before, after, c: (after, other_targets(c)),
    "reversed_rows": lambda seen, before, after, c: (after, reverse_rows(c)),
    "own_statistics": lambda seen, before, after, c: (own_statistics(seen, before), c),
    **{f"nudged_statistics_{pattern}": _nudge(pattern) for pattern in range(NUDGES)},
}
"""Re-evaluations: with another state or batch, with reversed rows, and with the batch's own moments,
exact or perturbed."""

AVERAGE = ("step:zero_statistics", "step:huge_statistics")

FIRST = {
    "step:own_statistics": AVERAGE,
    "step:second_step": ("step:zero_lr",),
    "step:far_statistics": ("step:zero_statistics",),
    "eval:own_statistics": AVERAGE,
    **{f"eval:nudged_statistics_{pattern}": AVERAGE for pattern in range(NUDGES)},
}
"""Name of a re-run -> the re-runs that it depends on."""
