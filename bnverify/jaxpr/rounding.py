"""A bound on the rounding error of a traced program's results.

The program is evaluated in float64 by walking its jaxpr in NumPy (nothing is compiled): once
exactly, and ``ROWS`` times with random rounding. The spread of these rows about the exact one is
the tolerance of each number. The method assumes nothing about the model, and an ill-conditioned
input widens its own tolerance.

Every value is an array (rows, cases, *shape). Row 0 is the exact run. In every other row each
equation's result is multiplied by 1 + e, with e drawn for each row, equation and element, somewhat
larger than a rounding error of the program's dtype: one possible outcome of the program's
arithmetic. An axis of size 1 stands for values that are equal in all rows (nothing was rounded yet)
or in all cases (constants).

Draws are mostly independent, because the error of compiled arithmetic is not a function of the
values alone: sums are reordered, and a product may be fused with the addition that uses it, so
equal terms need not cancel. But often it is such a function, and then the errors of equal values
agree and add up. Where that matters, half of the rows draw equal errors for equal digits. The error
model:

- A result is off by an ulp of its dtype; an approximated function, by a few.
- A sum of n terms also rounds its partial sums: ``arithmetic.rounding_ulps`` ulps of the sum, and
  where terms cancel, as many ulps of each term.
- A product that is added may or may not be rounded, because the compiler may use a fused
  multiply-add. It may decide differently for each use of the sum and of values computed from it
  elementwise. If the sum cancels the product, its uses differ by the product's rounding error and
  need not cancel.
- Overflow in the program's dtype makes a row infinite, and so the tolerance.
- Inputs, and operations that only move data, do not round.

Random rounding as a test of numerical stability is due to La Porte and Vignes (CESTAC) and to
Parker (Monte Carlo arithmetic, 1997). ``benchmarks/rounding_soundness.py`` compares the bounds with
float32 runs.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bnverify.jaxpr import arithmetic, draws, kinks, numeric, tracing
from bnverify.jaxpr.interpreter import hides_code, live, read
from bnverify.jaxpr.values import Array, has_rows, is_complex, is_float, limits, per_row, widen

if TYPE_CHECKING:
    from collections.abc import Mapping

    from bnverify.jaxpr.interpreter import Body

ROWS = 12
SAFETY = 1.25
SIZE = 0.8
"""The root mean square of e in ulps; that of a real rounding error is about 0.4."""

MANY = 16
"""From this many terms, n equal errors in a sum differ noticeably from sqrt(n) independent ones."""

CANCELLED = 1 / 8
"""Below this fraction of a product in it, a sum's own rounding is smaller than the product's."""

BYTES = 2**26
"""The most memory for one chunk of cases, over all equations."""

_DRAWS_PER_SEED = 2**32  # more than any program uses, so seeds share no draws
_BODY = 2**16  # more draws than the body of a branch or loop uses
_ITERATIONS = 8  # iterations of a loop with draws of their own; later ones repeat them

# A moved or negated product can still be fused.
_MOVES = frozenset({"broadcast_in_dim", "neg", "reshape", "squeeze", "transpose"})

# Host callbacks, which must not be called once for each row.
_CALLBACKS = frozenset({"debug_callback", "debug_print", "io_callback", "pure_callback"})


class Rounded(NamedTuple):
    """A program's exact results and their rounding tolerances.

    Attributes:
        exact: the results without rounding: floats in float64, integers and booleans unchanged.
        noise: a pytree like ``exact``: the tolerance of each number, infinite if unknown.
    """

    exact: Any
    noise: Any


class RoundingReading:
    """Evaluates a program exactly in row 0 and with random rounding in all other rows.

    Args:
        seed: of the random draws.
        added: ``id(eqn)`` -> how many numbers may later be added to its result, see
            ``bnverify.jaxpr.arithmetic.additions_after``; infinite for equations not listed.
        count: the number of rows, including the exact one.
        drawn: the cache of draws; readings of one program with one seed may share it.

    Attributes:
        unknown: names of primitives that cannot be evaluated with rounding. Results that depend on
            them have no known error: NaN in their rounded rows.
    """

    def __init__(
        self,
        seed: int = 0,
        added: Mapping[int, float] | None = None,
        count: int = 1 + ROWS,
        drawn: draws.Draws | None = None,
    ) -> None:
        self.count = count
        self.unknown: set[str] = set()
        self._added = added or {}
        self._draw_index = seed * _DRAWS_PER_SEED
        self._draws = drawn or draws.Draws(count)
        # Keyed by id(variable): products; errors between the uses of a sum with a fused product;
        # such sums that have been used.
        self._products: set[int] = set()
        self._fma_errors: dict[int, Array] = {}
        self._used: set[int] = set()

    def constant(self, value: Any, aval: Any, /) -> Array:
        """Return a literal or captured array: exact, and equal in all cases."""
        return widen(value, aval.dtype)[None, None]

    def mark_unknown(self, value: Array, known: Any) -> Array:
        """Return ``value`` with NaN in all rounded rows where ``known`` is False."""
        if not is_float(value.dtype):
            return value
        first = per_row(np.arange(self.count) == 0, value)
        known = np.asarray(known)
        known = known.reshape(known.shape + (1,) * (value.ndim - known.ndim))
        return np.where(first | known, value, np.nan)

    def round(self, value: Array, dtype: Any, units: float, added: float) -> Array:
        """Round every row but row 0 as ``dtype`` does.

        Args:
            value: what to round.
            dtype: the program's dtype.
            units: the size of the error in ulps.
            added: how many numbers may later be added to each element.
        """
        shape, info = value.shape[2:], limits(dtype)
        errors = self._errors(value, dtype, units, added)
        errors += 1
        rounded = np.multiply(value, errors, out=errors if errors.shape[1] > 1 else None)
        if not arithmetic.has_float32_range(dtype):  # float16: moderate values can be subnormal
            step = float(info.smallest_subnormal) * units
            self._draw_index += 1
            below = step * self._draws.independent(self._draw_index, shape)
            rounded = np.where(value == 0, rounded, rounded + below)
        return rounded

    def _errors(self, value: Array, dtype: Any, units: float, added: float) -> Array:
        """Return relative rounding errors in a new array; 0 in row 0. Arguments as for ``round``.

        The shape is that of ``value``, or has a case axis of size 1 if all cases share the errors.
        """
        shape, info = value.shape[2:], limits(dtype)
        size = units * SIZE * float(info.eps) / 2
        self._draw_index += 1
        independent: Array = size * self._draws.independent(self._draw_index, shape)
        if info.bits >= 32 and min(added, max(shape, default=0)) < MANY:
            return independent
        errors = np.empty((self.count, *value.shape[1:]))
        errors[:] = independent
        self._draws.tie(self._draw_index, value[0], dtype, size, out=errors)
        return errors

    def clip_to_range(self, value: Array, dtype: Any, room: float = 4) -> Array:
        """Return ``value`` as ``dtype`` can hold it: overflow becomes infinite, underflow 0.

        Row 0 stays exact. Near underflow only every other row is flushed: if all were, the loss
        could cancel later. Cases well within the range, which is nearly all, are returned
        unchanged.

        Args:
            value: what to clip.
            dtype: the program's dtype.
            room: how much larger than the sum the partial sums may be.
        """
        info, wide = limits(dtype), arithmetic.has_float32_range(dtype)
        # Scaling by a literal up to LITERAL_SCALE is not checked again.
        most = float(info.max) / room / (arithmetic.LITERAL_SCALE if wide else 1)
        # float16 is computed in float32, where its subnormal numbers are normal and not flushed.
        tiny = float(info.tiny) if wide else 0.0
        exact = np.abs(value[:1])
        near_zero = (exact < tiny * arithmetic.LITERAL_SCALE**2) & (exact > 0)
        if value.max(initial=0) <= most and value.min(initial=0) >= -most and not near_zero.any():
            return value
        elements = tuple(range(2, value.ndim))
        far = ~(np.abs(value).max(axis=(0, *elements), initial=0) <= most)
        cases = np.flatnonzero(far | near_zero.any(axis=(0, *elements)))
        odd = np.arange(self.count) % 2 == 1
        largest = np.full(odd.shape, most)
        least = tiny * np.where(odd, arithmetic.LITERAL_SCALE, 1 / arithmetic.LITERAL_SCALE)
        largest[0], least[0] = np.inf, 0
        clipped = np.broadcast_to(value, (self.count, *value.shape[1:])).copy()
        some = clipped[:, cases]
        size = np.abs(some)
        some[size < per_row(least, some)] = 0
        some[size > per_row(largest, some)] = np.inf
        clipped[:, cases] = some
        return clipped

    def _unknown_outputs(self, eqn: Any) -> list[Array]:
        """Return outputs of unknown value, such as those of a host callback."""
        self.unknown.add(eqn.primitive.name)
        # Row 0 is 0, since NaN in all rows would stand for a result that is known to be NaN.
        return [
            self.mark_unknown(
                widen(np.zeros(var.aval.shape), var.aval.dtype)[None, None], known=False
            )
            for var in eqn.outvars
        ]

    def _without_tolerance(self, eqn: Any, inputs: Sequence[Array]) -> list[Array]:
        """Return an equation's exact outputs with unknown error."""
        self.unknown.add(eqn.primitive.name)
        exact = [value[:1] for value in inputs]
        try:
            outputs = numeric.through_jax(eqn, exact)
        except Exception:  # noqa: BLE001 - a primitive may raise anything outside its usual context
            return self._unknown_outputs(eqn)
        return [self.mark_unknown(value, known=False) for value in outputs]

    def equation(self, eqn: Any, inputs: Sequence[Array]) -> Sequence[Array]:
        """Evaluate one equation on every row and round its outputs."""
        inputs = self._vary_fused(eqn, inputs)
        outputs = self._evaluate(eqn, inputs)
        self._track_fma(eqn, inputs, outputs)
        return outputs

    def _vary_fused(self, eqn: Any, inputs: Sequence[Array]) -> Sequence[Array]:
        """Return the inputs; each further use of a sum with a fused product gets its own error."""
        if self._fma_errors.keys().isdisjoint(map(id, eqn.invars)):
            return inputs
        varied = list(inputs)
        for place, (value, atom) in enumerate(zip(inputs, eqn.invars, strict=True)):
            if id(atom) in self._fma_errors and id(atom) in self._used:
                self._draw_index += 1
                drawn = self._draws.independent(self._draw_index, value.shape[2:])
                varied[place] = value + self._fma_errors[id(atom)] * drawn
            self._used.add(id(atom))
        return varied

    def _track_fma(self, eqn: Any, inputs: Sequence[Array], outputs: Sequence[Array]) -> None:
        """Record products, and by how much the uses of a sum that cancels one may differ."""
        name, out = eqn.primitive.name, eqn.outvars[0]
        self._fma_errors.pop(id(out), None)  # left by an earlier iteration or call
        self._used.discard(id(out))
        if arithmetic.is_product(eqn) or (name in _MOVES and id(eqn.invars[0]) in self._products):
            self._products.add(id(out))
        errors = [
            *self._inherited_fma_errors(eqn, inputs),
            *self._new_fma_errors(eqn, inputs, outputs),
        ]
        if errors:
            most = functools.reduce(np.maximum, kinks.aligned(*errors))
            self._fma_errors[id(out)] = np.broadcast_to(most, (*most.shape[:2], *out.aval.shape))

    def _new_fma_errors(
        self, eqn: Any, inputs: Sequence[Array], outputs: Sequence[Array]
    ) -> Iterator[Array]:
        """Yield the rounding error of a product that a sum cancels, (1, cases, *shape)."""
        dtype = eqn.outvars[0].aval.dtype
        if eqn.primitive.name not in arithmetic.ADDITIONS or not is_float(dtype):
            return
        products = [
            np.abs(value[:1])
            for value, atom in zip(inputs, eqn.invars, strict=True)
            if id(atom) in self._products
        ]
        if not products or limits(dtype).bits < 32:  # 16-bit products are rounded before addition
            return
        *products, total = kinks.aligned(*products, np.abs(outputs[0][:1]))
        largest = functools.reduce(np.maximum, products)
        cancels = (total < CANCELLED * largest) & np.isfinite(largest)
        if cancels.any():
            yield np.where(cancels, largest, 0) * (SIZE * float(limits(dtype).eps) / 2)

    def _inherited_fma_errors(self, eqn: Any, inputs: Sequence[Array]) -> Iterator[Array]:
        """Yield by how much the uses of an output may differ because those of its inputs do."""
        name = eqn.primitive.name
        for place, atom in enumerate(eqn.invars):
            error = self._fma_errors.get(id(atom))
            if error is None:
                continue
            if name in _MOVES:
                yield np.abs(numeric.apply(eqn, [error])[0])
            elif name in arithmetic.ADDITIONS:
                yield error
            elif name == "mul" or (name == "div" and place == 0):
                error, other = kinks.aligned(error, np.abs(inputs[1 - place][:1]))
                yield error * other if name == "mul" else error / other
            elif name == "dot_general" and arithmetic.terms(eqn) == 1:  # compiled as a product
                factors = [np.abs(value[:1]) for value in inputs]
                factors[place] = error
                yield numeric.apply(eqn, factors)[0]

    def _evaluate(self, eqn: Any, inputs: Sequence[Array]) -> Sequence[Array]:
        name = eqn.primitive.name
        if name in _CALLBACKS:
            return self._unknown_outputs(eqn)
        atoms = (*eqn.invars, *eqn.outvars)
        if any(is_complex(atom.aval.dtype) for atom in atoms) or (
            name not in numeric.FORMS and hides_code(eqn)
        ):
            return self._without_tolerance(eqn, inputs)
        if name in arithmetic.BITWISE:
            return numeric.apply(eqn, inputs)
        pairs = list(zip(inputs, eqn.invars, strict=True))
        if any(kinks.is_soft(value, atom.aval.dtype) for value, atom in pairs):
            return kinks.decide(eqn, inputs)
        noisy = [has_rows(value) and is_float(value.dtype) for value in inputs]
        if any(noisy):
            decided = self._decide(eqn, inputs)
            if decided is not None:
                return [decided]
            inputs = self._guard(eqn, inputs, noisy)
        return self._arithmetic(eqn, inputs)

    def _decide(self, eqn: Any, inputs: Sequence[Array]) -> Array | None:
        """Return the output of a comparison, max, min or clamp; None for other primitives."""
        name = eqn.primitive.name
        dtype = eqn.invars[-1].aval.dtype
        if name in kinks.COMPARISONS:
            left, right = kinks.aligned(*inputs)
            return self._compare(name, left, right, dtype)
        if name in {"max", "min"}:
            left, right = kinks.aligned(*inputs)
            return self._extreme(1 if name == "max" else -1, left, right, dtype)
        if name == "clamp":
            low, value, high = kinks.aligned(*inputs)
            return self._extreme(-1, self._extreme(1, value, low, dtype), high, dtype)
        if name == "is_finite":
            return self._is_finite(inputs[0])
        return None

    def _is_finite(self, value: Array) -> Array:
        """Return a soft boolean, unknown where a row overflows, or lost all digits, unlike row 0."""
        finite = np.isfinite(value)
        return np.where(finite == finite[:1], finite.astype(np.float64), np.nan)

    def _compare(self, name: str, left: Array, right: Array, dtype: Any) -> Array:
        self._draw_index += 1
        return kinks.compare(name, left, right, dtype, self._draws.sides(self._draw_index))

    def _extreme(self, sign: int, left: Array, right: Array, dtype: Any) -> Array:
        self._draw_index += 1
        return kinks.extreme(sign, left, right, dtype, self._draws.sides(self._draw_index))

    def _guard(self, eqn: Any, inputs: Sequence[Array], noisy: list[bool]) -> list[Array]:
        """Return the inputs, adjusted for step functions, ``sign`` and poles; see ``kinks``."""
        name, pole, ready = eqn.primitive.name, arithmetic.pole(eqn), list(inputs)
        to_integer = name == "convert_element_type" and not is_float(eqn.outvars[0].aval.dtype)
        if noisy[0] and (to_integer or name in arithmetic.STEP_FUNCTIONS):
            ready[0] = kinks.with_amplified_noise(inputs[0])
        if noisy[0] and name == "sign":
            self._draw_index += 1
            sides = self._draws.sides(self._draw_index)
            ready[0] = kinks.with_random_sign(inputs[0], eqn.invars[0].aval.dtype, sides)
        if pole is not None and noisy[pole]:
            ready[pole] = kinks.nan_without_digits(inputs[pole])
        return ready

    def _arithmetic(self, eqn: Any, inputs: Sequence[Array]) -> list[Array]:
        units, terms = arithmetic.rounding_ulps(eqn), arithmetic.terms(eqn)
        added = self._added.get(id(eqn), math.inf)
        name = eqn.primitive.name
        unrounded = inputs
        if terms > 1:
            # Half of a product's error is in its factors, half in each output's own partial sums.
            share = math.sqrt(0.5) if name in arithmetic.PRODUCTS else 1.0
            inputs = [
                self.round(
                    value,
                    arithmetic.accumulation_dtype(atom.aval.dtype, eqn),
                    units * share,
                    added * terms,
                )
                if is_float(atom.aval.dtype)
                else value
                for value, atom in zip(inputs, eqn.invars, strict=True)
            ]
        try:
            outputs = numeric.apply(eqn, inputs)
        except NotImplementedError:
            try:
                outputs = numeric.through_jax(eqn, inputs)
            except Exception:  # noqa: BLE001 - a primitive may raise anything outside its usual context
                return self._without_tolerance(eqn, inputs)
            units += 2  # row 0 was rounded, too
        exact = arithmetic.is_exact(eqn)
        if name in arithmetic.PRODUCTS and terms > 1:
            outputs = [self._round_partial_sums(eqn, unrounded, outputs[0], units, added)]
        rounded = [
            self._round_output(eqn, value, var.aval.dtype, units, added, exact=exact)
            if is_float(var.aval.dtype)
            else value
            for value, var in zip(outputs, eqn.outvars, strict=True)
        ]
        unrounded_where = None if exact else _exact_where(eqn, inputs)
        if unrounded_where is not None:
            unrounded_where = kinks.aligned(unrounded_where, outputs[0])[0]
            return [np.where(unrounded_where, outputs[0], rounded[0])]
        return rounded

    def _round_partial_sums(
        self, eqn: Any, inputs: Sequence[Array], output: Array, units: float, added: float
    ) -> Array:
        """Return a sum of products with an error in its partial sums, independent for each output.

        The errors of the factors are shared by all outputs that use a factor, so they cancel
        wherever these outputs cancel. In addition each of the n terms has an error of its own, as
        many ulps as the whole sum; together these are the root of the sum of their squares.
        """
        made = eqn.outvars[0].aval.dtype
        if not is_float(made):
            return output
        dtype = arithmetic.accumulation_dtype(made, eqn)
        squares = numeric.apply(eqn, [value[:1] * value[:1] for value in inputs])[0]
        length = np.sqrt(squares)
        errors = self._errors(output, dtype, units, added)
        summed: Array = output + np.where(np.isfinite(length), length, 0.0) * errors
        return summed

    def _round_output(
        self, eqn: Any, value: Array, dtype: Any, units: float, added: float, *, exact: bool
    ) -> Array:
        rounded = value if exact else self.round(value, dtype, units, added)
        if arithmetic.may_leave_range(eqn):
            return self.clip_to_range(rounded, dtype, room=1 if exact else 4)
        return rounded

    def call(self, eqn: Any, inputs: Sequence[Array], body: Body[Array]) -> Sequence[Array]:
        """Enter the call; the error of a program that is mapped over devices is unknown."""
        inputs = self._vary_fused(eqn, inputs)
        if eqn.primitive.name in {"shard_map", "xla_pmap"}:
            return self._without_tolerance(eqn, inputs)
        return body(inputs)

    def scan(
        self, eqn: Any, split: tuple[int, int], inputs: Sequence[Array], body: Body[Array]
    ) -> Sequence[Array]:
        """Run a scan iteration by iteration."""
        consts, rest = split[0], sum(split)
        carry, xs = list(inputs[consts:rest]), inputs[rest:]
        iterations: list[int] = list(range(eqn.params["length"]))
        ys: dict[int, list[Array]] = {}
        first_draw = self._draw_index
        for done, index in enumerate(reversed(iterations) if eqn.params["reverse"] else iterations):
            self._draw_index = first_draw + done % _ITERATIONS * _BODY
            slices = [x[:, :, index] for x in xs]
            outputs = body([*inputs[:consts], *carry, *slices])
            carry, ys[index] = outputs[: len(carry)], outputs[len(carry) :]
        self._draw_index = first_draw + _ITERATIONS * _BODY
        if not iterations:
            stacked = eqn.outvars[len(carry) :]
            empty = (widen(np.zeros(var.aval.shape), var.aval.dtype) for var in stacked)
            return [*carry, *(array[None, None] for array in empty)]
        columns = zip(*(ys[index] for index in iterations), strict=True)
        return [*carry, *(np.stack(np.broadcast_arrays(*column), axis=2) for column in columns)]

    def while_loop(
        self, eqn: Any, inputs: Sequence[Array], predicate: Body[Array], body: Body[Array]
    ) -> Sequence[Array]:
        """Run a while loop in each case for as many iterations as its exact row takes."""
        first, second = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
        carry = list(inputs[first + second :])
        known: Any = True
        first_draw = self._draw_index
        for done in itertools.count():
            iteration_draw = first_draw + done % _ITERATIONS * 2 * _BODY
            self._draw_index = iteration_draw
            going, agreed = _decision(predicate([*inputs[:first], *carry])[0])
            known = known & agreed
            if not going.any():
                break
            self._draw_index = iteration_draw + _BODY
            after = body([*inputs[first : first + second], *carry])
            carry = [
                new if going.all() else np.where(_trailing(going, new), new, old)
                for new, old in zip(after, carry, strict=True)
            ]
        # Later equations get draws that do not depend on the number of iterations.
        self._draw_index = first_draw + _ITERATIONS * 2 * _BODY
        return [self.mark_unknown(value, known) if has_rows(value) else value for value in carry]

    def cond(
        self, eqn: Any, inputs: Sequence[Array], branches: Sequence[Body[Array]]
    ) -> Sequence[Array]:
        """Take, in each case, the branch that the exact row takes, for all rows."""
        del eqn
        index, agreed = _decision(inputs[0])
        index = np.clip(index.astype(np.int64), 0, len(branches) - 1)
        first_draw = self._draw_index
        outputs: list[Array] = []
        for number in np.unique(index):
            # A case's draws do not depend on the branches that other cases take.
            self._draw_index = first_draw + int(number) * _BODY
            taken = branches[number](inputs[1:])
            outputs = [
                np.where(_trailing(index == number, other), other, value)
                for value, other in zip(outputs or taken, taken, strict=True)
            ]
        self._draw_index = first_draw + len(branches) * _BODY
        if not has_rows(inputs[0]):
            return outputs
        return [self.mark_unknown(value, agreed) for value in outputs]


