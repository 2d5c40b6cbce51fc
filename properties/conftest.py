"""The fixtures of the properties: a training step, and how it is checked against a law.

By default the step is the reference with SGD and Adam, in the nightly tier with four optimizers;
``--bnverify-target`` selects another one.
"""

from __future__ import annotations

import random
from functools import cached_property
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import Phase, errors, find, settings
from hypothesis import strategies as st

from bnverify.errors import UsageError
from bnverify.laws import STEP_LAWS, Law
from bnverify.target import load

# jax is imported when the first property runs, not at collection.
if TYPE_CHECKING:
    from collections.abc import Generator

    import numpy as np
    import numpy.typing as npt

    from bnverify.model import Case, Subject
    from bnverify.proof import Reading
    from bnverify.runs import Runner

OPTIMIZERS = ("sgd", "momentum", "adam", "adamw")
DEFAULT = ("sgd", "adam")
"""One optimizer without a state and one with a large state; the others run in the nightly tier."""
SHAPES = 5  # each compiles a few programs for each optimizer; three of them are always tiny
TOGETHER = 8
"""The most cases of one example: they are run and judged as a stack, and shrink to one."""
WITNESSES = 100
"""The fewest examples in which a witness is sought: a law is not violated because a profile has five."""


class Step:
    """A training step that can be checked against laws.

    Args:
        name: its name in test ids.
        target: the argument of ``bnverify.load``.

    Attributes:
        reached: how many cases of the running test met the precondition of its law.
    """

    def __init__(self, name: str, target: str) -> None:
        self._id = name
        self._target = target
        self._runners: dict[bool, Runner] = {}
        self.reached = 0

    def __str__(self) -> str:
        return self._id

    def cases(
        self, *, warmup: st.SearchStrategy[int] | None = None
    ) -> st.SearchStrategy[list[Case]]:
        """Return a strategy for a few cases of one shape.

        Args:
            warmup: a strategy for the number of steps before the observed one.
        """
        from bnverify import strategies

        def together(shape: tuple[int, int]) -> st.SearchStrategy[list[Case]]:
            each = strategies.cases(shape=st.just(shape), warmup=warmup)
            return st.lists(each, min_size=1, max_size=TOGETHER)

        shapes = strategies.shapes(features=self.subject.features, size=SHAPES)
        return shapes.flatmap(together)

    def first_steps(self) -> st.SearchStrategy[list[Case]]:
        """Return a strategy for cases without warm-up, so that the step is the first one."""
        return self.cases(warmup=st.just(0))

    def keeps(self, law: str, cases: list[Case]) -> None:
        """Fail if the step violates a law on some cases.

        Args:
            law: the name of the law.
            cases: the cases, of one shape.
        """
        __tracebackhide__ = True
        residuals = self._residuals(self._applicable(law), cases)
        self.reached += int((residuals >= 0).sum())
        worst = int(residuals.argmax())
        if residuals[worst] > 1:
            reason = f"the error is {residuals[worst]:.3g} times its tolerance"
            self._violated(law, reason, cases[worst])

    def shows(self, law: str, cases: st.SearchStrategy[list[Case]]) -> None:
        """Fail unless one of the cases is a witness for the law."""
        __tracebackhide__ = True
        known = self._applicable(law)
        try:
            find(
                cases,
                lambda some: bool((self._residuals(known, some) == 0).any()),
                settings=settings(
                    database=None,
                    phases=[Phase.generate],
                    max_examples=max(settings.default.max_examples, WITNESSES),
                ),
                random=random.Random(0),
            )
        except errors.NoSuchExample:
            self._violated(law, f"{known.never} in any of the cases tried")
        self.reached = 1

    def proves(self, law: str) -> None:
        """Fail if the traced step violates a law of structure, for all N and D if they trace."""
        __tracebackhide__ = True
        from bnverify.proof import judge_structure

        evidence = judge_structure(self._applicable(law), self._reading)
        if evidence.status == "violated":
            self._violated(law, evidence.reason)
        self.reached = 1

    @cached_property
    def subject(self) -> Subject:
        """The step as a Subject."""
        return load(self._target)

    @property
    def name(self) -> str:
        """The name of the subject, by which known failures refer to it."""
        return self.subject.name

    @cached_property
    def _reading(self) -> Reading:
        from bnverify import proof

        return proof.read(self.subject)

    def _runner(self, law: Law) -> Runner:
        """Return the runner for ``law``, with a stateful optimizer if the law needs one."""
        from bnverify.profile import Profile
        from bnverify.runs import Runner

        reading = self._reading
        probed = reading.probe is not None and "opt_state" in law.capabilities
        if probed not in self._runners:
            traced = reading.probe if probed else reading.traced
            assert traced is not None
            laws = [law for law in STEP_LAWS.values() if law.kind != "structure"]
            plan = Profile("properties", block=TOGETHER)
            self._runners[probed] = Runner(traced.tracer, traced.abstract, laws, plan)
        return self._runners[probed]

    def _applicable(self, name: str) -> Law:
        """Return the law, or skip the test with the reason why it does not apply."""
        from bnverify.proof import capabilities, exemption

        law, reading = STEP_LAWS[name], self._reading
        if reading.abstract is None:
            pytest.skip(reading.refusal)
        shown = capabilities(self.subject, reading.abstract, reading.probe)
        reason = exemption(law, self.subject, shown)
        if reason is not None:
            pytest.skip(reason)
        return law

    def _residuals(self, law: Law, cases: list[Case]) -> npt.NDArray[np.float64]:
        from bnverify.observe import SINGLE
        from bnverify.pytree import stack

        runner = self._runner(law)
        if "eager" in law.observes:  # slow, since every operation is compiled separately
            cases = cases[:1]
        run = runner.singly if SINGLE.intersection(law.observes) else runner.judged
        return run(stack(cases), [law])[law.name]

    def _violated(self, law: str, reason: str, case: Case | None = None) -> None:
        __tracebackhide__ = True
        from bnverify.evidence import Counterexample, Evidence, Violation

        shows = Counterexample(law, case, self._target)
        raise Violation(Evidence.of(law, "violated", reason=reason, counterexample=shows))


