"""The arithmetic of laws: errors relative to their tolerance, for many cases at once.

**Axis 0 is the cases.** Every leaf of a stacked transition has shape (K, ...), or (1, ...) if it is
the same in all cases. A residual or a condition has shape (K,), or (1,) if it is the same for all.
The functions here reduce over all other axes, so a law reads as if it were about a single case.

A residual is at most 1 if the law holds, infinite if a value is not finite but should be, and
``UNTRIGGERED`` if there was nothing to compare. All arithmetic is in float64, whose own rounding is
negligible next to the float32 values being judged.

Array functions come from ``xp``: NumPy, or inside ``array_namespace`` another library with NumPy's
functions. Therefore nothing is written in place, no array is indexed by a mask, and no ``if``
depends on a value. Overflow and invalid values are masked, so the laws run under
``np.errstate(all="ignore")`` (see ``bnverify.laws.law``), and other callers should, too.
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
    """Forwards to the current array library."""

    def __getattr__(self, name: str) -> Any:
        return getattr(_NAMESPACE.get(), name)


xp: Any = _Namespace()


@contextmanager
def array_namespace(module: Any) -> Iterator[None]:
    """Use ``module`` in place of NumPy within this context.

    Args:
        module: a library with NumPy's functions; ``jax.numpy`` needs ``jax_enable_x64``.
    """
    token = _NAMESPACE.set(module)
    try:
        yield
    finally:
        _NAMESPACE.reset(token)


UNTRIGGERED = -1.0
"""The residual of a case that does not meet a law's precondition. Errors are never negative."""

UNDERFLOW = 2.0**16
"""How much a step may magnify a flushed subnormal: by 1 / sqrt(epsilon) = 316, and by a kernel."""


# Dtypes, and shapes that broadcast.


def wide(value: Any) -> Any:
    """Return ``value`` in float64."""
    return xp.asarray(value, dtype=np.float64)


def unit(value: Any) -> float:
    """Return the unit roundoff u of the dtype of ``value``, 2^-24 for float32; 0 for integers."""
    return float(jnp.finfo(value.dtype).eps) / 2 if is_floating(value) else 0.0


def smallest(value: Any) -> float:
    """Return the smallest normal number of the dtype; smaller ones may be flushed to zero."""
    return float(jnp.finfo(value.dtype).tiny) if is_floating(value) else 0.0


def _largest(value: Any) -> float:
    return float(jnp.finfo(value.dtype if is_floating(value) else np.float32).max)


def per_case(values: Any, leaf: Any) -> Any:
    """Return one number per case, (K,), reshaped to broadcast against a leaf, (K, ...)."""
    return values.reshape(values.shape + (1,) * (leaf.ndim - 1))


def numbers(value: Any) -> Any:
    """Return one number per case, (K,), given as (K,) or (K, 1).

    Raises:
        ValueError: there are several numbers per case.
    """
    if value.shape[1:] not in {(), (1,)}:
        raise ValueError(f"expected one number for each case, got shape {value.shape}")
    return value.reshape(value.shape[:1])


# Reductions over all axes except that of the cases.


def _axes(value: Any) -> tuple[int, ...]:
    return tuple(range(1, value.ndim))


def all_over(condition: Any) -> Any:
    """Return whether ``condition``, (K, ...), is true everywhere in a case, (K,)."""
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
    """Return the largest |actual - expected| / allowed of each case, (K,).

    Elements are skipped if |expected| + allowed exceeds the range of the dtype of ``actual``. The
    residual is infinite if an element differs but ``allowed`` is 0, or if ``actual`` is not finite
    but ``expected`` is.

    Args:
        actual: an array, (K, ...).
        expected: (K, ...) of the same rank; or (K,), one number per case; or a number.
        allowed: likewise; not negative.
        of: the leaf that ``actual`` was computed from, for messages; by default ``actual`` itself.
        quantity: what was computed from it, in words.

    Raises:
        ValueError: the ranks or shapes do not match.
    """
    largest, named = _largest(actual), actual if of is None else of
    actual, expected, allowed = _aligned(actual, expected, allowed)
    compared = xp.abs(expected) + allowed <= largest  # also False for NaN and infinity
    error = xp.where(compared, xp.abs(actual - expected), 0.0)
    error = xp.where(xp.isfinite(error), error, np.inf)
    ratio = xp.where(error == 0, 0.0, error / xp.where(allowed > 0, allowed, 0.0))
    ratio = xp.where(compared, ratio, UNTRIGGERED)
    if (told := watch()) is not None:
        told.see(named, ratio, (actual, expected, allowed), quantity)
    return max_over(ratio, initial=UNTRIGGERED)


