"""How far the arithmetic of a traced program may take its results from the exact ones.

The program is evaluated in float64 once exactly and ``ROWS`` times with coarser rounding, by walking
its jaxpr in NumPy: nothing is compiled. The distance of the coarse rows from the exact one is the
tolerance of each number. Nothing is assumed about the model, and an ill-conditioned input widens its
own tolerance.

Every value is an array (rows, cases, *shape). Row 0 is the exact run. Each other row is a run in which
every equation's result is multiplied by 1 + e, with e drawn anew for each row, equation and element,
somewhat larger than a rounding of the program's dtype: one thing that its arithmetic could have made of
the same numbers. An axis of size 1 stands for values that are alike in all rows (nothing has rounded
yet) or in all cases (constants).

Draws are independent, because compiled arithmetic is no function of the values alone: sums are
reordered, and a product may be fused into the sum that takes it, so that equal terms need not cancel.
But mostly it is one, so that the errors of tied values agree and add up: where that counts, half of the
rows draw equally for equal digits. What rounding can do:

- A result errs by a unit of its dtype; a function that is approximated, by a few.
- A sum of n terms errs by its partial sums: as many units of it as ``arithmetic.growth`` says, and where
  terms cancel, as many of each term.
- A product that a sum takes is rounded, or it is not, where the two become one fused multiply-add. A
  compiler may decide it anew for each use of the sum, and of what is made of it element by element.
  Where the sum cancels, its uses then differ by the product's rounding, and need not cancel each other.
- What overflows in the program's dtype is infinite in its rows, so that its error is, too.
- Inputs, and what is only moved about, do not round.

Random rounding as a probe of stability is due to La Porte and Vignes (CESTAC) and to Parker (Monte
Carlo arithmetic, 1997). The claim is tested against float32 runs: ``benchmarks/rounding_soundness.py``.
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
from bnverify.jaxpr.interpreter import hides_code, read
from bnverify.jaxpr.sums import added
from bnverify.jaxpr.values import Array, has_rows, is_complex, is_float, limits, per_row, widen

if TYPE_CHECKING:
    from collections.abc import Mapping

    from bnverify.jaxpr.interpreter import Body

ROWS = 12
SAFETY = 1.25
SIZE = 0.8
"""The root mean square of e in units of rounding; that of a real error is near 0.4."""

MANY = 16
"""Terms of a sum from which on n errors that agree stand out from sqrt(n) that do not."""

CANCELLED = 1 / 8
"""A sum is this much smaller than a product in it where the product's rounding outweighs its own."""

BYTES = 2**26
"""The most that the values of one portion of the cases may take up, all equations together."""

_POINTS = 2**32  # more than a program has: the draws of two seeds have nothing in common
_BODY = 2**16  # more than a branch or a loop's body has
_TURNS = 8  # turns of a loop that draw anew; later ones repeat them

# A product is still one behind these.
_MOVES = frozenset({"broadcast_in_dim", "neg", "reshape", "squeeze", "transpose"})

# They leave the program, and may not be called for each row.
_CALLBACKS = frozenset({"debug_callback", "debug_print", "io_callback", "pure_callback"})


class Rounded(NamedTuple):
    """A program's results without rounding, and how far rounding may move them.

    Attributes:
        exact: the results in float64; integers and booleans as they are.
        noise: like ``exact``: the tolerance of each number, infinite where nothing is known.
    """

    exact: Any
    noise: Any


