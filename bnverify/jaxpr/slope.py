"""The slope of a program's result along a direction, in float64, and how well it is known.

Central differences at two distances, extrapolated (Richardson):

    D(h) = (f(p + h v) - f(p - h v)) / 2h,    slope = (4 D(h/2) - D(h)) / 3.

What truncation leaves is at most D(h) - D(h/2) where h is small. Whether it is, a third distance
tells, a thousandth of h: three normalisations of a tiny input bend within a millionth, beyond
which the differences agree with each other and not with the slope. All points are evaluated in
one vectorised run, and wherever the program decides something (a comparison, ``max``, ``sign``,
``argmax``), every point takes the side that p itself takes. So a kink between the points does no
harm: what is measured is the slope of the smooth piece that p lies on. Where p lies on the kink
itself, there is no slope, and the result says so.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np

from bnverify.jaxpr import arithmetic, kinks
from bnverify.jaxpr.interpreter import live, read
from bnverify.jaxpr.rounding import Rows, portion_of
from bnverify.jaxpr.values import Array, is_float, widen

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bnverify.jaxpr.tracing import Program

NEAR = 2.0**-10
POINTS = np.array((0.0, -1.0, -0.5, -NEAR, NEAR, 0.5, 1.0))
"""In units of h."""

_FLOAT64_TO_FLOAT32 = 2.0**-29  # the ratio of their units of rounding
_CLOSE, _FAR = 1e-5, 1e-2  # h, in units of the parameters' length


class Slope(NamedTuple):
    """A directional derivative of each case, (K,).

    Attributes:
        value: the slope of the result along the direction, float64.
        allowed: what truncation and float64 rounding may have left in it.
        reliable: whether both are finite; they are not where p lies on a kink.
    """

    value: Any
    allowed: Any
    reliable: Any


class _Points(Rows):
    """The reading that evaluates all points without rounding; row 0, p, decides for all."""

    def round(self, value: Array, dtype: Any, units: float, added: float) -> Array:
        """Leave ``value`` as it is."""
        del dtype, units, added
        return value

    def _as_used(self, eqn: Any, inputs: Sequence[Array]) -> Sequence[Array]:
        """Leave the inputs of an equation as they are."""
        del eqn
        return inputs

    def _summed(
        self, eqn: Any, inputs: Sequence[Array], output: Array, units: float, more: float
    ) -> Array:
        """Leave a sum of products as it is."""
        del eqn, inputs, units, more
        return output

    def confine(self, value: Array, dtype: Any, room: float = 4) -> Array:
        """Leave ``value`` as it is."""
        del dtype, room
        return value

    def _at_kink(self, eqn: Any, inputs: Sequence[Array]) -> Array | None:
        """Return an equation that may take either of two sides; None where it is another."""
        name = eqn.primitive.name
        if name in {"abs", "sign"}:
            value = inputs[0]
            side = np.sign(value[:1])
            return _off_kink(value, side * (value if name == "abs" else np.ones_like(value)))
        if name in {"reduce_max", "reduce_min"}:
            return _extreme(name, inputs[0], tuple(axis + 2 for axis in eqn.params["axes"]))
        return super()._at_kink(eqn, inputs)

    def _compare(self, name: str, left: Array, right: Array, dtype: Any) -> Array:
        del dtype
        decided = kinks.COMPARISONS[name](left, right)[:1].astype(np.float64)
        return _off_kink(left - right, decided + np.zeros_like(left - right))

    def _pick(self, sign: int, left: Array, right: Array, dtype: Any) -> Array:
        del dtype
        distance = sign * (left - right)
        return _off_kink(distance, np.where(distance[:1] > 0, left, right))

    def _steady(self, eqn: Any, inputs: Sequence[Array], noisy: list[bool]) -> list[Array]:
        """Return the inputs, those of a step function as they are at p."""
        steps = eqn.primitive.name in arithmetic.STEPS or not is_float(eqn.outvars[0].aval.dtype)
        return [
            value[:1] if steps and moves else value
            for value, moves in zip(inputs, noisy, strict=True)
        ]


def _off_kink(distance: Array, result: Array) -> Array:
    """Return ``result``, but NaN where p is on the kink and another point is not."""
    on_kink = (distance[:1] == 0) & (distance != 0)
    return np.where(on_kink, np.nan, result)


def _extreme(name: str, value: Array, axes: tuple[int, ...]) -> Array:
    """Return the mean of those entries that are extreme at p."""
    extreme = (np.max if name == "reduce_max" else np.min)(value[:1], axes, keepdims=True)
    chosen = value[:1] == extreme
    total = np.sum(np.where(chosen, value, 0), axes)
    return np.asarray(total / np.sum(chosen, axes))


def directional_derivative(
    program: Program,
    args: Sequence[Any],
    direction: Any,
    exact: Array,
    noise: Array,
    output: int = 0,
) -> Slope:
    """Return the slope of a result of ``program`` along ``direction`` in its first inputs.

    The distance h follows from the noise: the less is known of the result, the further apart the
    points.

    Args:
        program: traced; one of its results is a single number, a loss.
        args: its arguments, every leaf with a leading axis over K cases, grouped so that the first is
            a tree of floating-point arrays, parameters.
        direction: a tree like the first argument of one case, not 0 throughout. Its length does not
            matter to h; the slope is proportional to it.
        exact: the result at ``args``, (K,), as ``bnverify.jaxpr.rounding.Rounding`` tells it.
        noise: what float32 rounding allows it, likewise.
        output: which of the results, all leaves counted.
    """
    where = [widen(leaf, np.float64) for leaf in jax.tree_util.tree_leaves(args[0])]
    along = [widen(leaf, np.float64)[None] for leaf in jax.tree_util.tree_leaves(direction)]
    types = jax.tree_util.tree_leaves(program.args)[len(where) :]
    fixed = [
        widen(leaf, aval.dtype)[None]
        for leaf, aval in zip(jax.tree_util.tree_leaves(args[1:]), types, strict=True)
    ]
    wanted, cases = live(program.jaxpr, output), len(exact)
    with np.errstate(all="ignore"):
        error = noise * _FLOAT64_TO_FLOAT32 + np.abs(exact) * float(np.finfo(np.float64).eps)
        # Truncation leaves about h**2, rounding error / h: they balance at the cube root.
        balanced = np.cbrt(error / np.where(exact == 0, 1, np.abs(exact)))
        size = _length(where)
        h = np.clip(balanced, _CLOSE, _FAR) * np.where(size > 0, size, 1) / _length(along)
        steps = POINTS[:, None] * h
        portion = portion_of(program)
        values = np.empty((len(POINTS), cases))
        for start in range(0, cases, portion):
            part = slice(start, start + portion)
            points = [_moved(p[part], v, steps[:, part]) for p, v in zip(where, along, strict=True)]
            reading = _Points(count=len(POINTS))
            rest = [leaf[:, part] for leaf in fixed]
            (result,) = read(wanted, reading, [*points, *rest])
            values[:, part] = result.reshape(result.shape[:2])
        wide, narrow, near = (
            (values[-i] - values[i]) / (2 * h * POINTS[-i]) for i in range(1, 1 + len(POINTS) // 2)
        )
        slope = (4 * narrow - wide) / 3
        # Twice, since the nearer difference is not exact either.
        bent = 2 * np.maximum(np.abs(slope - near) - 2 * error / (NEAR * h), 0)
        allowed = np.maximum(np.abs(wide - narrow), bent) + 4 * error / h
        return Slope(slope, allowed, np.isfinite(slope) & np.isfinite(allowed))


def _moved(place: Array, along: Array, steps: Array) -> Array:
    """Return the points (POINTS, cases, ...) on a line through ``place``, (cases, ...)."""
    moved: Array = place + steps.reshape(*steps.shape, *[1] * (place.ndim - 1)) * along
    return moved


def _length(leaves: list[Array]) -> Array:
    """Return the length of the vector of all leaves of each case, (K,)."""
    squares = sum(np.sum(leaf.reshape(len(leaf), -1) ** 2, axis=1) for leaf in leaves)
    return np.asarray(np.sqrt(squares))