def _aligned(*values: Any) -> list[Any]:
    """Return float64 arrays of one rank; one number per case, (K,), becomes (K, 1, ...)."""
    arrays = [wide(value) for value in values]
    rank = max(1, *(array.ndim for array in arrays))
    if {array.ndim for array in arrays} - {0, 1, rank}:  # NumPy would align the last axes
        raise ValueError(f"cannot compare shapes {[array.shape for array in arrays]}")
    return [
        array if array.ndim == rank else array.reshape((-1,) + (1,) * (rank - 1))
        for array in arrays
    ]


def worst_of(residuals: list[Any]) -> Any:
    """Return the elementwise maximum of residuals, (K,); ``UNTRIGGERED`` if there are none."""
    worst = xp.full(1, UNTRIGGERED)
    for value in residuals:
        worst = xp.maximum(worst, value)
    return worst


def when(condition: Any, value: Any) -> Any:
    """Return the residual where ``condition`` holds, else ``UNTRIGGERED``."""
    return xp.where(condition, value, UNTRIGGERED)


def holds_if(condition: Any) -> Any:
    """Return 0 where ``condition`` is true, else infinity."""
    return xp.where(condition, 0.0, np.inf)


def never(*operands: Tree) -> Any:
    """Return an infinite residual, for trees that cannot be compared.

    Args:
        operands: the tree that is judged, then those that it should be like.
    """
    if (told := watch()) is not None:
        told.see_unlike(*operands)
    return xp.full(1, np.inf)


# Trees.


def alike(*operands: Tree) -> list[tuple[Any, ...]] | None:
    """Return one tuple of leaves for each place of several trees; None if they do not match.

    They match if structures and shapes agree, except for axis 0: see the module's docstring.
    """
    flat = [jax.tree_util.tree_flatten(tree) for tree in operands]
    if any(structure != flat[0][1] for _, structure in flat):
        return None
    rows = list(zip(*(leaves for leaves, _ in flat), strict=True))
    if any(len({leaf.shape[1:] for leaf in row}) > 1 for row in rows):
        return None
    return rows


def trees(function: Callable[..., Any], *operands: Tree) -> Any:
    """Return the largest residual of ``function`` over the leaves of matching trees, (K,).

    The residual is infinite if structures or shapes differ.

    Args:
        function: takes a leaf of each tree, returns a residual, (K,).
        operands: the trees.
    """
    rows = alike(*operands)
    if rows is None:
        return never(*operands)
    told, residuals = watch(), []
    for row in rows:
        if told is not None:
            told.row = row
        residuals.append(function(*row))
    if told is not None:
        told.row = ()
    return worst_of(residuals)


def same(actual: Tree, expected: Tree) -> Any:
    """Return 0 if all finite values of two trees are equal, else infinity, (K,)."""
    return trees(lambda a, e: residual(a, e, 0.0), actual, expected)


def frozen(t: Any, paths: Sequence[str]) -> Any:
    """Return 0 if a step does not change certain leaves of the state, else infinity, (K,).

    Args:
        t: a transition.
        paths: the paths of the leaves, such as "params/Dense_0/kernel".
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
    """Return the residual of two runs of the same computation, each of which may err by ``noise``."""

    def leaf(a: Any, e: Any, n: Any) -> Any:
        return residual(a, e, 2 * wide(n) + UNDERFLOW * smallest(a))

    return trees(leaf, actual, expected, noise)


def differs(a: Tree, b: Tree) -> Any:
    """Return whether two trees differ anywhere, (K,). NaN equals NaN; different shapes differ.

    Raises:
        ValueError: the trees have different numbers of leaves.
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
    """Return the floating-point leaves of ``tree``; only those can be moving averages."""
    return [leaf for leaf in jax.tree_util.tree_leaves(tree) if is_floating(leaf)]


