"""Running a subject on cases: stacks of each shape first, then a few cases one at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from bnverify import shrink
from bnverify.case import Case, Domain
from bnverify.clues import Clues, general_cases, read_clues
from bnverify.errors import first_line
from bnverify.evidence import Counterexample, Evidence, Status
from bnverify.jaxpr.arithmetic import numbers, operations
from bnverify.jaxpr.tracing import Tracer
from bnverify.judge import READ_NEEDS, Judge, judged
from bnverify.laws import LAWS, Law
from bnverify.laws.mismatch import Mismatch, factor
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
from bnverify.shapes import TINY_SHAPES, Shape, shape_pool, tiny_shapes
from bnverify.stacks import stacked_cases
from bnverify.transition import Transition

Tell = Callable[[str, int], None]
"""Told what is being done and how many cases were run so far."""

Residuals = Mapping[str, npt.NDArray[np.float64]]

SPLITS = (1, 2, 3, 4, 6, 8, 12, 24)
"""How many parts a step may split its batch into, to be tried in turn."""

BETWEEN = (3, 4, 5, 9, 17, 33)
"""Row counts at which a fault of larger batches may show: just beyond each power of two."""

ENOUGH = 30
"""Cases that reach a witness law and do not show it, from which on they contradict it."""

LONG_SEED = np.int32(2**24 + 1)
"""The seed of some cases: a float32, which JAX makes of a float, does not hold it."""

LONG = 3
"""How many cases have it: a network may give the same for two seeds, where no activation lives."""

SINGLES = 20
"""The most cases that are run one at a time: what they show, a few show."""

OPERATIONS = 2e9
"""Operations of the steps of one stack, some seconds of a core; a larger model has smaller stacks."""

NUMBERS = 2e6
"""Numbers that the equations of the steps of one stack make, about a second of reading their rounding."""

FEWEST = 10
"""Cases of a shape, however few a stack of a large model holds."""


MOST_READ = 3
"""Of how many counterexamples the numbers are read."""


@dataclass
class Tally:
    """What the cases run so far say about one law.

    Attributes:
        law: the law.
        triggered: how many cases reached its precondition.
        broken: how many of them break it; of a witness law, how many do not show it.
        worst: the largest residual; for a witness law the smallest.
        case: the simplest case that violates it; for a witness law the one that shows it.
        worst_case: the case of the largest residual.
        dismissed: whether nothing confirmed what stacked runs seemed to show.
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
        """Count stacked cases and their residuals, (K,)."""
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
        """Keep one of stacked cases that is simpler than what is kept; ``wanted``, (K,), says which."""
        for index in np.flatnonzero(wanted)[:64]:  # enough to find a simple one among them
            case = take(cases, int(index))
            rank = shrink.complexity(case)
            if rank < self._rank:
                self.case, self._rank = case, rank

    def replace(self, case: Case) -> None:
        """Take a simpler case that was found to show the same."""
        self.case, self._rank = case, shrink.complexity(case)

    @property
    def shown(self) -> bool:
        """Whether a witness law was seen to hold."""
        return self.law.kind == "witness" and self.worst == 0

    @property
    def violated(self) -> bool:
        """Whether the cases contradict the law.

        A witness law is contradicted when ``ENOUGH`` cases reached it and none showed it.
        """
        if self.worst is None or self.dismissed:
            return False
        if self.law.kind == "witness":
            return not self.shown and self.triggered >= ENOUGH
        return self.worst > 1

    @property
    def verdict(self) -> tuple[Status, str]:
        """The status of the law, and what it rests on."""
        witness = self.law.kind == "witness"
        if self.worst is None:
            return "untriggered", "no case reached its precondition"
        if self.violated:
            return "violated", never(self.law, self.triggered) if witness else too_far(self.worst)
        if witness and not self.shown:
            reason = f"{never(self.law, self.triggered)}; it takes {ENOUGH} to decide"
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
    return "the values differ in structure or shape, or must be equal and are not"


def never(law: Law, cases: int) -> str:
    """Return what a witness law says where none of some cases shows it."""
    seen = law.never[:1].upper() + law.never[1:] or "Not shown"
    return f"{seen} in {cases:,} case{'' if cases == 1 else 's'}"


