"""What each primitive does to the digits of its inputs: tables, and a few rules.

A primitive that is in none of them is taken to round its floating-point outputs once, which is
what IEEE arithmetic does.
"""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp
import numpy as np

from bnverify import compat
from bnverify.jaxpr.interpreter import inner_jaxprs
from bnverify.jaxpr.values import is_float, limits

# Moves values about, or picks among them: no new digits, so no rounding.
_EXACT = frozenset(
    {
        "abs",
        "argmax",
        "argmin",
        "broadcast_in_dim",
        "ceil",
        "clamp",
        "concatenate",
        "copy",
        "copy_p",
        "cummax",
        "cummin",
        "dynamic_slice",
        "dynamic_update_slice",
        "expand_dims",
        "floor",
        "gather",
        "iota",
        "max",
        "min",
        "neg",
        "optimization_barrier",
        "pad",
        "pbroadcast",
        "pvary",
        "reduce_max",
        "reduce_min",
        "reshape",
        "rev",
        "round",
        "scatter",
        "scatter-max",
        "scatter-min",
        "scatter_max",
        "scatter_min",
        "select_n",
        "sign",
        "slice",
        "sort",
        "split",
        "squeeze",
        "stack",
        "stop_gradient",
        "tile",
        "top_k",
        "transpose",
        "unstack",
    }
)

# Computed by polynomial, table or iteration rather than correctly rounded: a few units in the
# last place.
_APPROXIMATE = frozenset(
    {
        "acos",
        "acosh",
        "asin",
        "asinh",
        "atan",
        "atan2",
        "atanh",
        "cbrt",
        "cos",
        "cosh",
        "cumlogsumexp",
        "digamma",
        "erf",
        "erf_inv",
        "erfc",
        "exp",
        "exp2",
        "expm1",
        "igamma",
        "igammac",
        "lgamma",
        "log",
        "log1p",
        "logistic",
        "pow",
        "rsqrt",
        "sin",
        "sinh",
        "tan",
        "tanh",
    }
)
_APPROXIMATE_UNITS = 4.0

ADDITIONS = frozenset({"add", "add_any", "sub"})

# Each element of the output is made of one element of each input, or of one moved here. A closed
# list: what is not on it may add elements up.
BY_ELEMENT = (
    _EXACT
    | _APPROXIMATE - {"cumlogsumexp"}
    | {
        "and",
        "convert_element_type",
        "div",
        "eq",
        "ge",
        "gt",
        "integer_pow",
        "is_finite",
        "le",
        "lt",
        "mul",
        "ne",
        "not",
        "or",
        "sqrt",
        "square",
    }
)

# Makes large or small numbers of moderate ones.
_SCALING = frozenset(
    {
        "conv_general_dilated",
        "cosh",
        "cumprod",
        "cumsum",
        "div",
        "dot_general",
        "exp",
        "exp2",
        "expm1",
        "integer_pow",
        "mul",
        "pow",
        "reduce_prod",
        "reduce_sum",
        "reduce_window_sum",
        "sinh",
        "square",
    }
)

PRODUCTS = frozenset({"conv_general_dilated", "dot_general"})
"""Sums of products, in which each factor enters many outputs."""

# Step functions of a real number.
STEPS = frozenset({"argmax", "argmin", "ceil", "floor", "round"})

NEAR = 1e3
"""The most by which a literal scales a value whose range is then not looked at."""

# The bits of a float are the point: these run in the original dtype.
BITWISE = frozenset({"bitcast_convert_type", "nextafter", "reduce_precision"})


def terms(eqn: Any) -> int:
    """Return how many numbers each output of a sum or product takes in; 1 where it is neither."""
    name, params = eqn.primitive.name, eqn.params
    shapes = [atom.aval.shape for atom in eqn.invars]
    count: Any = 1
    if name in {"reduce_sum", "reduce_prod"}:
        count = math.prod(shapes[0][axis] for axis in params["axes"])
    elif name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        count = math.prod(shapes[0][axis] for axis in contracted)
    elif name == "conv_general_dilated":
        count = math.prod(shapes[1]) // shapes[1][params["dimension_numbers"].rhs_spec[0]]
    elif name in {"cumsum", "cumprod", "cumlogsumexp"}:
        count = shapes[0][params["axis"]]
    elif name == "reduce_window_sum":
        count = math.prod(params["window_dimensions"])
    elif name in {"scatter-add", "scatter-mul", "scatter_mul"}:
        count = math.prod(shapes[1][:-1])  # every update may hit one place
    return max(int(count), 1)


def growth(eqn: Any) -> float:
    """Return how many roundings an equation's result is worth.

    A sum of n numbers rounds n - 1 partial sums: errors at random add up to sqrt(n) roundings,
    equal numbers, whose errors agree, to a fraction of n.
    """
    name = eqn.primitive.name
    if name in _APPROXIMATE:
        return _APPROXIMATE_UNITS
    if name == "integer_pow":
        return math.sqrt(max(abs(eqn.params["y"]) - 1, 1))
    count = terms(eqn)
    return math.sqrt(count) + count / 64