def widest(tree: Tree) -> Any:
    """Return the largest magnitude in ``tree``, (K,); 0 if it has no floating-point leaf."""
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


# The moving average, measured from outside: from statistics of 0 a step writes (1 - m) b, from a
# huge S it writes m S + (1 - m) b.


def momentum(zero: Any, high: Any) -> Any:
    """Return the measured weight m of the old value, elementwise.

    Args:
        zero: the new statistics after a step from 0, a floating-point leaf.
        high: the new statistics after a step from S = ``bnverify.reruns.huge(dtype)``.
    """
    return old_weight(wide(zero), wide(high), zero.dtype)


def measurable(zero: Any) -> Any:
    """Return where (1 - m) b is small enough, relative to S, for m to be exact within rounding."""
    return xp.abs(wide(zero)) <= unit(zero) * huge(zero.dtype)


def folded(old: Any, new: Any, zero: Any, high: Any) -> Any:
    """Return |new - (m old + (1 - m) b)| divided by its tolerance, (K,).

    ``batch_stats_change_only_by_ema`` derives the tolerance: 8 u (|m old| + |(1 - m) b|). A new value
    that is not finite after a step from S is no such sum: the residual is then infinite.

    Args:
        old: a leaf of the old statistics; untriggered unless it is floating-point.
        new: the same leaf after the step.
        zero: the same leaf after a step from 0.
        high: the same leaf after a step from S.
    """
    if not is_floating(old):
        return worst_of([])
    kept = momentum(zero, high) * wide(old)
    scale = xp.abs(kept) + xp.abs(wide(zero))
    allowed = xp.where(measurable(zero), 8 * unit(new) * scale + smallest(new), np.inf)
    start = huge(zero.dtype)
    overflows = measurable(zero) & ~xp.isfinite(wide(high))
    from_huge = xp.where(overflows, wide(high), start)
    return worst_of(
        [
            residual(new, kept + wide(zero), allowed),
            residual(
                from_huge, start, start, of=high, quantity=f"update from old values of {start:.1g}"
            ),
        ]
    )


# The moments of a normalisation layer's input: what its statistics should average.


class Moments(NamedTuple):
    """The moments of each feature, over all rows that are not masked out.

    Attributes:
        mean: (K, *features).
        var: (K, *features), the biased variance.
        count: (K, *features), the number of rows, or their total weight.
    """

    mean: Any
    var: Any
    count: Any


def moments(given: LayerInput) -> Moments:
    """Return the moments of a layer's input, (K, R, *features), over its rows."""
    value, weights = _weighted(given)
    count = xp.sum(weights, axis=1)
    mean = xp.sum(value * weights, axis=1) / count
    # In two passes, to avoid cancellation.
    squares = (value - xp.expand_dims(mean, 1)) ** 2
    return Moments(mean, xp.sum(squares * weights, axis=1) / count, count)


def apart_by(given: LayerInput, own: Moments, moved: Any) -> tuple[Any, Any]:
    """Return how far mean and variance can move if each element moves by at most ``moved``.

    Args:
        given: a layer's input.
        own: its moments.
        moved: a bound for each element, (K, R, *features).
    """
    value, weights = _weighted(given)
    moved = xp.where(weights > 0, moved, 0.0)
    deviation = xp.abs(value - xp.expand_dims(own.mean, 1))
    of_var = xp.sum((2 * deviation + moved) * moved * weights, axis=1) / own.count
    return xp.sum(moved * weights, axis=1) / own.count, of_var


def _weighted(given: LayerInput) -> tuple[Any, Any]:
    """Return a layer's input and its weights, broadcast to one shape."""
    value = wide(given.value)
    if given.weights is None:
        return value, xp.ones_like(value)
    weights = xp.broadcast_to(wide(given.weights), value.shape)
    return xp.where(weights > 0, value, 0.0), weights  # avoids 0 * inf
