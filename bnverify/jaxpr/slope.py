"""The directional derivative of a program's result, in float64, with an error bound.

Central differences at two distances with Richardson extrapolation:

    D(h) = (f(p + h v) - f(p - h v)) / 2h,    slope = (4 D(h/2) - D(h)) / 3.

The truncation error is at most D(h) - D(h/2) if h is small enough. A third distance, a thousandth
of h, checks that: after three normalisations of a tiny input the function can bend within a
millionth, and the larger differences then agree with each other but not with the slope. All points
are evaluated in one vectorised run. Wherever the program takes a decision (a comparison, ``max``,
``sign``, ``argmax``), every point follows the decision taken at p, so a kink between the points is
harmless: the result is the slope of the smooth piece that p lies on. If p lies on a kink itself,
there is no slope, and the result is not ``reliable``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np

from bnverify.jaxpr import arithmetic, kinks
from bnverify.jaxpr.interpreter import live, read
from bnverify.jaxpr.rounding import RoundingReading, cases_per_chunk
from bnverify.jaxpr.values import Array, is_float, widen

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bnverify.jaxpr.tracing import Program

NEAR = 2.0**-10
POINTS = np.array((0.0, -1.0, -0.5, -NEAR, NEAR, 0.5, 1.0))
"""The evaluated points, in units of h."""

_FLOAT64_TO_FLOAT32 = 2.0**-29  # eps(float64) / eps(float32)
_CLOSE, _FAR = 1e-5, 1e-2  # bounds of h, relative to the norm of the parameters


class Slope(NamedTuple):
    """A directional derivative for each of K cases; all arrays have shape (K,).

    Attributes:
        value: the derivative, float64.
        allowed: a bound on the truncation and float64 rounding error in ``value``.
        reliable: whether both are finite; False if p lies on a kink.
    """

    value: Any
    allowed: Any
    reliable: Any


class _SlopeReading(RoundingReading):
    """Evaluates all points without rounding; row 0, which is p, takes all decisions."""

    def round(self, value: Array, dtype: Any, units: float, added: float) -> Array:
        """Return ``value`` unchanged."""
        del dtype, units, added
        return value

    def _vary_fused(self, eqn: Any, inputs: Sequence[Array]) -> Sequence[Array]:
        """Return ``inputs`` unchanged."""
        del eqn
        return inputs

    def _round_partial_sums(
        self, eqn: Any, inputs: Sequence[Array], output: Array, units: float, added: float
    ) -> Array:
        """Return ``output`` unchanged."""
        del eqn, inputs, units, added
        return output

    def clip_to_range(self, value: Array, dtype: Any, room: float = 4) -> Array:
        """Return ``value`` unchanged."""
        del dtype, room
        return value

    def _decide(self, eqn: Any, inputs: Sequence[Array]) -> Array | None:
        """Return the output of a decision, or None if ``eqn`` is not one."""
        name = eqn.primitive.name
        if name in {"abs", "sign"}:
            value = inputs[0]
            side = np.sign(value[:1])
            return _off_kink(value, side * (value if name == "abs" else np.ones_like(value)))
        if name in {"reduce_max", "reduce_min"}:
            return _extreme_at_p(name, inputs[0], tuple(axis + 2 for axis in eqn.params["axes"]))
        return super()._decide(eqn, inputs)

    def _compare(self, name: str, left: Array, right: Array, dtype: Any) -> Array:
        del dtype
        decided = kinks.COMPARISONS[name](left, right)[:1].astype(np.float64)
        return _off_kink(left - right, decided + np.zeros_like(left - right))

    def _is_finite(self, value: Array) -> Array:
        return np.isfinite(value[:1]) & np.ones(value.shape, bool)

    def _extreme(self, sign: int, left: Array, right: Array, dtype: Any) -> Array:
        del dtype
        distance = sign * (left - right)
        return _off_kink(distance, np.where(distance[:1] > 0, left, right))

    def _guard(self, eqn: Any, inputs: Sequence[Array], noisy: list[bool]) -> list[Array]:
        """Return the inputs; those of a step function with their values at p."""
        steps = eqn.primitive.name in arithmetic.STEP_FUNCTIONS or not is_float(
            eqn.outvars[0].aval.dtype
        )
        return [
            value[:1] if steps and moves else value
            for value, moves in zip(inputs, noisy, strict=True)
        ]


def _off_kink(distance: Array, result: Array) -> Array:
    """Return ``result``, with NaN where p is on the kink and another point is not."""
    on_kink = (distance[:1] == 0) & (distance != 0)
    return np.where(on_kink, np.nan, result)


def _extreme_at_p(name: str, value: Array, axes: tuple[int, ...]) -> Array:
    """Return the mean of the entries that are extreme at p."""
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
    """Return the derivative of a result of ``program`` along ``direction`` in its first argument.

    The distance h grows with the noise in the result.

    Args:
        program: a traced program; one of its results is a scalar, such as a loss.
        args: its arguments; every leaf has a leading axis over K cases. The first argument is a
            pytree of floating-point arrays, the parameters.
        direction: a pytree like the first argument of one case, not all 0. h does not depend on its
            norm; the derivative is proportional to it.
        exact: the result at ``args``, (K,), from ``bnverify.jaxpr.rounding.Rounding``.
        noise: its float32 rounding tolerance, (K,), from the same.
        output: the index of the result among all result leaves.
    """
    place = [widen(leaf, np.float64) for leaf in jax.tree_util.tree_leaves(args[0])]
    along = [widen(leaf, np.float64)[None] for leaf in jax.tree_util.tree_leaves(direction)]
    types = jax.tree_util.tree_leaves(program.args)[len(place) :]
    fixed = [
        widen(leaf, aval.dtype)[None]
        for leaf, aval in zip(jax.tree_util.tree_leaves(args[1:]), types, strict=True)
    ]
    wanted, cases = live(program.jaxpr, output), len(exact)
    with np.errstate(all="ignore"):
        error = noise * _FLOAT64_TO_FLOAT32 + np.abs(exact) * float(np.finfo(np.float64).eps)
        # Truncation error is about h**2, rounding error about 1/h: they balance at the cube root.
        balanced = np.cbrt(error / np.where(exact == 0, 1, np.abs(exact)))
        size = _norm(place)
        h = np.clip(balanced, _CLOSE, _FAR) * np.where(size > 0, size, 1) / _norm(along)
        steps = POINTS[:, None] * h
        chunk = cases_per_chunk(wanted)
        values = np.empty((len(POINTS), cases))
        for start in range(0, cases, chunk):
            part = slice(start, start + chunk)
            points = [_moved(p[part], v, steps[:, part]) for p, v in zip(place, along, strict=True)]
            reading = _SlopeReading(count=len(POINTS))
            rest = [leaf[:, part] for leaf in fixed]
            (result,) = read(wanted, reading, [*points, *rest])
            values[:, part] = result.reshape(result.shape[:2])
        wide, narrow, near = (
            (values[-i] - values[i]) / (2 * h * POINTS[-i]) for i in range(1, 1 + len(POINTS) // 2)
        )
        slope = (4 * narrow - wide) / 3
        # Doubled because the nearer difference has an error, too.
        bent = 2 * np.maximum(np.abs(slope - near) - 2 * error / (NEAR * h), 0)
        allowed = np.maximum(np.abs(wide - narrow), bent) + 4 * error / h
        return Slope(slope, allowed, np.isfinite(slope) & np.isfinite(allowed))


def _moved(place: Array, along: Array, steps: Array) -> Array:
    """Return the points on the line through ``place``, (cases, ...): (POINTS, cases, ...)."""
    moved: Array = place + steps.reshape(*steps.shape, *[1] * (place.ndim - 1)) * along
    return moved


def _norm(leaves: list[Array]) -> Array:
    """Return the Euclidean norm over all leaves for each case, (K,)."""
    squares = sum(np.sum(leaf.reshape(len(leaf), -1) ** 2, axis=1) for leaf in leaves)
    return np.asarray(np.sqrt(squares))
