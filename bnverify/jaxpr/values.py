"""Arrays of a program evaluated in NumPy: shape (rows, cases, *shape), and their dtypes."""

from __future__ import annotations

import functools
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

Array: TypeAlias = npt.NDArray[Any]


@functools.cache
def limits(dtype: Any) -> Any:
    """Return ``jnp.finfo(dtype)``, cached: building it for each equation is slow."""
    return jnp.finfo(dtype)


@functools.cache
def is_float(dtype: Any) -> bool:
    """Return whether ``dtype`` is a real floating-point dtype."""
    return bool(jnp.issubdtype(dtype, jnp.floating))


@functools.cache
def is_complex(dtype: Any) -> bool:
    """Return whether ``dtype`` is complex."""
    return bool(jnp.issubdtype(dtype, jnp.complexfloating))


@functools.cache
def is_key(dtype: Any) -> bool:
    """Return whether ``dtype`` is a PRNG key dtype."""
    return bool(jnp.issubdtype(dtype, jax.dtypes.extended))


def has_rows(value: Array) -> bool:
    """Return whether ``value`` has been rounded, so that its rows differ."""
    return bool(value.shape[0] > 1)


def per_row(numbers: Array, value: Array) -> Array:
    """Return ``numbers``, one per row, shape (rows,), reshaped to broadcast against ``value``."""
    return numbers.reshape(-1, *[1] * (value.ndim - 1))


def widen(value: Any, dtype: Any) -> Array:
    """Convert ``value`` to ``dtype``, then to float64 where it is a float.

    Subnormal numbers become 0, as XLA flushes them on CPU. Those of float16 stay: XLA computes
    float16 in float32, where they are normal. A PRNG key becomes its key data, unsigned integers
    with one more axis.
    """
    if is_key(dtype):
        if isinstance(value, np.ndarray):
            return value
        return np.asarray(jax.random.key_data(value))
    array = np.asarray(value).astype(dtype)
    if not is_float(dtype):
        return array
    wide, info = array.astype(np.float64), limits(dtype)
    if info.nexp < 8:
        return wide
    return np.where(np.abs(wide) < float(info.tiny), np.copysign(0.0, wide), wide)
