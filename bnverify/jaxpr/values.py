"""What a program's values are while its rounding is read."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


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


def widen_params(params: dict[str, Any]) -> dict[str, Any]:
    """Return an equation's parameters with float64 for every floating-point dtype."""

    def wide(value: Any) -> Any:
        if not isinstance(value, (np.dtype, type)):
            return value
        try:
            return np.dtype(np.float64) if is_float(value) else value
        except TypeError:  # a class, but of no dtype
            return value

    return {key: wide(value) for key, value in params.items()}
