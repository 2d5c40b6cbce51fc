"""Residuals of laws on observed steps, with the step's own rounding noise as the tolerance."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from bnverify.errors import first_line
from bnverify.jaxpr.arithmetic import is_float32_wide_throughout
from bnverify.jaxpr.rounding import Rounded, Rounding, evaluate_stacked, rounding
from bnverify.jaxpr.slope import Slope, directional_derivative
from bnverify.jaxpr.tracing import Abstract, Tracer, TreeFunction
from bnverify.jaxpr.undrawn import UndrawnReading, draws_can_be_equal
from bnverify.laws import Law
from bnverify.laws.arithmetic import UNTRIGGERED, all_finite, wide
from bnverify.laws.mismatch import Mismatch, not_finite, watching
from bnverify.lazy import jax
from bnverify.model import Case, Outcome, State, Transition, Tree
from bnverify.observe import FEW_ROWS
from bnverify.pytree import is_floating
from bnverify.reruns import constant_features, double_batch

READ = {
    "noise": None,
    "gradient_noise": None,
    "eval_noise": None,
    "undrawn": None,
    "directional_derivative": "slope",
    "layer_input_noise": "layer_inputs",
}
"""Name in a law's ``observes`` -> the extra argument for ``RoundingBounds``; None: no extra one."""

OPTIONAL = frozenset({"gradient_noise"})
"""What laws can do without, if a step does not trace or its rounding cannot be read."""

EXACT = "exact:constant_features"
"""The outcome of that re-run in float64, without its rounding."""

READ_NEEDS = frozenset({*READ, "layer_inputs", EXACT})
"""Names in ``observes`` that are read from the traced step."""

FALLIBLE = frozenset({"expected_update"})
"""Names in ``observes`` that can fail; laws that need them are then not judged."""

FAINT = 2.0**-60
"""If all of x is smaller, its squares and products underflow."""


class Bounds(NamedTuple):
    """Exact values and rounding noise of K steps and evaluations; every leaf is (K, ...), float64.

    Attributes:
        exact: the outcomes without rounding.
        noise: like ``exact``: the rounding noise of each value.
        direction: a tree like params, (1, ...); None unless the slope was requested.
        slope: the slope of the loss along ``direction``, a ``bnverify.jaxpr.slope.Slope``; or None.
        layer_inputs: the input of each normalisation layer without rounding; None unless requested.
        layer_input_noise: the rounding noise of ``layer_inputs``.
        unknown: names of primitives whose rounding cannot be read in any case.
    """

    exact: Any
    noise: Any
    direction: Any = None
    slope: Any = None
    layer_inputs: Any = None
    layer_input_noise: Any = None
    unknown: frozenset[str] = frozenset()


class Undrawn(NamedTuple):
    """Two steps of K cases without rounding, in which all random numbers are equal.

    Attributes:
        step: the outcome of the step.
        doubled: that of the step on the batch with every row twice.
        noise: the rounding noise of ``step``.
    """

    step: Outcome
    doubled: Outcome
    noise: Outcome