def _exact_where(eqn: Any, inputs: Sequence[Array]) -> Array | None:
    """Return where these input values make an equation exact; None: nowhere."""
    if eqn.primitive.name == "pow":  # x**1, as in Adam's bias correction in the first step
        return np.asarray(inputs[1] == 1)
    if eqn.primitive.name != "convert_element_type":
        return None
    old, new = eqn.invars[0].aval.dtype, eqn.outvars[0].aval.dtype
    if jnp.issubdtype(old, jnp.integer) and is_float(new):
        largest = 2 ** (int(limits(new).nmant) + 1)
        return np.asarray(np.abs(inputs[0].astype(np.float64)) <= largest)
    return None


def _decision(value: Array) -> tuple[Array, Array]:
    """Return row 0 of a predicate or index, (1, cases), and whether all rows agree with it."""
    exact = value[:1] > 0.5 if is_float(value.dtype) else value[:1]  # soft booleans are floats
    return exact, np.all(value == exact, axis=0, keepdims=True)


def _trailing(mask: Array, value: Array) -> Array:
    """Return a mask, (1, cases), reshaped to broadcast against ``value``."""
    return mask.reshape(mask.shape + (1,) * (value.ndim - mask.ndim))


class Rounding:
    """The rounding error of one traced program.

    Args:
        program: traced on arguments of concrete shapes.
        seed: of the random draws.
        reading: how it is read.

    Attributes:
        program: as given.
        unknown: names of primitives whose rounding is unknown; filled by ``evaluate``.
    """

    def __init__(
        self,
        program: tracing.Program,
        seed: int = 0,
        reading: type[RoundingReading] = RoundingReading,
    ) -> None:
        self.program = program
        self.unknown: frozenset[str] = frozenset()
        self._seed = seed
        self._reading = reading
        self._live = live(program.jaxpr)
        self._added = arithmetic.additions_after(self._live)
        self._drawn = draws.Draws(1 + ROWS)

    def evaluate(self, *args: Any) -> Rounded:
        """Return the program's results on stacked arguments, and their rounding tolerances.

        Args:
            *args: pytrees like those the program was traced on, every leaf with a leading axis over
                the K cases.

        Returns:
            ``Rounded``, two pytrees like the program's result, every leaf (K, ...).

        Raises:
            TypeError: the tree structures differ from those of the trace.
        """
        leaves = _leaves(self.program, args)
        cases = len(leaves[0]) if leaves else 1
        chunk = cases_per_chunk(self._live)
        parts = [
            self._evaluate_chunk([leaf[start : start + chunk] for leaf in leaves])
            for start in range(0, cases, chunk)
        ]
        whole = [np.concatenate(column) for column in zip(*parts, strict=True)]
        structure = jax.tree_util.tree_structure(self.program.out)
        half = len(whole) // 2
        return Rounded(
            jax.tree_util.tree_unflatten(structure, whole[:half]),
            jax.tree_util.tree_unflatten(structure, whole[half:]),
        )

    def _evaluate_chunk(self, leaves: list[Array]) -> list[Array]:
        """Return the exact results of a chunk of cases, followed by their tolerances."""
        cases = len(leaves[0]) if leaves else 1
        reading = self._reading(self._seed, self._added, drawn=self._drawn)
        with np.errstate(all="ignore"):
            results = read(self._live, reading, [leaf[None] for leaf in leaves])
            self.unknown = self.unknown | reading.unknown
            exacts, noises = [], []
            types = jax.tree_util.tree_leaves(self.program.out)
            for result, aval in zip(results, types, strict=True):
                soft = kinks.is_soft(result, aval.dtype)
                value = kinks.harden(result) if soft else result
                whole = np.broadcast_to(value, (len(value), cases, *value.shape[2:]))
                exacts.append(whole[0])
                noises.append(_noise(whole, aval.dtype))
        return exacts + noises


