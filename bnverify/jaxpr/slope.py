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
import jax.numpy as jnp

from bnverify.jaxpr import arithmetic, kinks
from bnverify.jaxpr.interpreter import live, read
from bnverify.jaxpr.noise import Rows
from bnverify.jaxpr.values import Value, is_float, widen

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bnverify.jaxpr.tracing import Program

NEAR = 2.0**-10
POINTS = (0.0, -1.0, -0.5, -NEAR, NEAR, 0.5, 1.0)  # in units of h

_FLOAT64_TO_FLOAT32 = 2.0**-29  # the ratio of their units of rounding
_CLOSE, _FAR = 1e-5, 1e-2  # h, in units of the parameters' length


class Slope(NamedTuple):
    """A directional derivative.

    Attributes:
        value: the slope of the result along the direction, float64.
        allowed: what truncation and float64 rounding may have left in it.
        reliable: bool: both are finite; they are not where p lies on a kink.
    """

    value: Any
    allowed: Any
    reliable: Any


class _Points(Rows):
    """The reading that evaluates all points without rounding; row 0, p, decides for all."""

    def round(self, value: Value, dtype: Any, units: float, added: float) -> Value:
        """Leave ``value`` as it is."""
        del dtype, units, added
        return value

    def confine(self, value: Value, dtype: Any, room: float = 4) -> Value:
        """Leave ``value`` as it is."""
        del dtype, room
        return value

    def _at_kink(self, eqn: Any, inputs: Sequence[Value]) -> Value | None:
        """Return an equation that may take either of two sides; None where it is another."""
        name = eqn.primitive.name
        if name in {"abs", "sign"}:
            array = inputs[0].array
            side = jnp.sign(array[:1])
            return _off_kink(array, side * (array if name == "abs" else jnp.ones_like(array)))
        if name in {"reduce_max", "reduce_min"}:
            return _extreme(name, inputs[0].array, tuple(axis + 1 for axis in eqn.params["axes"]))
        return super()._at_kink(eqn, inputs)

    def _compare(self, name: str, left: Value, right: Value, dtype: Any) -> Value:
        del dtype
        one, other = kinks.aligned(left, right)
        decided = kinks.COMPARISONS[name](one, other)[:1].astype(jnp.float64)
        return _off_kink(one - other, decided + jnp.zeros_like(one - other))

    def _pick(self, sign: int, left: Value, right: Value, dtype: Any) -> Value:
        del dtype
        one, other = kinks.aligned(left, right)
        distance = sign * (one - other)
        return _off_kink(distance, jnp.where(distance[:1] > 0, one, other))

    def _steady(self, eqn: Any, inputs: Sequence[Value], noisy: list[bool]) -> list[Value]:
        """Return the inputs, those of a step function as they are at p."""
        steps = eqn.primitive.name in arithmetic.STEPS or not is_float(eqn.outvars[0].aval.dtype)
        return [
            Value(value.array[0], rows=False) if steps and moves else value
            for value, moves in zip(inputs, noisy, strict=True)
        ]


def _off_kink(distance: Any, result: Any) -> Value:
    """Return ``result``, but NaN where p is on the kink and another point is not."""
    on_kink = (distance[:1] == 0) & (distance != 0)
    return Value(jnp.where(on_kink, jnp.nan, result), rows=True)


def _extreme(name: str, array: Any, axes: tuple[int, ...]) -> Value:
    """Return the mean of those entries that are extreme at p."""
    extreme = (jnp.max if name == "reduce_max" else jnp.min)(array[:1], axes, keepdims=True)
    chosen = array[:1] == extreme
    total = jnp.sum(jnp.where(chosen, array, 0), axes)
    return Value(total / jnp.sum(chosen, axes), rows=True)


def directional_derivative(
    program: Program,
    args: Sequence[Any],
    direction: Any,
    exact: Any,
    noise: Any,
    output: int = 0,
) -> Slope:
    """Return the slope of a result of ``program`` along ``direction`` in its first inputs.

    Under ``jax.jit`` and ``jax.vmap``, and only within ``bnverify.compat.enable_x64()``. The
    distance h follows from the noise: the less is known of the result, the further apart the
    points.

    Args:
        program: traced; one of its results is a single number, a loss.
        args: its arguments, grouped so that the first is a tree of floating-point arrays, parameters.
        direction: a tree like the first argument, not 0 throughout. Its length does not matter
            to h; the slope is proportional to it.
        exact: the result at ``args``, as ``bnverify.jaxpr.rounding.Rounding`` tells it.
        noise: what float32 rounding allows it, likewise.
        output: which of the results, all leaves counted.
    """
    where = [widen(leaf, jnp.float64) for leaf in jax.tree_util.tree_leaves(args[0])]
    along = [widen(leaf, jnp.float64) for leaf in jax.tree_util.tree_leaves(direction)]
    types = jax.tree_util.tree_leaves(program.args)[len(where) :]
    fixed = [
        Value(widen(leaf, aval.dtype), rows=False)
        for leaf, aval in zip(jax.tree_util.tree_leaves(args[1:]), types, strict=True)
    ]
    error = noise * _FLOAT64_TO_FLOAT32 + jnp.abs(exact) * float(jnp.finfo(jnp.float64).eps)
    # Truncation leaves about h**2, rounding error / h: they balance at the cube root.
    balanced = jnp.cbrt(error / jnp.where(exact == 0, 1, jnp.abs(exact)))
    size = jnp.where(_length(where) > 0, _length(where), 1)
    h = jnp.clip(balanced, _CLOSE, _FAR) * size / _length(along)
    steps = h * jnp.asarray(POINTS)
    points = [
        Value(p + steps.reshape(-1, *[1] * p.ndim) * v, rows=True)
        for p, v in zip(where, along, strict=True)
    ]
    reading = _Points(len(POINTS) - 1)
    (result,) = read(live(program.jaxpr, output), reading, [*points, *fixed])
    values = reading.spread(result).reshape(-1)
    wide, narrow, near = (
        (values[-i] - values[i]) / (2 * h * POINTS[-i]) for i in range(1, 1 + len(POINTS) // 2)
    )
    slope = (4 * narrow - wide) / 3
    # Twice, since the nearer difference is not exact either.
    bent = 2 * jnp.maximum(jnp.abs(slope - near) - 2 * error / (NEAR * h), 0)
    allowed = jnp.maximum(jnp.abs(wide - narrow), bent) + 4 * error / h
    return Slope(slope, allowed, jnp.isfinite(slope) & jnp.isfinite(allowed))


def _length(leaves: list[Any]) -> Any:
    return jnp.sqrt(sum(jnp.sum(leaf * leaf) for leaf in leaves))
