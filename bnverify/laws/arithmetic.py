"""What laws compute with: errors in units of the error allowed, for many cases at once.

**Axis 0 is the cases.** Every leaf of a stacked transition has shape (K, ...), or (1, ...) where it
is the same in all cases. What is asked of a case, a residual or a condition, has shape (K,), and
again (1,) where it is the same for all. The functions here reduce all axes but that one, so a law
reads as if it were about a single case.

A residual is at most 1 where the law holds, infinite where a value is not finite though it should
be, and ``UNTRIGGERED`` where there was nothing to compare. All arithmetic is in float64, which adds
no error worth counting to the float32 values that are judged.

Array functions come from ``xp``: NumPy, or another library with NumPy's functions inside
``array_namespace``. So nothing is written in place, no array is indexed by a mask, and no ``if`` asks
for a value. NumPy warns about overflow and invalid values, which the masks settle: the laws run
under ``np.errstate(all="ignore")`` (see ``bnverify.laws.law``), and other callers should, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import numpy as np

from bnverify.laws.mismatch import watch
from bnverify.lazy import jax, jnp
from bnverify.model import LayerInput, Tree
from bnverify.pytree import is_floating, path_name
from bnverify.reruns import huge, old_weight

_NAMESPACE: ContextVar[Any] = ContextVar("array namespace", default=np)


class _Namespace:
    """Stands for the library that array functions are taken from at the moment."""

    def __getattr__(self, name: str) -> Any:
        return getattr(_NAMESPACE.get(), name)


xp: Any = _Namespace()


@contextmanager
def array_namespace(module: Any) -> Iterator[None]:
    """Take array functions from ``module`` instead of NumPy within this context.

    Args:
        module: a library with NumPy's functions; ``jax.numpy`` needs 64-bit types switched on.
    """
    token = _NAMESPACE.set(module)
    try:
        yield
    finally:
        _NAMESPACE.reset(token)


UNTRIGGERED = -1.0
"""The residual of a case that does not reach a law's precondition. Errors are never negative."""

UNDERFLOW = 2.0**16
"""How much a step may magnify what it flushed to zero: by 1 / sqrt(epsilon) = 316 and a kernel."""


# Single values: width, precision, and shapes that fit each other.


def wide(value: Any) -> Any:
    """Return ``value`` in float64."""
    return xp.asarray(value, dtype=np.float64)


def unit(value: Any) -> float:
    """Return u, the largest relative error of one rounding in the dtype of ``value``; 0 of integers."""
    return float(jnp.finfo(value.dtype).eps) / 2 if is_floating(value) else 0.0


def smallest(value: Any) -> float:
    """Return the smallest normal number of the dtype: below it float32 may flush to zero."""
    return float(jnp.finfo(value.dtype).tiny) if is_floating(value) else 0.0


def _largest(value: Any) -> float:
    return float(jnp.finfo(value.dtype if is_floating(value) else np.float32).max)


def per_case(values: Any, leaf: Any) -> Any:
    """Return one number for each case, (K,), in a shape that broadcasts against a leaf, (K, ...)."""
    return values.reshape(values.shape + (1,) * (leaf.ndim - 1))


def numbers(value: Any) -> Any:
    """Return one number for each case, (K,), given as (K,) or as (K, 1).

    Raises:
        ValueError: a case has several numbers.
    """
    if value.shape[1:] not in {(), (1,)}:
        raise ValueError(f"expected one number for each case, got shape {value.shape}")
    return value.reshape(value.shape[:1])


# Over all axes but that of the cases.


def _axes(value: Any) -> tuple[int, ...]:
    return tuple(range(1, value.ndim))


def all_over(condition: Any) -> Any:
    """Return whether ``condition``, (K, ...), is true throughout a case, (K,)."""
    return xp.all(condition, axis=_axes(condition))


def any_over(condition: Any) -> Any:
    """Return whether ``condition``, (K, ...), is true anywhere in a case, (K,)."""
    return xp.any(condition, axis=_axes(condition))


def sum_over(value: Any) -> Any:
    """Return the sum of ``value``, (K, ...), within a case, (K,)."""
    return xp.sum(value, axis=_axes(value))


def max_over(value: Any, initial: float) -> Any:
    """Return the largest of ``value``, (K, ...), within a case, (K,); at least ``initial``."""
    return xp.max(value, axis=_axes(value), initial=initial)


def min_over(value: Any, initial: float) -> Any:
    """Return the smallest of ``value``, (K, ...), within a case, (K,); at most ``initial``."""
    return xp.min(value, axis=_axes(value), initial=initial)


# Residuals.


