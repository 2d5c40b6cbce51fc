"""The simplest case that violates a law: found, and confirmed by a single call."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import numpy as np

from bnverify.case import Case
from bnverify.engine.bench import Bench
from bnverify.engine.examples import find, plainer
from bnverify.engine.exploration import COSTLY
from bnverify.engine.judge import Judge, judged
from bnverify.engine.tally import Tally
from bnverify.laws import Law

CLEAR = 8.0
"""Residuals from here on are no accident of the draws by which rounding was read."""

TRIES = 200
"""Cases drawn for a simpler one that breaks a law."""


class Simplification:
    """Makes the cases of violated laws simple.

    Args:
        bench: runs and judges the subject.
        shapes: small ones, (N, D), where a simpler case is looked for.
        seed: from which cases are drawn.
    """

    def __init__(self, bench: Bench, shapes: Sequence[tuple[int, int]], seed: int) -> None:
        self._bench = bench
        self._shapes = shapes
        self._seed = seed
        self._known: dict[Any, dict[str, float]] = {}

    def simplify(self, tally: Tally, others: Sequence[Tally]) -> None:
        """Put the simplest violating case in place: one that is confirmed; dismiss a law without one.

        It is by a single call: that stacked and single runs differ is for vmap_equals_loop to
        judge. And by a second reading of the rounding: among thousands of cases, bred from the
        worst, one finds the first reading's luck.

        Args:
            tally: of the law.
            others: of laws that are violated too: what is tried for this one may show them.
        """
        bench, law, worst = self._bench, tally.law, tally.worst or 0.0
        judges = [bench.judge]
        if "noise" in law.needs and worst < CLEAR:
            judges.append(bench.second)
        assert tally.case is not None
        candidates: Iterable[Case | None]
        if self._stacked(law):
            candidates = [bench.volume.simplify(tally, others)]
        elif COSTLY.intersection(law.needs):
            candidates = plainer(tally.case, self._shapes)
        else:
            seen = partial(self._violates, law, judges[:1])
            candidates = [find(self._shapes, bench.domain, seen, self._seed, TRIES)]
        for case in (*candidates, tally.case, tally.worst_case):
            if case is not None and self._violates(law, judges, case):
                tally.replace(case)
                return
        tally.dismissed = True

    def _stacked(self, law: Law) -> bool:
        return self._bench.stacks and law.name in self._bench.volume.laws

    def _violates(self, law: Law, judges: Sequence[Judge], case: Case) -> bool:
        return all(self._residuals(law, judge, case).get(law.name, -1.0) > 1 for judge in judges)

    def _residuals(self, law: Law, judge: Judge, case: Case) -> dict[str, float]:
        """Return the residuals of a case that is run by itself, of ``law`` and those judged with it.

        What was judged together is again: that program exists. Laws often share a simplest case,
        and that is run once.
        """
        bench = self._bench
        laws = bench.volume.judged(case.shape) if self._stacked(law) else [law]
        names = tuple(law.name for law in laws)
        key = judge, names, case.shape, tuple(np.asarray(leaf).tobytes() for leaf in case)
        if key not in self._known:
            ((t, available),) = bench.exploration.transitions([(case, COSTLY)], laws)
            self._known[key] = judge.each([t], judged(laws, available))[0]
        return self._known[key]
