"""The laws as pytest tests: ``test_my_step = bnverify.suite(subject)``."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
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
"""Set on an item whose law is known to fail: the reason."""

_GROUPS = itertools.count(1)


def suite(
    subject: Target | Callable[[], Target], profile: ProfileName | Profile = "ci"
) -> Callable[..., None]:
    """Return a parametrized pytest test, one test for each law, to assign to a ``test_*`` name.

    A law that is proved or held passes. A violated law fails with its reason, counterexample and
    the likely mistake. An untriggered or exempt law is skipped with its reason, so a pass always
    means that the law was exercised. The check runs once, for all selected laws. ``-m
    bnverify_statistics`` or ``-k statistics`` selects a family.

    Args:
        subject: the training step, a CheckpointedSubject or a Parallel; or a function that returns
            a training step or CheckpointedSubject, called when a test first runs. The laws about
            several devices are included only if a Parallel is given.
        profile: how many cases to check; ``--bnverify-profile`` overrides it.

    Raises:
        ValueError: ``subject`` is neither a subject nor a function.
    """
    if probe.flax_kind(subject) or not callable(subject):
        subject_of(subject)  # type: ignore[arg-type] # raises for anything else
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

    test.bnverify_suite = check  # type: ignore[attr-defined] # for bnverify.load
    return test


@dataclass(frozen=True)
class Settings:
    """The pytest options for checks.

    Attributes:
        profile: overrides every suite's own, unless None.
        seed: the seed of all cases.
    """

    profile: ProfileName | None
    seed: int

    @classmethod
    def of(cls, config: pytest.Config) -> Settings:
        """Return the options of this run."""
        return cls(config.getoption("bnverify_profile"), config.getoption("bnverify_seed"))


class Check:
    """One subject and its report, made when the first test needs it."""

    def __init__(
        self, subject: Target | Callable[[], Target], profile: ProfileName | Profile = "ci"
    ) -> None:
        self._given = subject
        self._profile = profile
        self._report: Report | None = None
        self._failed = ""  # why there is no report; the first test shows the traceback

    @cached_property
    def subject(self) -> Target:
        """The subject, made on first use."""
        given = self._given
        if isinstance(given, Subject | CheckpointedSubject | Parallel):
            return given
        made = given()
        if isinstance(made, Parallel):
            # Its additional tests would have to be collected before it is made.
            raise TypeError(
                "bnverify.suite got a function that returns a Parallel; pass the Parallel itself"
            )
        subject_of(made)  # raises for anything else
        return made

    @property
    def name(self) -> str:
        """The subject's name."""
        return self.subject.name

    def hold(self, law: str, request: pytest.FixtureRequest) -> None:
        """Pass, skip or fail the running test according to the evidence for ``law``.

        Raises:
            Violation: the law is violated.
        """
        __tracebackhide__ = True
        from bnverify.evidence import Violation
        from bnverify.testing.memory import Memory

        memory = Memory(request.node.nodeid)
        evidence = self._replay(memory)
        if evidence is not None:
            note = "(replayed from the last run, where it failed, too)"
            raise Violation(evidence, note)
        evidence = self._checked(request)[law]
        if evidence.status in {"untriggered", "exempt"}:
            reason = f"{evidence.status}: {evidence.reason}"
            if request.node.get_closest_marker("xfail") is not None:
                pytest.fail(f"expected a known failure, but {reason}", pytrace=False)
            pytest.skip(reason)
        if evidence.status == "violated":
            if evidence.family != "parallel":  # a replay would need four devices
                memory.keep(evidence)
            raise Violation(evidence)

    def _replay(self, memory: Memory) -> Evidence | None:
        """Return the stored evidence of the last run if its case still violates the law."""
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
        except Exception:  # noqa: BLE001 - the subject has changed, and the case does not fit
            memory.forget()
        else:
            memory.forget()
        return None

    def _checked(self, request: pytest.FixtureRequest) -> Report:
        if self._failed:
            pytest.fail(f"the check failed: {self._failed}", pytrace=False)
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
        from bnverify.report.progress import occasionally

        capture = request.config.pluginmanager.getplugin("capturemanager")

        def line(text: str) -> None:
            # A worker of pytest-xdist has the stderr of the whole run.
            with capture.global_and_fixture_disabled() if capture else nullcontext():
                print(f"\nbnverify: {self.name}: {text}", file=sys.stderr, flush=True)

        settings = Settings.of(request.config)
        return verify(
            self.subject,
            settings.profile or self._profile,
            seed=settings.seed,
            select=self._selected(request.session.items),
            target=f"{request.node.path}:{request.node.originalname}",
            listener=occasionally(line) if request.config.getoption("verbose") >= 0 else None,
        )

    def _selected(self, items: Sequence[pytest.Item]) -> list[str]:
        """Return the laws whose tests are selected in this run."""
        marks = (item.get_closest_marker("bnverify") for item in items)
        return [mark.kwargs["law"] for mark in marks if mark and mark.kwargs["subject"] is self]
