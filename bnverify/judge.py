"""How far observed steps break the laws: residuals, with the step's own rounding as tolerance."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from bnverify.case import Case
from bnverify.jaxpr.rounding import Rounding, rounding
from bnverify.jaxpr.slope import Slope, directional_derivative
from bnverify.jaxpr.tracing import Abstract, Tracer, as_function
from bnverify.laws import Law
from bnverify.laws.arithmetic import wide
from bnverify.laws.mismatch import Mismatch, not_finite, watching
from bnverify.lazy import jax
from bnverify.pytree import is_floating
from bnverify.subject import State, Tree
from bnverify.transition import Outcome, Transition

READ = {
    "noise": None,
    "gradient_noise": None,
    "directional_derivative": "slope",
    "layer_input_noise": "layer_inputs",
}
"""What laws need of the rounding -> what to ask ``RoundingBounds`` for besides the outcome's."""

OPTIONAL = frozenset({"gradient_noise"})
"""What laws can be judged without, where a step does not trace or its rounding cannot be read."""

READ_NEEDS = frozenset({*READ, "layer_inputs"})
"""What laws can ask of the step's traced program."""

FALLIBLE = frozenset({"expected_update"})
"""What a subject can fail to give; the laws that need it are not judged then."""

FAINT = 2.0**-60
"""Where all of a batch is smaller, its squares and slopes underflow."""


class Known(NamedTuple):
    """What float64 tells of some steps and evaluations, every leaf (K, ...).

    Attributes:
        exact: the outcomes without rounding.
        noise: like ``exact``: how far rounding may move each value.
        direction: a tree like params, (1, ...); None where the slope was not asked for.
        slope: of the loss along ``direction``, a ``bnverify.jaxpr.slope.Slope``; None likewise.
        layer_inputs: what each normalisation layer is given, without rounding; None where it was
            not asked for.
        layer_input_noise: likewise, how far rounding may move each value.
        unknown: names of primitives whose rounding cannot be read in any case.
    """

    exact: Any
    noise: Any
    direction: Any = None
    slope: Any = None
    layer_inputs: Any = None
    layer_input_noise: Any = None
    unknown: frozenset[str] = frozenset()


class RoundingBounds:
    """Reads the rounding of a subject's step and evaluation from its traces.

    Args:
        tracer: of the subject.
        seed: of the draws.
    """

    def __init__(self, tracer: Tracer, seed: int = 0) -> None:
        self._tracer = tracer
        self._seed = seed
        self._read: dict[Any, Rounding] = {}

    def __call__(self, before: State, case: Case, also: Collection[str] = ()) -> Known:
        """Return the exact outcomes of one step and evaluation, and the noise around them.

        Args:
            before: stacked states.
            case: stacked cases.
            also: which of "slope", with the direction, and "layer_inputs" is asked for too.
        """
        with_inputs = "layer_inputs" in also and self._tracer.subject.layer_inputs is not None
        reading = self._rounding(before, case, with_inputs=with_inputs)
        given = before, case.x, case.y, case.lr
        (exact, inputs), (noise, input_noise) = reading.evaluate(*given)
        known = Known(
            exact,
            noise,
            layer_inputs=inputs,
            layer_input_noise=input_noise,
            unknown=reading.unknown,
        )
        place = _place(reading.program.out[0].info.loss, reading.program.out)
        if "slope" not in also or place is None or np.ndim(exact.info.loss) != 1:
            return known  # a loss that is no scalar has no slope: a law of structure says so
        direction = some_direction(before.params)
        args = before.params, (*before[1:], *given[1:])  # the params are a state's first leaves
        at, around = exact.info.loss, noise.info.loss
        slope = directional_derivative(reading.program, args, direction, at, around, place)
        stacked = jax.tree_util.tree_map(lambda leaf: leaf[None], direction)
        return known._replace(direction=stacked, slope=slope)

    def slopes(self, before: State, case: Case, directions: Iterable[Tree]) -> list[Slope]:
        """Return the slope of the reported loss along each of some directions.

        Args:
            before: stacked states.
            case: stacked cases.
            directions: trees like the params of one case.

        Raises:
            LookupError: the step reports no loss that is a scalar.
        """
        reading = self._rounding(before, case, with_inputs=False)
        (exact, _), (noise, _) = reading.evaluate(before, case.x, case.y, case.lr)
        place = _place(reading.program.out[0].info.loss, reading.program.out)
        if place is None or np.ndim(exact.info.loss) != 1:
            raise LookupError("the step reports no loss that is a scalar")
        args = before.params, (*before[1:], case.x, case.y, case.lr)
        known = exact.info.loss, noise.info.loss, place
        return [directional_derivative(reading.program, args, d, *known) for d in directions]

    def _rounding(self, before: State, case: Case, *, with_inputs: bool) -> Rounding:
        single = jax.tree_util.tree_map(
            lambda leaf: Abstract(leaf.shape[1:], leaf.dtype), (before, case.x, case.y, case.lr)
        )
        types, structure = jax.tree_util.tree_flatten(single)
        key = structure, tuple(types), with_inputs
        if key not in self._read:
            run = self._run(*single, with_inputs=with_inputs)
            self._read[key] = rounding(run, *single, seed=self._seed)
        return self._read[key]

    def _run(self, before: State, x: Any, y: Any, lr: Any, *, with_inputs: bool) -> Any:
        """Return the step, its evaluation and its layers' inputs as one function, of traces alone."""
        subject, trace = self._tracer.subject, self._tracer.trace
        step = trace("step", subject.step, before, x, y, lr)
        evaluate = as_function(trace("evaluate", subject.evaluate, step.out[0], x, y))
        inputs = None
        if with_inputs:
            inputs = as_function(trace("layer_inputs", subject.layer_inputs, before, x, y))
        stepped = as_function(step)

        def run(before: State, x: Any, y: Any, lr: Any) -> tuple[Outcome, Any]:
            after, info = stepped(before, x, y, lr)
            given = inputs(before, x, y) if inputs is not None else None
            return Outcome(after, info, evaluate(after, x, y)), given

        return run


