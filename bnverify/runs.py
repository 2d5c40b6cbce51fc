"""Running a subject on cases: stacks of cases of each shape, then a few cases one at a time."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from bnverify import shrink
from bnverify.clues import Clues, general_cases, read_clues
from bnverify.errors import first_line
from bnverify.evidence import Counterexample, Evidence, Status
from bnverify.jaxpr.tracing import Tracer
from bnverify.judge import READ_NEEDS, Judge, judged
from bnverify.laws import LAWS, UNTRIGGERED, Law
from bnverify.laws.mismatch import Mismatch, factor
from bnverify.model import Case, Domain, Shape, Transition
from bnverify.observe import (
    FEW_ROWS,
    SINGLE,
    VOLUME,
    CompiledSubject,
    How,
    observe,
    observe_singly,
)
from bnverify.profile import Profile
from bnverify.pytree import stack, take
from bnverify.reruns import HALVES_LOST, LONG_SEED
from bnverify.shapes import TINY_SHAPES, shape_pool, tiny_shapes
from bnverify.stacks import stacked_cases

Phase: TypeAlias = tuple[str, int]
"""(What is being done now, the number of cases run so far)."""

Residuals = Mapping[str, npt.NDArray[np.float64]]

BETWEEN = (3, 4, 5, 9, 17, 33)
"""Row counts for smaller counterexamples of faults that need large batches: just above powers of two."""

ENOUGH = 30
"""A witness law is violated if this many cases met its precondition and none was a witness."""

LONG = 3
"""The number of cases with ``LONG_SEED``; one is not enough, since all its ReLUs may be inactive."""

NOISY = frozenset({"noise", "gradient_noise", "eval_noise", "undrawn"})
"""Observations with a tolerance that is rounding noise, read with random rounding."""

SINGLES = 20
"""The most cases that are run one at a time."""

FEWEST = 10
"""The fewest cases of a shape, even if a large model allows only small stacks."""

UNREACHED = "no case reached its precondition"

MOST_READ = 3
"""The most counterexamples that clues are read from."""


@dataclass
class Tally:
    """The results for one law so far.

    Attributes:
        law: the law.
        triggered: the number of cases that met its precondition.
        broken: how many of those violate it; for a witness law, how many are no witness.
        worst: the largest residual; for a witness law the smallest.
        case: the simplest violating case; for a witness law the simplest witness.
        worst_case: the case with the largest residual.
        dismissed: whether no single run confirmed the violation seen in stacked runs.
    """

    law: Law
    triggered: int = 0
    broken: int = 0
    worst: float | None = None
    case: Case | None = None
    worst_case: Case | None = None
    dismissed: bool = False
    _rank: tuple[float, ...] = field(default=(math.inf,))

    def add(self, cases: Case, residuals: npt.NDArray[np.float64]) -> None:
        """Add stacked cases and their residuals, (K,)."""
        residuals = np.nan_to_num(residuals, nan=np.inf, posinf=np.inf)
        reached = residuals >= 0
        if not reached.any():
            return
        self.triggered += int(reached.sum())
        self.broken += int((residuals > 1).sum())
        witness = self.law.kind == "witness"
        best = residuals[reached].min() if witness else residuals[reached].max()
        if self.worst is None or (best < self.worst if witness else best > self.worst):
            self.worst = float(best)
            self.worst_case = take(cases, int(np.flatnonzero(residuals == best)[0]))
        if witness and self.shown and self.case is not None:
            return
        wanted = reached if witness else residuals > 1
        if witness and (residuals == 0).any():
            wanted = residuals == 0
        self.keep_simplest(cases, wanted)

    def keep_simplest(self, cases: Case, wanted: npt.NDArray[np.bool_]) -> None:
        """Keep the simplest of stacked cases if simpler than ``case``; ``wanted``, (K,), selects them."""
        for index in np.flatnonzero(wanted)[:64]:  # enough to find a simple one
            case = take(cases, int(index))
            rank = shrink.complexity(case)
            if rank < self._rank:
                self.case, self._rank = case, rank

    def replace(self, case: Case) -> None:
        """Replace ``case`` by a simpler one."""
        self.case, self._rank = case, shrink.complexity(case)

    @property
    def shown(self) -> bool:
        """Whether a witness was found for a witness law."""
        return self.law.kind == "witness" and self.worst == 0

    @property
    def violated(self) -> bool:
        """Whether the law is violated.

        A witness law is violated if ``ENOUGH`` cases met its precondition and none was a witness.
        """
        if self.worst is None or self.dismissed:
            return False
        if self.law.kind == "witness":
            return not self.shown and self.triggered >= ENOUGH
        return self.worst > 1

    @property
    def verdict(self) -> tuple[Status, str]:
        """The status of a law that is not violated, and what it rests on."""
        witness = self.law.kind == "witness"
        if self.worst is None:
            return "untriggered", UNREACHED
        if witness and not self.shown:
            reason = (
                f"{never(self.law, self.triggered)}; at least {ENOUGH} cases are needed to decide"
            )
            return "untriggered", reason
        if self.dismissed:
            reason = f"{too_far(self.worst)} in a batched run; no single run confirms it"
            return "held", reason
        shown = self.case if witness else None
        return "held", f"shown by a case of shape {shown.shape}" if shown is not None else ""


def too_far(residual: float) -> str:
    """Return how far a residual exceeds its tolerance, in words."""
    if math.isfinite(residual):
        return f"the error is {factor(residual)} the tolerance"
    return "two values differ although they must be equal"


def never(law: Law, cases: int) -> str:
    """Return the message of a violated witness law: "Changing x never changed the loss in 30 cases"."""
    seen = law.never[:1].upper() + law.never[1:] or "Not shown"
    return f"{seen} in {cases:,} case{'' if cases == 1 else 's'}"


class Runner:
    """Runs one subject and judges the laws that need cases, for any number of seeds.

    Args:
        tracer: the tracer of the subject.
        abstract: a transition of the subject with shapes and dtypes; None if there is none.
        laws: the laws to judge.
        plan: how much to run.
        refusal: why the subject does not trace; empty if it does.
        note: a remark to add to every reason.
        how: how stacked cases are run; see :class:`CompiledSubject`.

    Attributes:
        domain: the domain of the cases.
        unstacked: why the subject does not run under vmap; empty if it does, or was not tried.
        judge: judges the laws.
        single: the subject's functions, called for one case after another.
    """

    def __init__(
        self,
        tracer: Tracer,
        abstract: Transition | None,
        laws: Collection[Law],
        plan: Profile,
        *,
        refusal: str = "",
        note: str = "",
        how: How = "vmap",
    ) -> None:
        subject = tracer.subject
        self.laws = laws
        self.subject = subject
        self.plan = plan
        self.refusal = refusal
        self.note = note
        self._readable = frozenset() if refusal else READ_NEEDS
        self.unstacked = ""
        self.judge, self._second = (
            Judge(tracer, abstract, seed, traces=not refusal) for seed in (0, 1)
        )
        self._how: How = "eager" if refusal else how
        alone: How = "eager" if refusal else "jit"
        self._batched = CompiledSubject(subject, self._how, tracer=tracer, most=plan.block)
        self.single = CompiledSubject(subject, alone, tracer=tracer)
        # A function that is init, one step and evaluate in one call is compared with a first step.
        first = bool(laws) and all("solution" in law.observes for law in laws)
        domain = Domain(max_warmup=0) if first else Domain()
        multiple = (subject.rows or 1) if refusal else tracer.multiple
        self.domain = replace(domain, multiple=multiple)

    # Sizes: how many cases, of which shapes.

    def block(self, shape: Shape) -> int:
        """Return how many cases of a shape (N, D) are stacked: one at least."""
        return self._batched.block(shape)

    def tiny(self) -> list[Shape]:
        """Return the tiny shapes of the plan, the largest last."""
        given = self._all_tiny()  # a single one where N and D have one value each
        chosen = [*dict.fromkeys([given[-1], given[0], *given])][: self.plan.tiny]
        return [shape for shape in given if shape in chosen]

    def between(self) -> list[Shape]:
        """Return the tiny shapes between the smallest and the largest one."""
        return self._all_tiny()[1:-1]

    def _all_tiny(self) -> list[Shape]:
        return list(tiny_shapes(domain=self.domain, features=self.subject.features))

    def further(self, seed: int) -> tuple[list[Shape], list[str]]:
        """Return the larger shapes, with as many rows as the model allows, and notes about them."""
        features = self.subject.features
        size = len(TINY_SHAPES) + self.plan.shapes
        pool = shape_pool(seed, domain=self.domain, features=features, size=size)
        tiny = self._all_tiny()
        width = self.subject.width(4)
        large = [(self._fitting(rows), width) for rows in self.plan.large]
        drawn = [*pool[len(tiny) :], *large]
        fitting = self._batched.fitting_rows
        found = [(self._fitting(fitting(shape)), shape[1]) for shape in drawn]
        notes = []
        if self.domain.multiple > 1:
            notes.append(
                f"the step only accepts batches of multiples of {self.domain.multiple} rows"
            )
        if found == drawn:
            return list(dict.fromkeys(found)), notes
        limit = max(rows for rows, _ in found)
        narrower = "the same code with narrower layers is checked far faster"
        note = f"a large model: cases of at most {limit} rows; {narrower}"
        return list(dict.fromkeys(found)), [*notes, note]

    def _fitting(self, rows: int) -> int:
        """Return the next smaller N that the step takes, or the smallest."""
        multiple = self.domain.multiple
        return max(rows // multiple, 1) * multiple

    def phases(self, seed: int) -> int:
        """Return the number of phases: compiling, one per shape, and one for single cases."""
        if not self.laws:
            return 0
        shapes = {*self.tiny(), *self.further(seed)[0]}
        return (
            self.compiles
            + len(shapes)
            + any(SINGLE.intersection(law.observes) for law in self.laws)
        )

    # Running.

    def prepare(self, shapes: Iterable[Shape]) -> None:
        """Start compiling for several shapes in the background; errors are raised by the later call."""
        if not self.compiles:
            return
        for shape in shapes:
            try:
                self._batched.prepare([shape])
            except Exception:  # noqa: BLE001 - user code may raise anything
                return

    @property
    def available(self) -> frozenset[str]:
        """What stacked runs can observe."""
        return VOLUME | self._readable

    def affordable(self, shape: Shape) -> list[Law]:
        """Return the laws that are judged on stacked cases of a shape.

        Doubling the batch takes a program of its own, so it is only done for few rows.
        """
        doubled = 1 < shape[0] <= FEW_ROWS and shape[1] != 1
        return [
            law
            for law in judged(self.laws, self.available)
            if doubled or "step:doubled_batch" not in law.observes
        ]

    def residuals(self, cases: Case) -> Residuals:
        """Return law name -> residuals, (K,), of stacked cases, for the laws judged on their shape."""
        return self.judged(cases, self.affordable(cases.shape))

    def judged(self, cases: Case, laws: Collection[Law]) -> Residuals:
        """Return law name -> residuals, (K,), of stacked cases."""
        needs = {need for law in laws for need in law.observes}
        return self.judge.residuals(observe(self._batched, cases, needs), laws)

    def unstack(self, error: Exception) -> None:
        """Run cases one at a time from now on, because the subject does not run under vmap."""
        self.unstacked = f"not run under vmap: {first_line(error)}"
        self._batched = self.single

    @property
    def compiles(self) -> bool:
        """Whether stacked cases are run by compiled programs."""
        return self.stacks and self._how == "vmap"

    @property
    def stacks(self) -> bool:
        """Whether stacked cases are run under vmap."""
        return not self.refusal and not self.unstacked

    def singly(self, cases: Case, laws: Iterable[Law], judge: Judge | None = None) -> Residuals:
        """Return law name -> residuals, (K,), of cases that are run one at a time."""
        available = self.available | SINGLE
        laws = judged(laws, available if self.stacks else available - {"stacked"})
        return (judge or self.judge).residuals(self._observed_singly(cases, laws), laws)

    def _observed_singly(self, cases: Case, laws: Iterable[Law]) -> Transition:
        needs = {need for law in laws for need in law.observes}
        return observe_singly(self.single, cases, needs, batched=self._batched)

    def hold(self, law: Law, case: Case) -> Evidence:
        """Return what a case that is run by itself says about a law."""
        found = self.singly(stack([case]), [law]).get(law.name, np.full(1, UNTRIGGERED))
        residual = float(np.nan_to_num(found[0], nan=np.inf))
        if residual > 1:
            return self.violation(law, case, residual)
        if residual < 0:
            return Evidence.of(law.name, "untriggered", reason=UNREACHED)
        return Evidence.of(law.name, "held", cases=1, residual=residual)

    def violation(
        self, law: Law, case: Case, residual: float, *, cases: int = 1, failed: int = 1
    ) -> Evidence:
        """Return the evidence of a law that is broken.

        Args:
            law: the law.
            case: one that breaks it; of a witness law, one that does not show it.
            residual: the worst that was seen.
            cases: how many cases reached the law's precondition.
            failed: how many of them broke it.
        """
        mismatch = None
        if law.kind == "witness":
            said = never(law, cases)
        else:
            mismatch = self.judge.mismatch(self._observed_singly(stack([case]), [law]), law)
            said = str(mismatch or too_far(residual))
        return Evidence.of(
            law.name,
            "violated",
            cases=cases,
            residual=residual,
            reason=", ".join(filter(None, (said, self.note))),
            shape=case.shape,
            mismatch=mismatch if isinstance(mismatch, Mismatch) else None,
            failed=failed,
        )

    def unreached(self, law: Law) -> str:
        """Return why no case reached a law's precondition."""
        if self.refusal:
            return f"not checked, because the step does not trace: {self.refusal}"
        if law.name in self.judge.incomparable:
            error = self.judge.incomparable[law.name]
            return f"the arrays that it compares do not match ({error}), perhaps as a law of structure says"
        refused = {**self.single.refused, **self._batched.refused}
        return next((refused[need] for need in law.observes if need in refused), UNREACHED)

    def confirmed(self, law: Law, case: Case, worst: float) -> bool:
        """Return whether a case violates a law when it is run on its own.

        If the tolerance is rounding noise, the violation must persist with a second, independent
        reading of it: with thousands of cases, mutated from the worst, some exceed it by chance.
        """
        judges = [self.judge]
        if NOISY & set(law.observes) and worst < shrink.CLEAR:
            judges.append(self._second)
        return all(
            self.singly(stack([case]), [law], judge).get(law.name, np.full(1, -1.0))[0] > 1
            for judge in judges
        )

    def clues(self, broken: Collection[Evidence], seed: int) -> Clues:
        """Return the clues about a step that violates some laws.

        They are read from two general cases and from counterexamples of several shapes, with the
        programs that are already compiled; for a large model one case at a time.

        Args:
            broken: the evidence of the violated laws.
            seed: the seed of the run, which chose the shapes.
        """
        shown: dict[Shape, Case] = {}
        for each in broken:
            if each.counterexample is not None and each.counterexample.case is not None:
                shown.setdefault(each.counterexample.case.shape, each.counterexample.case)
        # If doubling the batch changes the result, the fault may be in the doubled batch.
        twice = [
            general_cases((2 * rows, features))[0]
            for each in broken
            if each.shape is not None and "step:doubled_batch" in LAWS[each.law].observes
            for rows, features in [each.shape]
        ]
        several = [s for s in self.further(seed)[0] if s[0] > 2 * self.domain.multiple]
        shape = min(several, default=self.tiny()[-1])
        small = self.stacks and self.block(shape) == self.plan.block
        most = 1 if self.refusal else MOST_READ
        return read_clues(
            self._batched if small else self.single,
            self.judge.bounds,
            [*general_cases(shape), *twice, *list(shown.values())[:most]],
            [each.law for each in broken],
        )


