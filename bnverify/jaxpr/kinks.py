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

import jax
import jax.numpy as jnp
import numpy as np

from bnverify.jaxpr import arithmetic
from bnverify.jaxpr.primitives import on_rows
from bnverify.jaxpr.values import Value, is_float

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from bnverify.jaxpr.draws import Which

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


def in_doubt(distance: Any, dtype: Any, times: float = FLIP) -> Any:
    """Return for each row whether ``times`` its rounding could take it to the other side of 0.

    It could, too, where the distance is as small as what underflows, but not 0. Row 0 has no
    rounding, and is where it is.
    """
    exact = distance[:1]
    moved = jnp.where(distance == exact, 0, jnp.abs(distance - exact))  # inf - inf is no move
    moved = moved + jnp.where(exact == 0, 0, arithmetic.faint(dtype))
    others = np.arange(distance.shape[0]).reshape(-1, *[1] * (distance.ndim - 1)) > 0
    return (times * moved > jnp.abs(exact)) & others


def coins(array: Any, seed: int, which: Which) -> Any:
    """Return booleans in the shape of ``array``: random ones, but in each fourth row all alike."""
    tossed = (_mixed(array, seed, which) >> 31).astype(bool)
    return jnp.where(_alike(array, which), _other_side(array, which), tossed)


def _mixed(array: Any, seed: int, which: Which) -> Any:
    """Return random 32-bit integers in the shape of ``array``."""
    draws = np.random.default_rng(seed).integers(2**32, size=2 + which.total, dtype=np.uint32)
    place = jax.lax.iota(jnp.uint32, array[0].size) + draws[0]
    mixed = (place * (which.of(draws[1:])[:, None] | 1) ^ (place >> 3)) * np.uint32(0x9E3779B1)
    return mixed.reshape(array.shape)


def _alike(array: Any, which: Which) -> Any:
    """Return in which rows all elements take the same side: not left to chance, both are taken."""
    return which.column(which.numbers % 4 == 3, array.ndim)


def _other_side(array: Any, which: Which) -> Any:
    """Return which side these rows take."""
    return which.column(which.numbers % 8 == 3, array.ndim)


def aligned(left: Value, right: Value) -> tuple[Any, Any]:
    """Return two arrays that broadcast, rows against rows, though one may be a scalar's."""
    rank = max(value.array.ndim - value.rows for value in (left, right))
    return tuple(
        value.array.reshape(-1, *[1] * rank)
        if value.rows and value.array.ndim == 1
        else value.array
        for value in (left, right)
    )


def compare(name: str, left: Value, right: Value, dtype: Any, seed: int, which: Which) -> Value:
    """Return a comparison; in rows where it is in doubt, on a side of their own."""
    one, other = aligned(left, right)
    distance = one - other
    decided = COMPARISONS[name](one, other)
    further = distance[:1] + FLIP * (distance - distance[:1])
    goes_on = which.column(which.numbers % 4 == 2, distance.ndim)
    side = jnp.where(goes_on, COMPARISONS[name](further, 0.0), coins(distance, seed, which))
    taken = jnp.where(in_doubt(distance, dtype), side, decided)
    # Nearer to the kink than its own noise all that follows hangs on that noise, for a batch of
    # equal rows in all of them at once: nothing is known.
    hit = in_doubt(distance, dtype, 1.0)
    lost = jnp.isnan(one) | jnp.isnan(other) | hit
    return Value(jnp.where(lost, jnp.nan, taken.astype(jnp.float64)), rows=True)


