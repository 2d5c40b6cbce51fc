"""Slices, gathers and scatters of stacked arrays at dynamic indices.

Every array has two leading axes (rows, cases), each of full size or of size 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from bnverify.jaxpr.values import Array


def dynamic_slice(array: Array, starts: Sequence[Array], sizes: Sequence[int]) -> Array:
    """Return ``jax.lax.dynamic_slice``: starts out of bounds are clamped.

    Args:
        array: (rows or 1, cases or 1, *shape).
        starts: for each axis of ``shape``, an array (rows or 1, cases or 1).
        sizes: the slice's size along each axis.
    """
    firsts = _clamped(starts, array.shape[2:], sizes)
    if all(first.size == 1 for first in firsts):
        return array[_box(firsts, sizes)]
    return array[_places(firsts, sizes, array.shape[:2])]


def dynamic_update_slice(array: Array, update: Array, starts: Sequence[Array]) -> Array:
    """Return ``jax.lax.dynamic_update_slice``; arguments as for :func:`dynamic_slice`."""
    sizes = update.shape[2:]
    firsts = _clamped(starts, array.shape[2:], sizes)
    lead = np.broadcast_shapes(
        array.shape[:2], update.shape[:2], *(first.shape for first in firsts)
    )
    out = np.array(np.broadcast_to(array, lead + array.shape[2:]))
    if all(first.size == 1 for first in firsts):
        out[_box(firsts, sizes)] = update
    else:
        out[_places(firsts, sizes, lead)] = update
    return out


def _clamped(starts: Sequence[Array], shape: Sequence[int], sizes: Sequence[int]) -> list[Array]:
    return [
        np.clip(start.astype(np.int64), 0, length - size)
        for start, length, size in zip(starts, shape, sizes, strict=True)
    ]


def _box(firsts: Sequence[Array], sizes: Sequence[int]) -> tuple[slice, ...]:
    numbers = [first.item() for first in firsts]
    inside = [slice(at, at + size) for at, size in zip(numbers, sizes, strict=True)]
    return (slice(None), slice(None), *inside)


def _places(
    firsts: Sequence[Array], sizes: Sequence[int], lead: Sequence[int]
) -> tuple[Array, ...]:
    """Return an index array for each axis, rows and cases first; together they broadcast."""
    rank = len(sizes)
    ones = (1,) * rank
    rows = np.arange(lead[0]).reshape(-1, 1, *ones)
    cases = np.arange(lead[1]).reshape(-1, *ones)
    inner = []
    for axis, (first, size) in enumerate(zip(firsts, sizes, strict=True)):
        offsets = np.arange(size).reshape(-1, *(1,) * (rank - axis - 1))
        inner.append(first.reshape(*first.shape, *ones) + offsets)
    return (rows, cases, *inner)


def gather(
    operand: Array,
    indices: Array,
    numbers: Any,
    sizes: Sequence[int],
    *,
    clip: bool,
    fill: Any,
) -> Array:
    """Return ``jax.lax.gather``.

    Args:
        operand: (rows or 1, cases or 1, *shape).
        indices: (rows or 1, cases or 1, *batch, index depth).
        numbers: a ``jax.lax.GatherDimensionNumbers``.
        sizes: the slice's size along each axis of ``shape``.
        clip: whether to clamp slices that are out of bounds; otherwise they are ``fill``.
        fill: the value out of bounds.
    """
    if 0 in operand.shape:
        raise NotImplementedError("an empty array has no lines to pick from")
    batching = dict(
        zip(
            getattr(numbers, "operand_batching_dims", ()),  # from jax 0.4.31
            getattr(numbers, "start_indices_batching_dims", ()),
            strict=True,
        )
    )
    dropped = {*numbers.collapsed_slice_dims, *batching}
    where = _Placement(operand.shape, indices, numbers.start_index_map, batching, dropped, sizes)
    table = operand.transpose(0, 1, *(2 + axis for axis in (*where.indexed, *where.full)))
    table = table.reshape(-1, math.prod(where.full_shape))
    picked = table[where.linear(operand.shape[:2])]
    picked = picked.reshape(picked.shape[:-1] + where.full_shape)
    # (batch, partial, full) -> the axis order that the dimension numbers ask for.
    batch_rank, window = indices.ndim - 3, [*where.partial, *where.full]
    offsets = dict(zip(numbers.offset_dims, sorted(window), strict=True))
    batch = iter(range(2, 2 + batch_rank))
    order = [
        2 + batch_rank + window.index(offsets[axis]) if axis in offsets else next(batch)
        for axis in range(batch_rank + len(window))
    ]
    out = picked.transpose(0, 1, *order)
    if clip or where.inside.all():
        return out
    inside = where.inside.reshape(
        *where.inside.shape[:2],
        *(1 if axis in offsets else out.shape[2 + axis] for axis in range(out.ndim - 2)),
    )
    return np.where(inside, out, np.asarray(fill, operand.dtype))


def scatter(
    combine: np.ufunc | None,
    operand: Array,
    indices: Array,
    updates: Array,
    numbers: Any,
    *,
    clip: bool,
    unique: bool,
) -> Array:
    """Return one of the scatter operations of ``jax.lax``.

    Args:
        combine: how to combine an element with an update; None: the last update wins.
        operand: (rows or 1, cases or 1, *shape).
        indices: (rows or 1, cases or 1, *batch, index depth).
        updates: (rows or 1, cases or 1, *batch and window).
        numbers: a ``jax.lax.ScatterDimensionNumbers``.
        clip: whether to clamp updates that are out of bounds; otherwise they are dropped.
        unique: whether no element is updated twice.
    """
    if 0 in operand.shape:
        raise NotImplementedError("an empty array has no lines to write to")
    batching = dict(
        zip(
            getattr(numbers, "operand_batching_dims", ()),  # from jax 0.4.31
            getattr(numbers, "scatter_indices_batching_dims", ()),
            strict=True,
        )
    )
    dropped = {*numbers.inserted_window_dims, *batching}
    window = [axis for axis in range(operand.ndim - 2) if axis not in dropped]
    sizes = [1] * (operand.ndim - 2)
    for axis, of_updates in zip(window, numbers.update_window_dims, strict=True):
        sizes[axis] = updates.shape[2 + of_updates]
    to_operand = numbers.scatter_dims_to_operand_dims
    where = _Placement(operand.shape, indices, to_operand, batching, dropped, sizes)
    lead = np.broadcast_shapes(operand.shape[:2], indices.shape[:2], updates.shape[:2])
    order = [*where.indexed, *where.full]
    shape = lead + tuple([operand.shape[2 + axis] for axis in order])
    width = math.prod(where.full_shape)
    count = math.prod(shape) // width if width else 0
    out = np.empty((count + 1, width), operand.dtype)  # the last line takes dropped updates
    out[:-1].reshape(shape)[...] = operand.transpose(0, 1, *(2 + axis for axis in order))
    batch = [axis for axis in range(updates.ndim - 2) if axis not in numbers.update_window_dims]
    of_axis = dict(zip(window, numbers.update_window_dims, strict=True))
    mine = [*batch, *(of_axis[axis] for axis in (*where.partial, *where.full))]
    values = updates.transpose(0, 1, *(2 + axis for axis in mine))
    lines = where.linear(lead)
    if not clip:
        inside = where.inside.reshape(where.inside.shape + (1,) * len(where.partial))
        lines = np.where(inside, lines, count)
    lines = np.broadcast_to(lines, lead + lines.shape[2:])
    values = np.broadcast_to(values, lead + values.shape[2:]).reshape(lines.size, width)
    lines = lines.reshape(-1)
    alone = math.prod(
        size for i, size in enumerate(indices.shape[2:-1]) if i not in batching.values()
    )
    if combine is None:
        out[lines] = values
    elif unique or alone == 1:
        out[lines] = combine(out[lines], values)
    else:
        flat = (lines[:, None] * width + np.arange(width)).reshape(-1)
        combine.at(out.reshape(-1), flat, values.reshape(-1))
    back = np.argsort(order)
    return out[:-1].reshape(shape).transpose(0, 1, *(2 + axis for axis in back))


class _Placement:
    """Where the slices of a gather or scatter lie in the operand.

    Attributes:
        full: axes of the operand that every slice spans.
        full_shape: their sizes.
        indexed: all other axes.
        partial: the indexed axes along which a slice has an extent, and so has the result.
        inside: whether each slice is in bounds, (rows or 1, cases or 1, *batch).
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        indices: Array,
        index_map: Sequence[int],
        batching: dict[int, int],
        dropped: set[int],
        sizes: Sequence[int],
    ) -> None:
        shape = shape[2:]
        axes = range(len(shape))
        window = [axis for axis in axes if axis not in dropped]
        self.full = [a for a in window if sizes[a] == shape[a] and a not in index_map]
        self.full_shape = tuple([shape[axis] for axis in self.full])
        self.partial = [axis for axis in window if axis not in self.full]
        self.indexed = [axis for axis in axes if axis not in self.full]
        self._shape = tuple([shape[axis] for axis in self.indexed])
        batch = indices.shape[2:-1]
        tail = (1,) * len(self.partial)
        self._rank = len(batch) + len(tail)
        self.inside = np.ones((1, 1, *batch), bool)
        self._index: list[Array] = [np.zeros((1, 1, *batch, *tail), np.int64)] * len(self._shape)
        for component, axis in enumerate(index_map):
            start = indices[..., component].astype(np.int64)
            last = shape[axis] - sizes[axis]
            self.inside = self.inside & (start >= 0) & (start <= last)
            start = np.clip(start, 0, last)
            self._index[self.indexed.index(axis)] = start.reshape(start.shape + tail)
        for axis, of_indices in batching.items():
            along = np.arange(shape[axis]).reshape(-1, *(1,) * (len(batch) - of_indices - 1), *tail)
            self._index[self.indexed.index(axis)] = np.broadcast_to(along, (1, 1, *batch, *tail))
        for i, axis in enumerate(self.partial):
            place = self.indexed.index(axis)
            offset = np.arange(sizes[axis]).reshape(-1, *tail[i + 1 :])
            self._index[place] = self._index[place] + offset

    def linear(self, lead: tuple[int, int]) -> Array:
        """Return each element's line number in the operand reshaped to (lead * indexed, full).

        The result is (rows or 1, cases or 1, *batch, *partial); ``lead`` is the operand's.
        """
        place = np.arange(lead[0] * lead[1]).reshape(*lead, *(1,) * self._rank)
        for size, index in zip(self._shape, self._index, strict=True):
            place = place * size + index
        return place
