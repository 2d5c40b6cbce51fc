"""Explicit cases, drawn by Hypothesis and run as a user would run them: one call at a time."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from bnverify.case import Case
from bnverify.engine.judge import READ, Judge, judged
from bnverify.engine.volume import NEEDS, Volume
from bnverify.laws import Law
from bnverify.lazy import jax
from bnverify.observe import Calls, observe
from bnverify.subject import Subject
from bnverify.transition import Outcome, Transition

CALLS = frozenset({"again", "eager", "stacked", "solution"})
"""What laws can ask of single calls besides ``volume.NEEDS``."""

COSTLY = frozenset({"eager", "solution"})
"""Those that run uncompiled: one takes as long as a hundred others."""

TRACED = frozenset({"layer_inputs", *READ})
"""What takes the step's program, not only its results."""

Observed = tuple[Transition, frozenset[str]]
"""A transition and the names of what was observed for it."""


class Again(NamedTuple):
    """A second run of the same input, and that input before and after it and an eager run."""

    before: Any
    state: Any
    info: Any
    eval_loss: Any
    inputs_before: Any
    inputs_after: Any


class Solution(NamedTuple):
    """The one-call function at a whole seed and at one with a fraction."""

    whole: Any
    fractional: Any


class Exploration:
    """A subject run one call at a time.

    Args:
        subject: what is verified.
        laws: the laws to judge.
        judge: judges them.
        volume: runs single cases in a stack, to compare; None where the subject does not
            vectorise.
        traced: whether the subject traces; one that does not is run uncompiled, and the laws
            that need its program are not judged.

    Attributes:
        laws: as given.
        refused: see ``Calls``.
    """

    def __init__(
        self,
        subject: Subject,
        laws: Sequence[Law],
        judge: Judge,
        volume: Volume | None = None,
        *,
        traced: bool = True,
    ) -> None:
        self._subject = subject
        self.laws = laws
        self._judge = judge
        self._volume = volume
        self._calls = Calls(subject, "jit" if traced else "eager")
        self.refused = self._calls.refused
        self._seen = NEEDS if traced else NEEDS - TRACED
        self._eager = Calls(subject, "eager")

    def residuals(
        self, case: Case, laws: Sequence[Law] = (), *, costly: Collection[str] = COSTLY
    ) -> dict[str, float]:
        """Return law name -> residual of one case, for every law that it can be held to.

        Args:
            case: the case.
            laws: which laws; empty: all.
            costly: which of ``COSTLY`` to run.
        """
        return self.all_residuals([(case, costly)], laws)[0]

    def all_residuals(
        self, cases: Iterable[tuple[Case, Collection[str]]], laws: Sequence[Law] = ()
    ) -> list[dict[str, float]]:
        """Return what ``residuals`` gives for each of some cases, in order.

        Cases of one shape are judged together: the judge fills its stack anyway.

        Args:
            cases: pairs of a case and which of ``COSTLY`` to run for it.
            laws: which laws; empty: all.
        """
        chosen = laws or self.laws
        observed = self.transitions(cases, chosen)
        found: list[dict[str, float]] = [{} for _ in observed]
        for places in _by_shape(observed):
            always = frozenset.intersection(*(observed[place][1] for place in places))
            for calls, asked in _by_calls(chosen, always).items():
                able = [place for place in places if calls <= observed[place][1]]
                if not able:
                    continue
                unasked = CALLS.difference(*(law.needs for law in asked))
                transitions = [_without(observed[place][0], unasked) for place in able]
                residuals = self._judge.each(transitions, judged(asked, always | calls))
                for place, values in zip(able, residuals, strict=True):
                    found[place].update(values)
        return found

    def transitions(
        self, cases: Iterable[tuple[Case, Collection[str]]], laws: Sequence[Law]
    ) -> list[Observed]:
        """Return the transition of each case, and the names of what was observed for it.

        Args:
            cases: pairs of a case and which of ``COSTLY`` to run for it.
            laws: whose needs to observe.
        """
        needs = {need for law in laws for need in law.needs}
        found = [self._transition(case, needs - (COSTLY - set(costly))) for case, costly in cases]
        if "stacked" in needs and self._volume is not None:
            for places in _by_shape(found):
                given = [(found[place][0].before, found[place][0].case) for place in places]
                for place, outcome in zip(places, self._volume.outcomes(given), strict=True):
                    t, available = found[place]
                    t = t._replace(facts={**t.facts, "stacked": outcome})
                    found[place] = t, available | {"stacked"}
        return found

    def _transition(self, case: Case, needs: Collection[str]) -> Observed:
        """Return what single calls show."""
        available = self._seen.intersection(needs)
        t = observe(self._calls, case, available)
        facts = dict(t.facts)
        if "again" in needs:
            facts["again"] = self._again(t, eager="eager" in needs)
        if "eager" in needs:
            facts["eager"] = _outcome(self._eager, *_copies((t.before, case)))
        if "solution" in needs and self._subject.solution is not None:
            facts["solution"] = self._solution(case)
        return t._replace(facts=facts), available | (CALLS & set(facts))

    def _again(self, t: Transition, *, eager: bool) -> Again:
        before = self._calls.warm(self._calls.init(t.case), t.case)
        kept, given = _copies((t.before, t.case)), _copies((t.before, t.case))
        outcome = _outcome(self._calls, *given)
        if eager:  # only there does a step hold the caller's own arrays, not tracers
            _outcome(self._eager, *given)
        return Again(before, outcome.state, outcome.info, outcome.eval_loss, kept, given)

    def _solution(self, case: Case) -> Solution:
        solution = self._subject.solution
        assert solution is not None
        seed, lr = int(case.seed), float(case.lr)
        fraction = 0.75 if seed >= 0 else -0.75  # the integer part is towards zero
        return Solution(
            np.asarray(solution(float(seed), case.x, case.y, lr)),
            np.asarray(solution(seed + fraction, case.x, case.y, lr)),
        )


def _by_shape(observed: Sequence[Observed]) -> Iterable[list[int]]:
    """Return the places of what was observed for cases of the same shape."""
    alike: dict[Any, list[int]] = {}
    for place, (t, _) in enumerate(observed):
        alike.setdefault(t.case.shape, []).append(place)
    return alike.values()


def _by_calls(laws: Iterable[Law], always: Collection[str]) -> dict[frozenset[str], list[Law]]:
    """Return the laws by what they need of ``CALLS`` besides ``always``."""
    found: dict[frozenset[str], list[Law]] = {}
    for law in laws:
        found.setdefault(CALLS.intersection(law.needs).difference(always), []).append(law)
    return found


def _without(t: Transition, facts: Collection[str]) -> Transition:
    kept = {name: fact for name, fact in t.facts.items() if name not in facts}
    return t._replace(facts=kept)


def _copies(tree: Any) -> Any:
    return jax.tree_util.tree_map(lambda leaf: np.array(leaf, copy=True), tree)


def _outcome(calls: Calls, before: Any, case: Case) -> Outcome:
    outcome = calls.step(before, case)
    return outcome._replace(eval_loss=calls.evaluate(outcome.state, case))
