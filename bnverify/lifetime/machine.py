"""The life of a state as a Hypothesis state machine, for users' tests and for evidence.

    TestLife = bnverify.life(subject).TestCase

One shape or two serve a whole check: a shape costs seconds to compile, a step then takes a
millisecond.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import hypothesis
import numpy as np
from hypothesis import HealthCheck, Verbosity
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)

from bnverify import compile_cache
from bnverify.case import Case
from bnverify.claim import Broken
from bnverify.evidence import Evidence
from bnverify.lazy import jax
from bnverify.lifetime.checkpoint import COPIES, Lived
from bnverify.lifetime.life import CLAIMS, Life, Programs, Record, subject_of, ways
from bnverify.profile import PROFILES, Profile
from bnverify.subject import Subject
from bnverify.transition import is_floating
from bnverify.unusable import first_line

SHAPES = ((2, 2), (4, 3), (24, 3))  # 24: a step may split its batch in 2, 3, 4, 6 or 8

# Small numbers of few digits: with these a step of any sane subject stays far from overflow, and
# a counterexample reads well.
NUMBERS = st.integers(-8, 8).map(lambda k: k / 4)
RATES = st.sampled_from([0.125, 0.0, 0.5])


def batches(shape: tuple[int, int], *, max_seed: int = 3) -> st.SearchStrategy[Case]:
    """Strategy for the batches of a life: one shape, small numbers of few digits.

    Args:
        shape: (N, D).
        max_seed: the largest seed.
    """

    def array(of: Any) -> st.SearchStrategy[Any]:
        return hnp.arrays(np.float32, of, elements=NUMBERS, fill=st.nothing())

    return st.builds(
        Case.of,
        st.integers(0, max_seed),
        array(shape),
        array(shape[0]),
        RATES,
    )


def life(
    lived: Subject | Lived,
    *,
    name: str | None = None,
    programs: Programs | None = None,
    ignore: Collection[str] = (),
    record: Record | None = None,
) -> type[RuleBasedStateMachine]:
    """Return a state machine that lives the life of a state in every order.

    Args:
        lived: a Subject, saved by ``flax.serialization``, or a Lived with its own way to save
            and restore.
        name: how counterexamples find ``lived``: "module:name"; None: the reader puts it in.
        programs: see :class:`bnverify.lifetime.life.Programs`.
        ignore: names of claims that are not asked.
        record: counts how often each claim was tested.

    Raises:
        ValueError: the step takes no batch of 2, 4 or 24 rows.
    """
    subject = subject_of(lived)
    made = programs or Programs(subject)
    shape = shape_of(subject)
    offered = [way for way in ways(lived) if way != "orbax" and refused(lived, way, made) is None]
    cases = batches(shape)

    class Machine(RuleBasedStateMachine):
        def __init__(self) -> None:
            super().__init__()
            self.life = Life(lived, programs=made, ignore=ignore, record=record, name=name)

        @initialize(case=cases)
        def begin(self, case: Case) -> None:
            self.life.begin(case)

        @rule(case=cases)
        def train(self, case: Case) -> None:
            self.life.train(case)

        @rule(case=cases)
        def evaluate(self, case: Case) -> None:
            self.life.evaluate(case)

        @precondition(lambda self: bool(offered))
        @rule(way=st.sampled_from(offered or [""]))
        def save(self, way: str) -> None:
            self.life.save(way)

        @precondition(lambda self: self.life.saved is not None)
        @rule()
        def restore(self) -> None:
            self.life.restore()

        @rule(way=st.sampled_from(sorted(COPIES)))
        def copy(self, way: str) -> None:
            self.life.copy(way)

        @rule()
        def resume(self) -> None:
            self.life.resume()

    Machine.__name__ = Machine.__qualname__ = f"Life[{subject.name}]"
    return Machine


def shape_of(subject: Subject) -> tuple[int, int]:
    """Return the smallest of a few shapes that the step takes."""
    failure: Exception | None = None
    for rows, features in SHAPES:
        shape = rows, subject.features[0] if subject.features else features
        case = Case.of(0, np.zeros(shape), np.zeros(shape[0]), 0.0)
        try:
            jax.eval_shape(lambda c: subject.step(subject.init(c.seed, c.x), c.x, c.y, c.lr), case)
        except Exception as error:  # noqa: BLE001 - whatever a user's code raises
            failure = error
        else:
            return shape
    assert failure is not None
    raise ValueError(f"{subject.name} takes no batch of 2, 4 or 24 rows: {first_line(failure)}")


def refused(lived: Subject | Lived, way: str, programs: Programs) -> str | None:
    """Return why the libraries cannot save any state of this subject in this way, or None.

    A user's own way is never refused: where it raises, that is a violation.
    """
    if isinstance(lived, Lived):
        return None
    shape = shape_of(lived)
    state = programs.init(np.int32(0), np.zeros(shape, np.float32))
    try:
        ways(lived)[way].save(state)
    except Exception as error:  # noqa: BLE001 - whatever a library raises on a user's types
        return f"{way} cannot save it: {first_line(error)}"
    return None


def check_life(
    lived: Subject | Lived,
    profile: str | Profile = "ci",
    seed: int = 0,
    *,
    select: Collection[str] = (),
    target: str | None = None,
) -> list[Evidence]:
    """Hold the life of a state to its claims and return what is known about each.

    Args:
        lived: a Subject, or a Lived with its own way to save and restore.
        profile: how much to do: as many lives as the profile has explicit examples, twice over,
            and two scripted ones for each way to save.
        seed: from which the lives are drawn.
        select: names of claims; empty: all.
        target: how counterexample scripts name the subject.

    Raises:
        ValueError: the profile or a claim is unknown, or the step takes no batch of 2, 4 or 24
            rows.
    """
    plan = PROFILES.get(profile) if isinstance(profile, str) else profile
    if plan is None:
        raise ValueError(f"profile must be one of {', '.join(PROFILES)}, got {profile!r}")
    for name in select:
        if name not in CLAIMS:
            raise ValueError(f"no claim about the life of a state is named {name!r}")
    compile_cache.enable()
    asked = [name for name in CLAIMS if not select or name in select]
    check = _Check(lived, plan, seed, asked, target)
    check.run()
    return [check.evidence(name) for name in asked]


class _Check:
    """One check of the life of a state: first drawn lives, which shrink, then scripted ones."""

    def __init__(
        self,
        lived: Subject | Lived,
        plan: Profile,
        seed: int,
        asked: Collection[str],
        target: str | None,
    ) -> None:
        self._lived = lived
        self._subject = subject_of(lived)
        self._plan = plan
        self._seed = seed
        self._unasked = set(CLAIMS) - set(asked)
        self._target = target
        self._programs = Programs(self._subject)
        self._shape = shape_of(self._subject)
        self._record = Record()
        self._broken: dict[str, Broken] = {}
        self._refusals: dict[str, str] = {}

    def run(self) -> None:
        """Live all the lives."""
        # A claim that is broken is not asked again: behind it others may be broken too, and the
        # scripted lives are enough to see them.
        if self._plan.examples and (found := self._drawn()) is not None:
            self._broken[found.claim.name] = found
        for way in ways(self._lived):
            if way == "orbax" and self._plan.examples <= PROFILES["quick"].examples:
                continue
            reason = refused(self._lived, way, self._programs)
            if reason is not None:
                self._refusals[way] = reason
                continue
            while (found := self._scripted(way)) is not None:
                self._broken[found.claim.name] = found

    def evidence(self, name: str) -> Evidence:
        """Return what is known about one claim."""
        claim, cases = CLAIMS[name], self._record.seen[name]
        if name in self._broken:
            return self._broken[name].evidence(cases)
        if (reason := exemption(name, self._subject, self._programs, self._shape)) is not None:
            return claim.evidence("exempt", reason=reason)
        missing = "; ".join(self._refusals.values())
        if not cases:
            return claim.evidence("untriggered", reason=missing or "no life reached it")
        folded = name == "statistics_fold_each_batch_once"
        residual = self._record.worst if folded else None
        return claim.evidence("held", cases=cases, residual=residual, reason=missing)

    @property
    def _ignored(self) -> set[str]:
        return self._unasked | set(self._broken)

    def _drawn(self) -> Broken | None:
        """Let Hypothesis draw lives; return the simplest that breaks a claim."""
        machine = life(
            self._lived,
            name=self._target,
            programs=self._programs,
            ignore=self._ignored,
            record=self._record,
        )
        settings = hypothesis.settings(
            max_examples=2 * self._plan.examples,
            stateful_step_count=12,
            database=None,
            deadline=None,
            verbosity=Verbosity.quiet,
            print_blob=False,
            report_multiple_bugs=False,
            suppress_health_check=list(HealthCheck),
            phases=[hypothesis.Phase.generate, hypothesis.Phase.shrink],
        )
        try:
            run_state_machine_as_test(hypothesis.seed(self._seed)(machine), settings=settings)
        except Broken as found:
            return found
        return None

    def _scripted(self, way: str) -> Broken | None:
        """Live two lives in which everything happens, one of them saved in ``way``."""
        rng = np.random.default_rng(0)
        first, second = (
            Case.of(1, _rounded(rng, self._shape), _rounded(rng, self._shape[:1]), 0.125)
            for _ in range(2)
        )
        saved, resumed = (
            Life(
                self._lived,
                programs=self._programs,
                ignore=self._ignored,
                record=self._record,
                name=self._target,
            )
            for _ in range(2)
        )
        try:
            saved.begin(first)
            saved.train(first)
            saved.evaluate(second)
            saved.save(way)
            saved.train(second)
            saved.save(way)
            saved.train(first)
            saved.restore()
            for copy in COPIES:
                saved.copy(copy)
            saved.train(first)
            saved.train(second)
            resumed.begin(first)
            resumed.train(first)
            resumed.resume()
            resumed.train(second)
        except Broken as found:
            return found
        return None


def _rounded(rng: np.random.Generator, shape: tuple[int, ...]) -> Any:
    return np.round(rng.normal(size=shape) * 4) / 4


def exemption(
    name: str, subject: Subject, programs: Programs, shape: tuple[int, int]
) -> str | None:
    """Return why a claim does not apply to ``subject``, or None."""
    if name in subject.exempt:
        return subject.exempt[name]
    if name == "evaluation_between_steps_changes_nothing" and programs.after_eval is None:
        return "the subject's evaluation cannot write"
    if name == "statistics_fold_each_batch_once":
        if "batch_stats_change_only_by_ema" in subject.exempt:
            return subject.exempt["batch_stats_change_only_by_ema"]
        state = jax.eval_shape(subject.init, np.int32(0), np.zeros(shape, np.float32))
        if not any(map(is_floating, jax.tree_util.tree_leaves(state.batch_stats))):
            return "the subject keeps no running statistics"
    return None
