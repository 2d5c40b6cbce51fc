"""The laws as pytest tests of a user's own: ``test_my_step = bnverify.suite(subject)``."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import pytest

from bnverify import probe
from bnverify.errors import first_line
from bnverify.laws import LAWS
from bnverify.model import CheckpointedSubject, Parallel, Subject
from bnverify.probe import subject_of
from bnverify.testing.workers import shared

if TYPE_CHECKING:
    from bnverify.evidence import Evidence, Report
    from bnverify.model import Target
    from bnverify.profile import Profile, ProfileName
    from bnverify.testing.memory import Memory

KNOWN = pytest.StashKey[str]()
"""Set on an item whose law is known to fail: why."""

_GROUPS = itertools.count(1)


def suite(
    subject: Target | Callable[[], Target], profile: ProfileName | Profile = "ci"
) -> Callable[..., None]:
    """Return a pytest test, to be assigned to a ``test_*`` name, that is one test for each law.

    A law that is proved or held passes. A violated one fails with its reason, its counterexample
    and the likely mistake. One that no case reached, or that does not apply, is skipped with its
    reason: a tick means that something was seen. The check runs once, for all the laws selected.
    ``-m bnverify_statistics``, or ``-k statistics``, selects a family.

    Args:
        subject: the training step, a CheckpointedSubject or a Parallel; or a function that makes it, called
            when a test first runs. The claims about many devices are among the tests where a
            Parallel itself is given.
        profile: how much to do; ``--bnverify-profile`` takes its place.

    Raises:
        ValueError: it is neither a subject nor a function.
    """
    if probe.flax_kind(subject) or not callable(subject):
        subject_of(subject)  # type: ignore[arg-type] # refuses what is none
    check = Check(subject, profile)
    # With --dist loadgroup, all laws of one suite go to one worker.
    group = pytest.mark.xdist_group(f"bnverify-{next(_GROUPS)}")
    laws = [
        pytest.param(
            name,
            marks=[
                pytest.mark.bnverify(law=name, subject=check),
                getattr(pytest.mark, f"bnverify_{law.family}"),
                group,
            ],
            id=name,
        )
        for name, law in LAWS.items()
        if law.family != "parallel" or isinstance(subject, Parallel)
    ]

    @pytest.mark.parametrize("law", laws)
    def test(law: str, request: pytest.FixtureRequest) -> None:
        __tracebackhide__ = True
        check.hold(law, request)

    test.bnverify_suite = check  # type: ignore[attr-defined] # how bnverify.load finds the subject
    return test


@dataclass(frozen=True)
class Settings:
    """What the command line of pytest says about checks.

    Attributes:
        profile: takes the place of every suite's own; None: it does not.
        seed: from which all cases are drawn.
    """

    profile: ProfileName | None
    seed: int

    @classmethod
    def of(cls, config: pytest.Config) -> Settings:
        """Return the settings of this run."""
        return cls(config.getoption("bnverify_profile"), config.getoption("bnverify_seed"))


class Check:
    """One subject and its one report, made when the first law asks for it."""

    def __init__(
        self, subject: Target | Callable[[], Target], profile: ProfileName | Profile = "ci"
    ) -> None:
        self._given = subject
        self._profile = profile
        self._report: Report | None = None
        self._failed = ""  # why there is none; the first test that asked shows the traceback

    @cached_property
    def subject(self) -> Target:
        """The subject itself."""
        given = self._given
        if isinstance(given, Subject | CheckpointedSubject | Parallel):
            return given
        made = given()
        if isinstance(made, Parallel):
            # Its further tests would have had to be collected before it was made.
            raise TypeError(
                "bnverify.suite needs the Parallel itself, not a function that makes it"
            )
        subject_of(made)  # refuses what is none
        return made

    @property
    def name(self) -> str:
        """The name of the subject."""
        return self.subject.name

    def hold(self, law: str, request: pytest.FixtureRequest) -> None:
        """Pass, skip or fail the test that is running as the evidence for ``law`` says.

        Raises:
            Violation: the law is violated.
        """
        __tracebackhide__ = True
        from bnverify.evidence import Violation
        from bnverify.testing.memory import Memory

        memory = Memory(request.node.nodeid)
        evidence = self._replay(memory)
        if evidence is not None:
            note = "(the case of the last run, tried first; it fails as before)"
            raise Violation(evidence, note)
        evidence = self._checked(request)[law]
        if evidence.status in {"untriggered", "exempt"}:
            reason = f"{evidence.status}: {evidence.reason}"
            if request.node.get_closest_marker("xfail") is not None:
                pytest.fail(f"known to fail, but {reason}", pytrace=False)
            pytest.skip(reason)
        if evidence.status == "violated":
            if evidence.family != "parallel":  # a replay would need four devices
                memory.keep(evidence)
            raise Violation(evidence)

    def _replay(self, memory: Memory) -> Evidence | None:
        """Return what was remembered of the last run, if its case still violates the law."""
        from bnverify import compile_cache
        from bnverify.check import show_again
        from bnverify.evidence import Violation

        remembered = memory.recall()
        if remembered is None or remembered.counterexample is None:
            return None
        compile_cache.enable()
        try:
            show_again(self.subject, remembered.counterexample)
        except Violation:
            return remembered
        except Exception:  # noqa: BLE001 - a case for a subject that has since changed its shape
            memory.forget()
        else:
            memory.forget()
        return None

    def _checked(self, request: pytest.FixtureRequest) -> Report:
        if self._failed:
            pytest.fail(f"the check could not be made: {self._failed}", pytrace=False)
        if self._report is None:
            try:
                with shared(request) as share:
                    self._report = share.load()
                    if self._report is None:
                        self._report = self._verify(request)
                        share.save(self._report)
            except Exception as error:
                self._failed = first_line(error)
                raise
        return self._report

    def _verify(self, request: pytest.FixtureRequest) -> Report:
        from bnverify.check import verify

        settings = Settings.of(request.config)
        return verify(
            self.subject,
            settings.profile or self._profile,
            seed=settings.seed,
            select=self._selected(request.session.items),
            target=f"{request.node.path}:{request.node.originalname}",
        )

    def _selected(self, items: Sequence[pytest.Item]) -> list[str]:
        """Return the laws that this run asks about: what -k leaves out costs nothing."""
        marks = (item.get_closest_marker("bnverify") for item in items)
        return [mark.kwargs["law"] for mark in marks if mark and mark.kwargs["subject"] is self]