class Run:
    """One run of a subject for one seed, and its results.

    Args:
        runner: runs and judges the subject.
        seed: from which all cases are drawn.
        fail_fast: whether to stop at the first stack of cases that shows a violation.

    Attributes:
        tallies: law name -> its results.
        cases: the number of cases run.
        notes: notes for the report.
    """

    def __init__(self, runner: Runner, seed: int, *, fail_fast: bool = False) -> None:
        self._runner = runner
        self._plan, self._domain = runner.plan, runner.domain
        self._seed, self._fail_fast = seed, fail_fast
        self.tallies = {law.name: Tally(law) for law in runner.laws}
        self.cases = 0
        self.notes: list[str] = []

    def steps(self) -> Iterator[Phase]:
        """Run everything the plan asks for, and yield each phase as it begins."""
        if not self._runner.laws:
            return
        rng = np.random.default_rng(self._seed)
        tiny = self._runner.tiny()
        small = sorted({*tiny, *self._runner.between()}, key=math.prod)
        further, notes = self._runner.further(self._seed)
        self.notes += notes
        # The smallest batches come last: BatchNorm maps a single row to 0, so it reveals little.
        shapes = [*sorted(tiny, key=lambda shape: shape[0] == self._domain.multiple), *further]
        if self._runner.compiles:
            yield "compiling", self.cases  # the proofs are printed before it
            self._runner.prepare(shapes)
        for shape in shapes:
            if not self._enough:
                yield from self._stack(shape, self._plan.blocks, rng)
        yield from self._descend(rng, shapes)
        if self._runner.unstacked:
            self.notes.append(self._runner.unstacked)
        yield from self._explore(tiny[-1])
        broken = [t for t in self.tallies.values() if t.violated and t.law.kind == "residual"]
        for place, tally in enumerate(broken):
            yield f"shrinking {tally.law.name}", self.cases
            shrink.simplify(self._runner, tally, broken[place + 1 :], small, self._seed)

    @property
    def _enough(self) -> bool:
        residual = (tally for tally in self.tallies.values() if tally.law.kind == "residual")
        return self._fail_fast and any(tally.violated for tally in residual)

    def _stack(self, shape: Shape, blocks: int, rng: np.random.Generator) -> Iterator[Phase]:
        """Run stacks of cases of one shape; half of each is bred from the worst of those before."""
        runner = self._runner
        if runner.stacks:
            size = runner.block(shape)
            try:
                blocks = max(blocks, math.ceil(min(FEWEST, self._plan.block) / size))
                yield from self._blocks(shape, blocks, size, rng)
            except Exception as error:  # noqa: BLE001 - whatever a user's code raises under vmap
                runner.unstack(error)
            else:
                return
        yield from self._blocks(shape, 1, self._plan.examples, rng)

    def _blocks(
        self, shape: Shape, blocks: int, size: int, rng: np.random.Generator
    ) -> Iterator[Phase]:
        worst: dict[str, tuple[float, Case]] = {}
        for _ in range(blocks):
            yield f"cases of shape {shape}", self.cases
            cases = stacked_cases(rng, shape, size, self._domain)
            if worst and size > 1:
                parents = [case for _, case in worst.values()]
                bred = shrink.breed(parents, size // 2, rng, self._domain)
                kept = take(cases, np.arange(size // 2, size))
                cases = Case(*(np.concatenate(part) for part in zip(bred, kept, strict=True)))
            residuals = self._runner.residuals(cases)
            self.cases += size
            for name, values in residuals.items():
                self.tallies[name].add(cases, values)
                finite = np.where(np.isfinite(values), values, -1.0)
                index = int(np.argmax(finite))
                if finite[index] > worst.get(name, (0.0, None))[0]:
                    worst[name] = float(finite[index]), take(cases, index)
            if self._enough:
                break

    def _descend(self, rng: np.random.Generator, run: Collection[Shape]) -> Iterator[Phase]:
        """Look for smaller violating cases of the laws that only large batches were seen to break.

        First with fewer rows and few features, then with few features or few rows, and last in the tiny
        shapes that are not among those that were ``run``.
        """
        if not self._runner.stacks or self._enough:
            return
        width = self._runner.subject.width(1)
        multiple = self._domain.multiple
        for parts in BETWEEN:
            if not any(shape[0] > parts * multiple for shape in self._violating()):
                break
            yield from self._stack((parts * multiple, width), 1, rng)
        large = [
            shape
            for shape in self._violating()
            if shape[0] > 2 * multiple and shape[1] > max(2, width)
        ]
        if large:
            rows, columns = min(large)
            yield from self._stack((rows, width), 1, rng)
            yield from self._stack((2 * multiple, columns), 1, rng)
        for smaller in self._runner.between():
            if smaller not in run and self._runner.tiny()[-1] in self._violating():
                yield from self._stack(smaller, 1, rng)

    def _violating(self) -> list[Shape]:
        """Return the shape of the simplest counterexample of each violated law."""
        broken = (tally.case for tally in self.tallies.values() if tally.violated)
        return [case.shape for case in broken if case is not None]

    def _explore(self, shape: Shape) -> Iterator[Phase]:
        """Run a few cases of one shape one at a time, for the laws that compare ways of running.

        Eager runs, and calls of the one-call function, are limited by the plan: outside of jit every
        operation is compiled separately.
        """
        laws = [law for law in self._runner.laws if SINGLE.intersection(law.observes)]
        if self._enough or not self._plan.examples or not laws:
            return
        yield "cases one at a time", self.cases
        cases = shrink.draw([shape], self._domain, self._plan.examples, self._seed)
        ranked = shrink.rich(cases)
        compiled = [law for law in laws if not {"eager", "solution"}.intersection(law.observes)]
        self._singly([cases[index] for index in ranked[:SINGLES]], compiled)
        eager = [law for law in laws if "eager" in law.observes]
        self._singly([cases[index] for index in ranked[: self._plan.eager]], eager)
        if self._runner.subject.solution is not None:
            # The one-call function takes a single step, so there must be no warm-up.
            first = [cases[index]._replace(warmup=np.int32(0)) for index in ranked[: 1 + LONG]]
            long = [case._replace(seed=LONG_SEED) for case in first[1:]]
            long += [case._replace(seed=HALVES_LOST) for case in first[1:2]]
            self._singly([*first[:1], *long], [law for law in laws if "solution" in law.observes])

    def _singly(self, cases: list[Case], laws: list[Law]) -> None:
        if not cases or not laws:
            return
        self.cases += len(cases)
        stacked = stack(cases)
        for name, values in self._runner.singly(stacked, laws).items():
            self.tallies[name].add(stacked, values)

    def evidence(self, target: str | None) -> list[Evidence]:
        """Return the evidence for each law.

        Args:
            target: the name of the subject in counterexample scripts; None: a placeholder.
        """
        return [self._evidence(tally, target) for tally in self.tallies.values()]

    def _evidence(self, tally: Tally, target: str | None) -> Evidence:
        law, case, runner = tally.law, tally.case, self._runner
        if tally.violated and case is not None and tally.worst is not None:
            found = runner.violation(
                law, case, tally.worst, cases=tally.triggered, failed=tally.broken
            )
            return replace(found, counterexample=Counterexample(law.name, case, target))
        status, reason = tally.verdict
        if not tally.triggered:
            reason = runner.unreached(law)
        return Evidence.of(
            law.name,
            status,
            cases=tally.triggered,
            residual=None if status == "untriggered" or tally.dismissed else tally.worst,
            reason=", ".join(filter(None, (reason, runner.note))),
            example=case.code() if tally.shown and case is not None else None,
        )
