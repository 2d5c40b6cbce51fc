"""Padding, convolutions and window reductions of stacked arrays.

Every array has two leading axes (rows, cases), each of full size or of size 1. Windows are extra
axes of a strided view; a convolution copies these patches once, in memory order, and multiplies
them with the kernel in one matmul.

Source: https://openxla.org/xla/operation_semantics
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided

from bnverify.jaxpr.products import product
from bnverify.jaxpr.values import Array

PATCHES = 2**22
"""The most bytes of patches that a convolution holds in memory at once."""


def pad(array: Array, value: Array, config: Sequence[tuple[int, int, int]]) -> Array:
    """Return ``jax.lax.pad``.

    Args:
        array: (rows or 1, cases or 1, *shape).
        value: (rows or 1, cases or 1), what to fill with.
        config: for each axis of ``shape`` how much goes before it (negative: is cut off), after
            it, and between two elements.
    """
    sizes, source, target = [], [], []
    for size, (low, high, between) in zip(array.shape[2:], config, strict=True):
        step = between + 1
        total = max(low + high + (size - 1) * step + 1 if size else low + high, 0)
        # Element i goes to low + i * step, where that is inside.
        first = max(-(low // step), 0)
        last = min(size, -((low - total) // step))
        sizes.append(total)
        source.append(slice(first, max(last, first)))
        start = low + first * step
        stop = low + (last - 1) * step + 1 if last > first else start
        target.append(slice(start, stop, step))
    lead = np.broadcast_shapes(array.shape[:2], value.shape[:2])
    out = np.empty((*lead, *sizes), array.dtype)
    out[...] = value.reshape(value.shape[:2] + (1,) * len(sizes))
    out[_inside(target)] = array[_inside(source)]
    return out


def convolve(
    lhs: Array,
    rhs: Array,
    *,
    strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
    lhs_dilation: Sequence[int],
    rhs_dilation: Sequence[int],
    specs: tuple[Sequence[int], Sequence[int], Sequence[int]],
    feature_groups: int,
    batch_groups: int,
) -> Array:
    """Return ``jax.lax.conv_general_dilated`` of two stacked arrays of one dtype.

    Args:
        lhs: the batch.
        rhs: the kernel.
        strides: the window's stride along each spatial axis.
        padding: (before, after) for each spatial axis; negative values crop.
        lhs_dilation: the batch's dilation along each spatial axis.
        rhs_dilation: the kernel's dilation along each spatial axis.
        specs: the axis numbers of ``lhs`` (batch, feature, *spatial), of ``rhs`` (output feature,
            input feature, *spatial) and of the result (batch, feature, *spatial).
        feature_groups: the number of groups of features.
        batch_groups: the number of groups of the batch.
    """
    (n_axis, c_axis, *space_axes), (o_axis, i_axis, *window_axes), out_spec = specs
    config = [(0, 0, 0)] * (lhs.ndim - 2)
    for axis, (low, high), by in zip(space_axes, padding, lhs_dilation, strict=True):
        config[axis] = (low, high, by - 1)
    if any(each != (0, 0, 0) for each in config):
        lhs = pad(lhs, np.zeros((1, 1), lhs.dtype), config)
    window = [rhs.shape[2 + axis] for axis in window_axes]
    space = [
        count_windows(lhs.shape[2 + axis], size, stride, by)
        for axis, size, stride, by in zip(space_axes, window, strides, rhs_dilation, strict=True)
    ]
    groups = feature_groups * batch_groups  # one of them is 1
    n, c = lhs.shape[2 + n_axis] // batch_groups, lhs.shape[2 + c_axis] // feature_groups
    o = rhs.shape[2 + o_axis] // groups
    step = lhs.strides[2:]
    # Each axis of the patches by name: its size, and its stride in the padded batch.
    axes = {"n": (n, step[n_axis]), "c": (c, step[c_axis])}
    axes["g"] = (groups, n * step[n_axis] if batch_groups > 1 else c * step[c_axis])
    for i, axis in enumerate(space_axes):
        axes[f"s{i}"] = (space[i], step[axis] * strides[i])
        axes[f"w{i}"] = (window[i], step[axis] * rhs_dilation[i])
    # Patches are copied in memory order, with the longest contiguous run innermost.
    places = sorted(
        (name for name in axes if name[0] in "ns"), key=lambda name: -abs(axes[name][1])
    )
    taps = sorted((name for name in axes if name[0] in "cw"), key=lambda name: -abs(axes[name][1]))
    taps_first = _run(axes, places) > _run(axes, taps)
    order = ["g", *taps, *places] if taps_first else ["g", *places, *taps]
    shape = tuple([axes[name][0] for name in order])
    jumps = tuple([axes[name][1] for name in order])
    rows = math.prod([axes[name][0] for name in places])
    depth = math.prod([axes[name][0] for name in taps])
    # The kernel as (rows, cases, groups, depth, o), with its taps in the order of the patches.
    place_of = {"c": i_axis} | {f"w{i}": axis for i, axis in enumerate(window_axes)}
    kernel = np.moveaxis(rhs, 2 + o_axis, 2)
    now = [axis - (axis > o_axis) for axis in (place_of[name] for name in taps)]
    kernel = kernel.transpose(0, 1, 2, *(3 + axis for axis in now))
    kernel = kernel.reshape(*rhs.shape[:2], groups, o, depth).swapaxes(-1, -2)

    def multiply(batch: Array, kernel: Array) -> Array:
        lead = batch.shape[:2]
        patches = as_strided(batch, lead + shape, batch.strides[:2] + jumps)
        if taps_first:
            patches = patches.reshape(*lead, groups, depth, rows).swapaxes(-1, -2)
        else:
            patches = patches.reshape(*lead, groups, rows, depth)
        return product(patches, kernel)

    lead = np.broadcast_shapes(lhs.shape[:2], rhs.shape[:2])
    parts = _parts(lhs.shape[:2], rows * depth * groups * lhs.itemsize)
    if len(parts) == 1:
        out = multiply(lhs, kernel)
    else:
        out = np.empty((*lead, groups, rows, o), lhs.dtype)
        for part in parts:
            _at(out, part)[...] = multiply(_at(lhs, part), _at(kernel, part))
    out = out.reshape(*lead, groups, *(axes[name][0] for name in places), o)
    # (g, places, o) -> n, (g, o), space -> the requested layout.
    position = {name: 3 + i for i, name in enumerate(places)}
    spatial = [position[f"s{i}"] for i in range(len(space))]
    out = out.transpose(0, 1, position["n"], 2, out.ndim - 1, *spatial)
    out = out.reshape(*lead, n, groups * o, *space)
    return out.transpose(0, 1, *(2 + axis for axis in np.argsort(out_spec)))


def _run(axes: dict[str, tuple[int, int]], names: Sequence[str]) -> int:
    """Return the number of contiguous elements along the innermost axes."""
    length, expected = 1, None
    for name in reversed(names):
        size, stride = axes[name]
        if size == 1:
            continue
        if expected is not None and stride != expected:
            break
        length, expected = length * size, stride * size
    return length


def _parts(lead: tuple[int, ...], each: int) -> list[tuple[slice, slice]]:
    """Split rows and cases so that each part's patches, ``each`` bytes per case, fit in PATCHES."""
    rows, cases = lead
    fit = max(PATCHES // max(each, 1), 1)
    return list(itertools.product(_cut(rows, fit // cases), _cut(cases, fit)))


def _cut(length: int, most: int) -> list[slice]:
    """Return slices of at most ``most`` elements; the full slice if one is enough."""
    if length <= max(most, 1):
        return [slice(None)]
    return [slice(at, at + max(most, 1)) for at in range(0, length, max(most, 1))]


def _at(array: Array, part: tuple[slice, slice]) -> Array:
    """Return a part of the rows and cases, and all of a leading axis of size 1."""
    rows, cases = (
        which if size > 1 else slice(None)
        for which, size in zip(part, array.shape[:2], strict=True)
    )
    return array[rows, cases]


def _inside(slices: Sequence[slice]) -> tuple[slice, ...]:
    """Return an index of all rows and cases, and ``slices`` of the other axes."""
    return (slice(None), slice(None), *slices)


def count_windows(length: int, size: int, stride: int, dilation: int) -> int:
    """Return the number of windows along an axis."""
    return max((length - (size - 1) * dilation - 1) // stride + 1, 0) if size else 0


def reduce_window(
    combine: np.ufunc,
    array: Array,
    identity: Any,
    *,
    window: Sequence[int],
    strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
    base_dilation: Sequence[int],
    window_dilation: Sequence[int],
) -> Array:
    """Return ``jax.lax.reduce_window`` with an associative and commutative ``combine``.

    Args:
        combine: of two elements.
        array: (rows or 1, cases or 1, *shape).
        identity: a number that changes nothing in ``combine``, to pad with.
        window: its size along each axis of ``shape``.
        strides: of the window, for each axis.
        padding: (before, after) for each axis.
        base_dilation: of the array, for each axis.
        window_dilation: of the window, for each axis.
    """
    array = _padded(array, identity, padding, base_dilation)
    places = zip(window, strides, window_dilation, strict=True)
    for axis, (size, stride, by) in enumerate(places, start=2):
        array = _reduce_along(combine, array, axis, size, stride, by)
    return array


def _padded(
    array: Array, value: Any, padding: Sequence[tuple[int, int]], dilation: Sequence[int]
) -> Array:
    config = [(*ends, by - 1) for ends, by in zip(padding, dilation, strict=True)]
    if all(each == (0, 0, 0) for each in config):
        return array
    return pad(array, np.full((1, 1), value, array.dtype), config)


def _reduce_along(
    combine: np.ufunc, array: Array, axis: int, size: int, stride: int, by: int
) -> Array:
    """Reduce windows along one axis."""
    count = count_windows(array.shape[axis], size, stride, by)
    if size == 1 and stride == 1:
        return array
    if size == 1 or count == 0 or count >= size:
        parts = [_take(array, axis, _every(tap * by, count, stride)) for tap in range(size)]
        out = parts[0]
        for i, part in enumerate(parts[1:]):
            out = combine(out, part, out=out if i else None)
        return out
    windows = np.moveaxis(array, axis, -1)
    shape = (*windows.shape[:-1], count, size)
    along = windows.strides[-1]
    windows = as_strided(windows, shape, (*windows.strides[:-1], along * stride, along * by))
    return np.moveaxis(combine.reduce(windows, axis=-1, dtype=array.dtype), -1, axis)


def _take(array: Array, axis: int, part: slice) -> Array:
    return array[(slice(None),) * axis + (part,)]


def _taps(
    window: Sequence[int], dilation: Sequence[int], count: Sequence[int], strides: Sequence[int]
) -> Iterator[tuple[slice, ...]]:
    """Yield, for each element of a window in row-major order, its positions over all windows."""
    for place in itertools.product(*map(range, window)):
        steps = zip(place, dilation, count, strides, strict=True)
        yield tuple([_every(at * by, n, stride) for at, by, n, stride in steps])


def _every(start: int, count: int, stride: int) -> slice:
    """Return a slice of ``count`` elements."""
    return slice(start, start + (count - 1) * stride + 1 if count else start, stride)


def select_and_scatter_add(
    selects: Callable[[Array, Array], Array],
    source: Array,
    operand: Array,
    *,
    window: Sequence[int],
    strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
) -> Array:
    """Add each element of ``source`` at the selected element of its window of ``operand``.

    Args:
        selects: ``selects(best, candidate)``: whether ``best`` stays selected.
        source: (rows or 1, cases or 1, *number of windows along each axis).
        operand: (rows or 1, cases or 1, *shape). Padding is never selected.
        window: the window's size along each axis of ``shape``.
        strides: the window's stride along each axis.
        padding: (before, after) for each axis.
    """
    ones = [1] * len(window)
    inside = _padded(np.ones((1, 1, *operand.shape[2:]), bool), False, padding, ones)
    padded = _padded(operand, 0, padding, ones)
    taps = list(_taps(window, ones, source.shape[2:], strides))
    best = np.zeros((*padded.shape[:2], *source.shape[2:]), padded.dtype)
    chosen = np.full(best.shape, -1)
    for i, tap in enumerate(taps):
        candidate, real = padded[_inside(tap)], inside[_inside(tap)]
        takes = real & ((chosen < 0) | ~selects(best, candidate))
        best, chosen = np.where(takes, candidate, best), np.where(takes, i, chosen)
    lead = np.broadcast_shapes(source.shape[:2], operand.shape[:2])
    out = np.zeros((*lead, *padded.shape[2:]), source.dtype)
    for i, tap in enumerate(taps):
        out[_inside(tap)] += np.where(chosen == i, source, 0)
    kept = [
        slice(max(low, 0), max(low, 0) + size)
        for (low, _), size in zip(padding, operand.shape[2:], strict=True)
    ]
    return out[_inside(kept)]


def select_and_gather_add(
    selects: Callable[[Array, Array], Array],
    tangents: Array,
    operand: Array,
    *,
    window: Sequence[int],
    strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
    base_dilation: Sequence[int],
    window_dilation: Sequence[int],
) -> Array:
    """Return the tangent at the selected element of each window of ``operand``.

    Args:
        selects: ``selects(best, candidate)``: whether ``best`` stays selected.
        tangents: (rows or 1, cases or 1, *shape).
        operand: (rows or 1, cases or 1, *shape). Padding is selected last.
        window: the window's size along each axis of ``shape``.
        strides: the window's stride along each axis.
        padding: (before, after) for each axis.
        base_dilation: the operand's dilation along each axis.
        window_dilation: the window's dilation along each axis.
    """
    worst = -np.inf if selects(np.array(1), np.array(0)) else np.inf
    keys = _padded(operand, worst, padding, base_dilation)
    values = _padded(tangents, 0, padding, base_dilation)
    count = [
        count_windows(*each)
        for each in zip(keys.shape[2:], window, strides, window_dilation, strict=True)
    ]
    lead = np.broadcast_shapes(keys.shape[:2], values.shape[:2])
    best: Array = np.full((*keys.shape[:2], *count), worst)
    out: Array = np.zeros((*lead, *count))
    for tap in _taps(window, window_dilation, count, strides):
        stays = selects(best, keys[_inside(tap)])
        best, out = (
            np.where(stays, best, keys[_inside(tap)]),
            np.where(stays, out, values[_inside(tap)]),
        )
    return out