class Runner:
    """Runs one subject and judges the laws that need running, for any number of seeds.

    Args:
        tracer: of the subject.
        abstract: a transition of it whose leaves have shapes and dtypes; None where none is known.
        laws: the laws that need running.
        plan: how much to run.
        refusal: why the subject does not trace; empty where it does.
        note: what the evidence should say besides.

    Attributes:
        domain: where cases are drawn from.
        unstacked: why stacked cases cannot be run; empty as far as is known.
        judge: judges the laws.
        single: the subject's functions, called for one case after the other.
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
    ) -> None:
        subject = tracer.subject
        self.laws = laws
        self.subject = subject
        self.plan = plan
        self._tracer = tracer
        self.refusal = refusal
        self.note = note
        self._readable = frozenset() if refusal else READ_NEEDS
        self.unstacked = ""
        self.judge, self._second = (Judge(tracer, abstract, seed) for seed in (0, 1))
        stacked: How = "eager" if refusal else "vmap"
        alone: How = "eager" if refusal else "jit"
        self._batched = CompiledSubject(subject, stacked, tracer=tracer, block=self.block)
        self.single = CompiledSubject(subject, alone, tracer=tracer)
        self._sizes: dict[int, tuple[float, float]] = {}
        # A function that is init, one step and evaluate in one call is compared with a first step.
        first = bool(laws) and all("solution" in law.observes for law in laws)
        domain = Domain(max_warmup=0) if first else Domain()
        self.domain = replace(domain, multiple=self._multiple())

    def _multiple(self) -> int:
        """Return the number of which every N is a multiple: some steps split their batch."""
        if self.subject.rows is not None or self.refusal:
            return self.subject.rows or 1
        width = self.subject.features[0] if self.subject.features else 1
        for rows in SPLITS:
            try:
                state, batch = self._tracer.state(rows, width), self._tracer.batch(rows, width)
                self._tracer.trace("step", self.subject.step, state, batch.x, batch.y, batch.lr)
            except Exception:  # noqa: BLE001, S112 - whatever a user's code raises when traced
                continue
            return rows
        return 1

    # Sizes: how many cases, of which shapes.

    def block(self, shape: Shape) -> int:
        """Return how many cases of a shape (N, D) are stacked: one at least."""
        rows, features = shape
        done, made = self._size(features)
        most = min(OPERATIONS / max(rows * done, 1), NUMBERS / max(rows * made, 1))
        return max(1, min(self.plan.block, int(most)))

    def _size(self, features: int) -> tuple[float, float]:
        """Return for one row how many operations a step takes and how many numbers it makes.

        As a trace of few rows has it; 0 where there is none.
        """
        if features not in self._sizes:
            self._sizes[features] = 0.0, 0.0
            if self.refusal:
                return self._sizes[features]
            rows = 2 * self.domain.multiple
            try:
                state = self._tracer.state(rows, features)
                batch = self._tracer.batch(rows, features)
                given = state, batch.x, batch.y, batch.lr
                jaxpr = self._tracer.trace("step", self.subject.step, *given).jaxpr
                self._sizes[features] = operations(jaxpr) / rows, numbers(jaxpr) / rows
            except Exception:  # noqa: BLE001, S110 - a step may not take so few: its run will tell
                pass
        return self._sizes[features]

    def tiny(self) -> list[Shape]:
        """Return the tiny shapes that the plan asks for, the largest last."""
        given = tiny_shapes(domain=self.domain, features=self.subject.features)
        return list(given[-self.plan.tiny :])

    def further(self, seed: int) -> tuple[list[Shape], list[str]]:
        """Return shapes that are not tiny, with as many rows as can be run, and what to say of them."""
        features = self.subject.features
        size = len(TINY_SHAPES) + self.plan.shapes
        pool = shape_pool(seed, domain=self.domain, features=features, size=size)
        tiny = tiny_shapes(domain=self.domain, features=features)
        width = features[0] if features else 4
        large = [(self._fitting(rows), width) for rows in self.plan.large]
        drawn = [*pool[len(tiny) :], *large]
        found = [(self._fitting(min(rows, self._most_rows(width))), width) for rows, width in drawn]
        notes = []
        if self.domain.multiple > 1:
            notes.append(f"batches of multiples of {self.domain.multiple} rows: others are refused")
        if found == drawn:
            return list(dict.fromkeys(found)), notes
        most = max(rows for rows, _ in found)
        narrower = "the same code with narrower layers is checked far faster"
        note = f"a large model: cases of at most {most} rows; {narrower}"
        return list(dict.fromkeys(found)), [*notes, note]

    def _fitting(self, rows: int) -> int:
        """Return the next smaller N that the step takes, or the smallest."""
        multiple = self.domain.multiple
        return max(rows // multiple, 1) * multiple

    def phases(self, seed: int) -> int:
        """Return how many things a run tells of: each shape, and the cases run one at a time."""
        if not self.laws:
            return 0
        shapes = {*self.tiny(), *self.further(seed)[0]}
        return len(shapes) + any(SINGLE.intersection(law.observes) for law in self.laws)

    def _most_rows(self, features: int) -> int:
        per_row, _ = self._size(features)
        return max(2, int(OPERATIONS / max(per_row, 1)))

    # Running.

    def run(self, seed: int, tell: Tell, *, fail_fast: bool = False) -> Run:
        """Run everything the plan asks for, and return what it says about each law.

        Args:
            seed: from which all cases are drawn.
            tell: told of progress.
            fail_fast: whether to stop at the first stack of cases that shows a violation.
        """
        return Run(self, seed, tell, fail_fast=fail_fast)

    def prepare(self, shapes: Iterable[Shape]) -> None:
        """Begin to compile for some shapes, all at once; what fails, fails when it is called."""
        if not self.stacks:
            return
        for shape in shapes:
            try:
                self._batched.prepare([shape])
            except Exception:  # noqa: BLE001 - whatever a user's code raises when traced
                return

    @property
    def available(self) -> frozenset[str]:
        """What stacked runs can observe."""
        return VOLUME | self._readable

    def affordable(self, shape: Shape) -> list[Law]:
        """Return the laws that are judged on stacked cases of a shape.

        What doubling a batch shows, it shows on few rows: it costs a program of its own.
        """
        doubled = 1 < shape[0] <= FEW_ROWS and shape[1] != 1
        return [
            law
            for law in judged(self.laws, self.available)
            if doubled or "step:doubled_batch" not in law.observes
        ]

    def residuals(self, cases: Case) -> Residuals:
        """Return law name -> residuals, (K,), of stacked cases: all that are judged on their shape."""
        return self.judged(cases, self.affordable(cases.shape))

    def judged(self, cases: Case, laws: Collection[Law]) -> Residuals:
        """Return law name -> residuals, (K,), of stacked cases."""
        needs = {need for law in laws for need in law.observes}
        return self.judge.residuals(observe(self._batched, cases, needs), laws)

    def unstack(self, error: Exception) -> None:
        """Run cases one at a time from now on, since stacks cannot be run."""
        self.unstacked = f"not run under vmap: {first_line(error)}"
        self._batched = self.single

    @property
    def stacks(self) -> bool:
        """Whether stacked cases are run as one."""
        return not self.refusal and not self.unstacked

    def singly(self, cases: Case, laws: Iterable[Law], judge: Judge | None = None) -> Residuals:
        """Return law name -> residuals, (K,), of cases that are run one at a time."""
        available = self.available | SINGLE
        laws = judged(laws, available if self.stacks else available - {"stacked"})
        return (judge or self.judge).residuals(self._observed_singly(cases, laws), laws)

    def _observed_singly(self, cases: Case, laws: Iterable[Law]) -> Transition:
        needs = {need for law in laws for need in law.observes}
        return observe_singly(self.single, cases, needs, batched=self._batched)

    def mismatch(self, law: Law, case: Case) -> Mismatch | None:
        """Return where a case breaks a law most; None where no single value is to blame."""
        return self.judge.mismatch(self._observed_singly(stack([case]), [law]), law)

    def confirmed(self, law: Law, case: Case, worst: float) -> bool:
        """Return whether a case that is run by itself violates a law.

        Where rounding is the tolerance, with a second reading of it, too: among thousands of
        cases, bred from the worst, one finds the first reading's luck.
        """
        judges = [self.judge]
        if {"noise", "gradient_noise"} & set(law.observes) and worst < shrink.CLEAR:
            judges.append(self._second)
        return all(
            self.singly(stack([case]), [law], judge).get(law.name, np.full(1, -1.0))[0] > 1
            for judge in judges
        )

    def clues(self, broken: Collection[Evidence], seed: int) -> Clues:
        """Return what the numbers say of a step that breaks some laws.

        Read are two general cases and counterexamples of several shapes: of a small model in the programs
        that are compiled already, of a large one, whose programs take many cases, one at a time.

        Args:
            broken: the evidence of the broken laws.
            seed: of the run, which chose the shapes.
        """
        shown: dict[Shape, Case] = {}
        for each in broken:
            if each.counterexample is not None and each.counterexample.case is not None:
                shown.setdefault(each.counterexample.case.shape, each.counterexample.case)
        # Where twice the batch gives another result, the fault may lie in that one.
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

    def refused(self) -> Mapping[str, str]:
        """Return name of a fact that no run could observe -> what was raised."""
        return {**self.single.refused, **self._batched.refused}


class Run:
    """One run of a subject for one seed, and what it says about each law.

    Args:
        runner: runs and judges the subject.
        seed: from which all cases are drawn.
        tell: told of progress.
        fail_fast: whether to stop at the first stack of cases that shows a violation.

    Attributes:
        tallies: law name -> its tally.
        cases: how many cases were run.
        notes: what the report should say besides.
    """

    def __init__(self, runner: Runner, seed: int, tell: Tell, *, fail_fast: bool) -> None:
        self._runner = runner
        self._plan, self._domain = runner.plan, runner.domain
        self._seed, self._tell, self._fail_fast = seed, tell, fail_fast
        self.tallies = {law.name: Tally(law) for law in runner.laws}
        self.cases = 0
        self.notes: list[str] = []
        if runner.laws:
            self._run()

    def _run(self) -> None:
        rng = np.random.default_rng(self._seed)
        tiny = self._runner.tiny()
        further, notes = self._runner.further(self._seed)
        self.notes += notes
        # A single row shows least: it is its own mean.
        shapes = [*sorted(tiny, key=lambda shape: shape[0] == self._domain.multiple), *further]
        self._runner.prepare(shapes)
        for shape in shapes:
            if not self._enough:
                self._stack(shape, self._plan.blocks, rng)
        self._descend(rng)
        if self._runner.unstacked:
            self.notes.append(self._runner.unstacked)
        self._explore(tiny[-1])
        broken = [t for t in self.tallies.values() if t.violated and t.law.kind == "residual"]
        for place, tally in enumerate(broken):
            self._tell(f"shrinking {tally.law.name}", self.cases)
            shrink.simplify(self._runner, tally, broken[place + 1 :], tiny, self._seed)

    @property
    def _enough(self) -> bool:
        residual = (tally for tally in self.tallies.values() if tally.law.kind == "residual")
        return self._fail_fast and any(tally.violated for tally in residual)

    def _stack(self, shape: Shape, blocks: int, rng: np.random.Generator) -> None:
        """Run stacks of cases of one shape; half of each is bred from the worst of those before."""
        runner = self._runner
        if runner.stacks:
            size = runner.block(shape)
            try:
                blocks = max(blocks, math.ceil(min(FEWEST, self._plan.block) / size))
                self._blocks(shape, blocks, size, rng)
            except Exception as error:  # noqa: BLE001 - whatever a user's code raises under vmap
                runner.unstack(error)
            else:
                return
        self._blocks(shape, 1, self._plan.examples, rng)

    def _blocks(self, shape: Shape, blocks: int, size: int, rng: np.random.Generator) -> None:
        worst: dict[str, tuple[float, Case]] = {}
        for _ in range(blocks):
            self._tell(f"cases of shape {shape}", self.cases)
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

    def _descend(self, rng: np.random.Generator) -> None:
        """Look for smaller violating cases of the laws that only large batches were seen to break.

        First for fewer rows of few features; then, of what is left, for few features or few rows.
        """
        if not self._runner.stacks or self._enough:
            return
        features = self._runner.subject.features
        width = features[0] if features else 1
        multiple = self._domain.multiple
        for parts in BETWEEN:
            if not any(shape[0] > parts * multiple for shape in self._violating()):
                break
            self._stack((parts * multiple, width), 1, rng)
        large = [
            shape
            for shape in self._violating()
            if shape[0] > 2 * multiple and shape[1] > max(2, width)
        ]
        if large:
            rows, columns = min(large)
            self._stack((rows, width), 1, rng)
            self._stack((2 * multiple, columns), 1, rng)

    def _violating(self) -> list[Shape]:
        """Return the shape of the simplest case of each violated law that has one."""
        broken = (tally.case for tally in self.tallies.values() if tally.violated)
        return [case.shape for case in broken if case is not None]

    def _explore(self, shape: Shape) -> None:
        """Run a few cases of one shape one at a time, for the laws that compare ways of running.

        Uncompiled, and by the subject's one-call function, as few as the plan says: they compile
        operation by operation.
        """
        laws = [law for law in self._runner.laws if SINGLE.intersection(law.observes)]
        if self._enough or not self._plan.examples or not laws:
            return
        self._tell("cases one at a time", self.cases)
        cases = shrink.draw([shape], self._domain, self._plan.examples, self._seed)
        ranked = shrink.rich(cases)
        compiled = [law for law in laws if not {"eager", "solution"}.intersection(law.observes)]
        self._singly([cases[index] for index in ranked[:SINGLES]], compiled)
        eager = [law for law in laws if "eager" in law.observes]
        self._singly([cases[index] for index in ranked[: self._plan.eager]], eager)
        if self._runner.subject.solution is not None:
            # What it gives is compared where one step is all there is.
            first = [cases[index]._replace(warmup=np.int32(0)) for index in ranked[: 1 + LONG]]
            long = [case._replace(seed=LONG_SEED) for case in first[1:]]
            self._singly([*first[:1], *long], [law for law in laws if "solution" in law.observes])

    def _singly(self, cases: list[Case], laws: list[Law]) -> None:
        if not cases or not laws:
            return
        self.cases += len(cases)
        stacked = stack(cases)
        for name, values in self._runner.singly(stacked, laws).items():
            self.tallies[name].add(stacked, values)

    def evidence(self, target: str | None) -> list[Evidence]:
        """Return what the run says about each law.

        Args:
            target: how counterexamples find the subject; None: the reader puts it in.
        """
        runner, found = self._runner, []
        refused = runner.refused()
        for tally in self.tallies.values():
            status, reason = tally.verdict
            law, case = tally.law, tally.case
            worst = None if status == "untriggered" or tally.dismissed else tally.worst
            if runner.refusal and not tally.triggered:
                reason = f"cannot be seen of a step that does not trace: {runner.refusal}"
            elif status == "untriggered" and law.name in runner.judge.incomparable:
                reason = (
                    "what it compares differs in structure or shape: a law of structure says how"
                )
            elif status == "untriggered":
                reason = next((refused[need] for need in law.observes if need in refused), reason)
            violated = status == "violated"
            mismatch = None
            if violated and law.kind == "residual" and case is not None:
                mismatch = runner.mismatch(law, case)
                reason = str(mismatch) if mismatch is not None else reason
            found.append(
                Evidence(
                    law.name,
                    law.family,
                    status,
                    tally.triggered,
                    worst,
                    "; ".join(text for text in (reason, runner.note) if text),
                    counterexample=Counterexample(law.name, case, target) if violated else None,
                    shape=case.shape if violated and case is not None else None,
                    example=case.code() if tally.shown and case is not None else None,
                    mismatch=mismatch,
                    failed=tally.broken if violated else 0,
                )
            )
        return found
