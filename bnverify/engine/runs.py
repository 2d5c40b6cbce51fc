"""Running a subject: stacked cases of each shape first, then explicit ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from bnverify import strategies
from bnverify.case import Case, Domain
from bnverify.engine.budget import Budget
from bnverify.engine.exploration import CALLS, Exploration, draw, find
from bnverify.engine.judge import Judge, judged
from bnverify.engine.tally import ENOUGH, Tally, stack
from bnverify.engine.volume import NEEDS, Volume
from bnverify.evidence import Evidence, Status
from bnverify.laws import Law
from bnverify.profile import Profile
from bnverify.subject import Subject

Tell = Callable[[str, int], None]
Shape = tuple[int, int]

BETWEEN = (3, 4, 5, 9, 17, 33)
"""Row counts at which a fault of larger batches may show: just beyond each power of two."""

CLEAR = 8.0
"""Residuals from here on are no accident of the draws by which rounding was read."""

FEWEST = 10
"""Cases of a shape, however few a stack of a large model holds."""

OFTEN = 20  # blocks of a shape: from here on optimising its programs pays


class Runs:
    """The runs of one check and what they say about each law.

    Args:
        subject: what is verified.
        laws: the laws that need running.
        facts: see ``bnverify.engine.judge.static_facts``.
        plan: how much to run.
        seed: from which all cases are drawn.
        tell: told what is being done and how many cases were run so far.
        fail_fast: whether to stop at the first shape that shows a violation.
        note: what the evidence should say besides.
        refusal: why the subject does not trace; empty where it does.

    Attributes:
        tallies: law name -> its tally.
        cases: how many cases were run.
        notes: what the report should say besides.
    """

    def __init__(
        self,
        subject: Subject,
        laws: Collection[Law],
        facts: Mapping[str, Any],
        plan: Profile,
        seed: int,
        tell: Tell,
        *,
        fail_fast: bool = False,
        note: str = "",
        refusal: str = "",
    ) -> None:
        self._subject = subject
        self._facts = dict(facts)
        self._plan = plan
        self._seed = seed
        self._tell = tell
        self._fail_fast = fail_fast
        self._note = note
        self._refusal = refusal
        self._domain = _domain(laws)
        self._optimise = plan.blocks > OFTEN
        self._budget = Budget(subject, plan.block)
        self._judge = Judge(subject, facts, self._budget.block, optimise=self._optimise)
        self._second = Judge(subject, facts, self._budget.block, optimise=self._optimise, seed=1)
        self.tallies = {law.name: Tally(law) for law in laws}
        self.cases = 0
        self.notes: list[str] = []

    def run(self) -> None:
        """Run everything the plan asks for."""
        rng = np.random.default_rng(self._seed)
        tiny, further = self._shapes()
        volume = self._stack([*tiny, *further], rng)
        if volume is not None:
            self._descend(volume, max(rows for rows, _ in tiny), rng)
        exploration = self._explore([*tiny[-1:], *further[:1]], volume)
        for tally in self.tallies.values():
            if tally.violated and tally.law.kind == "residual":
                self._tell(f"shrinking {tally.law.name}", self.cases)
                self._simplify(tally, volume, exploration, tiny)

    def evidence(self) -> list[Evidence]:
        """Return what the runs say about each law."""
        found = []
        for tally in self.tallies.values():
            status, reason = _verdict(tally)
            law = tally.law
            worst = None if status == "untriggered" or tally.dismissed else tally.worst
            if self._refusal and not tally.triggered:
                reason = f"not to be seen of a step that does not trace: {self._refusal}"
            said = "; ".join(text for text in (reason, self._note) if text)
            found.append(Evidence(law.name, law.family, status, tally.triggered, worst, said))
        return found

    @property
    def _enough(self) -> bool:
        residual = (tally for tally in self.tallies.values() if tally.law.kind == "residual")
        return self._fail_fast and any(tally.violated for tally in residual)

    def _shapes(self) -> tuple[list[Shape], list[Shape]]:
        """Return the tiny shapes, where counterexamples are small, and the further ones."""
        features, tiny = self._subject.features, len(strategies.TINY_SHAPES)
        size = tiny + self._plan.shapes
        pool = strategies.shape_pool(self._seed, domain=self._domain, features=features, size=size)
        width = features[0] if features else 4
        further = [*pool[tiny:], *((rows, width) for rows in self._plan.large)]
        small = pool[:tiny][-self._plan.tiny :]
        found = self._affordable([*small, *further])
        tinies, others = found[: len(small)], found[len(small) :]
        return list(dict.fromkeys(tinies)), list(dict.fromkeys(others))

    def _affordable(self, shapes: list[Shape]) -> list[Shape]:
        """Return the shapes with as many rows as can be run, and say so where these are fewer."""
        found = [(min(rows, self._budget.rows(width) or rows), width) for rows, width in shapes]
        if found != shapes:
            most = max(rows for rows, _ in found)
            self.notes.append(f"a large model: cases of at most {most} rows")
        return found

    def _stack(self, shapes: list[Shape], rng: np.random.Generator) -> Volume | None:
        laws = judged((tally.law for tally in self.tallies.values()), NEEDS)
        if not laws or self._refusal:
            return None
        plan = self._plan
        volume = Volume(
            self._subject, laws, self._judge, domain=self._domain, optimise=self._optimise
        )
        for rows, features in shapes:
            self._tell(f"stacked cases of shape ({rows}, {features})", self.cases)
            try:
                blocks = math.ceil(FEWEST / self._judge.block((rows, features)))
                self._block(volume, (rows, features), max(plan.blocks, blocks), rng)
            except Exception as error:  # noqa: BLE001 - whatever a user's code raises under vmap
                line = (str(error).strip().splitlines() or [""])[0]
                self.notes.append(f"not run under vmap: {type(error).__name__}: {line}")
                return None
            if self._enough:
                break
        return volume

    def _descend(self, volume: Volume, tiny: int, rng: np.random.Generator) -> None:
        """Look for smaller violating cases of the laws that only large batches were seen to break."""
        for rows in BETWEEN:
            broken = [tally for tally in self.tallies.values() if tally.violated]
            found = [tally.case.shape for tally in broken if tally.case is not None]
            large = [shape for shape in found if shape[0] > max(rows, tiny)]
            if not large:
                return
            shape = rows, self._subject.features[0] if self._subject.features else 1
            self._tell(f"looking for a smaller batch: {rows} rows", self.cases)
            self._block(volume, shape, 1, rng)

    def _block(self, volume: Volume, shape: Shape, count: int, rng: np.random.Generator) -> None:
        for cases, residuals in volume.blocks(shape, count, rng):
            self.cases += len(cases.seed)
            for name, values in residuals.items():
                self.tallies[name].add(cases, values)

    def _explore(self, shapes: list[Shape], volume: Volume | None) -> Exploration:
        """Run explicit cases; the laws that stacked cases were held to need no second look."""
        all_laws = [tally.law for tally in self.tallies.values()]
        laws = [law for law in all_laws if volume is None or law.name not in volume.laws]
        exploration = Exploration(
            self._subject, laws, self._judge, volume, traced=not self._refusal
        )
        if self._enough or not self._plan.examples or not judged(laws, NEEDS | CALLS):
            return exploration
        cases = draw(shapes, self._domain, self._plan.examples, self._seed)

        def observed() -> Iterator[tuple[Case, bool]]:
            for index, case in enumerate(cases):
                self._tell("explicit cases", self.cases)
                self.cases += 1
                # The last ones: Hypothesis begins with zeros, on which little shows.
                yield case, index >= len(cases) - self._plan.eager

        for case, residuals in zip(cases, exploration.all_residuals(observed()), strict=True):
            for name, value in residuals.items():
                self.tallies[name].add(stack([case]), np.asarray([value]))
        return exploration

    def _simplify(
        self, tally: Tally, volume: Volume | None, exploration: Exploration, tiny: list[Shape]
    ) -> None:
        """Put the simplest violating case in place: one that is confirmed.

        It is by a single call: that stacked and single runs differ is for vmap_equals_loop to
        judge. And by a second reading of the rounding: among thousands of cases, bred from the
        worst, one finds the first reading's luck.
        """
        law, worst = tally.law, tally.worst or 0.0
        stacked = volume if volume is not None and law.name in volume.laws else None
        judges = [self._judge]
        if "noise" in law.needs and worst < CLEAR:
            judges.append(self._second)

        def violates(case: Case, judges: Sequence[Judge]) -> bool:
            # What was judged together is again: that program exists.
            laws = stacked.judged(case.shape) if stacked is not None else [law]
            t, available = exploration.transition(case, laws, eager=True)
            laws = judged(laws, available)
            return all(judge.each([t], laws)[0].get(law.name, -1.0) > 1 for judge in judges)

        if stacked is not None:
            simplest: Case | None = stacked.simplify(tally)
        else:
            simplest = find(tiny, self._domain, lambda c: violates(c, judges[:1]), self._seed)
        for case in (simplest, tally.case, tally.worst_case):
            if case is not None and violates(case, judges):
                tally.replace(case)
                return
        tally.dismissed = True


def _domain(laws: Collection[Law]) -> Domain:
    """Return where cases are drawn from.

    A function that is init, one step and evaluate in one call is compared with a first step.
    """
    first = all("solution" in law.needs for law in laws)
    return Domain(max_warmup=0) if first else Domain()


def _verdict(tally: Tally) -> tuple[Status, str]:
    witness = tally.law.kind == "witness"
    if tally.violated and witness:
        return "violated", f"{tally.triggered} cases, none of which shows it"
    if tally.violated:
        return "violated", f"off by {tally.worst:.3g} times the error allowed"
    if tally.worst is None:
        return "untriggered", "no case reached its precondition"
    if witness and not tally.shown:
        return "untriggered", f"not shown by {tally.triggered} cases; {ENOUGH} would decide"
    if tally.dismissed:
        return "held", f"{tally.worst:.3g} times the error allowed in a stack; nothing confirms it"
    return "held", "shown by a case" if witness else ""