def residual(
    actual: Any, expected: Any, allowed: Any, *, of: Any = None, quantity: str = ""
) -> Any:
    """Return the worst error of ``actual`` in units of ``allowed``, (K,).

    Elements whose expected value or allowance leaves the range of the actual value's dtype are
    not compared. An error where none is allowed is infinite, and so is an actual value that is
    not finite though the expected one is.

    Args:
        actual: an array, (K, ...).
        expected: (K, ...) of the same rank; or (K,), one number for each case; or a number.
        allowed: likewise; not negative.
        of: the leaf that ``actual`` was derived from, to name it in a message; by default itself.
        quantity: what was derived from it, in words.

    Raises:
        ValueError: the ranks or shapes do not fit.
    """
    largest, named = _largest(actual), actual if of is None else of
    actual, expected, allowed = _aligned(actual, expected, allowed)
    compared = xp.abs(expected) + allowed <= largest  # false for NaN and infinity too
    error = xp.where(compared, xp.abs(actual - expected), 0.0)
    error = xp.where(xp.isfinite(error), error, np.inf)
    ratio = xp.where(error == 0, 0.0, error / xp.where(allowed > 0, allowed, 0.0))
    ratio = xp.where(compared, ratio, UNTRIGGERED)
    if (told := watch()) is not None:
        told.see(named, ratio, (actual, expected, allowed), quantity)
    return max_over(ratio, initial=UNTRIGGERED)


def _aligned(*values: Any) -> list[Any]:
    """Return float64 arrays of one rank; what is one number for each case broadcasts."""
    arrays = [wide(value) for value in values]
    rank = max(1, *(array.ndim for array in arrays))
    if {array.ndim for array in arrays} - {0, 1, rank}:  # else NumPy would align the last axes
        raise ValueError(f"cannot compare shapes {[array.shape for array in arrays]}")
    return [
        array if array.ndim == rank else array.reshape((-1,) + (1,) * (rank - 1))
        for array in arrays
    ]


def worst_of(residuals: list[Any]) -> Any:
    """Return the largest of some residuals, (K,); untriggered where there is none."""
    worst = xp.full(1, UNTRIGGERED)
    for value in residuals:
        worst = xp.maximum(worst, value)
    return worst


def when(condition: Any, value: Any) -> Any:
    """Return the residual where ``condition`` holds, else untriggered."""
    return xp.where(condition, value, UNTRIGGERED)


def holds_if(condition: Any) -> Any:
    """Return the residual of what holds or does not, with no degrees between: 0 or infinity."""
    return xp.where(condition, 0.0, np.inf)


def never() -> Any:
    """Return the residual of what cannot be compared at all, and so cannot hold."""
    if (told := watch()) is not None:
        told.comparable = False
    return xp.full(1, np.inf)


# Trees.


def alike(*operands: Tree) -> list[tuple[Any, ...]] | None:
    """Return the leaves of some trees side by side; None where structures or shapes differ.

    Numbers of cases may differ, see the module's docstring.
    """
    flat = [jax.tree_util.tree_flatten(tree) for tree in operands]
    if any(structure != flat[0][1] for _, structure in flat):
        return None
    rows = list(zip(*(leaves for leaves, _ in flat), strict=True))
    if any(len({leaf.shape[1:] for leaf in row}) > 1 for row in rows):
        return None
    return rows


def trees(function: Callable[..., Any], *operands: Tree) -> Any:
    """Return the worst residual that ``function`` gives over the leaves of alike trees, (K,).

    Trees that are not alike give an infinite residual: there the values cannot be compared,
    and a law of structure says why.

    Args:
        function: takes a leaf of each tree, returns a residual, (K,).
        operands: the trees.
    """
    rows = alike(*operands)
    if rows is None:
        return never()
    told, residuals = watch(), []
    for row in rows:
        if told is not None:
            told.row = row
        residuals.append(function(*row))
    if told is not None:
        told.row = ()
    return worst_of(residuals)


def same(actual: Tree, expected: Tree) -> Any:
    """Return 0 where two trees are equal to the bit of every finite value, else infinity, (K,)."""
    return trees(lambda a, e: residual(a, e, 0.0), actual, expected)


def frozen(t: Any, paths: Sequence[str]) -> Any:
    """Return 0 where a step leaves leaves of the state as they are, else infinity, (K,).

    Args:
        t: a transition.
        paths: of the leaves, the first segment a field of the State.
    """
    before, after = (
        {
            f"{field}/{path_name(path)}": leaf
            for field, tree in state._asdict().items()
            for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
        }
        for state in (t.before, t.after)
    )
    kept = [path for path in paths if path in before and path in after]
    return same({path: after[path] for path in kept}, {path: before[path] for path in kept})


def within_noise(actual: Tree, expected: Tree, noise: Tree) -> Any:
    """Return the residual of two float32 runs of one computation: each may err by ``noise``."""

    def leaf(a: Any, e: Any, n: Any) -> Any:
        return residual(a, e, 2 * wide(n) + UNDERFLOW * smallest(a))

    return trees(leaf, actual, expected, noise)