class RoundingBounds:
    """Reads the rounding noise of a subject's step and evaluation from its traces.

    Args:
        tracer: the tracer of the subject.
        seed: the seed of the random rounding.
    """

    def __init__(self, tracer: Tracer, seed: int = 0) -> None:
        self._tracer = tracer
        self._seed = seed
        self._read: dict[Any, Rounding] = {}

    def __call__(self, before: State, case: Case, also: Collection[str] = ()) -> Bounds:
        """Return the exact outcomes of one step and evaluation, and their rounding noise.

        Args:
            before: stacked states.
            case: stacked cases.
            also: what else to return: "slope" (with the direction), "layer_inputs".
        """
        with_inputs = "layer_inputs" in also and self._tracer.subject.layer_inputs is not None
        reading = self._rounding(before, case, with_inputs=with_inputs)
        given = before, case.x, case.y, case.lr
        (exact, inputs), (noise, input_noise) = reading.evaluate(*given)
        known = Bounds(
            exact,
            noise,
            layer_inputs=inputs,
            layer_input_noise=input_noise,
            unknown=reading.unknown,
        )
        place = _place(reading.program.out[0].info.loss, reading.program.out)
        if "slope" not in also or place is None or np.ndim(exact.info.loss) != 1:
            return known  # training_loss_is_a_scalar reports a loss that is no scalar
        direction = some_direction(before.params)
        args = before.params, (*before[1:], *given[1:])  # the params are a state's first leaves
        at, around = exact.info.loss, noise.info.loss
        slope = directional_derivative(reading.program, args, direction, at, around, place)
        stacked = jax.tree_util.tree_map(lambda leaf: leaf[None], direction)
        return known._replace(direction=stacked, slope=slope)

    def of_evaluation(self, state: State, case: Case) -> Rounded:
        """Return the exact eval loss of given states, and its rounding noise without that of a step.

        Args:
            state: stacked states.
            case: stacked cases.
        """
        single = _of_one_case((state, case.x, case.y))
        program = self._tracer.trace("evaluate", self._tracer.subject.evaluate, *single)
        reading = self._once("evaluate", single, lambda: Rounding(program, self._seed))
        return reading.evaluate(state, case.x, case.y)

    def undrawn(self, before: State, case: Case) -> Undrawn | None:
        """Return a step, and one on the doubled batch, with equal random numbers.

        None: the batch has a single row or too many, or the random numbers cannot be held equal.

        Args:
            before: stacked states.
            case: stacked cases.
        """
        if not 1 < case.shape[0] <= FEW_ROWS:
            return None
        twice = double_batch(case)
        given, doubled = ((before, each.x, each.y, each.lr) for each in (case, twice))
        step, again = (
            self._tracer.trace("step", self._tracer.subject.step, *_of_one_case(each))
            for each in (given, doubled)
        )
        if not draws_can_be_equal(step.jaxpr):
            return None
        reading = self._once(
            "undrawn", step.args, lambda: Rounding(step, self._seed, UndrawnReading)
        )
        exact, noise = reading.evaluate(*given)
        other = evaluate_stacked(again, *doubled, reading=UndrawnReading(count=1))
        return Undrawn(Outcome(*exact), Outcome(*other), Outcome(*noise))

    def exact(self, before: State, case: Case) -> tuple[Outcome, bool]:
        """Return the outcomes of one step without rounding, and whether all its floats are wide.

        A float is wide that has float32's range at least: float16 has not.

        Args:
            before: stacked states.
            case: stacked cases.
        """
        program = self._rounding(before, case, with_inputs=False).program
        outcome, _ = evaluate_stacked(program, before, case.x, case.y, case.lr)
        return outcome, is_float32_wide_throughout(program.jaxpr)

    def slopes(self, before: State, case: Case, directions: Iterable[Tree]) -> list[Slope]:
        """Return the slope of the reported loss along each direction.

        Args:
            before: stacked states.
            case: stacked cases.
            directions: trees like the params of one case.

        Raises:
            LookupError: the step reports no scalar loss.
        """
        reading = self._rounding(before, case, with_inputs=False)
        (exact, _), (noise, _) = reading.evaluate(before, case.x, case.y, case.lr)
        place = _place(reading.program.out[0].info.loss, reading.program.out)
        if place is None or np.ndim(exact.info.loss) != 1:
            raise LookupError("the step reports no scalar loss")
        args = before.params, (*before[1:], case.x, case.y, case.lr)
        known = exact.info.loss, noise.info.loss, place
        return [directional_derivative(reading.program, args, d, *known) for d in directions]

    def _rounding(self, before: State, case: Case, *, with_inputs: bool) -> Rounding:
        single = _of_one_case((before, case.x, case.y, case.lr))

        def read() -> Rounding:
            return rounding(self._run(*single, with_inputs=with_inputs), *single, seed=self._seed)

        return self._once("step with inputs" if with_inputs else "step", single, read)

    def _once(self, name: str, single: Any, read: Callable[[], Rounding]) -> Rounding:
        """Return the reading of this name for these argument types, made at its first use."""
        types, structure = jax.tree_util.tree_flatten(single)
        key = name, structure, tuple(types)
        if key not in self._read:
            self._read[key] = read()
        return self._read[key]

    def _run(self, before: State, x: Any, y: Any, lr: Any, *, with_inputs: bool) -> Any:
        """Return one function of the traced programs: step, evaluation and layer inputs."""
        subject, trace = self._tracer.subject, self._tracer.trace
        step = trace("step", subject.step, before, x, y, lr)
        evaluate = TreeFunction(trace("evaluate", subject.evaluate, step.out[0], x, y))
        inputs = None
        if with_inputs:
            inputs = TreeFunction(trace("layer_inputs", subject.layer_inputs, before, x, y))
        stepped = TreeFunction(step)

        def run(before: State, x: Any, y: Any, lr: Any) -> tuple[Outcome, Any]:
            after, info = stepped(before, x, y, lr)
            given = inputs(before, x, y) if inputs is not None else None
            return Outcome(after, info, evaluate(after, x, y)), given

        return run


