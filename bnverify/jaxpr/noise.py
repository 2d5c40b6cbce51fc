"""Evaluate a program in float64 several times at once: exactly, and with coarser rounding.

Every value carries a leading axis of rows: row 0 is the float64 run, each other row a run in
which every equation's result v is rounded more coarsely than the program's dtype would. The
rounding is that of two products which float64 cannot hold,

    row(v) = ((k + d) w - k w) / (c d),    w = c v,

so each row errs by up to k / d units of float64. k is COARSE times the ratio of the two dtypes'
units, c and d are near 1; all are drawn for each row and each equation. In row 0, k is 0, c and d
are 1: it stays exact. So a row is one thing that somewhat worse arithmetic could have made. Like
rounding itself it depends on the value alone: equal values err equally, and the errors of many
equal terms add up instead of cancelling. What overflows in the program's dtype has no known
error. Where values are exact (inputs, and what is only moved about), no rows exist.

Random rounding as a probe of stability is due to La Porte and Vignes (CESTAC) and to Parker
(Monte Carlo arithmetic, 1997).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from bnverify.jaxpr import arithmetic, kinks, loops
from bnverify.jaxpr.cancellation import reordered
from bnverify.jaxpr.interpreter import inner_jaxprs
from bnverify.jaxpr.values import Value, is_float, widen, widen_params

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bnverify.jaxpr.interpreter import Body

ROWS = 12
COARSE = 1.0

_DRAWS = 509  # equations that share a draw are this far apart
_FEW = 64  # terms of a sum whose own rounding covers that of the partial sums
_FAINT = 2.0**16  # a value so near to underflow may be made of what was flushed to zero
_LARGEST = 2.0**51  # k beyond which nothing would be left of a value

# Their equations carry the combining program, in the program's own dtype: made anew in float64.
_SCATTERS = {
    "scatter": jax.lax.scatter,
    "scatter-add": jax.lax.scatter_add,
    "scatter-max": jax.lax.scatter_max,
    "scatter-min": jax.lax.scatter_min,
    "scatter-mul": jax.lax.scatter_mul,
    "scatter_max": jax.lax.scatter_max,
    "scatter_min": jax.lax.scatter_min,
    "scatter_mul": jax.lax.scatter_mul,
}


def _scatter(name: str, params: dict[str, Any], arrays: Sequence[Any]) -> Any:
    options = ("indices_are_sorted", "unique_indices", "mode")
    kept = {option: params[option] for option in options}
    scatter: Any = _SCATTERS[name]
    return scatter(*arrays, params["dimension_numbers"], **kept)


class Rows:
    """The reading that evaluates all rows.

    Attributes:
        rows: how many coarse runs beside the exact one.
        unknown: names of primitives that it cannot evaluate coarsely: what depends on them has
            no known error, and NaN in its rows.
    """

    def __init__(self, rows: int = ROWS) -> None:
        self.rows = rows
        self.unknown: set[str] = set()
        self._draws = 2 ** np.random.default_rng(0).uniform(-0.5, 0.5, (_DRAWS, 1 + rows))
        self._draws[:, 0] = 0
        self._points = 0
        self._infinite = False

    def constant(self, value: Any, aval: Any, /) -> Value:
        """Return a literal or captured array: exact."""
        wide = widen(value, aval.dtype)
        if is_float(aval.dtype) and not isinstance(value, jax.core.Tracer):
            self._infinite |= bool(np.any(np.isinf(np.asarray(value, np.float64))))
        return Value(wide, rows=False)

    def spread(self, value: Value) -> Any:
        """Return an array with its rows, equal ones if it had none."""
        if value.rows:
            return value.array
        array = jnp.asarray(value.array)
        return jnp.broadcast_to(array, (1 + self.rows, *array.shape))

    def void(self, value: Value, known: Any) -> Value:
        """Return ``value`` with its error unknown, NaN in its rows, where not ``known``."""
        if not is_float(value.array.dtype):
            return value
        array = self.spread(value)
        first = np.arange(1 + self.rows).reshape(-1, *[1] * (array.ndim - 1)) == 0
        return Value(jnp.where(first | known, array, jnp.nan), rows=True)

    def round(self, value: Value, dtype: Any, growth: float = 1.0) -> Value:
        """Round every row but the first as ``dtype`` does, only ``COARSE * growth`` times worse."""
        array, info = self.spread(value), jnp.finfo(dtype)
        draw = self._draws[self._points % _DRAWS]
        self._points += 1
        ratio = float(info.eps) / float(np.finfo(np.float64).eps)
        less = np.minimum(ratio * COARSE * growth * draw, _LARGEST)
        more = less + np.where(draw > 0, draw / 2, 1)
        part = more - less  # exactly; d
        shift = np.where(draw > 0, 1 / (1 + draw), 1)
        # Scaled so that the products overflow where ``dtype`` does.
        large = 2.0 ** (1024 - int(info.maxexp))
        column = (-1, *[1] * (array.ndim - 1))
        scaled = array * (large * shift).reshape(column)
        parts = scaled * (more / large).reshape(column) - scaled * (less / large).reshape(column)
        rounded = parts * (1 / (shift * part)).reshape(column)
        # What is flushed to zero may lie on either side of a kink there; an exact zero does not.
        tiny, exact = float(info.tiny), array[:1]
        faint = (exact != 0) & (jnp.abs(exact) < _FAINT * tiny)
        signs = np.where(np.arange(array.shape[0]) % 2, tiny, -tiny) * (draw > 0)
        rounded = jnp.where(faint, rounded + signs.reshape(column), rounded)
        if self._infinite:  # an infinity that the program asks for, as a mask, is no overflow
            rounded = jnp.where(jnp.isinf(array), array, rounded)
        return Value(rounded, rows=True, fresh=True)

    def _apply(self, eqn: Any, inputs: Sequence[Value], params: dict[str, Any]) -> list[Value]:
        """Return the primitive on every row."""

        def bind(*arrays: Any) -> list[Any]:
            if eqn.primitive.name in _SCATTERS:
                return [_scatter(eqn.primitive.name, params, arrays)]
            out = eqn.primitive.bind(*arrays, **params)
            return list(out) if eqn.primitive.multiple_results else [out]

        rows = any(value.rows for value in inputs)
        axes = tuple(0 if value.rows else None for value in inputs)
        on_rows = jax.vmap(bind, in_axes=axes) if rows else bind
        return [Value(array, rows) for array in on_rows(*(value.array for value in inputs))]

    def _original(self, eqn: Any, inputs: Sequence[Value]) -> list[Value]:
        """Return the primitive on every row in the program's own dtypes."""
        narrow = [
            Value(jnp.asarray(value.array).astype(atom.aval.dtype), value.rows)
            if is_float(atom.aval.dtype)
            else value
            for value, atom in zip(inputs, eqn.invars, strict=True)
        ]
        return [
            Value(widen(value.array, var.aval.dtype), value.rows)
            for value, var in zip(self._apply(eqn, narrow, eqn.params), eqn.outvars, strict=True)
        ]

    def _give_up(self, eqn: Any, inputs: Sequence[Value]) -> list[Value]:
        """Return an equation's outputs with no known error."""
        self.unknown.add(eqn.primitive.name)
        return [self.void(value, known=False) for value in self._original(eqn, inputs)]

    def equation(self, eqn: Any, inputs: Sequence[Value]) -> Sequence[Value]:
        """Evaluate one equation on every row, and round what it makes."""
        name = eqn.primitive.name
        atoms = (*eqn.invars, *eqn.outvars)
        if any(jnp.issubdtype(atom.aval.dtype, jnp.complexfloating) for atom in atoms) or (
            inner_jaxprs(eqn) and name not in _SCATTERS
        ):
            return self._give_up(eqn, inputs)
        if name in arithmetic.BITWISE:
            return self._original(eqn, inputs)
        pairs = list(zip(inputs, eqn.invars, strict=True))
        if any(kinks.is_soft(value, atom.aval.dtype) for value, atom in pairs):
            return kinks.decide(eqn, inputs, self._apply)
        noisy = [value.rows and is_float(value.array.dtype) for value in inputs]
        if any(noisy):
            done = self._at_kink(eqn, inputs)
            if done is not None:
                return [done]
            inputs = self._steady(eqn, inputs, noisy)
        return self._arithmetic(eqn, inputs)

    def _at_kink(self, eqn: Any, inputs: Sequence[Value]) -> Value | None:
        """Return an equation that may take either of two sides; None where it is another."""
        name = eqn.primitive.name
        if name in kinks.COMPARISONS:
            return self._compare(name, inputs[0], inputs[1])
        if name in {"max", "min"}:
            return self._pick(1 if name == "max" else -1, inputs[0], inputs[1])
        if name == "clamp":
            low, value, high = inputs
            return self._pick(-1, self._pick(1, value, low), high)
        return None

    def _compare(self, name: str, left: Value, right: Value) -> Value:
        self._points += 1
        return kinks.compare(name, left, right, self._points)

    def _pick(self, sign: int, left: Value, right: Value) -> Value:
        return kinks.extreme(sign, left, right)

    def _steady(self, eqn: Any, inputs: Sequence[Value], noisy: list[bool]) -> list[Value]:
        """Return the inputs, made fit for step functions and poles."""
        name, pole, ready = eqn.primitive.name, arithmetic.pole(eqn), list(inputs)
        to_integer = name == "convert_element_type" and not is_float(eqn.outvars[0].aval.dtype)
        if noisy[0] and (to_integer or name in arithmetic.STEPS):
            ready[0] = kinks.amplified(inputs[0])
        if noisy[0] and name == "sign":
            self._points += 1
            ready[0] = kinks.signed(inputs[0], self._points)
        if pole is not None and noisy[pole]:
            ready[pole] = kinks.near_pole(inputs[pole])
        return ready

    def _arithmetic(self, eqn: Any, inputs: Sequence[Value]) -> list[Value]:
        growth, terms = arithmetic.growth(eqn), arithmetic.terms(eqn)
        if terms > 1:
            inputs = [
                self._round_terms(value, atom.aval.dtype, eqn)
                if is_float(atom.aval.dtype)
                else value
                for value, atom in zip(inputs, eqn.invars, strict=True)
            ]
        try:
            outputs = self._apply(eqn, inputs, widen_params(eqn.params))
        except (NotImplementedError, TypeError):  # no float64 form of it, or no batched one
            return self._give_up(eqn, inputs)
        fresh = [value.fresh for value in inputs]
        if arithmetic.is_exact(eqn):
            if eqn.primitive.name in arithmetic.MOVES:
                return [inputs[0]._replace(array=value.array) for value in outputs]
            owing = any(value.owing for value in inputs)
            return [value._replace(owing=owing) for value in outputs]
        if arithmetic.is_covered(eqn, fresh):
            return [value._replace(owing=True) for value in outputs]
        if any(value.owing for value in inputs):
            growth *= 2**0.5  # one rounding that stands for two
        rounded = [
            self.round(value, var.aval.dtype, growth) if is_float(var.aval.dtype) else value
            for value, var in zip(outputs, eqn.outvars, strict=True)
        ]
        if len(rounded) == 1:
            rounded = [self.reorder(eqn, inputs, rounded[0])]
        exactly = self._exactly(eqn, inputs)
        if exactly is not None:
            kept = jnp.where(exactly, self.spread(outputs[0]), rounded[0].array)
            return [Value(kept, rows=True)]
        return rounded

    def reorder(self, eqn: Any, inputs: Sequence[Value], output: Value) -> Value:
        """Return a sum with the error that another order of its terms would make."""
        params = widen_params(eqn.params)
        return reordered(eqn, inputs, output, self._apply, params, self._points)

    def _round_terms(self, value: Value, dtype: Any, eqn: Any) -> Value:
        """Round the terms of a sum as its partial sums are: where terms cancel, it shows."""
        if value.rows and arithmetic.terms(eqn) <= _FEW:
            return value  # they are rounded enough
        return self.round(value, arithmetic.summed_in(dtype, eqn), arithmetic.growth(eqn))

    def _exactly(self, eqn: Any, inputs: Sequence[Value]) -> Any | None:
        """Return where the values themselves spare an equation its rounding; None: nowhere."""
        if eqn.primitive.name == "pow":  # Adam's bias corrections in its first step
            return inputs[1].array == 1
        old, new = eqn.invars[0].aval.dtype, eqn.outvars[0].aval.dtype
        if eqn.primitive.name == "convert_element_type" and jnp.issubdtype(old, jnp.integer):
            largest = 2 ** (int(jnp.finfo(new).nmant) + 1)
            return abs(inputs[0].array.astype(jnp.float64)) <= largest
        return None

    def call(self, eqn: Any, inputs: Sequence[Value], body: Body[Value]) -> Sequence[Value]:
        """Enter it; a program spread over devices only as one whose error is not known."""
        if eqn.primitive.name in {"shard_map", "xla_pmap"}:
            return self._give_up(eqn, inputs)
        return body(inputs)

    def scan(
        self, eqn: Any, split: tuple[int, int], inputs: Sequence[Value], body: Body[Value]
    ) -> Sequence[Value]:
        """Run one scan over all rows at once."""
        return loops.scan(self, eqn, split, inputs, body)

    def while_loop(
        self, eqn: Any, inputs: Sequence[Value], predicate: Body[Value], body: Body[Value]
    ) -> Sequence[Value]:
        """Run one loop for all rows, as often as the exact row needs."""
        return loops.while_loop(self, eqn, inputs, predicate, body)

    def cond(
        self, eqn: Any, inputs: Sequence[Value], branches: Sequence[Body[Value]]
    ) -> Sequence[Value]:
        """Take the exact row's branch for all rows."""
        return loops.cond(self, eqn, inputs, branches)