def extreme(sign: int, left: Value, right: Value, dtype: Any, seed: int, which: Which) -> Value:
    """Return max (``sign`` 1) or min (-1); in rows where it is in doubt, what noise makes.

    Clipped at a bound without noise, all rows on one side would say the same, and their spread
    would be 0: there they say how far beyond the bound they are. But not exactly: of two values
    with the bound in their middle, as normalising two rows makes them, one alone is beyond it, and
    what follows may hang on their difference.
    """
    one, other = aligned(left, right)
    plain = (jnp.maximum if sign > 0 else jnp.minimum)(one, other)
    if left.rows and right.rows:
        return Value(plain, rows=True)
    value, bound = (one, other) if left.rows else (other, one)
    distance = value - bound
    beyond = in_doubt(distance, dtype) & jnp.isfinite(distance)
    # From 0 to the root of 3: of root mean square 1.
    share = math.sqrt(3) * 2.0**-32 * _mixed(distance, seed, which).astype(jnp.float64)
    return Value(jnp.where(beyond, bound + sign * share * jnp.abs(distance), plain), rows=True)


def signed(value: Value, dtype: Any, seed: int, which: Which) -> Value:
    """Return a value whose sign counts; in rows where that is in doubt, of a sign that a coin says."""
    array, exact = value.array, value.array[:1]
    turned = jnp.where(coins(array, seed, which), -1.0, 1.0)
    # Turned away from row 0, not from what noise made of it: twice turned is not turned at all.
    side = jnp.where(exact == 0, turned * array, turned * jnp.sign(exact) * jnp.abs(array))
    return Value(jnp.where(in_doubt(array, dtype), side, array), rows=True)


def amplified(value: Value, which: Which) -> Value:
    """Return a value that a step function is taken of, each row FLIP times as far from row 0."""
    moved = FLIP * (value.array - value.array[:1])
    up_or_down = jnp.where(_other_side(moved, which), 1.0, -1.0) * jnp.abs(moved)
    far = value.array[:1] + jnp.where(_alike(moved, which), up_or_down, moved)
    return Value(jnp.where(jnp.isfinite(far), far, value.array), rows=True)


def near_pole(value: Value) -> Value:
    """Return a value that must keep its digits, with NaN in the rows where it lost them."""
    array, exact = value.array, value.array[:1]
    lost = POLE * jnp.abs(array - exact) > jnp.abs(exact)
    return Value(jnp.where(lost, jnp.nan, array), rows=True)


def is_soft(value: Value, dtype: Any) -> bool:
    """Return whether a value of the program's ``dtype`` is a truth value that may be NaN."""
    return value.rows and dtype == np.bool_ and is_float(value.array.dtype)


def harden(value: Value) -> Value:
    """Return a truth value as a boolean; where it is not known, other than in the exact row."""
    exact = value.array[:1] > 0.5
    return Value(jnp.where(jnp.isnan(value.array), ~exact, value.array > 0.5), rows=True)


def decide(eqn: Any, inputs: Sequence[Value]) -> list[Value]:
    """Return an equation some of whose inputs are truth values that may be NaN."""
    name, first = eqn.primitive.name, inputs[0]
    out = eqn.outvars[0].aval.dtype
    if name in _MOVES:
        wide = [
            Value(value.array.astype(jnp.float64), value.rows)
            if atom.aval.dtype == np.bool_
            else value
            for value, atom in zip(inputs, eqn.invars, strict=True)
        ]
        return on_rows(eqn, wide, eqn.params)
    if name == "convert_element_type" and is_float(out):
        return [first]
    if name == "not":
        return [Value(1 - first.array, rows=True)]
    if name in {"and", "or"}:
        left, right = (value.array.astype(jnp.float64) for value in inputs)
        both = left * right
        return [Value(both if name == "and" else left + right - both, rows=True)]
    hard = [
        harden(value) if is_soft(value, atom.aval.dtype) else value
        for value, atom in zip(inputs, eqn.invars, strict=True)
    ]
    outputs = on_rows(eqn, hard, eqn.params)
    if name == "select_n" and is_float(outputs[0].array.dtype):
        chosen = outputs[0].array
        lost = jnp.isnan(first.array)
        lost = lost.reshape(*lost.shape, *([1] * (chosen.ndim - lost.ndim)))
        return [Value(jnp.where(lost, jnp.nan, chosen), rows=True)]
    return outputs
