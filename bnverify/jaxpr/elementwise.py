"""Elementwise primitives in NumPy, with XLA's semantics.

Floats are float64; integers wrap around. Inputs broadcast against each other.

Source: https://openxla.org/xla/operation_semantics
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from bnverify.jaxpr.values import Array
from bnverify.lazy import LazyModule

special: Any = LazyModule("scipy.special")  # few steps need it, and importing it takes 0.1 s


def _scipy(name: str) -> Callable[..., Array]:
    def function(*args: Array) -> Array:
        result: Array = getattr(special, name)(*args)
        return result

    return function


def _divide(x: Array, y: Array) -> Array:
    """Divide; integers truncate toward zero, and division by zero sets all bits."""
    if x.dtype.kind == "f":
        return np.divide(x, y)
    quotient = np.floor_divide(x, y)
    if x.dtype.kind == "i":
        quotient = quotient + ((quotient * y != x) & ((x < 0) != (y < 0))).astype(x.dtype)
    return np.where(y == 0, ~np.zeros_like(y), quotient)


def _remainder(x: Array, y: Array) -> Array:
    """Return the remainder of division toward zero; integers modulo zero are returned unchanged."""
    remainder = np.fmod(x, y)
    return remainder if x.dtype.kind == "f" else np.where(y == 0, x, remainder)


def _sign(x: Array) -> Array:
    return np.copysign(np.sign(x), x) if x.dtype.kind == "f" else np.sign(x)


def _signed(x: Array) -> Array:
    return x.view(f"i{x.dtype.itemsize}")


def _unsigned(x: Array) -> Array:
    return x.view(f"u{x.dtype.itemsize}")


def _shift(function: Callable[..., Array], x: Array, by: Array) -> Array:
    """Shift; by the bit width or more gives zero. Shift counts are read as unsigned."""
    x, by = _unsigned(x), _unsigned(by)
    inside = by < x.dtype.itemsize * 8
    return np.where(inside, function(x, np.where(inside, by, 0).astype(x.dtype)), x.dtype.type(0))


def _shift_left(x: Array, by: Array) -> Array:
    return _shift(np.left_shift, x, by).view(x.dtype)


def _shift_right_logical(x: Array, by: Array) -> Array:
    return _shift(np.right_shift, x, by).view(x.dtype)


def _shift_right_arithmetic(x: Array, by: Array) -> Array:
    most = np.minimum(_unsigned(by), x.dtype.itemsize * 8 - 1)
    return np.right_shift(_signed(x), _signed(most)).view(x.dtype)


def _population_count(x: Array) -> Array:
    return np.bitwise_count(_unsigned(x)).astype(x.dtype)


def _count_leading_zeros(x: Array) -> Array:
    bits, rest = x.dtype.itemsize * 8, _unsigned(x)
    count = np.full(x.shape, bits, x.dtype)
    while rest.any():
        count -= (rest != 0).astype(x.dtype)
        rest = rest >> rest.dtype.type(1)
    return count


def _multiply_high(x: Array, y: Array) -> Array:
    size = x.dtype.itemsize
    if size == 8:
        raise NotImplementedError("mulhi of 64-bit integers is not implemented")
    wide = np.dtype(f"{x.dtype.kind}{2 * size}")
    high: Array = x.astype(wide) * y.astype(wide) >> (8 * size)
    return high.astype(x.dtype)


def _digamma(x: Array) -> Array:
    return np.where((x <= 0) & (x == np.floor(x)), np.nan, special.digamma(x))


def _lgamma(x: Array) -> Array:
    return np.where(np.isinf(x), np.inf, special.gammaln(x))


def _power(x: Array, y: Array) -> Array:
    return np.power(x, y.astype(np.float64, copy=False))


def _polynomial(x: Array, *coefficients: Array) -> Array:
    """Evaluate a polynomial by Horner's rule; the coefficients start with the constant one."""
    *lower, total = coefficients
    for coefficient in reversed(lower):
        total = total * x + coefficient
    return total


