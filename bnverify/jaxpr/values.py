"""What a program's values are while it is evaluated in NumPy: arrays (rows, cases, *shape)."""

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
    """Return ``jnp.finfo`` of a dtype, which is slow to make for each equation of a program."""
    return jnp.finfo(dtype)


@functools.cache
def is_float(dtype: Any) -> bool:
    """Return whether a dtype is a real floating-point one."""
    return bool(jnp.issubdtype(dtype, jnp.floating))


@functools.cache
def is_complex(dtype: Any) -> bool:
    """Return whether a dtype is a complex one."""
    return bool(jnp.issubdtype(dtype, jnp.complexfloating))


@functools.cache
def is_key(dtype: Any) -> bool:
    """Return whether a dtype is that of PRNG keys."""
    return bool(jnp.issubdtype(dtype, jax.dtypes.extended))


def has_rows(value: Array) -> bool:
    """Return whether rounding has touched a value: its rows then differ."""
    return bool(value.shape[0] > 1)


def per_row(numbers: Array, value: Array) -> Array:
    """Return what is known of each row, (rows,), to broadcast against ``value``."""
    return numbers.reshape(-1, *[1] * (value.ndim - 1))


def widen(value: Any, dtype: Any) -> Array:
    """Return ``value`` as a program holds it in ``dtype``, but floats in float64.

    A subnormal number is 0, as XLA reads it on a CPU; but not of float16, which is computed in
    float32, where it is normal. A PRNG key is held as its key data, unsigned integers with an axis
    more.
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
