"""How each primitive rounds: tables, and a few rules.

A primitive in none of the tables rounds its floating-point outputs once, as IEEE arithmetic does.
"""

from __future__ import annotations

import math
from collections import defaultdict
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np

from bnverify import compat
from bnverify.jaxpr.interpreter import called_jaxpr, inner_jaxprs, open_jaxpr
from bnverify.jaxpr.values import is_float, limits

if TYPE_CHECKING:
    from collections.abc import Sequence

# Moves values or selects among them, so nothing is rounded.
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

# Computed by a polynomial, a table or iteration, so the result is off by a few ulps.
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
        "log2",
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

# Each output element depends on one element of each input. The list is closed: a primitive that is
# not on it may sum elements.
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
        "one_minus_square",
        "or",
        "sqrt",
        "square",
    }
)

# May produce large or small numbers from moderate ones.
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
        "one_minus_square",
        "polynomial",
        "pow",
        "reduce_prod",
        "reduce_sum",
        "reduce_window_sum",
        "sinh",
        "square",
    }
)

PRODUCTS = frozenset({"conv_general_dilated", "dot_general"})
"""Sums of products, in which each factor contributes to many outputs."""

# Step functions of a real number.
STEP_FUNCTIONS = frozenset({"argmax", "argmin", "ceil", "floor", "round"})

LITERAL_SCALE = 1e3
"""A literal between 1/LITERAL_SCALE and LITERAL_SCALE scales a value without a range check."""

# Depend on the bits of the program's own dtype, so they run in it.
BITWISE = frozenset({"bitcast_convert_type", "nextafter", "reduce_precision"})


def terms(eqn: Any) -> int:
    """Return how many terms each output of a sum or product has; 1 if it is neither."""
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
    elif name == "polynomial":  # Horner's rule rounds a product and a sum for each coefficient
        count = 2 * (len(shapes) - 1)
    elif name in {"scatter-add", "scatter-mul", "scatter_mul"}:
        count = math.prod(shapes[1][:-1])  # all updates may hit one element
    return max(int(count), 1)


def rounding_ulps(eqn: Any) -> float:
    """Return how many roundings, in ulps of the result, an equation amounts to.

    A sum of n numbers rounds n - 1 partial sums. Independent errors add up to sqrt(n) roundings;
    those of equal numbers agree, and add up to a fraction of n: to an eighth or a quarter where XLA's
    CPU backend adds one after another, as in most sums over several axes.
    """
    name = eqn.primitive.name
    if name in _APPROXIMATE:
        return _APPROXIMATE_UNITS
    if name == "integer_pow":
        return math.sqrt(max(abs(eqn.params["y"]) - 1, 1))
    if name == "one_minus_square":  # 1 + x, 1 - x and their product
        return math.sqrt(3)
    count = terms(eqn)
    return math.sqrt(count) + count / (64 if name in PRODUCTS else 16)


def accumulation_dtype(dtype: Any, eqn: Any) -> Any:
    """Return the dtype in which terms of ``dtype`` are accumulated."""
    products = eqn.primitive.name in {"dot_general", "conv_general_dilated"}
    # Products of 16-bit numbers are accumulated in float32 and rounded once at the end.
    return np.dtype(np.float32) if products and limits(dtype).bits < 32 else dtype


def is_exact(eqn: Any) -> bool:
    """Return whether an equation does not round its result."""
    name = eqn.primitive.name
    if name in _EXACT or (name == "integer_pow" and eqn.params["y"] == 1):
        return True
    if name == "convert_element_type":
        old, new = eqn.invars[0].aval.dtype, eqn.outvars[0].aval.dtype
        return bool(old == np.bool_ or (is_float(old) and jnp.promote_types(old, new) == new))
    return any(_is_exact_literal(eqn, position) for position in range(len(eqn.invars)))


def _is_exact_literal(eqn: Any, position: int) -> bool:
    """Return whether the input is a literal 0 that is added or a power of two that scales."""
    name, atom = eqn.primitive.name, eqn.invars[position]
    number = compat.literal(atom)
    if number is None or number.ndim or not is_float(atom.aval.dtype):
        return False
    value = float(number)
    if name in ADDITIONS:
        return value == 0
    power = value != 0 and math.isfinite(value) and abs(math.frexp(value)[0]) == 0.5
    return power and (name == "mul" or (name == "div" and position == 1))


def is_product(eqn: Any) -> bool:
    """Return whether a compiler may fuse an equation with an addition of its result.

    Besides products these are divisions by a literal, which XLA compiles as a product with the
    reciprocal.
    """
    name = eqn.primitive.name
    if name == "div":
        return compat.literal(eqn.invars[1]) is not None and not is_exact(eqn)
    return bool(name == "mul")


def has_float32_range(dtype: Any) -> bool:
    """Return whether ``dtype`` has the exponent range of float32, unlike float16."""
    return int(limits(dtype).nexp) >= 8


def underflow_threshold(dtype: Any) -> float:
    """Return the magnitude below which values of ``dtype`` may be the result of an underflow.

    XLA flushes subnormal float32 numbers to zero. float16 is computed in float32, so its subnormal
    numbers only lose digits, and rounding the rows loses as many.
    """
    info = limits(dtype)
    return float(info.tiny) * 2**16 if has_float32_range(dtype) else float(info.smallest_subnormal)


