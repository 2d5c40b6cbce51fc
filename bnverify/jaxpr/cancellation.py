"""What cancels exactly when all terms are rounded alike, and does not when XLA runs it.

XLA adds in an order of its own, and fuses a product into the sum that takes it (a * b - c with
one rounding). So a sum errs by roundings of its partial sums even where equal terms have equal
errors, and a * b - a * b need not be 0. The error that this can make is a rounding of the
magnitudes summed; each row gets one, drawn along the last axis.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np

from bnverify.jaxpr import arithmetic
from bnverify.jaxpr.values import Value, is_float

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_ADDS = frozenset({"add", "add_any", "sub"})
_SUMS = frozenset(
    {"conv_general_dilated", "cumsum", "dot_general", "reduce_sum", "reduce_window_sum"}
)


def reordered(
    eqn: Any,
    inputs: Sequence[Value],
    output: Value,
    apply: Callable[..., list[Value]],
    params: dict[str, Any],
    point: int,
) -> Value:
    """Return a sum with the error in its rows that another order or a fused product makes.

    Args:
        eqn: the equation.
        inputs: its inputs.
        output: its only output, with rows.
        apply: applies the equation's primitive.
        params: its parameters, in float64.
        point: tells equations apart.
    """
    name, aval = eqn.primitive.name, eqn.outvars[0].aval
    if not is_float(aval.dtype) or not output.rows:
        return output
    exact = [value.array[0] if value.rows else jnp.asarray(value.array) for value in inputs]
    if name in _ADDS and any(value.rows for value in inputs):
        magnitude = jnp.abs(exact[0]) + jnp.abs(exact[1])
    elif name in _SUMS and arithmetic.terms(eqn) > 1:
        terms = [Value(jnp.abs(array), rows=False) for array in exact]
        magnitude = apply(eqn, terms, params)[0].array
    else:
        return output
    unit = float(jnp.finfo(arithmetic.summed_in(aval.dtype, eqn)).eps) / 2
    rows, last = output.array.shape[0], (aval.shape[-1] if aval.shape else 1)
    rng = np.random.default_rng(point)
    draw = rng.uniform(0.5, 1, (rows, last)) * rng.choice([-1.0, 1.0], (rows, last))
    draw[0] = 0
    shape = (rows, *[1] * max(len(aval.shape) - 1, 0), *([last] if aval.shape else []))
    error = unit * arithmetic.growth(eqn) * draw.reshape(shape) * magnitude
    return output._replace(array=output.array + error)
