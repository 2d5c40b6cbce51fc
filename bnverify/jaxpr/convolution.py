"""Convolutions as matrix products.

XLA's convolutions on the CPU are fast in float32 alone: in float64, and with a kernel for each of
many rows, they take the square of the number of kernels. A product of patches with the kernel does
the same sums in float64 at the speed of the step.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

MANY = 128
"""Slices: beyond it a program of so many takes longer to compile than the convolution to run."""


def convolve(
    lhs: Any,
    rhs: Any,
    *,
    window_strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
    lhs_dilation: Sequence[int],
    rhs_dilation: Sequence[int],
    dimension_numbers: Any,
    feature_group_count: int,
    batch_group_count: int,
    **_: Any,
) -> Any | None:
    """Return what ``jax.lax.conv_general_dilated`` does, or None where it takes too many slices.

    Args:
        lhs: the batch, in any layout.
        rhs: the kernel.
        window_strides: for each spatial axis.
        padding: (before, after) for each spatial axis; negative: cropped.
        lhs_dilation: for each spatial axis of the batch.
        rhs_dilation: for each spatial axis of the kernel.
        dimension_numbers: a ``jax.lax.ConvDimensionNumbers``.
        feature_group_count: into how many groups the features fall.
        batch_group_count: into how many groups the batch falls.
    """
    batch = jnp.transpose(lhs, dimension_numbers.lhs_spec)  # N, C, space
    kernel = jnp.transpose(rhs, dimension_numbers.rhs_spec)  # O, I, space
    edges = [(low, high, by - 1) for (low, high), by in zip(padding, lhs_dilation, strict=True)]
    batch = jax.lax.pad(batch, jnp.zeros((), batch.dtype), [(0, 0, 0), (0, 0, 0), *edges])
    window = kernel.shape[2:]
    reach = [(size - 1) * by + 1 for size, by in zip(window, rhs_dilation, strict=True)]
    lengths = zip(batch.shape[2:], reach, window_strides, strict=True)
    space = [(length - over) // stride + 1 for length, over, stride in lengths]
    if 0 in space or min(math.prod(window), math.prod(space)) > MANY:
        return None
    # One of the two is small: the window in a forward pass, the space in the kernel's gradient.
    if math.prod(window) <= math.prod(space):
        parts = _slices(batch, window, rhs_dilation, space, window_strides)
        axis = 2
    else:
        parts = _slices(batch, space, window_strides, window, rhs_dilation)
        axis = 3
    patches = jnp.stack([part.reshape(*batch.shape[:2], -1) for part in parts], axis)
    kernel = kernel.reshape(*kernel.shape[:2], -1)
    out = _grouped(patches, kernel, feature_group_count, batch_group_count)
    out = out.reshape(*out.shape[:2], *space)
    return jnp.transpose(out, np.argsort(dimension_numbers.out_spec).tolist())


def _slices(
    batch: Any,
    starts: Sequence[int],
    step: Sequence[int],
    sizes: Sequence[int],
    strides: Sequence[int],
) -> Iterator[Any]:
    """Yield for each place in a box of ``starts`` the part of ``batch`` that begins there."""
    for place in itertools.product(*map(range, starts)):
        first = [at * by for at, by in zip(place, step, strict=True)]
        ends = zip(first, sizes, strides, strict=True)
        last = [start + (size - 1) * stride + 1 for start, size, stride in ends]
        yield jax.lax.slice(batch, (0, 0, *first), (*batch.shape[:2], *last), (1, 1, *strides))


def _grouped(patches: Any, kernel: Any, features: int, batches: int) -> Any:
    """Return (N, O, P): patches (N, C, K, P) times a kernel (O, I, K), group by group."""
    rows, _, taps, places = patches.shape
    outputs, inputs, _ = kernel.shape
    patches = patches.reshape(batches, rows // batches, features, inputs, taps, places)
    kernel = kernel.reshape(batches, features, outputs // (batches * features), inputs, taps)
    out = jnp.einsum("bngckp,bgock->nbgop", patches, kernel)
    return out.reshape(rows // batches, outputs, places)