def _place(leaf: Any, tree: Any) -> int | None:
    """Return which of a tree's leaves ``leaf`` is; None: none of them, as of a loss not shown."""
    leaves = jax.tree_util.tree_leaves(tree)
    return next((number for number, each in enumerate(leaves) if each is leaf), None)


def some_direction(params: Tree) -> Tree:
    """Return a tree like one case of ``params``, in which every element counts: random signs and sizes.

    Args:
        params: stacked, (K, ...).
    """
    leaves, structure = jax.tree_util.tree_flatten(params)
    rng = np.random.default_rng(0)
    shapes = [leaf.shape[1:] for leaf in leaves]
    drawn = [rng.uniform(0.5, 1, shape) * rng.choice([-1.0, 1.0], shape) for shape in shapes]
    return jax.tree_util.tree_unflatten(structure, drawn)


class Judge:
    """Residuals of laws on transitions of one subject.

    Args:
        tracer: of the subject.
        abstract: a transition of it whose leaves have shapes and dtypes; None where it does not trace.
        seed: of the draws by which rounding is read.

    Attributes:
        incomparable: names of the laws that could not be judged, because the state's structure
            or shapes change, or a loss has another shape than it should.
        bounds: reads the rounding of the subject's step.
    """

    def __init__(self, tracer: Tracer, abstract: Transition | None, seed: int = 0) -> None:
        self.incomparable: set[str] = set()
        self._subject = tracer.subject
        self._traces = abstract is not None
        self.bounds = RoundingBounds(tracer, seed)
        self._facts = _static_facts(tracer.subject, abstract) if abstract is not None else {}

    def residuals(self, t: Transition, laws: Iterable[Law]) -> dict[str, Any]:
        """Return law name -> residuals, (K,), of stacked transitions.

        Args:
            t: the transitions, without rounding.
            laws: which laws.
        """
        laws = [law for law in laws if not FALLIBLE & set(law.observes) - set(t.facts)]
        t = self._with_facts(t, laws)
        found = {}
        for law in laws:
            try:
                found[law.name] = law.check(t)
            except (LookupError, TypeError, ValueError):  # trees or shapes that do not match
                self.incomparable.add(law.name)
        return found

    def mismatch(self, t: Transition, law: Law) -> Mismatch | None:
        """Return where a case breaks a law most; None where no single value is to blame.

        Args:
            t: the transition of one case, stacked, without rounding.
            law: a law with a residual that the case breaks.
        """
        t = self._with_facts(t, [law])
        with watching(t) as seen:
            law.check(t)
        return seen.worst or (not_finite(t) if seen.comparable else None)

    def _with_facts(self, t: Transition, laws: Collection[Law]) -> Transition:
        """Return stacked transitions with what the laws need of the traced step and the subject."""
        needs = {need for law in laws for need in law.observes}
        needs -= frozenset() if self._traces else OPTIONAL
        facts = {**t.facts, **self._facts}
        if not needs.isdisjoint(READ_NEEDS):
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
    """Return the laws with a residual whose needs are all ``available``."""
    known = set(available) | OPTIONAL
    return [law for law in laws if law.kind != "structure" and set(law.observes) <= known]


def _static_facts(subject: Any, abstract: Transition) -> Mapping[str, Any]:
    """Return the facts about ``subject`` that are the same for every case."""
    leaves: Sequence[Any] = jax.tree_util.tree_leaves(abstract.before.batch_stats)
    return {
        "momenta": tuple(subject.momentum for leaf in leaves if is_floating(leaf)),
        "biases_before_norm": tuple(subject.biases_before_norm),
        "look": subject.look,
    }


def _unless_faint(case: Case, noise: Any) -> Any:
    """Return ``noise``, infinite for a batch so faint that its squares and slopes underflow.

    Rounding is read as if a value were flushed to zero once; where all of x is below 2^-60 whole
    chains of values are, and what is left of them is no measure of a step.
    """
    largest = np.max(np.abs(case.x), axis=(-2, -1))
    faint = (largest > 0) & (largest < FAINT)
    if not faint.any():
        return noise

    def leaf(value: Any) -> Any:
        return np.where(faint.reshape(-1, *[1] * (value.ndim - 1)), np.inf, value)

    return jax.tree_util.tree_map(leaf, noise)


def _derivation(oracle: Any, t: Transition) -> Any:
    """Return what an oracle expects: of the step, and of evaluation in the step's outcome."""
    before, after, case = jax.tree_util.tree_map(wide, (t.before, t.after, t.case))
    with np.errstate(all="ignore"):  # a huge batch overflows; what is not finite is not compared
        expected = oracle.expected(before, case.x, case.y, case.lr)
        loss = oracle.evaluate(after.params, after.batch_stats, case.x, case.y)
    return expected._replace(eval_loss=loss)
