"""Where rounding does more than move a result a little: kinks and poles.

Near a kink (``max``, a comparison, ``sign``) rounding decides which side is taken. A row whose
distance from row 0, times FLIP, exceeds row 0's own distance from the kink is in doubt. In a
comparison it takes a side of its own, and in ``max`` and ``min`` the noisy side: so the consequence,
together with everything else that a row may hold, becomes part of the rows' spread. A comparison
whose noise alone exceeds the distance has no known outcome. Which side differs between rows, since the many elements of an
array may flip one by one or together (all rows of a batch share the error of their mean): half of
the rows toss a coin for each element, a quarter goes FLIP times as far as its own noise went, a
quarter puts all elements on one side.

Near a pole (a denominator, the argument of ``log``) a few rows say little about the worst. Where
a row is further from row 0 than a POLE-th of its value, it becomes NaN: what depends on it has no
known error. To let NaN pass through decisions, a truth value with rows is a float here: 0, 1, or
NaN for one that is not known.
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

# These act on a truth value's place alone, so they act on a NaN as on any other.
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


def in_doubt(distance: Array, dtype: Any, times: float = FLIP) -> Array:
    """Return for each row whether ``times`` its rounding could take it to the other side of 0.

    It could, too, where the distance is as small as what underflows, but not 0. Row 0 has no
    rounding, and is where it is.
    """
    return _exceeds(_moved(distance), distance[:1], dtype, times)


def _moved(distance: Array) -> Array:
    """Return how far each row is from row 0; NaN, which exceeds nothing, between two infinities."""
    moved: Array = distance - distance[:1]
    return np.abs(moved, out=moved)


def _exceeds(moved: Array, exact: Array, dtype: Any, times: float) -> Array:
    """Return where a row moved ``times`` as far as row 0 is from 0; see ``in_doubt``."""
    faint = np.where(exact == 0, 0, arithmetic.faint(dtype))
    doubt = moved > np.abs(exact) / times - faint
    doubt[0] = False
    return np.asarray(doubt)


def aligned(*values: Array) -> list[Array]:
    """Return values whose axes broadcast: where lax allows one to be a scalar, it gets axes of size 1."""
    rank = max(value.ndim for value in values)
    return [value.reshape(value.shape + (1,) * (rank - value.ndim)) for value in values]


def compare(name: str, left: Array, right: Array, dtype: Any, sides: Sides) -> Array:
    """Return a comparison; in rows where it is in doubt, on a side of their own."""
    distance = left - right
    decided = COMPARISONS[name](left, right)
    moved = _moved(distance)
    doubt = _exceeds(moved, distance[:1], dtype, FLIP)
    # Nearer to the kink than its own noise all that follows hangs on that noise, for a batch of
    # equal rows in all of them at once: nothing is known.
    lost = np.isnan(left) | np.isnan(right) | _exceeds(moved, distance[:1], dtype, 1.0)
    if doubt.any():
        further = distance[:1] + FLIP * (distance - distance[:1])
        goes_on = per_row(np.arange(sides.count) % 4 == 2, distance)
        coins = sides.coins(distance.shape[2:])
        side = np.where(goes_on, COMPARISONS[name](further, 0.0), coins)
        decided = np.where(doubt, side, decided)
    return np.where(lost, np.nan, decided.astype(np.float64))


def extreme(sign: int, left: Array, right: Array, dtype: Any, sides: Sides) -> Array:
    """Return max (``sign`` 1) or min (-1); in rows where it is in doubt, what noise makes.

    Clipped at a bound without noise, all rows on one side would say the same, and their spread
    would be 0: there they say how far beyond the bound they are. But not exactly: of two values
    with the bound in their middle, as normalising two rows makes them, one alone is beyond it, and
    what follows may hang on their difference.
    """
    plain: Array = (np.maximum if sign > 0 else np.minimum)(left, right)
    if has_rows(left) == has_rows(right):
        return plain
    value, bound = (left, right) if has_rows(left) else (right, left)
    distance = value - bound
    beyond = in_doubt(distance, dtype) & np.isfinite(distance)
    if not beyond.any():
        return plain
    # From 0 to the root of 3: of root mean square 1.
    share = math.sqrt(3) * 2.0**-32 * sides.mixed(distance.shape[2:])
    return np.where(beyond, bound + sign * share * np.abs(distance), plain)


def signed(value: Array, dtype: Any, sides: Sides) -> Array:
    """Return a value whose sign counts; in rows where that is in doubt, of a sign that a coin says."""
    exact = value[:1]
    turned = np.where(sides.coins(value.shape[2:]), -1.0, 1.0)
    # Turned away from row 0, not from what noise made of it: twice turned is not turned at all.
    side = np.where(exact == 0, turned * value, turned * np.sign(exact) * np.abs(value))
    return np.where(in_doubt(value, dtype), side, value)


def amplified(value: Array) -> Array:
    """Return a value that a step function is taken of, each row FLIP times as far from row 0."""
    moved = FLIP * (value - value[:1])
    alike, up = (per_row(which(len(value)), value) for which in (draws.alike, draws.up))
    far = value[:1] + np.where(alike, np.where(up, 1.0, -1.0) * np.abs(moved), moved)
    return np.where(np.isfinite(far), far, value)


def near_pole(value: Array) -> Array:
    """Return a value that must keep its digits, with NaN in the rows where it lost them."""
    exact = value[:1]
    lost = POLE * np.abs(value - exact) > np.abs(exact)
    return np.where(lost, np.nan, value)


def is_soft(value: Array, dtype: Any) -> bool:
    """Return whether a value of the program's ``dtype`` is a truth value that may be NaN."""
    return bool(dtype == np.bool_ and is_float(value.dtype))


def harden(value: Array) -> Array:
    """Return a truth value as a boolean; where it is not known, other than in the exact row."""
    exact = value[:1] > 0.5
    return np.where(np.isnan(value), ~exact, value > 0.5)


def decide(eqn: Any, inputs: Sequence[Array]) -> list[Array]:
    """Return an equation some of whose inputs are truth values that may be NaN."""
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
    if name in {"and", "or"}:
        left, right = aligned(*(value.astype(np.float64) for value in inputs))
        both = left * right
        return [both if name == "and" else left + right - both]
    hard = [
        harden(value) if is_soft(value, atom.aval.dtype) else value
        for value, atom in zip(inputs, eqn.invars, strict=True)
    ]
    outputs = numeric.apply(eqn, hard)
    if name == "select_n" and is_float(outputs[0].dtype):
        lost = np.isnan(first).reshape(first.shape + (1,) * (outputs[0].ndim - first.ndim))
        return [np.where(lost, np.nan, outputs[0])]
    return outputs