def summed_in(dtype: Any, eqn: Any) -> Any:
    """Return the dtype in which terms of ``dtype`` are added up."""
    products = eqn.primitive.name in {"dot_general", "conv_general_dilated"}
    # Products of 16-bit numbers are accumulated in 32 bits, and rounded once at the end.
    return np.dtype(np.float32) if products and limits(dtype).bits < 32 else dtype


def is_exact(eqn: Any) -> bool:
    """Return whether an equation's result needs no rounding."""
    name = eqn.primitive.name
    if name in _EXACT or (name == "integer_pow" and eqn.params["y"] == 1):
        return True
    if name == "convert_element_type":
        old, new = eqn.invars[0].aval.dtype, eqn.outvars[0].aval.dtype
        return bool(old == np.bool_ or (is_float(old) and jnp.promote_types(old, new) == new))
    return any(_leaves_digits(eqn, position) for position in range(len(eqn.invars)))


def _leaves_digits(eqn: Any, position: int) -> bool:
    """Return whether an input is a literal 0 to add or a power of two to scale by."""
    name, atom = eqn.primitive.name, eqn.invars[position]
    number = compat.literal(atom)
    if number is None or number.ndim or not is_float(atom.aval.dtype):
        return False
    value = float(number)
    if name in ADDITIONS:
        return value == 0
    power = value != 0 and math.isfinite(value) and abs(math.frexp(value)[0]) == 0.5
    return power and (name == "mul" or (name == "div" and position == 1))


def is_wide(dtype: Any) -> bool:
    """Return whether values of ``dtype`` are seldom near the ends of its range: not float16's."""
    return int(limits(dtype).nexp) >= 8


def faint(dtype: Any) -> float:
    """Return the magnitude below which values of ``dtype`` may stem from what underflowed.

    XLA flushes subnormal numbers of 32 bits to zero. It computes those of float16 in 32 bits, where
    they only lose digits, and each rounding of the rows loses as many.
    """
    info = limits(dtype)
    return float(info.tiny) * 2**16 if is_wide(dtype) else float(info.smallest_subnormal)


def leaves_range(eqn: Any) -> bool:
    """Return whether an equation may take values out of a dtype's range that were well in it."""
    if eqn.primitive.name == "convert_element_type":
        old, new = eqn.invars[0].aval.dtype, eqn.outvars[0].aval.dtype
        return is_float(old) and int(limits(new).maxexp) < int(limits(old).maxexp)
    literals = [compat.literal(atom) for atom in eqn.invars]
    near = any(n is not None and n.ndim == 0 and 1 / NEAR <= abs(n) <= NEAR for n in literals)
    spared = near and len(eqn.invars) == 2 and is_wide(eqn.outvars[0].aval.dtype)
    return eqn.primitive.name in _SCALING and not spared


def pole(eqn: Any) -> int | None:
    """Return which input must itself have digits for the result to have some; None: no input."""
    name = eqn.primitive.name
    if name in {"div", "rem"}:
        return 1
    if name in {"digamma", "lgamma", "log", "rsqrt"}:
        return 0
    if name == "integer_pow" and eqn.params["y"] < 0:
        return 0
    exponent = getattr(eqn.invars[1], "val", 1) if name == "pow" else 1
    return 0 if np.ndim(exponent) == 0 and exponent < 0 else None


def operations(jaxpr: Any) -> float:
    """Return how many operations a program takes, roughly: a term of a sum is one."""
    inner = getattr(jaxpr, "jaxpr", jaxpr)
    total = 0.0
    for eqn in inner.eqns:
        bodies = inner_jaxprs(eqn)
        turns = eqn.params.get("length", 1)  # of a scan
        total += turns * sum(map(operations, bodies))
        if not bodies:
            total += terms(eqn) * sum(math.prod(var.aval.shape) for var in eqn.outvars)
    return total


def numbers(jaxpr: Any) -> int:
    """Return how many numbers the equations of a program make, those of each body once."""
    inner = getattr(jaxpr, "jaxpr", jaxpr)
    made = 0
    for eqn in inner.eqns:
        made += sum(math.prod(var.aval.shape) for var in eqn.outvars)
        made += sum(map(numbers, inner_jaxprs(eqn)))
    return made


def is_wide_throughout(jaxpr: Any) -> bool:
    """Return whether no equation of a program makes a value of a narrow range, as float16 has."""
    inner = getattr(jaxpr, "jaxpr", jaxpr)
    return all(
        all(is_wide(v.aval.dtype) for v in eqn.outvars if is_float(getattr(v.aval, "dtype", int)))
        and all(map(is_wide_throughout, inner_jaxprs(eqn)))
        for eqn in inner.eqns
    )