STEPS: dict[str, Step] = {}
"""Name -> step; all properties in a process share its compiled programs."""


def pytest_configure(config: pytest.Config) -> None:
    """Register the plugin's mark, in case bnverify is not installed."""
    config.addinivalue_line("markers", "bnverify(law, subject): a test of one law on one subject")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Parametrise every property with every step."""
    if "step" not in metafunc.fixturenames:
        return
    target = metafunc.config.getoption("bnverify_target", default=None)
    names = getattr(metafunc.module, "STEPS_OF", OPTIMIZERS)
    targets = {f"reference[{name}]": f"bnverify.reference:{name}" for name in names}
    nightly = {f"reference[{name}]" for name in names if name not in DEFAULT}
    if target:
        targets = {target: target}
    law = metafunc.function.__name__.removeprefix("test_")

    def param(name: str, source: str) -> Any:
        step = STEPS.setdefault(name, Step(name, source))
        # Known failures find the test by this mark.
        marks = [pytest.mark.bnverify(law=law, subject=step)]
        return pytest.param(step, marks=[*marks, pytest.mark.nightly] if name in nightly else marks)

    metafunc.parametrize(
        "step", [param(*each) for each in targets.items()], ids=str, scope="session"
    )


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, None, None]:
    """Skip a test that would pass only because no case met the precondition of its law.

    hypothesis.assume is no alternative: up to nine of ten cases may have nothing to compare because of
    rounding, which Hypothesis would report as a health-check failure.
    """
    step = item.callspec.params.get("step") if hasattr(item, "callspec") else None
    if step is None:
        yield
        return
    step.reached = 0
    yield
    if step.reached == 0:
        pytest.skip("no case reached the precondition of the law")


def pytest_collection_finish(session: pytest.Session) -> None:
    """Report an invalid target in one line, before the first test."""
    target = session.config.getoption("bnverify_target", default=None)
    if target in STEPS and not session.config.option.collectonly:
        try:
            STEPS[target].subject  # noqa: B018 - a cached property, computed here
        except UsageError as error:
            raise pytest.UsageError(str(error)) from None
