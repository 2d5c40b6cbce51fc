"""Where rounding does more than move a result a little: kinks and poles.

Near a kink (``max``, a comparison, ``sign``) rounding decides which side is taken. A row is in
doubt if FLIP times its distance from row 0 exceeds row 0's distance from the kink. In a comparison
such a row takes a side independently of row 0; in ``max`` and ``min`` it takes the noisy operand.
The consequences thus become part of the spread of the rows. If a row's noise itself exceeds the
distance, the outcome of the comparison is unknown. The elements of an array may flip one by one or
together (all rows of a batch share the error of their mean), so rows choose differently: half of
them draw a side for each element, a quarter moves FLIP times as far as its own noise, a quarter
puts all elements on one side.

Near a pole (a denominator, the argument of ``log``) a few rows are too small a sample for the worst
case. A row that differs from row 0 by more than a POLE-th of its value becomes NaN, so results that
depend on it have no known error. Booleans that depend on rounding are *soft*: floats 0 or 1, or NaN
if unknown, so that NaN passes through decisions.
"""

from __future__ import annotations

import math
import operator
from typing import TYPE_CHECKING, Any

import numpy as np

from bnverify.jaxpr import arithmetic, draws, numeric
from bnverify.jaxpr.values import Array, has_rows, is_float, per_row

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from bnverify.jaxpr.draws import Sides

FLIP = 8.0
POLE = 4.0

COMPARISONS: dict[str, Callable[[Any, Any], Any]] = {
    "eq": operator.eq,
    "ge": operator.ge,
    "gt": operator.gt,
    "le": operator.le,
    "lt": operator.lt,
    "ne": operator.ne,
}

# Primitives that only move elements, so that a soft boolean can pass through as a float.
_MOVES = frozenset(
    {
        "broadcast_in_dim",
        "concatenate",
        "copy",
        "copy_p",
        "dynamic_slice",
        "expand_dims",
        "gather",
        "reshape",
        "rev",
        "slice",
        "squeeze",
        "transpose",
    }
)

_LOGIC = frozenset({"and", "or", "reduce_and", "reduce_or"})


def in_doubt(distance: Array, dtype: Any, times: float = FLIP) -> Array:
    """Return for each row whether ``times`` its rounding could take it across 0.

    Also true if the distance is so small that it may be an underflow, but not 0. Row 0 is not
    rounded and never in doubt.
    """
    return _exceeds(_moved(distance), distance[:1], dtype, times)


def _moved(distance: Array) -> Array:
    """Return each row's distance from row 0; NaN, which compares false, if both are infinite."""
    moved: Array = distance - distance[:1]
    return np.abs(moved, out=moved)


def _exceeds(moved: Array, exact: Array, dtype: Any, times: float) -> Array:
    """Return where a row moved by 1/``times`` of row 0's distance from 0; see ``in_doubt``."""
    threshold = np.where(exact == 0, 0, arithmetic.underflow_threshold(dtype))
    doubt = moved > np.abs(exact) / times - threshold
    doubt[0] = False
    return np.asarray(doubt)


def aligned(*values: Array) -> list[Array]:
    """Return ``values`` with equal rank: scalar operands of lax get axes of size 1."""
    rank = max(value.ndim for value in values)
    return [value.reshape(value.shape + (1,) * (rank - value.ndim)) for value in values]


def compare(name: str, left: Array, right: Array, dtype: Any, sides: Sides) -> Array:
    """Return a comparison as a soft boolean; rows in doubt take a side of their own."""
    distance = left - right
    decided = COMPARISONS[name](left, right)
    moved = _moved(distance)
    doubt = _exceeds(moved, distance[:1], dtype, FLIP)
    # If the noise exceeds the distance, everything downstream depends on it, for a batch of equal
    # rows in all of them at once, so the outcome is unknown.
    lost = np.isnan(left) | np.isnan(right) | _exceeds(moved, distance[:1], dtype, 1.0)
    if doubt.any():
        further = distance[:1] + FLIP * (distance - distance[:1])
        goes_on = per_row(np.arange(sides.count) % 4 == 2, distance)
        choices = sides.choices(distance.shape[2:])
        side = np.where(goes_on, COMPARISONS[name](further, 0.0), choices)
        decided = np.where(doubt, side, decided)
    return np.where(lost, np.nan, decided.astype(np.float64))


