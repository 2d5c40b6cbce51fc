"""Errors measured in units of the error allowed: the arithmetic that laws share.

Laws run with 64-bit types on, so that their own arithmetic adds no error worth counting to the
float32 values they judge. A residual is at most 1 where the law holds, infinite where a value
is not finite though it should be, and ``UNTRIGGERED`` where there was nothing to compare.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bnverify.laws.law import UNTRIGGERED
from bnverify.lazy import jax, jnp
from bnverify.subject import Tree


def wide(value: Any) -> Any:
    """Return ``value`` in the widest float at hand: float64 where 64-bit types are on."""
    return jnp.asarray(value).astype(jnp.result_type(float))


def unit(value: Any) -> float:
    """Return u, the largest relative error of one rounding in the dtype of ``value``."""
    dtype = jnp.asarray(value).dtype
    return float(jnp.finfo(dtype).eps) / 2 if jnp.issubdtype(dtype, jnp.floating) else 0.0


def smallest(value: Any) -> float:
    """Return the smallest normal number of the dtype: below it float32 may flush to zero."""
    dtype = jnp.asarray(value).dtype
    return float(jnp.finfo(dtype).tiny) if jnp.issubdtype(dtype, jnp.floating) else 0.0


def residual(actual: Any, expected: Any, allowed: Any) -> Any:
    """Return the worst error of ``actual`` in units of ``allowed``, a scalar.

    Elements whose expected value or allowance leaves the range of the actual value's dtype are
    not compared. An error where none is allowed is infinite, and so is an actual value that is
    not finite though the expected one is.
    """
    largest = _largest(actual)
    actual, expected, allowed = wide(actual), wide(expected), wide(allowed)
    compared = jnp.abs(expected) + allowed <= largest  # false for NaN and infinity too
    error = jnp.where(compared, jnp.abs(actual - expected), 0.0)
    error = jnp.where(jnp.isfinite(error), error, jnp.inf)
    ratio = jnp.where(error == 0, 0.0, error / jnp.where(allowed > 0, allowed, 0.0))
    return worst_of([jnp.max(jnp.where(compared, ratio, UNTRIGGERED), initial=UNTRIGGERED)])


def _largest(value: Any) -> float:
    dtype = jnp.asarray(value).dtype
    return float(jnp.finfo(dtype if jnp.issubdtype(dtype, jnp.floating) else jnp.float32).max)


def worst_of(residuals: list[Any]) -> Any:
    """Return the largest of some residuals; untriggered where there is none."""
    worst = jnp.asarray(UNTRIGGERED, jnp.result_type(float))
    for value in residuals:
        worst = jnp.maximum(worst, value)
    return worst


def trees(function: Callable[..., Any], *operands: Tree, elementwise: bool = True) -> Any:
    """Return the worst residual that ``function`` gives over the leaves of alike trees.

    Trees that are not alike give an infinite residual: there the values cannot be compared,
    and a law of structure says why.

    Args:
        function: takes a leaf of each tree.
        operands: the trees.
        elementwise: whether it judges each element by itself. Then it is given all leaves of the
            same dtypes at once, as one long array: a program that compiles as fast for a hundred
            layers as for one.
    """
    leaves, structure = jax.tree_util.tree_flatten(operands[0])
    columns = [leaves]
    for tree in operands[1:]:
        others, other_structure = jax.tree_util.tree_flatten(tree)
        if other_structure != structure:
            return jnp.asarray(jnp.inf, jnp.result_type(float))
        columns.append(others)
    rows = list(zip(*columns, strict=True))
    if any(len({jnp.shape(leaf) for leaf in row}) > 1 for row in rows):
        return jnp.asarray(jnp.inf, jnp.result_type(float))
    return worst_of([function(*row) for row in (_joined(rows) if elementwise else rows)])


def _joined(rows: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """Return rows of leaves of equal shapes, those of the same dtypes as one row of long leaves."""
    alike: dict[Any, list[tuple[Any, ...]]] = {}
    for row in rows:
        alike.setdefault(tuple(jnp.asarray(leaf).dtype for leaf in row), []).append(row)
    return [
        tuple(
            jnp.concatenate([jnp.ravel(leaf) for leaf in leaves])
            for leaves in zip(*group, strict=True)
        )
        for group in alike.values()
    ]


def same(actual: Tree, expected: Tree) -> Any:
    """Return 0 where two trees are equal to the bit of every finite value, else infinity."""
    return trees(lambda a, e: residual(a, e, jnp.zeros_like(wide(e))), actual, expected)


UNDERFLOW = 2.0**16
"""How much a step may magnify what it flushed to zero: by 1 / sqrt(epsilon) = 316 and a kernel."""


def within_noise(actual: Tree, expected: Tree, noise: Tree) -> Any:
    """Return the residual of two float32 runs of one computation: each may err by ``noise``."""

    def leaf(a: Any, e: Any, n: Any) -> Any:
        return residual(a, e, 2 * n + UNDERFLOW * smallest(a))

    return trees(leaf, actual, expected, noise)


def when(condition: Any, value: Any) -> Any:
    """Return the residual where ``condition`` holds, else untriggered."""
    return jnp.where(condition, value, UNTRIGGERED)


def floats(tree: Tree) -> list[Any]:
    """Return the floating-point leaves of ``tree``: the only ones that can be averages."""
    leaves = jax.tree_util.tree_leaves(tree)
    return [leaf for leaf in leaves if jnp.issubdtype(jnp.asarray(leaf).dtype, jnp.floating)]


def widest(tree: Tree) -> Any:
    """Return the largest magnitude in ``tree``, a scalar; 0 where it has no numbers."""
    magnitudes = [jnp.max(jnp.abs(wide(leaf)), initial=0.0) for leaf in floats(tree)]
    return jnp.max(jnp.stack(magnitudes)) if magnitudes else jnp.zeros(())


def all_finite(tree: Tree) -> Any:
    """Return whether every value in ``tree`` is finite, a scalar bool."""
    finite = [jnp.all(jnp.isfinite(leaf)) for leaf in floats(tree)]
    return jnp.all(jnp.stack(finite)) if finite else jnp.asarray(True)
