"""What a check makes of a subject before it draws a case: nothing here depends on a seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from bnverify.case import Domain
from bnverify.engine.budget import Budget
from bnverify.engine.exploration import Exploration
from bnverify.engine.judge import Judge, judged
from bnverify.engine.volume import NEEDS, Volume
from bnverify.laws import Law
from bnverify.profile import Profile
from bnverify.subject import Subject


class Bench:
    """The programs of one subject, compiled at their first call and kept for any number of checks.

    Args:
        subject: what is verified.
        laws: the laws that need running.
        facts: see ``bnverify.engine.judge.static_facts``.
        plan: how much to run.
        refusal: why the subject does not trace; empty where it does.
        note: what the evidence should say besides.

    Attributes:
        domain: where cases are drawn from.
        budget: how many cases a call stacks.
        judge: judges the laws.
        second: judges them with other draws.
        unstacked: why stacked cases cannot be run; empty as far as is known.
    """

    def __init__(
        self,
        subject: Subject,
        laws: Sequence[Law],
        facts: Mapping[str, Any],
        plan: Profile,
        *,
        refusal: str = "",
        note: str = "",
    ) -> None:
        self.subject = subject
        self.laws = laws
        self.plan = plan
        self.refusal = refusal
        self.note = note
        self.domain = _domain(laws)
        self.budget = Budget(subject, plan.block, plan.blocks)
        self.judge = Judge(subject, facts, self.budget)
        self.second = Judge(subject, facts, self.budget, seed=1)
        self.unstacked = ""

    @property
    def stacks(self) -> bool:
        """Whether stacked cases can be run, as far as is known."""
        return not self.refusal and not self.unstacked and bool(judged(self.laws, NEEDS))

    def unstack(self, why: str) -> None:
        """Run no stacked cases from now on."""
        self.unstacked = why
        self.__dict__.pop("exploration", None)

    @property
    def refused(self) -> Mapping[str, str]:
        """Name of a fact that no run could observe -> what was raised."""
        return {**self.exploration.refused, **(self.volume.refused if self.stacks else {})}

    @cached_property
    def volume(self) -> Volume:
        """Runs stacked cases."""
        laws = judged(self.laws, NEEDS)
        return Volume(self.subject, laws, self.judge, domain=self.domain)

    @cached_property
    def exploration(self) -> Exploration:
        """Runs explicit cases; the laws that stacked cases were held to need no second look."""
        volume = self.volume if self.stacks else None
        laws = [law for law in self.laws if volume is None or law.name not in volume.laws]
        return Exploration(self.subject, laws, self.judge, volume, traced=not self.refusal)


def _domain(laws: Sequence[Law]) -> Domain:
    """Return where cases are drawn from.

    A function that is init, one step and evaluate in one call is compared with a first step.
    """
    first = all("solution" in law.needs for law in laws)
    return Domain(max_warmup=0) if first else Domain()