def extreme(sign: int, left: Array, right: Array, dtype: Any, sides: Sides) -> Array:
    """Return max (``sign`` 1) or min (-1); rows in doubt take the noisy operand.

    If all rows were clipped to a bound that has no noise, their spread would be 0. Rows in doubt
    instead move beyond the bound by a random share of their distance from it. The share is random
    because two values symmetric about the bound, as in a normalised batch of two rows, must not
    both be beyond it by the same amount: later arithmetic may cancel their difference.
    """
    plain: Array = (np.maximum if sign > 0 else np.minimum)(left, right)
    if has_rows(left) == has_rows(right):
        return plain
    value, bound = (left, right) if has_rows(left) else (right, left)
    distance = value - bound
    beyond = in_doubt(distance, dtype) & np.isfinite(distance)
    if not beyond.any():
        return plain
    # Uniform on 0 to sqrt(3), so that the root mean square is 1.
    share = math.sqrt(3) * 2.0**-32 * sides.bits(distance.shape[2:])
    return np.where(beyond, bound + sign * share * np.abs(distance), plain)


def with_random_sign(value: Array, dtype: Any, sides: Sides) -> Array:
    """Return ``value`` with a random sign in the rows where its sign is in doubt."""
    exact = value[:1]
    turned = np.where(sides.choices(value.shape[2:]), -1.0, 1.0)
    # Signs are relative to row 0, so that applying this twice does not restore the sign.
    side = np.where(exact == 0, turned * value, turned * np.sign(exact) * np.abs(value))
    return np.where(in_doubt(value, dtype), side, value)


def with_amplified_noise(value: Array) -> Array:
    """Return the input of a step function with each row FLIP times as far from row 0."""
    moved = FLIP * (value - value[:1])
    uniform, upper = (
        per_row(rows(len(value)), value) for rows in (draws.uniform_rows, draws.upper_rows)
    )
    far = value[:1] + np.where(uniform, np.where(upper, 1.0, -1.0) * np.abs(moved), moved)
    return np.where(np.isfinite(far), far, value)


def nan_without_digits(value: Array) -> Array:
    """Return a denominator or similar, with NaN in the rows that have lost all digits."""
    exact = value[:1]
    lost = POLE * np.abs(value - exact) > np.abs(exact)
    return np.where(lost, np.nan, value)


def _soft_logic(eqn: Any, inputs: Sequence[Array]) -> Array:
    """Return "and" or "or" of soft booleans, or over some axes; unknown if any of them is."""
    name = eqn.primitive.name
    if name.startswith("reduce"):
        axes = tuple(axis + 2 for axis in eqn.params["axes"])
        return np.asarray((np.min if name == "reduce_and" else np.max)(inputs[0], axis=axes))
    left, right = aligned(*(value.astype(np.float64) for value in inputs))
    both: Array = left * right
    return both if name == "and" else left + right - both


def is_soft(value: Array, dtype: Any) -> bool:
    """Return whether a value of the program's ``dtype`` is a soft boolean."""
    return bool(dtype == np.bool_ and is_float(value.dtype))


def harden(value: Array) -> Array:
    """Return a soft boolean as bool; unknown entries become the opposite of row 0."""
    exact = value[:1] > 0.5
    return np.where(np.isnan(value), ~exact, value > 0.5)


def decide(eqn: Any, inputs: Sequence[Array]) -> list[Array]:
    """Return the outputs of an equation that has soft booleans among its inputs."""
    name, first = eqn.primitive.name, inputs[0]
    out = eqn.outvars[0].aval.dtype
    if name in _MOVES:
        wide = [
            value.astype(np.float64) if atom.aval.dtype == np.bool_ else value
            for value, atom in zip(inputs, eqn.invars, strict=True)
        ]
        return numeric.apply(eqn, wide)
    if name == "convert_element_type" and is_float(out):
        return [first]
    if name == "not":
        return [1 - first]
    if name in _LOGIC:
        return [_soft_logic(eqn, inputs)]
    hard = [
        harden(value) if is_soft(value, atom.aval.dtype) else value
        for value, atom in zip(inputs, eqn.invars, strict=True)
    ]
    outputs = numeric.apply(eqn, hard)
    if name == "select_n" and is_float(outputs[0].dtype):
        lost = np.isnan(first).reshape(first.shape + (1,) * (outputs[0].ndim - first.ndim))
        return [np.where(lost, np.nan, outputs[0])]
    return outputs
