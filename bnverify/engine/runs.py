"""Running a subject: stacked cases of each shape first, then explicit ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator

import numpy as np

from bnverify.case import Case
from bnverify.engine.bench import Bench
from bnverify.engine.examples import draw, rich, uncompiled
from bnverify.engine.exploration import CALLS
from bnverify.engine.judge import judged
from bnverify.engine.simplification import Simplification
from bnverify.engine.tally import ENOUGH, Tally
from bnverify.engine.volume import NEEDS
from bnverify.evidence import Evidence, Status
from bnverify.jaxpr.noise import ROWS
from bnverify.pytree import stack
from bnverify.shapes import TINY_SHAPES, Shape, shape_pool, tiny_shapes
from bnverify.unusable import first_line

Tell = Callable[[str, int], None]

BETWEEN = (3, 4, 5, 9, 17, 33)
"""Row counts at which a fault of larger batches may show: just beyond each power of two."""

SELDOM = 3
"""One explicit case in so many is run by the subject's one-call function too, which takes longest."""

LONG_SEED = np.int32(2**24 + 1)
"""The seed of some of them: a float32, which JAX makes of a float, does not hold it."""

LONG = 3
"""How many: a network may give the same for two seeds, where no activation lives."""

FEWEST = 10
"""Cases of a shape, however few a stack of a large model holds."""

HUGE = 3
"""As many, of a model so large that the rounding of one case is read in parts: each takes long."""


