"""What the run cases say about each law so far, kept small."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from bnverify.case import Case
from bnverify.laws import Law
from bnverify.pytree import take


def complexity(case: Case) -> tuple[float, ...]:
    """Return how hard a case is to read: its size first, then its numbers."""
    rows, features = case.shape
    values = np.concatenate([np.ravel(case.x), np.ravel(case.y), [case.lr]])
    digits = sum(len(np.format_float_positional(abs(v), trim="-")) for v in values)
    return (rows * features, rows, int(case.warmup), digits, abs(int(case.seed)))


@dataclass
class Tally:
    """The cases of one law.

    Attributes:
        law: the law.
        triggered: how many cases reached its precondition.
        worst: the largest residual; for a witness law the smallest.
        case: the simplest case that violates it; for a witness law the one that shows it.
        worst_case: the case of the largest residual.
        dismissed: whether nothing confirmed what stacked runs seemed to show.
    """

    law: Law
    triggered: int = 0
    worst: float | None = None
    case: Case | None = None
    worst_case: Case | None = None
    dismissed: bool = False
    _rank: tuple[float, ...] = field(default=(math.inf,))

    def add(self, cases: Case, residuals: npt.NDArray[np.float64]) -> None:
        """Count stacked cases and their residuals, (B,)."""
        residuals = np.nan_to_num(np.asarray(residuals, np.float64), nan=np.inf, posinf=np.inf)
        reached = residuals >= 0
        if not reached.any():
            return
        self.triggered += int(reached.sum())
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
        """Keep one of stacked cases that is simpler than what is kept; ``wanted``, (B,), says which."""
        for index in np.flatnonzero(wanted)[:64]:  # enough to find a simple one among them
            case = take(cases, int(index))
            rank = complexity(case)
            if rank < self._rank:
                self.case, self._rank = case, rank

    def replace(self, case: Case) -> None:
        """Take a simpler case that was found to show the same."""
        self.case, self._rank = case, complexity(case)

    @property
    def shown(self) -> bool:
        """Whether a witness law was seen to hold."""
        return self.law.kind == "witness" and self.worst == 0

    @property
    def violated(self) -> bool:
        """Whether the cases contradict the law.

        A witness law is contradicted when 30 cases and more reached it and none showed it.
        """
        if self.worst is None or self.dismissed:
            return False
        if self.law.kind == "witness":
            return not self.shown and self.triggered >= ENOUGH
        return self.worst > 1


ENOUGH = 30
