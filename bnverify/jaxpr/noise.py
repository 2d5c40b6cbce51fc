"""Evaluate a program in float64 several times at once: exactly, and with random rounding.

Every value carries a leading axis of rows. Row 0 is the float64 run. Each other row is a run in
which every equation's result is multiplied by 1 + e, with e drawn anew for each row, equation
and element, somewhat larger than a rounding of the program's dtype: one thing that its arithmetic
could have made of the same numbers. Draws are independent, because compiled arithmetic is no
function of the values alone: sums are reordered, and a product may be fused into the sum that
takes it, so that equal terms need not cancel. But mostly it is one, so that the errors of tied
rows agree and add up: where that counts, half of the rows have equal draws for equal digits.

What rounding can do:

- A result errs by a unit of its dtype; a function that is approximated, by a few.
- A sum of n terms errs by its partial sums: as many units of it as ``arithmetic.growth`` says,
  and where terms cancel, as many of each term.
- What overflows in the program's dtype is infinite in its rows, so that its error is, too.
- What has no rounding (inputs, and what is only moved about) has no rows.

Random rounding as a probe of stability is due to La Porte and Vignes (CESTAC) and to Parker
(Monte Carlo arithmetic, 1997).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np

from bnverify.jaxpr import arithmetic, draws, kinks, loops
from bnverify.jaxpr.draws import Which
from bnverify.jaxpr.interpreter import hides_code
from bnverify.jaxpr.primitives import SCATTERS, in_float64, in_its_own_dtypes
from bnverify.jaxpr.values import Value, is_float, widen

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from bnverify.jaxpr.interpreter import Body

ROWS = 12
MANY = 16  # terms: from here on n errors that agree stand out from sqrt(n) that do not
_POINTS = 2**32  # more than a program has: the draws of two seeds have nothing in common
SIZE = 0.8  # the root mean square of e in units of rounding; that of a real error is near 0.4

# They leave the program, and may not be called for each row.
_CALLBACKS = frozenset({"debug_callback", "debug_print", "io_callback", "pure_callback"})


class Rows:
    """The reading that evaluates all rows.

    Attributes:
        which: the rows that are held: the exact one, and coarse ones.
        rows: how many coarse ones.
        seed: of the draws.
        added: how many numbers are added to what an equation makes, by its id (jaxpr/sums.py);
            any number to what is not listed.
        unknown: names of primitives that it cannot evaluate coarsely: what depends on them has
            no known error, and NaN in its rows.
    """

    def __init__(
        self, rows: int | Which = ROWS, seed: int = 0, added: Mapping[int, float] | None = None
    ) -> None:
        self.which = rows if isinstance(rows, Which) else Which.all(rows)
        self.rows = len(self.which.numbers) - 1
        self.seed = seed
        self.added = added or {}
        self.unknown: set[str] = set()
        self._points = seed * _POINTS

    def _draw(self, shape: tuple[int, ...]) -> Any:
        """Return e in units of SIZE, for each row and element of ``shape``; 0 in row 0."""
        self._points += 1
        return draws.independent(self._points, self.which, shape)

    def constant(self, value: Any, aval: Any, /) -> Value:
        """Return a literal or captured array: exact."""
        return Value(widen(value, aval.dtype), rows=False)

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

    def round(self, value: Value, dtype: Any, units: float, added: float) -> Value:
        """Round every row but the first as ``dtype`` does.

        Args:
            value: what to round.
            dtype: of the program.
            units: how many times over.
            added: how many numbers are added to each of these afterwards.
        """
        array = jnp.asarray(value.array)
        shape = array.shape[1:] if value.rows else array.shape
        size = units * SIZE * float(jnp.finfo(dtype).eps) / 2
        draw = self._draw(shape)
        factor = 1 + size * draw
        if jnp.finfo(dtype).bits < 32 or min(added, max(shape, default=0)) >= MANY:
            exact = array[0] if value.rows else array
            one, other, turned = draws.alike(self._points, self.which, draw, exact, dtype)
            factor = jnp.where(turned, 1 + size * other, 1 + size * one)
        rounded = array * factor
        if not arithmetic.is_wide(dtype):  # float16: values of every day are subnormal
            step = float(jnp.finfo(dtype).smallest_subnormal) * units
            rounded = jnp.where(array == 0, rounded, rounded + step * self._draw(shape))
        return Value(rounded, rows=True)

    def confine(self, value: Value, dtype: Any, room: float = 4) -> Value:
        """Return ``value`` in the range of ``dtype``: beyond it infinite, below it 0.

        But in row 0, which is exact. Near the lower end every other row loses what the rest keep:
        what is lost in all of them may cancel again.

        Args:
            value: what to confine.
            dtype: of the program.
            room: how much larger than a sum its partial sums may be.
        """
        info, wide = jnp.finfo(dtype), arithmetic.is_wide(dtype)
        # A literal may scale what is then not confined.
        most = float(info.max) / room / (arithmetic.NEAR if wide else 1)
        # float16 is computed in 32 bits, where its subnormal numbers are normal: none is flushed.
        tiny = float(info.tiny) if wide else 0.0
        odd = np.arange(1 + self.which.total) % 2 == 1
        largest = np.full(odd.shape, most)
        least = tiny * np.where(odd, arithmetic.NEAR, 1 / arithmetic.NEAR)
        largest[0], least[0] = np.inf, 0
        array = self.spread(value)
        size, rank = jnp.abs(array), array.ndim
        low, high = (self.which.column(self.which.of(ends), rank) for ends in (least, largest))
        inner = jnp.where(size < low, 0, array)
        return Value(jnp.where(size > high, jnp.inf, inner), rows=True)

    def _outside(self, eqn: Any) -> list[Value]:
        """Return what Python or the world gives: values of which nothing is known."""
        self.unknown.add(eqn.primitive.name)
        shapes = [(var.aval.shape, var.aval.dtype) for var in eqn.outvars]
        return [
            # The row without errors is a number: NaN in all of them would be a NaN known exactly.
            self.void(Value(jnp.zeros(shape), rows=False), False)
            if is_float(dtype)
            else Value(jnp.zeros(shape, dtype), rows=False)
            for shape, dtype in shapes
        ]

    def _give_up(self, eqn: Any, inputs: Sequence[Value]) -> list[Value]:
        """Return an equation's outputs with no known error."""
        self.unknown.add(eqn.primitive.name)
        return [self.void(value, known=False) for value in in_its_own_dtypes(eqn, inputs)]

    def equation(self, eqn: Any, inputs: Sequence[Value]) -> Sequence[Value]:
        """Evaluate one equation on every row, and round what it makes."""
        name = eqn.primitive.name
        if name in _CALLBACKS:
            return self._outside(eqn)
        atoms = (*eqn.invars, *eqn.outvars)
        if any(jnp.issubdtype(atom.aval.dtype, jnp.complexfloating) for atom in atoms) or (
            hides_code(eqn) and name not in SCATTERS
        ):
            return self._give_up(eqn, inputs)
        if name in arithmetic.BITWISE:
            return in_its_own_dtypes(eqn, inputs)
        pairs = list(zip(inputs, eqn.invars, strict=True))
        if any(kinks.is_soft(value, atom.aval.dtype) for value, atom in pairs):
            return kinks.decide(eqn, inputs)
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
        dtype = eqn.invars[-1].aval.dtype
        if name in kinks.COMPARISONS:
            return self._compare(name, inputs[0], inputs[1], dtype)
        if name in {"max", "min"}:
            return self._pick(1 if name == "max" else -1, inputs[0], inputs[1], dtype)
        if name == "clamp":
            low, value, high = inputs
            return self._pick(-1, self._pick(1, value, low, dtype), high, dtype)
        return None

    def _compare(self, name: str, left: Value, right: Value, dtype: Any) -> Value:
        self._points += 1
        return kinks.compare(name, left, right, dtype, self._points, self.which)

    def _pick(self, sign: int, left: Value, right: Value, dtype: Any) -> Value:
        self._points += 1
        return kinks.extreme(sign, left, right, dtype, self._points, self.which)

    def _steady(self, eqn: Any, inputs: Sequence[Value], noisy: list[bool]) -> list[Value]:
        """Return the inputs, made fit for step functions and poles."""
        name, pole, ready = eqn.primitive.name, arithmetic.pole(eqn), list(inputs)
        to_integer = name == "convert_element_type" and not is_float(eqn.outvars[0].aval.dtype)
        if noisy[0] and (to_integer or name in arithmetic.STEPS):
            ready[0] = kinks.amplified(inputs[0], self.which)
        if noisy[0] and name == "sign":
            self._points += 1
            ready[0] = kinks.signed(inputs[0], eqn.invars[0].aval.dtype, self._points, self.which)
        if pole is not None and noisy[pole]:
            ready[pole] = kinks.near_pole(inputs[pole])
        return ready

    def _arithmetic(self, eqn: Any, inputs: Sequence[Value]) -> list[Value]:
        units, terms = arithmetic.growth(eqn), arithmetic.terms(eqn)
        added = self.added.get(id(eqn), math.inf)
        if terms > 1:
            inputs = [
                self.round(value, arithmetic.summed_in(atom.aval.dtype, eqn), units, added * terms)
                if is_float(atom.aval.dtype)
                else value
                for value, atom in zip(inputs, eqn.invars, strict=True)
            ]
        try:
            outputs = in_float64(eqn, inputs)
        except (NotImplementedError, TypeError):  # no float64 form of it, or no batched one
            return self._give_up(eqn, inputs)
        rounded = [
            self._finish(eqn, value, var.aval.dtype, units, added)
            if is_float(var.aval.dtype)
            else value
            for value, var in zip(outputs, eqn.outvars, strict=True)
        ]
        exactly = None if arithmetic.is_exact(eqn) else self._exactly(eqn, inputs)
        if exactly is not None:
            kept = jnp.where(exactly, self.spread(outputs[0]), rounded[0].array)
            return [Value(kept, rows=True)]
        return rounded

    def _finish(self, eqn: Any, value: Value, dtype: Any, units: float, added: float) -> Value:
        exact = arithmetic.is_exact(eqn)
        finished = value if exact else self.round(value, dtype, units, added)
        if arithmetic.leaves_range(eqn):
            return self.confine(finished, dtype, room=1 if exact else 4)
        return finished

    def _exactly(self, eqn: Any, inputs: Sequence[Value]) -> Any | None:
        """Return where the values themselves spare an equation its rounding; None: nowhere."""
        if eqn.primitive.name == "pow":  # Adam's bias corrections in its first step
            return inputs[1].array == 1
        old, new = eqn.invars[0].aval.dtype, eqn.outvars[0].aval.dtype
        counts = jnp.issubdtype(old, jnp.integer) and is_float(new)
        if eqn.primitive.name == "convert_element_type" and counts:
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