class Runs:
    """The runs of one check and what they say about each law.

    Args:
        bench: runs and judges the subject.
        seed: from which all cases are drawn.
        tell: told what is being done and how many cases were run so far.
        fail_fast: whether to stop at the first stack of cases that shows a violation.

    Attributes:
        tallies: law name -> its tally.
        cases: how many cases were run.
        notes: what the report should say besides.
    """

    def __init__(self, bench: Bench, seed: int, tell: Tell, *, fail_fast: bool = False) -> None:
        self._bench = bench
        self._plan = bench.plan
        self._seed = seed
        self._tell = tell
        self._fail_fast = fail_fast
        self.tallies = {law.name: Tally(law) for law in bench.laws}
        self.cases = 0
        self.notes: list[str] = []

    def run(self) -> None:
        """Run everything the plan asks for."""
        rng = np.random.default_rng(self._seed)
        plan, domain, features = self._plan, self._bench.domain, self._bench.subject.features
        tiny = tiny_shapes(domain=domain, features=features)[-plan.tiny :]
        # A single row shows least: it is its own mean.
        self._stack(sorted(tiny, key=lambda shape: shape[0] == 1), rng)
        further = [] if self._enough else self._further()
        self._stack(further, rng)
        self._descend(rng)
        if self._bench.unstacked:
            self.notes.append(self._bench.unstacked)
        self._explore([*tiny[-1:], *further[:1]])
        broken = [t for t in self.tallies.values() if t.violated and t.law.kind == "residual"]
        simplification = Simplification(self._bench, tiny, self._seed)
        for place, tally in enumerate(broken):
            self._tell(f"shrinking {tally.law.name}", self.cases)
            simplification.simplify(tally, broken[place + 1 :])

    def evidence(self) -> list[Evidence]:
        """Return what the runs say about each law."""
        found, refused = [], self._bench.refused
        for tally in self.tallies.values():
            status, reason = _verdict(tally)
            law = tally.law
            worst = None if status == "untriggered" or tally.dismissed else tally.worst
            if self._bench.refusal and not tally.triggered:
                reason = f"not to be seen of a step that does not trace: {self._bench.refusal}"
            elif status == "untriggered" and law.name in self._bench.judge.incomparable:
                reason = (
                    "what it compares differs in structure or shape: a law of structure says how"
                )
            elif status == "untriggered":
                reason = next((refused[need] for need in law.needs if need in refused), reason)
            said = "; ".join(text for text in (reason, self._bench.note) if text)
            example = tally.case.code() if tally.shown and tally.case is not None else None
            found.append(
                Evidence(
                    law.name, law.family, status, tally.triggered, worst, said, example=example
                )
            )
        return found

    @property
    def _enough(self) -> bool:
        residual = (tally for tally in self.tallies.values() if tally.law.kind == "residual")
        return self._fail_fast and any(tally.violated for tally in residual)

    def _further(self) -> list[Shape]:
        """Return shapes that are not tiny, with as many rows as can be run; say where these are fewer."""
        domain, budget = self._bench.domain, self._bench.budget
        features = self._bench.subject.features
        size = len(TINY_SHAPES) + self._plan.shapes
        pool = shape_pool(self._seed, domain=domain, features=features, size=size)
        tiny = tiny_shapes(domain=domain, features=features)
        width = features[0] if features else 4
        drawn = [*pool[len(tiny) :], *((rows, width) for rows in self._plan.large)]
        found = [(min(rows, budget.rows(width) or rows), width) for rows, width in drawn]
        if found != drawn:
            most = max(rows for rows, _ in found)
            narrower = "; the same code with narrower layers is checked far faster"
            more = narrower if any(map(self._huge, found)) else ""
            self.notes.append(f"a large model: cases of at most {most} rows{more}")
        return list(dict.fromkeys(found))

    def _huge(self, shape: Shape) -> bool:
        return self._bench.budget.held(shape) < ROWS

    def _stack(self, shapes: Iterable[Shape], rng: np.random.Generator) -> None:
        for rows, features in shapes:
            if self._enough or not self._bench.stacks:
                return
            self._tell(f"stacked cases of shape ({rows}, {features})", self.cases)
            try:
                fewest = HUGE if self._huge((rows, features)) else FEWEST
                blocks = math.ceil(fewest / self._bench.budget.block((rows, features)))
                self._block((rows, features), max(self._plan.blocks, blocks), rng)
            except Exception as error:  # noqa: BLE001 - whatever a user's code raises under vmap
                self._bench.unstack(f"not run under vmap: {first_line(error)}")

    def _descend(self, rng: np.random.Generator) -> None:
        """Look for smaller violating cases of the laws that only large batches were seen to break.

        First for fewer rows of few features; then, of what is left, for few features or few rows.
        """
        if not self._bench.stacks:
            return
        features = self._bench.subject.features
        width = features[0] if features else 1
        for rows in BETWEEN:
            if not any(shape[0] > rows for shape in self._violating()):
                break
            self._smaller((rows, width), rng)
        large = [shape for shape in self._violating() if shape[0] > 2 and shape[1] > max(2, width)]
        if large:
            rows, columns = min(large)
            self._smaller((rows, width), rng)
            self._smaller((2, columns), rng)

    def _violating(self) -> list[Shape]:
        """Return the shape of the simplest case of each violated law that has one."""
        broken = (tally.case for tally in self.tallies.values() if tally.violated)
        return [case.shape for case in broken if case is not None]

    def _smaller(self, shape: Shape, rng: np.random.Generator) -> None:
        self._tell(f"looking for a smaller batch: of shape {shape}", self.cases)
        self._block(shape, 1, rng)

    def _block(self, shape: Shape, count: int, rng: np.random.Generator) -> None:
        for cases, residuals in self._bench.volume.blocks(shape, count, rng):
            self.cases += len(cases.seed)
            for name, values in residuals.items():
                self.tallies[name].add(cases, values)
            if self._enough:
                break

    def _explore(self, shapes: list[Shape]) -> None:
        """Run explicit cases."""
        exploration = self._bench.exploration
        if self._enough or not self._plan.examples or not judged(exploration.laws, NEEDS | CALLS):
            return
        examples = HUGE if any(map(self._huge, shapes)) else self._plan.examples
        cases = draw(shapes, self._bench.domain, examples, self._seed)
        costly = {index: {"eager"} for index in uncompiled(cases, shapes[0], self._plan.eager)}
        if self._bench.subject.solution is not None:
            # What it gives is compared where one step is all there is.
            first = sorted(rich(cases), key=lambda index: cases[index].warmup > 0)
            for index in first[:LONG]:
                cases[index] = cases[index]._replace(seed=LONG_SEED, warmup=np.int32(0))
            alone = all("solution" in law.needs for law in exploration.laws)
            for index in first if alone else first[: math.ceil(len(first) / SELDOM)]:
                costly.setdefault(index, set()).add("solution")

        def observed() -> Iterator[tuple[Case, Collection[str]]]:
            for index, case in enumerate(cases):
                self._tell("explicit cases", self.cases)
                self.cases += 1
                yield case, costly.get(index, ())

        for case, residuals in zip(cases, exploration.all_residuals(observed()), strict=True):
            for name, value in residuals.items():
                self.tallies[name].add(stack([case]), np.asarray([value]))


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
    shown = tally.case if witness else None
    return "held", f"shown by a case of shape {shown.shape}" if shown is not None else ""