def evaluate(program: tracing.Program, *args: Any, reading: RoundingReading | None = None) -> Any:
    """Evaluate a program on one case without rounding: floats in float64, nothing compiled.

    Args:
        program: the traced program.
        *args: pytrees of arrays like those it was traced on.
        reading: how all of the program is read, with one row; None: what its results depend on is
            read, as it is.

    Raises:
        TypeError: the tree structures differ from those of the trace.
    """
    stacked = jax.tree_util.tree_map(lambda leaf: leaf[None], args)
    outcome = evaluate_stacked(program, *stacked, reading=reading)
    return jax.tree_util.tree_map(lambda leaf: leaf[0], outcome)


def evaluate_stacked(
    program: tracing.Program, *args: Any, reading: RoundingReading | None = None
) -> Any:
    """Return the same of several cases, every leaf (K, ...), as those of ``args`` are.

    Args:
        program: the traced program.
        *args: as for ``evaluate``, stacked.
        reading: as for ``evaluate``.

    Raises:
        TypeError: the trees are not those of the trace.
    """
    leaves = [leaf[None] for leaf in _leaves(program, args)]
    cases = leaves[0].shape[1] if leaves else 1
    with np.errstate(all="ignore"):
        if reading is None:
            results = read(live(program.jaxpr), RoundingReading(count=1), leaves)
        else:
            results = read(program.jaxpr, reading, leaves)
    structure = jax.tree_util.tree_structure(program.out)
    whole = [np.broadcast_to(each[0], (cases, *each.shape[2:])) for each in results]
    return jax.tree_util.tree_unflatten(structure, whole)