class Rows:
    """The reading that evaluates a program exactly and with random rounding.

    Args:
        seed: of the draws.
        added: how many numbers are added to what an equation makes, by its id
            (``bnverify.jaxpr.sums``); any number to what is not listed.
        count: how many rows there are, the exact one included.
        drawn: remembers draws; readings of one program with one seed may share it.

    Attributes:
        unknown: names of primitives that cannot be evaluated coarsely: what depends on them has no
            known error, and NaN in its rows.
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
        self._point = seed * _POINTS
        self._draws = drawn or draws.Draws(count)
        # By the id of a variable: products; how far the uses of a sum are apart; sums used once.
        self._products: set[int] = set()
        self._apart: dict[int, Array] = {}
        self._used: set[int] = set()

    def constant(self, value: Any, aval: Any, /) -> Array:
        """Return a literal or captured array: exact, and the same in all cases."""
        return widen(value, aval.dtype)[None, None]

    def void(self, value: Array, known: Any) -> Array:
        """Return ``value`` with its error unknown, NaN in its rows, where not ``known``."""
        if not is_float(value.dtype):
            return value
        first = per_row(np.arange(self.count) == 0, value)
        known = np.asarray(known)
        known = known.reshape(known.shape + (1,) * (value.ndim - known.ndim))
        return np.where(first | known, value, np.nan)

    def round(self, value: Array, dtype: Any, units: float, added: float) -> Array:
        """Round every row but the first as ``dtype`` does.

        Args:
            value: what to round.
            dtype: of the program.
            units: how many times over.
            added: how many numbers are added to each of these afterwards.
        """
        shape, info = value.shape[2:], limits(dtype)
        errors = self._errors(value, dtype, units, added)
        errors += 1
        rounded = np.multiply(value, errors, out=errors if errors.shape[1] > 1 else None)
        if not arithmetic.is_wide(dtype):  # float16: values of every day are subnormal
            step = float(info.smallest_subnormal) * units
            self._point += 1
            below = step * self._draws.independent(self._point, shape)
            rounded = np.where(value == 0, rounded, rounded + below)
        return rounded

    def _errors(self, value: Array, dtype: Any, units: float, added: float) -> Array:
        """Return the relative errors that rounding a value makes, to be overwritten; 0 in row 0.

        An array like ``value``, or with an axis of size 1 where all cases err equally. For the
        arguments see ``round``.
        """
        shape, info = value.shape[2:], limits(dtype)
        size = units * SIZE * float(info.eps) / 2
        self._point += 1
        independent: Array = size * self._draws.independent(self._point, shape)
        if info.bits >= 32 and min(added, max(shape, default=0)) < MANY:
            return independent
        errors = np.empty((self.count, *value.shape[1:]))
        errors[:] = independent
        self._draws.alike(self._point, value[0], dtype, size, out=errors)
        return errors

    def confine(self, value: Array, dtype: Any, room: float = 4) -> Array:
        """Return ``value`` in the range of ``dtype``: beyond it infinite, below it 0.

        But in row 0, which is exact. Near the lower end every other row loses what the rest keep:
        what is lost in all of them may cancel again. Cases that are well in the range, as nearly all
        are, stay as they are.

        Args:
            value: what to confine.
            dtype: of the program.
            room: how much larger than a sum its partial sums may be.
        """
        info, wide = limits(dtype), arithmetic.is_wide(dtype)
        # A literal may scale what is then not confined.
        most = float(info.max) / room / (arithmetic.NEAR if wide else 1)
        # float16 is computed in 32 bits, where its subnormal numbers are normal: none is flushed.
        tiny = float(info.tiny) if wide else 0.0
        exact = np.abs(value[:1])
        near_zero = (exact < tiny * arithmetic.NEAR**2) & (exact > 0)
        if value.max(initial=0) <= most and value.min(initial=0) >= -most and not near_zero.any():
            return value
        elements = tuple(range(2, value.ndim))
        far = ~(np.abs(value).max(axis=(0, *elements), initial=0) <= most)
        cases = np.flatnonzero(far | near_zero.any(axis=(0, *elements)))
        odd = np.arange(self.count) % 2 == 1
        largest = np.full(odd.shape, most)
        least = tiny * np.where(odd, arithmetic.NEAR, 1 / arithmetic.NEAR)
        largest[0], least[0] = np.inf, 0
        confined = np.broadcast_to(value, (self.count, *value.shape[1:])).copy()
        some = confined[:, cases]
        size = np.abs(some)
        some[size < per_row(least, some)] = 0
        some[size > per_row(largest, some)] = np.inf
        confined[:, cases] = some
        return confined

    def _outside(self, eqn: Any) -> list[Array]:
        """Return what Python or the world gives: values of which nothing is known."""
        self.unknown.add(eqn.primitive.name)
        # The row without errors is a number: NaN in all of them would be a NaN known exactly.
        return [
            self.void(widen(np.zeros(var.aval.shape), var.aval.dtype)[None, None], known=False)
            for var in eqn.outvars
        ]

    def _give_up(self, eqn: Any, inputs: Sequence[Array]) -> list[Array]:
        """Return an equation's outputs with no known error."""
        self.unknown.add(eqn.primitive.name)
        exact = [value[:1] for value in inputs]
        try:
            outputs = numeric.through_jax(eqn, exact)
        except Exception:  # noqa: BLE001 - whatever a primitive raises out of its place
            return self._outside(eqn)
        return [self.void(value, known=False) for value in outputs]

    def equation(self, eqn: Any, inputs: Sequence[Array]) -> Sequence[Array]:
        """Evaluate one equation on every row, and round what it makes."""
        inputs = self._as_used(eqn, inputs)
        outputs = self._evaluated(eqn, inputs)
        self._note_fusable(eqn, inputs, outputs)
        return outputs

    def _as_used(self, eqn: Any, inputs: Sequence[Array]) -> Sequence[Array]:
        """Return the inputs of an equation; a sum that may be fused anew, as this use may find it."""
        if self._apart.keys().isdisjoint(map(id, eqn.invars)):
            return inputs
        ready = list(inputs)
        for place, (value, atom) in enumerate(zip(inputs, eqn.invars, strict=True)):
            if id(atom) in self._apart and id(atom) in self._used:
                self._point += 1
                drawn = self._draws.independent(self._point, value.shape[2:])
                ready[place] = value + self._apart[id(atom)] * drawn
            self._used.add(id(atom))
        return ready

    def _note_fusable(self, eqn: Any, inputs: Sequence[Array], outputs: Sequence[Array]) -> None:
        """Keep in mind a product, and how far the uses of a sum that cancels one may be apart."""
        name, out = eqn.primitive.name, eqn.outvars[0]
        self._apart.pop(id(out), None)  # of an earlier turn or call
        self._used.discard(id(out))
        if name == "mul" or (name in _MOVES and id(eqn.invars[0]) in self._products):
            self._products.add(id(out))
        apart = [*self._carried_apart(eqn, inputs), *self._newly_apart(eqn, inputs, outputs)]
        if apart:
            most = functools.reduce(np.maximum, kinks.aligned(*apart))
            self._apart[id(out)] = np.broadcast_to(most, (*most.shape[:2], *out.aval.shape))

    def _newly_apart(
        self, eqn: Any, inputs: Sequence[Array], outputs: Sequence[Array]
    ) -> Iterator[Array]:
        """Yield a product's rounding where a sum cancels it, (1, cases, *shape)."""
        dtype = eqn.outvars[0].aval.dtype
        if eqn.primitive.name not in arithmetic.ADDITIONS or not is_float(dtype):
            return
        products = [
            np.abs(value[:1])
            for value, atom in zip(inputs, eqn.invars, strict=True)
            if id(atom) in self._products
        ]
        if not products or limits(dtype).bits < 32:  # 16 bits are rounded before they are added
            return
        *products, total = kinks.aligned(*products, np.abs(outputs[0][:1]))
        largest = functools.reduce(np.maximum, products)
        cancels = (total < CANCELLED * largest) & np.isfinite(largest)
        if cancels.any():
            yield np.where(cancels, largest, 0) * (SIZE * float(limits(dtype).eps) / 2)

    def _carried_apart(self, eqn: Any, inputs: Sequence[Array]) -> Iterator[Array]:
        """Yield how far apart an output's uses are since those of its inputs are: all is fused."""
        name = eqn.primitive.name
        for place, atom in enumerate(eqn.invars):
            apart = self._apart.get(id(atom))
            if apart is None:
                continue
            if name in _MOVES:
                yield np.abs(numeric.apply(eqn, [apart])[0])
            elif name in arithmetic.ADDITIONS:
                yield apart
            elif name == "mul" or (name == "div" and place == 0):
                apart, other = kinks.aligned(apart, np.abs(inputs[1 - place][:1]))
                yield apart * other if name == "mul" else apart / other

    def _evaluated(self, eqn: Any, inputs: Sequence[Array]) -> Sequence[Array]:
        name = eqn.primitive.name
        if name in _CALLBACKS:
            return self._outside(eqn)
        atoms = (*eqn.invars, *eqn.outvars)
        if any(is_complex(atom.aval.dtype) for atom in atoms) or (
            name not in numeric.FORMS and hides_code(eqn)
        ):
            return self._give_up(eqn, inputs)
        if name in arithmetic.BITWISE:
            return numeric.apply_in_own_dtype(eqn, inputs)
        pairs = list(zip(inputs, eqn.invars, strict=True))
        if any(kinks.is_soft(value, atom.aval.dtype) for value, atom in pairs):
            return kinks.decide(eqn, inputs)
        noisy = [has_rows(value) and is_float(value.dtype) for value in inputs]
        if any(noisy):
            done = self._at_kink(eqn, inputs)
            if done is not None:
                return [done]
            inputs = self._steady(eqn, inputs, noisy)
        return self._arithmetic(eqn, inputs)

    def _at_kink(self, eqn: Any, inputs: Sequence[Array]) -> Array | None:
        """Return an equation that may take either of two sides; None where it is another."""
        name = eqn.primitive.name
        dtype = eqn.invars[-1].aval.dtype
        if name in kinks.COMPARISONS:
            left, right = kinks.aligned(*inputs)
            return self._compare(name, left, right, dtype)
        if name in {"max", "min"}:
            left, right = kinks.aligned(*inputs)
            return self._pick(1 if name == "max" else -1, left, right, dtype)
        if name == "clamp":
            low, value, high = kinks.aligned(*inputs)
            return self._pick(-1, self._pick(1, value, low, dtype), high, dtype)
        return None

    def _compare(self, name: str, left: Array, right: Array, dtype: Any) -> Array:
        self._point += 1
        return kinks.compare(name, left, right, dtype, self._draws.sides(self._point))

    def _pick(self, sign: int, left: Array, right: Array, dtype: Any) -> Array:
        self._point += 1
        return kinks.extreme(sign, left, right, dtype, self._draws.sides(self._point))

    def _steady(self, eqn: Any, inputs: Sequence[Array], noisy: list[bool]) -> list[Array]:
        """Return the inputs, made fit for step functions and poles."""
        name, pole, ready = eqn.primitive.name, arithmetic.pole(eqn), list(inputs)
        to_integer = name == "convert_element_type" and not is_float(eqn.outvars[0].aval.dtype)
        if noisy[0] and (to_integer or name in arithmetic.STEPS):
            ready[0] = kinks.amplified(inputs[0])
        if noisy[0] and name == "sign":
            self._point += 1
            sides = self._draws.sides(self._point)
            ready[0] = kinks.signed(inputs[0], eqn.invars[0].aval.dtype, sides)
        if pole is not None and noisy[pole]:
            ready[pole] = kinks.near_pole(inputs[pole])
        return ready

    def _arithmetic(self, eqn: Any, inputs: Sequence[Array]) -> list[Array]:
        units, terms = arithmetic.growth(eqn), arithmetic.terms(eqn)
        more = self._added.get(id(eqn), math.inf)
        name = eqn.primitive.name
        given = inputs
        if terms > 1:
            # Half of a product's error comes from its factors, half from each output's own sum.
            share = math.sqrt(0.5) if name in arithmetic.PRODUCTS else 1.0
            inputs = [
                self.round(
                    value,
                    arithmetic.summed_in(atom.aval.dtype, eqn),
                    units * share,
                    more * terms,
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
            except Exception:  # noqa: BLE001 - whatever a primitive raises out of its place
                return self._give_up(eqn, inputs)
            units += 2  # the exact row was rounded, too
        exact = arithmetic.is_exact(eqn)
        if name in arithmetic.PRODUCTS and terms > 1:
            outputs = [self._summed(eqn, given, outputs[0], units, more)]
        rounded = [
            self._finish(eqn, value, var.aval.dtype, units, more, exact=exact)
            if is_float(var.aval.dtype)
            else value
            for value, var in zip(outputs, eqn.outvars, strict=True)
        ]
        spared = None if exact else _spared(eqn, inputs)
        if spared is not None:
            spared = kinks.aligned(spared, outputs[0])[0]
            return [np.where(spared, outputs[0], rounded[0])]
        return rounded

    def _summed(
        self, eqn: Any, inputs: Sequence[Array], output: Array, units: float, more: float
    ) -> Array:
        """Return a sum of products with a rounding of its partial sums that is each output's own.

        The errors of the factors are shared by all outputs that a factor enters, and where these
        cancel, they do, too. Each of n terms errs besides, by as many units as the whole: together by
        the root of the sum of their squares.
        """
        made = eqn.outvars[0].aval.dtype
        if not is_float(made):
            return output
        dtype = arithmetic.summed_in(made, eqn)
        squares = numeric.apply(eqn, [value[:1] * value[:1] for value in inputs])[0]
        length = np.sqrt(squares)
        errors = self._errors(output, dtype, units, more)
        summed: Array = output + np.where(np.isfinite(length), length, 0.0) * errors
        return summed

    def _finish(
        self, eqn: Any, value: Array, dtype: Any, units: float, more: float, *, exact: bool
    ) -> Array:
        finished = value if exact else self.round(value, dtype, units, more)
        if arithmetic.leaves_range(eqn):
            return self.confine(finished, dtype, room=1 if exact else 4)
        return finished

    def call(self, eqn: Any, inputs: Sequence[Array], body: Body[Array]) -> Sequence[Array]:
        """Enter it; a program spread over devices only as one whose error is not known."""
        inputs = self._as_used(eqn, inputs)
        if eqn.primitive.name in {"shard_map", "xla_pmap"}:
            return self._give_up(eqn, inputs)
        return body(inputs)

    def scan(
        self, eqn: Any, split: tuple[int, int], inputs: Sequence[Array], body: Body[Array]
    ) -> Sequence[Array]:
        """Run a scan turn by turn."""
        consts, rest = split[0], sum(split)
        carry, xs = list(inputs[consts:rest]), inputs[rest:]
        turns: list[int] = list(range(eqn.params["length"]))
        ys: dict[int, list[Array]] = {}
        begun = self._point
        for done, turn in enumerate(reversed(turns) if eqn.params["reverse"] else turns):
            self._point = begun + done % _TURNS * _BODY
            slices = [x[:, :, turn] for x in xs]
            outputs = body([*inputs[:consts], *carry, *slices])
            carry, ys[turn] = outputs[: len(carry)], outputs[len(carry) :]
        self._point = begun + _TURNS * _BODY
        if not turns:
            stacked = eqn.outvars[len(carry) :]
            empty = [np.zeros((1, 1, *var.aval.shape), _held(var.aval.dtype)) for var in stacked]
            return [*carry, *empty]
        columns = zip(*(ys[turn] for turn in turns), strict=True)
        return [*carry, *(np.stack(np.broadcast_arrays(*column), axis=2) for column in columns)]

    def while_loop(
        self, eqn: Any, inputs: Sequence[Array], predicate: Body[Array], body: Body[Array]
    ) -> Sequence[Array]:
        """Run a loop as often as each case's exact row asks."""
        first, second = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
        carry = list(inputs[first + second :])
        known: Any = True
        begun = self._point
        for done in itertools.count():
            turn = begun + done % _TURNS * 2 * _BODY
            self._point = turn
            going, agreed = _decided(predicate([*inputs[:first], *carry])[0])
            known = known & agreed
            if not going.any():
                break
            self._point = turn + _BODY
            after = body([*inputs[first : first + second], *carry])
            carry = [
                new if going.all() else np.where(_trailing(going, new), new, old)
                for new, old in zip(after, carry, strict=True)
            ]
        # What follows draws anew, however often the loop turned.
        self._point = begun + _TURNS * 2 * _BODY
        return [self.void(value, known) if has_rows(value) else value for value in carry]

    def cond(
        self, eqn: Any, inputs: Sequence[Array], branches: Sequence[Body[Array]]
    ) -> Sequence[Array]:
        """Take in each case the exact row's branch for all rows."""
        del eqn
        index, agreed = _decided(inputs[0])
        index = np.clip(index.astype(np.int64), 0, len(branches) - 1)
        begun = self._point
        outputs: list[Array] = []
        for number in np.unique(index):
            # A case's draws do not depend on the branches that other cases take.
            self._point = begun + int(number) * _BODY
            taken = branches[number](inputs[1:])
            outputs = [
                np.where(_trailing(index == number, other), other, value)
                for value, other in zip(outputs or taken, taken, strict=True)
            ]
        self._point = begun + len(branches) * _BODY
        if not has_rows(inputs[0]):
            return outputs
        return [self.void(value, agreed) for value in outputs]


def _spared(eqn: Any, inputs: Sequence[Array]) -> Array | None:
    """Return where the values themselves spare an equation its rounding; None: nowhere."""
    if eqn.primitive.name == "pow":  # Adam's bias corrections in its first step
        return np.asarray(inputs[1] == 1)
    old, new = eqn.invars[0].aval.dtype, eqn.outvars[0].aval.dtype
    counts = jnp.issubdtype(old, jnp.integer) and is_float(new)
    if eqn.primitive.name == "convert_element_type" and counts:
        largest = 2 ** (int(limits(new).nmant) + 1)
        return np.asarray(np.abs(inputs[0].astype(np.float64)) <= largest)
    return None


def _decided(value: Array) -> tuple[Array, Array]:
    """Return the exact row of a decision, (1, cases), and in which cases all rows share it."""
    exact = value[:1] > 0.5 if is_float(value.dtype) else value[:1]  # a truth value may be NaN
    return exact, np.all(value == exact, axis=0, keepdims=True)


def _trailing(mask: Array, value: Array) -> Array:
    """Return a mask (1, cases) to broadcast against ``value``."""
    return mask.reshape(mask.shape + (1,) * (value.ndim - mask.ndim))


def _held(dtype: Any) -> Any:
    return np.float64 if is_float(dtype) else dtype


class Rounding:
    """The rounding of one traced program.

    Args:
        program: what was traced, on arguments of concrete shapes.
        seed: of the draws.

    Attributes:
        program: as given.
        unknown: names of primitives whose rounding is not known; filled by ``evaluate``.
    """

    def __init__(self, program: tracing.Program, seed: int = 0) -> None:
        self.program = program
        self.unknown: frozenset[str] = frozenset()
        self._seed = seed
        self._added = added(program.jaxpr)
        self._drawn = draws.Draws(1 + ROWS)

    def evaluate(self, *args: Any) -> Rounded:
        """Return what the program gives on stacked arguments, and its rounding noise.

        Args:
            *args: trees like those the program was traced on, every leaf with a leading axis over
                the cases, (K, ...).

        Returns:
            Trees like the program's result, every leaf (K, ...).

        Raises:
            TypeError: the trees are not those of the trace.
        """
        leaves = _leaves(self.program, args)
        cases = len(leaves[0]) if leaves else 1
        portion = portion_of(self.program)
        parts = [
            self._portion([leaf[start : start + portion] for leaf in leaves])
            for start in range(0, cases, portion)
        ]
        whole = [np.concatenate(column) for column in zip(*parts, strict=True)]
        structure = jax.tree_util.tree_structure(self.program.out)
        half = len(whole) // 2
        return Rounded(
            jax.tree_util.tree_unflatten(structure, whole[:half]),
            jax.tree_util.tree_unflatten(structure, whole[half:]),
        )

    def _portion(self, leaves: list[Array]) -> list[Array]:
        """Return the exact results of some cases, then their noises."""
        cases = len(leaves[0]) if leaves else 1
        reading = Rows(self._seed, self._added, drawn=self._drawn)
        with np.errstate(all="ignore"):
            results = read(self.program.jaxpr, reading, [leaf[None] for leaf in leaves])
            self.unknown = self.unknown | reading.unknown
            exacts, noises = [], []
            types = jax.tree_util.tree_leaves(self.program.out)
            for result, aval in zip(results, types, strict=True):
                hard = kinks.is_soft(result, aval.dtype)
                value = kinks.harden(result) if hard else result
                whole = np.broadcast_to(value, (len(value), cases, *value.shape[2:]))
                exacts.append(whole[0])
                noises.append(_noise(whole, aval.dtype))
        return exacts + noises


def evaluate(program: tracing.Program, *args: Any) -> Any:
    """Return what a program gives on one case without rounding: floats in float64, nothing compiled.

    Args:
        program: what was traced.
        *args: trees of arrays like those it was traced on.

    Raises:
        TypeError: the trees are not those of the trace.
    """
    outcome = evaluate_stacked(program, *jax.tree_util.tree_map(lambda leaf: leaf[None], args))
    return jax.tree_util.tree_map(lambda leaf: leaf[0], outcome)


def evaluate_stacked(program: tracing.Program, *args: Any) -> Any:
    """Return the same of several cases, every leaf (K, ...), as those of ``args`` are.

    Raises:
        TypeError: the trees are not those of the trace.
    """
    leaves = [leaf[None] for leaf in _leaves(program, args)]
    cases = leaves[0].shape[1] if leaves else 1
    with np.errstate(all="ignore"):
        results = read(program.jaxpr, Rows(count=1), leaves)
    structure = jax.tree_util.tree_structure(program.out)
    whole = [np.broadcast_to(each[0], (cases, *each.shape[2:])) for each in results]
    return jax.tree_util.tree_unflatten(structure, whole)


def portion_of(program: tracing.Program) -> int:
    """Return how many cases of a program are read at once, so that they fit in ``BYTES``."""
    return max(1, int(BYTES / (8 * (1 + ROWS) * max(arithmetic.numbers(program.jaxpr), 1))))


def _leaves(program: tracing.Program, args: Any) -> list[Array]:
    expected: Any = jax.tree_util.tree_structure(program.args)
    given: Any = jax.tree_util.tree_structure(args)
    if given != expected:
        raise TypeError(f"traced on {expected}, called with {given}")
    abstract = jax.tree_util.tree_leaves(program.args)
    leaves = jax.tree_util.tree_leaves(args)
    return [widen(leaf, aval.dtype) for leaf, aval in zip(leaves, abstract, strict=True)]


def _noise(value: Array, dtype: Any) -> Array:
    """Return how far the rows of a result are from the exact one, times ``SAFETY``.

    The length of the vector of the rows' distances is steadier than the largest of them, and never
    below it, so that a jump which only one row made counts in full.
    """
    exact = value[0]
    if not has_rows(value):
        return np.zeros(exact.shape)
    if not is_float(value.dtype):
        return np.where(np.all(value == value[:1], axis=0), 0.0, np.inf)
    distance = value[1:] - value[:1]
    noise = SAFETY * np.sqrt(np.sum(distance * distance, axis=0))
    return np.where(np.isfinite(noise), noise, np.inf) + arithmetic.faint(dtype)


def rounding(function: Callable[..., Any], *args: Any, seed: int = 0) -> Rounding:
    """Return the rounding of ``function``, traced on arguments of these types.

    Args:
        function: anything that traces under ``jax.jit``.
        *args: trees of ``Abstract``, ``jax.ShapeDtypeStruct`` or arrays, of concrete shapes.
        seed: of the draws.
    """
    return Rounding(tracing.trace(function, *args), seed)