def may_leave_range(eqn: Any) -> bool:
    """Return whether an equation may overflow or underflow from values well within the range."""
    if eqn.primitive.name == "convert_element_type":
        old, new = eqn.invars[0].aval.dtype, eqn.outvars[0].aval.dtype
        return is_float(old) and int(limits(new).maxexp) < int(limits(old).maxexp)
    literals = [compat.literal(atom) for atom in eqn.invars]
    near = any(
        n is not None and n.ndim == 0 and 1 / LITERAL_SCALE <= abs(n) <= LITERAL_SCALE
        for n in literals
    )
    harmless = near and len(eqn.invars) == 2 and has_float32_range(eqn.outvars[0].aval.dtype)
    return eqn.primitive.name in _SCALING and not harmless


def pole(eqn: Any) -> int | None:
    """Return the index of the input at which the primitive has a pole, or None.

    If that input has lost all its digits, so has the result.
    """
    name = eqn.primitive.name
    if name in {"div", "rem"}:
        return 1
    if name in {"digamma", "lgamma", "log", "log2", "rsqrt"}:
        return 0
    if name == "integer_pow" and eqn.params["y"] < 0:
        return 0
    exponent = getattr(eqn.invars[1], "val", 1) if name == "pow" else 1
    return 0 if np.ndim(exponent) == 0 and exponent < 0 else None


def count_operations(jaxpr: Any) -> float:
    """Return the approximate number of floating-point operations; each term of a sum counts one."""
    inner = getattr(jaxpr, "jaxpr", jaxpr)
    total = 0.0
    for eqn in inner.eqns:
        bodies = inner_jaxprs(eqn)
        turns = eqn.params.get("length", 1)  # of a scan
        total += turns * sum(map(count_operations, bodies))
        if not bodies:
            total += terms(eqn) * sum(math.prod(var.aval.shape) for var in eqn.outvars)
    return total


def count_values(jaxpr: Any) -> int:
    """Return how many values the equations of a program produce; loop bodies count once."""
    inner = getattr(jaxpr, "jaxpr", jaxpr)
    made = 0
    for eqn in inner.eqns:
        made += sum(math.prod(var.aval.shape) for var in eqn.outvars)
        made += sum(map(count_values, inner_jaxprs(eqn)))
    return made


def additions_after(jaxpr: Any) -> dict[int, float]:
    """Return, for each equation, how many numbers may later be added to its result.

    Errors that agree matter where elements are added: n equal errors sum to n times one, n
    independent errors to sqrt(n). Results that are not added up any more, as in most of an
    optimizer, need no agreeing errors.

    Args:
        jaxpr: closed or open, as returned by ``jax.make_jaxpr``.

    Returns:
        ``id(eqn)`` -> count, including equations within calls, loops and branches. The count is the
        largest product of the lengths of the sums on any path to an output, plus one for each
        addition of two; 1 if there are none. It is infinite within and before a loop, and before a
        primitive that is not known to act element by element.
    """
    found: dict[int, float] = {}
    _count_additions(jaxpr, [1.0] * len(open_jaxpr(jaxpr)[0].outvars), found)
    return found


def _count_additions(jaxpr: Any, ends: Sequence[float], found: dict[int, float]) -> list[float]:
    """Return the counts at the inputs, given ``ends`` at the outputs; fill ``found``."""
    inner, _ = open_jaxpr(jaxpr)
    most: defaultdict[int, float] = defaultdict(lambda: 1.0)
    for atom, end in zip(inner.outvars, ends, strict=True):
        most[id(atom)] = max(most[id(atom)], end)
    for eqn in reversed(inner.eqns):
        after = [most[id(var)] for var in eqn.outvars]
        # One jaxpr may be called from several places.
        found[id(eqn)] = max([found.get(id(eqn), 1.0), *after])
        for atom, count in zip(eqn.invars, _counts_before(eqn, after, found), strict=True):
            most[id(atom)] = max(most[id(atom)], count)
    return [most[id(var)] for var in inner.invars]


def _counts_before(eqn: Any, after: list[float], found: dict[int, float]) -> list[float]:
    """Return the counts at an equation's inputs, given ``after`` at its outputs."""
    if eqn.primitive.name == "cond":
        branches = [_count_additions(branch, after, found) for branch in eqn.params["branches"]]
        return [math.inf, *(max(counts) for counts in zip(*branches, strict=True))]
    called = called_jaxpr(eqn)
    if called is not None:
        return _count_additions(called, after, found)
    for body in inner_jaxprs(eqn):
        _count_additions(body, [math.inf] * len(open_jaxpr(body)[0].outvars), found)
    most = max(after, default=1.0)
    name, count = eqn.primitive.name, terms(eqn)
    if count > 1:
        most *= count
    elif name in ADDITIONS:
        most += 1
    elif name not in BY_ELEMENT:
        most = math.inf
    return [most] * len(eqn.invars)


def is_float32_wide_throughout(jaxpr: Any) -> bool:
    """Return whether every float in a program has at least float32's range, unlike float16."""
    inner = getattr(jaxpr, "jaxpr", jaxpr)
    return all(
        all(
            has_float32_range(v.aval.dtype)
            for v in eqn.outvars
            if is_float(getattr(v.aval, "dtype", int))
        )
        and all(map(is_float32_wide_throughout, inner_jaxprs(eqn)))
        for eqn in inner.eqns
    )
