"""What a program's values are while its rounding is read."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Value(NamedTuple):
    """An array of a program, floats as float64.

    Attributes:
        array: with a leading axis where ``rows``: the exact run, then the coarse ones.
        rows: whether rounding has touched it.
    """

    array: Any
    rows: bool


def is_float(dtype: Any) -> bool:
    """Return whether a dtype is a real floating-point one."""
    return bool(jnp.issubdtype(dtype, jnp.floating))


def widen(value: Any, dtype: Any) -> Any:
    """Return ``value`` as a program holds it in ``dtype``, but floats in float64."""
    if jnp.issubdtype(dtype, jax.dtypes.extended):  # PRNG keys
        return value
    array = jnp.asarray(value).astype(dtype)
    return array.astype(jnp.float64) if is_float(dtype) else array
