"""A primitive on all rows of ``bnverify.jaxpr.noise`` at once, in float64 or in its own dtypes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from bnverify.jaxpr.convolution import convolve
from bnverify.jaxpr.values import Value, is_float, widen

if TYPE_CHECKING:
    from collections.abc import Sequence

# Their equations carry the combining program, in the program's own dtype: made anew in float64.
SCATTERS = {
    "scatter": jax.lax.scatter,
    "scatter-add": jax.lax.scatter_add,
    "scatter-max": jax.lax.scatter_max,
    "scatter-min": jax.lax.scatter_min,
    "scatter-mul": jax.lax.scatter_mul,
    "scatter_max": jax.lax.scatter_max,
    "scatter_min": jax.lax.scatter_min,
    "scatter_mul": jax.lax.scatter_mul,
}


def in_float64(eqn: Any, inputs: Sequence[Value]) -> list[Value]:
    """Return the primitive on every row, whatever dtype the program asks for.

    Raises:
        NotImplementedError: it has no batched form.
        TypeError: it has no float64 form.
    """
    return on_rows(eqn, inputs, _widened(eqn.params))


def in_its_own_dtypes(eqn: Any, inputs: Sequence[Value]) -> list[Value]:
    """Return the primitive on every row as the program has it, its results widened."""
    narrow = [
        Value(jnp.asarray(value.array).astype(atom.aval.dtype), value.rows)
        if is_float(atom.aval.dtype)
        else value
        for value, atom in zip(inputs, eqn.invars, strict=True)
    ]
    return [
        Value(widen(value.array, var.aval.dtype), value.rows)
        for value, var in zip(on_rows(eqn, narrow, eqn.params), eqn.outvars, strict=True)
    ]


def on_rows(eqn: Any, inputs: Sequence[Value], params: dict[str, Any]) -> list[Value]:
    """Return the primitive on every row, with ``params`` in the place of its own."""

    def bind(*arrays: Any) -> list[Any]:
        if eqn.primitive.name in SCATTERS:
            return [_scatter(eqn.primitive.name, params, arrays)]
        if eqn.primitive.name == "conv_general_dilated":
            product = convolve(*arrays, **params)
            if product is not None:
                return [product]
        out = eqn.primitive.bind(*arrays, **params)
        return list(out) if eqn.primitive.multiple_results else [out]

    rows = any(value.rows for value in inputs)
    axes = tuple(0 if value.rows else None for value in inputs)
    apply = jax.vmap(bind, in_axes=axes) if rows else bind
    return [Value(array, rows) for array in apply(*(value.array for value in inputs))]


def _scatter(name: str, params: dict[str, Any], arrays: Sequence[Any]) -> Any:
    options = ("indices_are_sorted", "unique_indices", "mode")
    kept = {option: params[option] for option in options}
    scatter: Any = SCATTERS[name]
    return scatter(*arrays, params["dimension_numbers"], **kept)


def _widened(params: dict[str, Any]) -> dict[str, Any]:
    """Return an equation's parameters with float64 for every floating-point dtype."""

    def wide(value: Any) -> Any:
        if not isinstance(value, (np.dtype, type)):
            return value
        try:
            return np.dtype(np.float64) if is_float(value) else value
        except TypeError:  # a class, but of no dtype
            return value

    return {key: wide(value) for key, value in params.items()}
