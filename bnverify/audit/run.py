"""Run a user's tests once for each fault in the user's own step, and report which faults they miss.

No file is changed. The tests run with a finder on ``sys.meta_path`` that imports the target's module as
usual; before the import returns, the target's name is bound to a faulty version. Every import of it, under
any name, gets that version.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
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
from types import ModuleType
from typing import Any, Literal

import bnverify
from bnverify.audit.faults import FAULTS, Fault, faulty
from bnverify.errors import UsageError

VARIABLE = "BNVERIFY_AUDIT"
STARTUP = Path(__file__).parent / "startup"


@dataclass(frozen=True)
class Order:
    """What a process must substitute.

    Attributes:
        targets: each ``module:name`` or ``path/file.py:name``.
        fault: a name in FAULTS; empty: only record which targets are imported.
        mark: a file to append to: "imported TARGET", "touched".
    """

    targets: tuple[str, ...]
    fault: str
    mark: str

    def dump(self) -> str:
        """Return the order as the text of the environment variable."""
        return json.dumps([self.targets, self.fault, self.mark])

    @classmethod
    def load(cls, text: str) -> Order:
        """Return the order written by ``dump``."""
        targets, fault, mark = json.loads(text)
        return cls(tuple(targets), fault, mark)

    def note(self, line: str) -> None:
        """Append a line to the mark."""
        with Path(self.mark).open("a", encoding="utf-8") as file:
            file.write(line + "\n")


# In the process of the command.

TOO_LATE = 124
"""The exit status of tests that a fault makes hang, as timeout(1) reports it: they notice the fault."""

FAILED = 1
"""The exit status of tests that fail, as pytest's; another one may have another reason."""

LAST = 20
"""How many of the last printed lines are kept."""

Verdict = Literal["noticed", "missed", "not reached"]


@dataclass(frozen=True)
class Finding:
    """What the user's tests do with one fault.

    Attributes:
        fault: its name.
        mistake: a name in ``bnverify.mistakes``.
        sentence: what is wrong, in one sentence.
        verdict: "noticed": the tests fail; "missed": they pass; "not reached": they never run
            the code that the fault would change.
        seconds: how long the tests took.
        status: their exit status; 124 if they were stopped, negative if a signal ended them.
        printed: the last lines that they printed; empty if they failed as expected.
    """

    fault: str
    mistake: str
    sentence: str
    verdict: Verdict
    seconds: float
    status: int = 0
    printed: str = ""

    @property
    def ended(self) -> str:
        """How the tests ended, in words, if that tells more than the verdict; else ""."""
        if self.status in ({0, 1} if self.verdict == "noticed" else {0}):
            return ""
        if self.status == TOO_LATE:
            return "they took too long and were stopped"
        if self.status < 0:
            return f"signal {-self.status} ended them"
        return f"they ended with exit status {self.status}"


@dataclass(frozen=True)
class Audit:
    """What the user's tests do with all faults.

    Attributes:
        command: the command that runs the tests.
        targets: where the faults were inserted.
        seconds: how long the tests take without a fault.
        findings: one for each fault.
    """

    command: str
    targets: tuple[str, ...]
    seconds: float
    findings: tuple[Finding, ...]

    def of(self, verdict: Verdict) -> list[Finding]:
        """Return the findings with a verdict."""
        return [finding for finding in self.findings if finding.verdict == verdict]

    def to_json(self) -> str:
        """Return the findings as JSON text."""
        return json.dumps(asdict(self), indent=2) + "\n"


def audit(
    command: str,
    targets: Sequence[str],
    faults: Iterable[Fault] = tuple(FAULTS.values()),
    *,
    listener: Callable[[Finding], None] | None = None,
) -> Audit:
    """Run ``command`` once as it is, then once for each fault.

    Args:
        command: as typed in a terminal; it is not run by a shell.
        targets: each ``module:name`` or ``path/file.py:name``: a Subject, a function that returns
            one, a training step or an evaluation.
        faults: the faults, inserted one at a time.
        listener: called with each finding.

    Raises:
        UsageError: without a fault, the tests fail or never import a target.
    """
    words = shlex.split(command)
    with tempfile.TemporaryDirectory(prefix="bnverify-") as folder:
        mark = Path(folder) / "mark"
        printed = Path(folder) / "printed"
        done, seconds = _run(words, Order(tuple(targets), "", str(mark)), printed)
        if done != 0:
            raise UsageError(
                f"the tests fail without any fault: {command} ended with {done}; it printed\n"
                f"{_last(printed)}"
            )
        seen = _lines(mark)
        for target in targets:
            if f"imported {target}" not in seen:
                raise UsageError(f"the tests never import {target}")
        findings = []
        for fault in faults:
            mark.unlink(missing_ok=True)
            order = Order(tuple(targets), fault.name, str(mark))
            status, took = _run(words, order, printed, 60 + 10 * seconds)
            reached = "touched" in _lines(mark)
            verdict: Verdict = "not reached" if not reached else "noticed" if status else "missed"
            last = "" if verdict == "noticed" and status == FAILED else _last(printed)
            finding = Finding(
                fault.name, fault.mistake, fault.sentence, verdict, took, status, last
            )
            findings.append(finding)
            if listener is not None:
                listener(finding)
    return Audit(command, tuple(targets), seconds, tuple(findings))