def _of_one_case(stacked: Any) -> Any:
    """Return the shapes and dtypes of one case of stacked trees."""
    return jax.tree_util.tree_map(lambda leaf: Abstract(leaf.shape[1:], leaf.dtype), stacked)


def _place(leaf: Any, tree: Any) -> int | None:
    """Return the index of ``leaf`` among the leaves of a tree; None if it is not one of them."""
    leaves = jax.tree_util.tree_leaves(tree)
    return next((number for number, each in enumerate(leaves) if each is leaf), None)


def some_direction(params: Tree) -> Tree:
    """Return a direction for a single case of ``params``: random signs, sizes from 0.5 to 1.

    Args:
        params: stacked, (K, ...).
    """
    leaves, structure = jax.tree_util.tree_flatten(params)
    rng = np.random.default_rng(0)
    shapes = [leaf.shape[1:] for leaf in leaves]
    drawn = [rng.uniform(0.5, 1, shape) * rng.choice([-1.0, 1.0], shape) for shape in shapes]
    return jax.tree_util.tree_unflatten(structure, drawn)


class Judge:
    """Computes the residuals of laws on transitions of one subject.

    Args:
        tracer: the tracer of the subject.
        abstract: a transition of it with shapes and dtypes; None if there is none.
        seed: the seed of the random rounding.
        traces: whether the subject traces, so that its rounding can be read.

    Attributes:
        incomparable: the laws that could not be judged, as where the step changes the structure or
            shapes of its state, or the loss has the wrong shape -> the error.
        bounds: reads the rounding noise of the subject's step.
    """

    def __init__(
        self, tracer: Tracer, abstract: Transition | None, seed: int = 0, *, traces: bool = True
    ) -> None:
        self.incomparable: dict[str, str] = {}
        self._subject = tracer.subject
        self._traces = traces
        self.bounds = RoundingBounds(tracer, seed)
        self._facts = _static_facts(tracer.subject, abstract) if abstract is not None else {}

    def residuals(self, t: Transition, laws: Iterable[Law]) -> dict[str, Any]:
        """Return law name -> residuals, (K,), of stacked transitions.

        Args:
            t: the transitions, with ``exact`` and ``noise`` still None.
            laws: the laws.
        """
        laws = [law for law in laws if not FALLIBLE & set(law.observes) - set(t.facts)]
        t = self._with_facts(t, laws)
        found = {}
        for law in laws:
            try:
                found[law.name] = self._unless_skipped(t, law.check(t))
            except (LookupError, TypeError, ValueError) as error:  # trees or shapes do not match
                self.incomparable[law.name] = first_line(error)
        return found

    def _unless_skipped(self, t: Transition, residuals: Any) -> Any:
        """Return the residuals, ``UNTRIGGERED`` where a run may have been skipped by design.

        A step with a loss scale, for example, leaves its state as it is if a gradient is not finite.
        """
        look = self._subject.look
        if look is None or not look.skips:
            return residuals
        runs = [t.info.grads, *(rerun.info.grads for rerun in t.reruns.values())]
        ran = all_finite(tuple(runs))
        return np.where(ran, residuals, UNTRIGGERED)

    def mismatch(self, t: Transition, law: Law) -> Mismatch | str | None:
        """Return where a case violates a law.

        Args:
            t: the transition of one case, stacked, with ``exact`` and ``noise`` still None.
            law: a law of kind "residual" that the case violates.

        Returns:
            The entry with the largest error, or else how trees differ in structure or shape, in words;
            None if neither is known.
        """
        t = self._with_facts(t, [law])
        with watching(t) as seen:
            law.check(t)
        if seen.worst is not None or seen.unlike:
            return seen.worst or seen.unlike
        return not_finite(t, ["constant_features"] if EXACT in law.observes else [""])

    def with_rounding(self, t: Transition) -> Transition:
        """Return stacked transitions with their exact outcomes and the noise around them."""
        known = self.bounds(t.before, t.case)
        return t._replace(exact=known.exact, noise=_unless_faint(t.case, known.noise))

    def _with_facts(self, t: Transition, laws: Collection[Law]) -> Transition:
        """Return stacked transitions with the exact values, noise and facts that the laws need."""
        needs = {need for law in laws for need in law.observes}
        needs -= frozenset() if self._traces else OPTIONAL
        facts = {**t.facts, **self._facts}
        if EXACT in needs:
            exact, wide_range = self.bounds.exact(t.before, constant_features(t.case))
            facts |= {"exact_constant_features": exact, "wide_range": wide_range}
        if "eval_noise" in needs:
            evaluated = self.bounds.of_evaluation(t.after, t.case)
            facts["exact_evaluation"] = evaluated.exact
            facts["eval_noise"] = _unless_faint(t.case, evaluated.noise)
        if "undrawn" in needs:
            facts["undrawn"] = self.bounds.undrawn(t.before, t.case)
        if not needs.isdisjoint(READ_NEEDS - {EXACT, "eval_noise", "undrawn"}):
            also = [name for need, name in READ.items() if need in needs and name is not None]
            known = self.bounds(t.before, t.case, {*also, *needs & {"layer_inputs"}})
            noise, input_noise = _unless_faint(t.case, (known.noise, known.layer_input_noise))
            facts |= {
                "direction": known.direction,
                "directional_derivative": known.slope,
                "layer_inputs": known.layer_inputs,
                "layer_input_noise": input_noise,
                "gradient_noise": None if known.unknown else noise.info.grads,
            }
            t = t._replace(exact=known.exact, noise=noise)
        if self._subject.oracle is not None:
            facts["oracle"] = _derivation(self._subject.oracle, t)
        return t._replace(facts=facts)