def differs(a: Tree, b: Tree) -> Any:
    """Return whether two trees differ anywhere, (K,); NaN equals NaN, other shapes differ.

    Raises:
        ValueError: they have different numbers of leaves.
    """
    found = xp.zeros(1, dtype=bool)
    leaves = zip(jax.tree_util.tree_leaves(a), jax.tree_util.tree_leaves(b), strict=True)
    for one, other in leaves:
        if one.shape[1:] != other.shape[1:]:
            return xp.ones(1, dtype=bool)
        both_nan = xp.isnan(wide(one)) & xp.isnan(wide(other))
        found = found | any_over((one != other) & ~both_nan)
    return found


def floats(tree: Tree) -> list[Any]:
    """Return the floating-point leaves of ``tree``: the only ones that can be averages."""
    return [leaf for leaf in jax.tree_util.tree_leaves(tree) if is_floating(leaf)]


def widest(tree: Tree) -> Any:
    """Return the largest magnitude in ``tree``, (K,); 0 where it has no floating-point numbers."""
    largest = xp.zeros(1)
    for leaf in floats(tree):
        largest = xp.maximum(largest, max_over(xp.abs(wide(leaf)), initial=0.0))
    return largest


def all_finite(tree: Tree) -> Any:
    """Return whether every value in ``tree`` is finite, (K,)."""
    finite = xp.ones(1, dtype=bool)
    for leaf in floats(tree):
        finite = finite & all_over(xp.isfinite(leaf))
    return finite


# The moving average that a step keeps, measured from outside: from statistics of 0 a step writes
# (1 - m) b, from a huge S it writes m S + (1 - m) b.


def momentum(zero: Any, high: Any) -> Any:
    """Return the measured weight m of the old value, elementwise.

    Args:
        zero: what a step makes of statistics of 0, a floating-point leaf.
        high: what it makes of a huge one, see ``bnverify.reruns.huge``.
    """
    return old_weight(wide(zero), wide(high), zero.dtype)


def measurable(zero: Any) -> Any:
    """Return where (1 - m) b is so small beside S that m is read to the last place."""
    return xp.abs(wide(zero)) <= unit(zero) * huge(zero.dtype)


def folded(old: Any, new: Any, zero: Any, high: Any) -> Any:
    """Return how far ``new`` is from m ``old`` + (1 - m) b, over the error allowed, (K,).

    ``batch_stats_change_only_by_ema`` derives the error: 8 u (|m old| + |(1 - m) b|).

    Args:
        old: what a step started from; a leaf of any dtype, of which only floating ones average.
        new: what it made of it.
        zero: what it makes of 0.
        high: what it makes of S.
    """
    if not is_floating(old):
        return worst_of([])
    kept = momentum(zero, high) * wide(old)
    scale = xp.abs(kept) + xp.abs(wide(zero))
    allowed = xp.where(measurable(zero), 8 * unit(new) * scale + smallest(new), np.inf)
    return residual(new, kept + wide(zero), allowed)


# The moments of what a normalisation layer was given: what its statistics should hold.


class Moments(NamedTuple):
    """Of each feature, over all rows that count.

    Attributes:
        mean: (K, *features).
        var: (K, *features), the biased variance.
        count: (K, *features), how many rows count.
    """

    mean: Any
    var: Any
    count: Any


def moments(given: LayerInput) -> Moments:
    """Return the moments of a layer's input, (K, R, *features), over its rows."""
    value, weights = _weighted(given)
    count = xp.sum(weights, axis=1)
    mean = xp.sum(value * weights, axis=1) / count
    # In two passes: no digits are lost to cancellation.
    squares = (value - xp.expand_dims(mean, 1)) ** 2
    return Moments(mean, xp.sum(squares * weights, axis=1) / count, count)


def apart_by(given: LayerInput, own: Moments, moved: Any) -> tuple[Any, Any]:
    """Return how far at most mean and variance move where each input moves by up to ``moved``.

    Args:
        given: a layer's input.
        own: its moments.
        moved: like the input's value, (K, R, *features).
    """
    value, weights = _weighted(given)
    moved = xp.where(weights > 0, moved, 0.0)
    deviation = xp.abs(value - xp.expand_dims(own.mean, 1))
    of_var = xp.sum((2 * deviation + moved) * moved * weights, axis=1) / own.count
    return xp.sum(moved * weights, axis=1) / own.count, of_var


def _weighted(given: LayerInput) -> tuple[Any, Any]:
    """Return a layer's input and the weights of its elements, alike in shape."""
    value = wide(given.value)
    if given.weights is None:
        return value, xp.ones_like(value)
    weights = xp.broadcast_to(wide(given.weights), value.shape)
    return xp.where(weights > 0, value, 0.0), weights  # 0 * inf is no 0