FUNCTIONS: dict[str, Callable[..., Array]] = {
    "abs": np.abs,
    "acos": np.arccos,
    "acosh": np.arccosh,
    "add": np.add,
    "add_any": np.add,
    "and": np.bitwise_and,
    "asin": np.arcsin,
    "asinh": np.arcsinh,
    "atan": np.arctan,
    "atan2": np.arctan2,
    "atanh": np.arctanh,
    "bessel_i0e": _scipy("i0e"),
    "bessel_i1e": _scipy("i1e"),
    "cbrt": np.cbrt,
    "ceil": np.ceil,
    "clamp": lambda low, x, high: np.minimum(np.maximum(x, low), high),
    "clz": _count_leading_zeros,
    "cos": np.cos,
    "cosh": np.cosh,
    "digamma": _digamma,
    "div": _divide,
    "eq": np.equal,
    "erf": _scipy("erf"),
    "erf_inv": lambda x: np.copysign(special.erfinv(x), x),
    "erfc": _scipy("erfc"),
    "exp": np.exp,
    "exp2": np.exp2,
    "expm1": np.expm1,
    "floor": np.floor,
    "ge": np.greater_equal,
    "gt": np.greater,
    "igamma": _scipy("gammainc"),
    "igammac": _scipy("gammaincc"),
    "is_finite": np.isfinite,
    "le": np.less_equal,
    "lgamma": _lgamma,
    "log": np.log,
    "log1p": np.log1p,
    "log2": np.log2,
    "logistic": lambda x: 1 / (1 + np.exp(-x)),
    "lt": np.less,
    "max": np.maximum,
    "min": np.minimum,
    "mul": np.multiply,
    "mulhi": _multiply_high,
    "ne": np.not_equal,
    "neg": np.negative,
    "not": np.invert,
    "one_minus_square": lambda x: (1 + x) * (1 - x),
    "or": np.bitwise_or,
    "polygamma": _scipy("polygamma"),
    "polynomial": _polynomial,
    "population_count": _population_count,
    "pow": _power,
    "regularized_incomplete_beta": _scipy("betainc"),
    "rem": _remainder,
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "shift_left": _shift_left,
    "shift_right_arithmetic": _shift_right_arithmetic,
    "shift_right_logical": _shift_right_logical,
    "sign": _sign,
    "sin": np.sin,
    "sinh": np.sinh,
    "sqrt": np.sqrt,
    "square": np.square,
    "sub": np.subtract,
    "tan": np.tan,
    "tanh": np.tanh,
    "xor": np.bitwise_xor,
    "zeta": _scipy("zeta"),
}


def integer_power(base: Array, exponent: int) -> Array:
    """Raise to a power by repeated multiplication, as XLA does; integers wrap around."""
    power: Array | None = None
    factor, left = base, abs(exponent)
    while left:
        if left & 1:
            power = factor if power is None else power * factor
        left >>= 1
        if left:
            factor = factor * factor
    if power is None:
        power = np.ones_like(base)
    return np.divide(1, power) if exponent < 0 else power


def round_away(x: Array) -> Array:
    """Round to the nearest integer, halves away from zero."""
    whole = np.trunc(x)
    return np.where(np.abs(x - whole) >= 0.5, whole + np.copysign(1, x), whole)


def convert(x: Array, dtype: np.dtype[Any]) -> Array:
    """Convert as XLA does: floats to integers truncate and saturate, and NaN becomes 0."""
    if x.dtype == dtype:
        return x
    if dtype.kind == "b":
        return np.not_equal(x, 0)
    if x.dtype.kind != "f":
        return x.astype(dtype)
    info = np.iinfo(dtype)
    inside = (x > info.min) & (x < info.max)
    beyond = np.where(x >= info.max, info.max, np.where(x <= info.min, info.min, 0)).astype(dtype)
    return np.where(inside, np.where(inside, x, 0).astype(dtype), beyond)


def reduce_precision(x: Array, exponent_bits: int, mantissa_bits: int) -> Array:
    """Round floats to fewer exponent and mantissa bits; the dtype stays.

    The mantissa is rounded to nearest even; then overflow gives infinity and underflow zero.
    """
    info, unsigned = jnp.finfo(x.dtype), np.dtype(f"u{x.dtype.itemsize}")
    bits, one = x.view(unsigned), unsigned.type(1)
    if mantissa_bits < info.nmant:
        lost = unsigned.type(info.nmant - mantissa_bits)
        bias = (one << (lost - one)) - one
        bits = ((bits + bias + ((bits >> lost) & one)) >> lost) << lost
    sign = x.view(unsigned) & (one << unsigned.type(info.bits - 1))
    if exponent_bits < info.nexp:
        exponent = (bits >> unsigned.type(info.nmant)) & unsigned.type((1 << info.nexp) - 1)
        middle, reach = (1 << (info.nexp - 1)) - 1, (1 << (exponent_bits - 1)) - 1
        infinite = unsigned.type(((1 << info.nexp) - 1) << info.nmant)
        bits = np.where(exponent > middle + reach, sign | infinite, bits)
        bits = np.where(exponent <= middle - reach, sign, bits)
    return np.where(np.isnan(x), x, bits.view(x.dtype))
