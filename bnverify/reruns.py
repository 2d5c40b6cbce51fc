"""Counterfactual inputs: what the same step, or evaluation, is run on besides its own.

What a re-run changes is NumPy, so that nothing is compiled for it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np

from bnverify.case import Case
from bnverify.lazy import jax, jnp
from bnverify.pytree import is_floating, path_name
from bnverify.subject import State, Subject, Tree
from bnverify.transition import Outcome

Inputs = tuple[State, Case]

Seen = Mapping[str, Outcome]


def with_statistics(state: State, change: Callable[[Any], Any]) -> State:
    """Return ``state`` with ``change`` applied to every floating-point statistic."""
    return state._replace(batch_stats=_changed(state.batch_stats, change))


def with_params(state: State, change: Callable[[Any], Any]) -> State:
    """Return ``state`` with ``change`` applied to every floating-point param."""
    return state._replace(params=_changed(state.params, change))


def _changed(tree: Tree, change: Callable[[Any], Any]) -> Tree:
    def leaf(value: Any) -> Any:
        return change(value).astype(value.dtype) if is_floating(value) else value

    with np.errstate(over="ignore"):  # twice a large float16 is infinite, and is not compared
        return jax.tree_util.tree_map(leaf, tree)


def huge(dtype: Any) -> float:
    """Return the power of two that stands for a huge statistic: far from overflow, exact."""
    return float(2.0 ** int(0.8 * jnp.finfo(dtype).maxexp))


def other_statistic(value: Any) -> Any:
    """Return another value for a statistic: never the same, always positive, as variances are."""
    return 2 * abs(value) + 1


def other_param(value: Any) -> Any:
    """Return another value for a param, moderate where that is: zeros and ones move, too."""
    return 0.5 - 0.75 * value


def other_inputs(case: Case) -> Case:
    """Return the case with 1, 2 or 3 added to each input: neighbouring rows never move alike.

    What all rows are moved by a normalisation takes away again.
    """
    rows, features = case.shape
    moves = 1 + np.add.outer(np.arange(rows), np.arange(features)) % 3
    return case._replace(x=case.x + moves.astype(np.float32))


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
"""Where a gradient errs by more of itself than this, its update is no longer predicted."""


def nudged(value: Any, pattern: int, by: float | None = None) -> Any:
    """Return ``value``, (K, ...), with its elements moved up and down.

    The pattern of signs is the same in each of the K cases.

    Args:
        value: what to move.
        pattern: of the signs.
        by: how far, in units of the value; None: by eight roundings.
    """
    by = 4 * float(jnp.finfo(value.dtype).eps) if by is None else by
    index = np.arange(value.shape[-1] if value.ndim > 1 else 1)
    signs = 1 - 2 * ((index * (2654435769, 0, 1)[pattern] >> (4 if pattern == 0 else 0)) % 2)
    moved = value * (1 + by * signs)
    return moved.reshape(value.shape)


def nudged_inputs(grads: Tree, state: State) -> list[tuple[Tree, State]]:
    """Return what an optimizer is given, its gradients nudged, and its state where it keeps one."""
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
    """Return how far the biases before a normalisation are moved: in proportion to the batch."""
    return 0.25 * abs(case.x).mean(axis=(-2, -1))


def shift_biases(subject: Subject, state: State, by: Any) -> State:
    """Return ``state`` with ``by`` added to every bias right before a normalisation."""

    def leaf(path: Any, value: Any) -> Any:
        if path_name(path) not in subject.biases_before_norm:
            return value
        return (value + np.expand_dims(by, -1)).astype(value.dtype)

    return state._replace(params=jax.tree_util.tree_map_with_path(leaf, state.params))


def old_weight(zero: Any, high: Any, dtype: Any) -> Any:
    """Return m of new = m * old + (1 - m) * b, from the new values for old = 0 and huge.

    Args:
        zero: what the step writes over 0, any shape, in float64.
        high: what it writes over ``huge(dtype)``, likewise.
        dtype: of the statistic.
    """
    return (high - zero) / huge(dtype)


def own_weight(zero: Any, high: Any, dtype: Any, xp: Any) -> Any:
    """Return 1 - m, see :func:`old_weight`.

    Where a decimal of four places lies within rounding of the measured value it is that
    decimal: people write 0.99, and 1 - m would otherwise lose two digits to the subtraction.

    Args:
        zero: as there.
        high: likewise.
        dtype: likewise.
        xp: numpy or jax.numpy.
    """
    weight = 1 - old_weight(zero, high, dtype)
    decimal = xp.round(weight * 1e4) / 1e4
    near = abs(weight - decimal) <= 4 * float(jnp.finfo(dtype).eps)
    return xp.where(near, decimal, weight)


def own_statistics(seen: Seen, state: State) -> State:
    """Return ``state`` with the batch's own moments b, found from outside: new(0) = (1 - m) b."""

    def leaf(old: Any, zero: Any, high: Any) -> Any:
        if not is_floating(old):
            return old
        zero, high = zero.astype(np.float64), high.astype(np.float64)
        # A statistic that never moves has no own weight; what it divides to is not compared.
        with np.errstate(all="ignore"):
            return (zero / own_weight(zero, high, old.dtype, np)).astype(old.dtype)

    own = jax.tree_util.tree_map(
        leaf,
        state.batch_stats,
        seen["zero_statistics"].state.batch_stats,
        seen["huge_statistics"].state.batch_stats,
    )
    return state._replace(batch_stats=own)


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
}
"""Re-runs of the same step on changed inputs."""

LATER_RERUNS: dict[str, Callable[[Seen, State, Case], Inputs]] = {
    "own_statistics": lambda seen, s, c: (own_statistics(seen, s), _rest(c)),
    "second_step": lambda seen, s, c: (seen["zero_lr"].state, _rest(c)),
}
"""Re-runs whose inputs come out of earlier ones: the batch's own moments, a step repeated."""


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
"""Re-evaluations: of another state or batch, of the rows reversed, from the batch's own moments
and from those moved by a few places."""

AVERAGE = ("step:zero_statistics", "step:huge_statistics")

FIRST = {
    "step:own_statistics": AVERAGE,
    "step:second_step": ("step:zero_lr",),
    "eval:own_statistics": AVERAGE,
    **{f"eval:nudged_statistics_{pattern}": AVERAGE for pattern in range(NUDGES)},
}
"""What must have run before."""