def cases_per_chunk(jaxpr: Any) -> int:
    """Return how many cases of a program to evaluate at once so that they fit in ``BYTES``."""
    return max(1, int(BYTES / (8 * (1 + ROWS) * max(arithmetic.count_values(jaxpr), 1))))


def _leaves(program: tracing.Program, args: Any) -> list[Array]:
    expected: Any = jax.tree_util.tree_structure(program.args)
    given: Any = jax.tree_util.tree_structure(args)
    if given != expected:
        raise TypeError(f"the program was traced on {expected}, but called with {given}")
    abstract = jax.tree_util.tree_leaves(program.args)
    leaves = jax.tree_util.tree_leaves(args)
    return [widen(leaf, aval.dtype) for leaf, aval in zip(leaves, abstract, strict=True)]


def _noise(value: Array, dtype: Any) -> Array:
    """Return the distance of a result's rows from the exact one, times ``SAFETY``.

    Rows are combined by their Euclidean norm: it varies less than the maximum and is never below
    it, so a jump in a single row counts in full.
    """
    exact = value[0]
    if not has_rows(value):
        return np.zeros(exact.shape)
    if not is_float(value.dtype):
        return np.where(np.all(value == value[:1], axis=0), 0.0, np.inf)
    distance = value[1:] - value[:1]
    noise = SAFETY * np.sqrt(np.sum(distance * distance, axis=0))
    return np.where(np.isfinite(noise), noise, np.inf) + arithmetic.underflow_threshold(dtype)


def rounding(function: Callable[..., Any], *args: Any, seed: int = 0) -> Rounding:
    """Return the rounding error of ``function``, traced on these argument types.

    Args:
        function: anything that traces under ``jax.jit``.
        *args: pytrees of ``Abstract``, ``jax.ShapeDtypeStruct`` or arrays, of concrete shapes.
        seed: of the random draws.
    """
    return Rounding(tracing.trace(function, *args), seed)