def _run(
    words: Sequence[str], order: Order, printed: Path, limit: float | None = None
) -> tuple[int, float]:
    """Run the tests; return their exit status and how long they took. ``printed`` gets their output."""
    started = time.perf_counter()
    try:
        with printed.open("wb") as out:
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
        raise UsageError(f"the command {words[0]!r} is not found") from None
    except subprocess.TimeoutExpired:
        status = TOO_LATE
    return status, time.perf_counter() - started


def environment(order: Order) -> dict[str, str]:
    """Return the environment variables of this process, plus those for the substitution."""
    scratch = Path(order.mark).parent
    path = [str(STARTUP)]
    home = Path(bnverify.__file__).parents[1]
    if "site-packages" not in home.parts:  # run from a source tree, which must be importable
        path.append(str(home))
    path += [os.environ["PYTHONPATH"]] if os.environ.get("PYTHONPATH") else []
    # The substitution imports bnverify before pytest can rewrite its asserts; it has none. In a
    # project that turns warnings into errors, pytest's warning would end every run.
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
        # Caches that tools write during these runs must not mix with the user's.
        "PYTHONDONTWRITEBYTECODE": "1",
        "HYPOTHESIS_STORAGE_DIRECTORY": str(scratch / "hypothesis"),
        "PYTEST_ADDOPTS": " ".join(options),
    }


def _last(printed: Path) -> str:
    return "\n".join(_lines(printed)[-LAST:])


def _lines(mark: Path) -> list[str]:
    return mark.read_text(encoding="utf-8", errors="replace").splitlines() if mark.exists() else []


# In the processes of the tests.


def install() -> None:
    """Install the finder if the environment asks for a substitution."""
    text = os.environ.get(VARIABLE)
    if text:
        sys.meta_path.insert(0, Finder(Order.load(text)))


class Finder(importlib.abc.MetaPathFinder):
    """Finds modules with the other finders, and substitutes targets in them."""

    def __init__(self, order: Order) -> None:
        self._order = order

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Return the module's own spec; its loader is wrapped if the module contains a target."""
        for finder in sys.meta_path:
            if finder is self or not hasattr(finder, "find_spec"):
                continue
            spec = finder.find_spec(fullname, path, target)
            if spec is None:
                continue
            names = [each for each in self._order.targets if _is_in(each, spec)]
            if names and spec.loader is not None:
                spec.loader = Loader(spec.loader, self._order, names)
            return spec
        return None


def _is_in(target: str, spec: importlib.machinery.ModuleSpec) -> bool:
    source, _, _ = target.rpartition(":")
    if source.endswith(".py"):
        return bool(spec.origin) and Path(str(spec.origin)).resolve() == Path(source).resolve()
    return source == spec.name


class Loader(importlib.abc.Loader):
    """Executes a module with its own loader, then substitutes.

    Args:
        loader: the module's own loader.
        order: what to substitute.
        targets: the targets in this module.
    """

    def __init__(self, loader: Any, order: Order, targets: Sequence[str]) -> None:
        self._loader = loader
        self._order = order
        self._targets = targets

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)  # such as get_source and get_data

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        """Create the module with its own loader."""
        made: ModuleType | None = self._loader.create_module(spec)
        return made

    def exec_module(self, module: ModuleType) -> None:
        """Execute the module and insert the fault."""
        self._loader.exec_module(module)
        for target in self._targets:
            substitute(module, target, self._order)


def substitute(module: ModuleType, target: str, order: Order) -> None:
    """Bind the name of ``target`` in ``module`` to a faulty version.

    Raises:
        ImportError: the module has no such name.
    """
    holder: Any = module
    *outer, name = target.rpartition(":")[2].split(".")
    try:
        for part in outer:
            holder = getattr(holder, part)
        value = getattr(holder, name)
    except AttributeError as error:
        raise ImportError(f"{target}: {error}") from None
    order.note(f"imported {target}")
    if order.fault:
        changed = faulty(value, FAULTS[order.fault], lambda: order.note("touched"))
        setattr(holder, name, changed)
