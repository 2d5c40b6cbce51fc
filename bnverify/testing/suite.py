"""The laws as pytest tests of a user's own: ``test_my_step = bnverify.suite(subject)``."""

from __future__ import annotations

import ast
import hashlib
import itertools
import os
import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from bnverify.laws import LAWS
from bnverify.subject import Subject
from bnverify.unusable import first_line

if TYPE_CHECKING:
    from bnverify.case import Case
    from bnverify.evidence import Evidence, Report
    from bnverify.profile import Profile

KNOWN = pytest.StashKey[str]()
"""Set on an item whose law is known to fail: why."""

_GROUPS = itertools.count(1)


def suite(
    subject: Subject | Callable[[], Subject], profile: str | Profile = "ci"
) -> Callable[..., None]:
    """Return a pytest test, to be assigned to a ``test_*`` name, that is one test for each law.

    A law that is proved or held passes. A violated one fails with its reason, its counterexample
    and the likely mistake. One that no case reached, or that does not apply, is skipped with its
    reason: a tick means that something was seen. The check runs once, for all the laws selected.

    Args:
        subject: the training step, or a function that makes it, called when a test first runs.
        profile: how much to do; ``--bnverify-profile`` takes its place.
    """
    check = Check(subject, profile)
    # With --dist loadgroup, all laws of one suite go to one worker.
    group = pytest.mark.xdist_group(f"bnverify-{next(_GROUPS)}")
    laws = [
        pytest.param(name, marks=[pytest.mark.bnverify(law=name, subject=check), group], id=name)
        for name in LAWS
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

    profile: str | None
    seed: int

    @classmethod
    def of(cls, config: pytest.Config) -> Settings:
        """Return the settings of this run."""
        return cls(config.getoption("bnverify_profile"), config.getoption("bnverify_seed"))


class Check:
    """One subject and its one report, made when the first law asks for it."""

    def __init__(
        self, subject: Subject | Callable[[], Subject], profile: str | Profile = "ci"
    ) -> None:
        self._given = subject
        self._profile = profile
        self._report: Report | None = None
        self._failed = ""  # why there is none; the first test that asked shows the traceback

    @cached_property
    def subject(self) -> Subject:
        """The subject itself."""
        return self._given if isinstance(self._given, Subject) else self._given()

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
        from bnverify.engine.counterexample import Violation

        memory = Memory(request)
        message = self._replay(law, memory)
        if message is None:
            evidence = self._checked(request)[law]
            if evidence.status in {"untriggered", "exempt"}:
                reason = f"{evidence.status}: {evidence.reason}"
                if request.node.get_closest_marker("xfail") is not None:
                    pytest.fail(f"known to fail, but {reason}", pytrace=False)
                pytest.skip(reason)
            if evidence.status == "violated":
                message = described(evidence)
                memory.keep(message, evidence.counterexample)
        if message is not None:
            raise Violation(message)

    def _replay(self, law: str, memory: Memory) -> str | None:
        """Return what was remembered of the last run, if its case still violates ``law``."""
        from bnverify import compile_cache
        from bnverify.engine.counterexample import Violation, replay

        remembered = memory.recall()
        if remembered is None:
            return None
        message, script = remembered
        compile_cache.enable()
        try:
            replay(self.subject, case_of(script), law)
        except Violation:
            return f"{message}\n\n(the case of the last run, tried first; it fails as before)"
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
        from bnverify.engine import verify as engine

        settings = Settings.of(request.config)
        path = os.path.relpath(request.node.path)
        return engine.verify(
            self.subject,
            settings.profile or self._profile,
            seed=settings.seed,
            select=self._selected(request.session.items),
            target=f"{path}:{request.node.originalname}",
        )

    def _selected(self, items: Sequence[pytest.Item]) -> list[str]:
        """Return the laws that this run asks about: what -k leaves out costs nothing."""
        marks = (item.get_closest_marker("bnverify") for item in items)
        return [mark.kwargs["law"] for mark in marks if mark and mark.kwargs["subject"] is self]


def described(evidence: Evidence) -> str:
    """Return the message of a failed test."""
    parts = [f"{evidence.law}: {LAWS[evidence.law].claim}", evidence.reason]
    if evidence.diagnosis:
        parts.append(f"Usually: {evidence.diagnosis}")
    text = "\n".join(parts)
    if evidence.counterexample:
        text += f"\nTo see it, paste into Python:\n\n{evidence.counterexample.rstrip()}"
    return text


def case_of(script: str) -> Case:
    """Return the case in a counterexample script."""
    from bnverify.case import Case

    for statement in ast.parse(script).body:
        if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Call):
            arguments = {
                keyword.arg: ast.literal_eval(keyword.value)
                for keyword in statement.value.keywords
                if keyword.arg
            }
            if {"seed", "x", "y", "lr"} <= set(arguments):
                return Case.of(**arguments)
    raise ValueError("no case in the script")


class Memory:
    """What pytest's cache holds of the failure of one test."""

    def __init__(self, request: pytest.FixtureRequest) -> None:
        # None with -p no:cacheprovider; then nothing is remembered.
        self._cache: Any = getattr(request.config, "cache", None)
        name = hashlib.sha256(request.node.nodeid.encode()).hexdigest()[:16]
        self._key = f"bnverify/{name}"

    def recall(self) -> tuple[str, str] | None:
        """Return the message and the script of the last failure."""
        found = self._cache.get(self._key, None) if self._cache else None
        return (found["message"], found["script"]) if found else None

    def keep(self, message: str, script: str | None) -> None:
        """Remember a failure."""
        if self._cache and script:
            self._cache.set(self._key, {"message": message, "script": script})

    def forget(self) -> None:
        """Forget it again."""
        if self._cache:
            self._cache.set(self._key, None)


class Share:
    """A report that the workers of one pytest-xdist run share, so that one of them makes it."""

    def __init__(self, file: Path | None) -> None:
        self._file = file

    def load(self) -> Report | None:
        """Return the report if a worker has made it."""
        if self._file is None or not self._file.exists():
            return None
        report: Report = pickle.loads(self._file.read_bytes())  # noqa: S301 - this run's own folder
        return report

    def save(self, report: Report) -> None:
        """Let the other workers have it."""
        if self._file is not None:
            self._file.write_bytes(pickle.dumps(report))


@contextmanager
def shared(request: pytest.FixtureRequest) -> Iterator[Share]:
    """Hold the lock on the report of this test's suite; outside pytest-xdist there is none.

    The kernel gives the lock of a worker that dies to the next, which finds no report and makes it.
    """
    run = os.environ.get("PYTEST_XDIST_TESTRUNUID")
    try:
        import fcntl
    except ImportError:  # not POSIX: every worker makes its own
        run = None
    if run is None:
        yield Share(None)
        return
    nodeid = request.node.nodeid.partition("[")[0]
    name = hashlib.sha256(f"{run} {nodeid}".encode()).hexdigest()[:16]
    # Each worker has a folder of its own in the one of the run.
    folder = request.getfixturevalue("tmp_path_factory").getbasetemp().parent
    with (folder / f"bnverify-{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield Share(folder / f"bnverify-{name}.report")