def judged(laws: Iterable[Law], available: Collection[str]) -> list[Law]:
    """Return the laws, except those of structure, whose ``observes`` are all ``available``."""
    known = set(available) | OPTIONAL
    return [law for law in laws if law.kind != "structure" and set(law.observes) <= known]


def _static_facts(subject: Any, abstract: Transition) -> Mapping[str, Any]:
    """Return the facts that are the same in every case."""
    leaves: Sequence[Any] = jax.tree_util.tree_leaves(abstract.before.batch_stats)
    return {
        "momenta": tuple(subject.momentum for leaf in leaves if is_floating(leaf)),
        "biases_before_norm": tuple(subject.biases_before_norm),
        "look": subject.look,
    }


def _unless_faint(case: Case, noise: Any) -> Any:
    """Return ``noise``, but infinite for cases in which all of x is below 2^-60.

    The reading of rounding allows for a single value being flushed to zero; with such a small x whole
    chains of products are flushed.
    """
    largest = np.max(np.abs(case.x), axis=(-2, -1))
    faint = (largest > 0) & (largest < FAINT)
    if not faint.any():
        return noise

    def leaf(value: Any) -> Any:
        return np.where(faint.reshape(-1, *[1] * (value.ndim - 1)), np.inf, value)

    return jax.tree_util.tree_map(leaf, noise)


def _derivation(oracle: Any, t: Transition) -> Any:
    """Return the oracle's results for the step, and for evaluation of the step's new state."""
    before, after, case = jax.tree_util.tree_map(wide, (t.before, t.after, t.case))
    with np.errstate(all="ignore"):  # a huge batch may overflow; non-finite values are not compared
        expected = oracle.expected(before, case.x, case.y, case.lr)
        loss = oracle.evaluate(after.params, after.batch_stats, case.x, case.y)
    return expected._replace(eval_loss=loss)
