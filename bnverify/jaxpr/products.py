"""Products of stacked matrices, batched into as few matmuls as possible.

Every array has two leading axes (rows, cases), each of full size or of size 1. Where only one of
two matrices varies along a leading axis, that axis is folded into the matrix: one large product
instead of many small ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from bnverify.jaxpr.values import Array


def product(a: Array, b: Array) -> Array:
    """Return the matrix products of two stacks.

    Args:
        a: (rows or 1, cases or 1, *batch, M, C).
        b: (rows or 1, cases or 1, *batch, C, N).

    Returns:
        (rows or 1, cases or 1, *batch, M, N), in any memory order.
    """
    a_alone = [axis for axis in (0, 1) if a.shape[axis] > 1 and b.shape[axis] == 1]
    b_alone = [axis for axis in (0, 1) if b.shape[axis] > 1 and a.shape[axis] == 1]
    if not a_alone and not b_alone:
        return _matmul(a, b)
    a, a_sizes = _fold(a, a_alone)
    b, b_sizes = _fold(b.swapaxes(-1, -2), b_alone)
    return _unfold(_matmul(a, b.swapaxes(-1, -2)), a_alone, a_sizes, b_alone, b_sizes)


def _fold(a: Array, alone: Sequence[int]) -> tuple[Array, list[int]]:
    """Fold the leading axes ``alone`` into the matrices' rows; also return their sizes."""
    sizes = [a.shape[axis] for axis in alone]
    if not alone:
        return a, sizes
    shape = [1 if axis in alone else size for axis, size in enumerate(a.shape)]
    shape[-2] *= math.prod(sizes)
    order = [axis for axis in range(a.ndim - 2) if axis not in alone]
    return a.transpose(*order, *alone, a.ndim - 2, a.ndim - 1).reshape(shape), sizes


def _unfold(
    out: Array,
    a_alone: Sequence[int],
    a_sizes: Sequence[int],
    b_alone: Sequence[int],
    b_sizes: Sequence[int],
) -> Array:
    """Undo ``_fold``: ``a_alone`` from the matrices' rows, ``b_alone`` from their columns."""
    stack, (m, n) = out.shape[:-2], out.shape[-2:]
    m, n = m // math.prod(a_sizes), n // math.prod(b_sizes)
    out = out.reshape(*stack, *a_sizes, m, *b_sizes, n)
    folded = [*range(len(stack), len(stack) + len(a_sizes))]
    folded += range(len(stack) + len(a_sizes) + 1, out.ndim - 1)
    for axis, now in zip((*a_alone, *b_alone), folded, strict=True):
        out = out.swapaxes(axis, now)
    return out.squeeze(tuple(folded))


def _matmul(a: Array, b: Array) -> Array:
    if a.shape[-1] == 1:
        return a * b
    out: Array = np.matmul(_for_blas(a), _for_blas(b))
    return out


def _for_blas(a: Array) -> Array:
    """Return ``a`` in a memory layout that BLAS accepts; NumPy is slow for others."""
    size, (rows, columns), (down, along) = a.itemsize, a.shape[-2:], a.strides[-2:]
    straight = along == size and down >= size * columns
    turned = down == size and along >= size * rows
    return a if straight or turned else np.ascontiguousarray(a)


def dot_general(
    a: Array,
    b: Array,
    contracting: tuple[Sequence[int], Sequence[int]],
    batch: tuple[Sequence[int], Sequence[int]],
) -> Array:
    """Return ``jax.lax.dot_general`` of two stacked arrays of one dtype.

    Args:
        a: (rows or 1, cases or 1, *shape).
        b: likewise.
        contracting: for each operand, the axes to sum over, not counting the leading two.
        batch: for each operand, the batch axes, not counting the leading two.
    """
    left, a_free = _matrices(a, batch[0], contracting[0])
    right, b_free = _matrices(b, batch[1], contracting[1])
    out = product(left, right.swapaxes(-1, -2))
    return out.reshape(out.shape[: 2 + len(batch[0])] + a_free + b_free)


def _matrices(
    a: Array, batch: Sequence[int], contracting: Sequence[int]
) -> tuple[Array, tuple[int, ...]]:
    """Return ``a`` as (rows, cases, *batch, free, contracted), and its free shape."""
    shape = a.shape[2:]
    free = [axis for axis in range(len(shape)) if axis not in batch and axis not in contracting]
    order = (0, 1, *(2 + axis for axis in (*batch, *free, *contracting)))
    size = math.prod([shape[axis] for axis in contracting])
    free_shape = tuple([shape[axis] for axis in free])
    out = a.transpose(order)
    return out.reshape(*out.shape[: 2 + len(batch)], math.prod(free_shape), size), free_shape
