"""Run a user's tests once for each fault in the user's own step, and tell which faults they miss."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import bnverify
from bnverify.errors import UsageError
from bnverify.mutants.substitution import STARTUP, VARIABLE, Order
from bnverify.mutants.transplant import TRANSPLANTS, Transplant

Verdict = Literal["noticed", "missed", "not reached"]


@dataclass(frozen=True)
class TestsFinding:
    """What a user's tests say about one fault.

    Attributes:
        fault: its name.
        mistake: a name in ``bnverify.mistakes``.
        sentence: what is wrong, in one sentence.
        verdict: "noticed": the tests fail; "missed": they pass; "not reached": they never run
            what the fault would change.
        seconds: how long the tests took.
    """

    fault: str
    mistake: str
    sentence: str
    verdict: Verdict
    seconds: float


@dataclass(frozen=True)
class TestsAudit:
    """What a user's tests say about all the faults.

    Attributes:
        command: the tests.
        targets: where the faults were put.
        seconds: how long the tests take without a fault.
        findings: one for each fault.
    """

    command: str
    targets: tuple[str, ...]
    seconds: float
    findings: tuple[TestsFinding, ...]

    def of(self, verdict: Verdict) -> list[TestsFinding]:
        """Return the findings of one verdict."""
        return [finding for finding in self.findings if finding.verdict == verdict]

    def to_json(self) -> str:
        """Return the findings as JSON text."""
        return json.dumps(asdict(self), indent=2) + "\n"


def audit_tests(
    command: str,
    targets: Sequence[str],
    faults: Iterable[Transplant] = tuple(TRANSPLANTS.values()),
    *,
    listener: Callable[[TestsFinding], None] | None = None,
) -> TestsAudit:
    """Run ``command`` once as it is, then once for each fault.

    Args:
        command: as typed in a terminal; no shell reads it.
        targets: each ``module:name`` or ``path/file.py:name``: a Subject, a function that makes
            one, a training step or an evaluation.
        faults: what is to be wrong, one at a time.
        listener: told of each finding.

    Raises:
        UsageError: the tests fail, or never import a target, without any fault.
    """
    words = shlex.split(command)
    with tempfile.TemporaryDirectory(prefix="bnverify-") as folder:
        mark = Path(folder) / "mark"
        printed = Path(folder) / "printed"
        done, seconds = _run(words, Order(tuple(targets), "", str(mark)), None, printed)
        if done != 0:
            last = "\n".join(_lines(printed)[-20:])
            raise UsageError(
                f"the tests fail without any fault: {command} ended with {done}; it printed\n{last}"
            )
        seen = _lines(mark)
        for target in targets:
            if f"imported {target}" not in seen:
                raise UsageError(f"the tests never import {target}")
        findings = []
        for fault in faults:
            mark.unlink(missing_ok=True)
            order = Order(tuple(targets), fault.name, str(mark))
            status, took = _run(words, order, 60 + 10 * seconds)
            reached = "touched" in _lines(mark)
            verdict: Verdict = "not reached" if not reached else "noticed" if status else "missed"
            finding = TestsFinding(fault.name, fault.mistake, fault.sentence, verdict, took)
            findings.append(finding)
            if listener is not None:
                listener(finding)
    return TestsAudit(command, tuple(targets), seconds, tuple(findings))


def _run(
    words: Sequence[str], order: Order, limit: float | None, printed: Path | None = None
) -> tuple[int, float]:
    started = time.perf_counter()
    try:
        with Path(printed or os.devnull).open("wb") as out:
            done = subprocess.run(  # noqa: S603 - the user's own command
                words,
                env=environment(order),
                stdout=out,
                stderr=subprocess.STDOUT,
                timeout=limit,
                check=False,
            )
        status = done.returncode
    except FileNotFoundError:
        raise UsageError(f"no command {words[0]!r} is found") from None
    except subprocess.TimeoutExpired:
        status = 124  # as timeout(1) reports it: a fault that makes the tests hang is noticed
    return status, time.perf_counter() - started


def environment(order: Order) -> dict[str, str]:
    """Return this process's environment with the substitution in it."""
    scratch = Path(order.mark).parent
    path = [str(STARTUP)]
    home = Path(bnverify.__file__).parents[1]
    if "site-packages" not in home.parts:  # run from a source tree, which the tests need not know
        path.append(str(home))
    path += [os.environ["PYTHONPATH"]] if os.environ.get("PYTHONPATH") else []
    # The substitution imports bnverify before pytest can rewrite its asserts; it has none. Where a
    # project makes warnings errors, that warning would end every run.
    quiet = (
        "ignore:Module already imported so cannot be rewritten:pytest.PytestAssertRewriteWarning"
    )
    options = [
        os.environ.get("PYTEST_ADDOPTS", ""),
        f"-o cache_dir={scratch}/pytest",
        f"-W '{quiet}'",
    ]
    programs = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))
    return {
        **os.environ,
        VARIABLE: order.dump(),
        "PYTHONPATH": os.pathsep.join(path),
        "PATH": programs,  # `pytest` is this interpreter's
        # What tools remember of these runs is none of the user's.
        "PYTHONDONTWRITEBYTECODE": "1",
        "HYPOTHESIS_STORAGE_DIRECTORY": str(scratch / "hypothesis"),
        "PYTEST_ADDOPTS": " ".join(options),
    }


def _lines(mark: Path) -> list[str]:
    return mark.read_text(encoding="utf-8", errors="replace").splitlines() if mark.exists() else []
