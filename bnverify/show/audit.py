"""An audit in a terminal: the matrix of faults and laws, and what was missed, readable plain."""

from __future__ import annotations

import statistics
import sys
import textwrap
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, TextIO

from rich.console import Console
from rich.text import Text

from bnverify.mistakes import MISTAKES
from bnverify.show.symbols import symbols

if TYPE_CHECKING:
    from bnverify.mutants.audit import Audit, Finding
    from bnverify.mutants.users_tests import TestsAudit, TestsFinding

NAME = 50  # columns for a fault's name
VERDICTS = {"noticed": "green", "missed": "bold red", "not reached": "yellow"}


def progress(total: int) -> Callable[[Finding], None] | None:
    """Return a listener that tells on standard error of each finding; None where nobody looks."""
    if not sys.stderr.isatty():
        return None
    done = iter(range(1, total + 1))

    def listener(finding: Finding) -> None:
        what = "killed" if finding.killed else "survives"
        print(f"{next(done)}/{total} {finding.mutant}: {what}", file=sys.stderr)

    return listener


def tests_progress(total: int) -> Callable[[TestsFinding], None] | None:
    """Return a listener that tells on standard error of each run of the tests."""
    if not sys.stderr.isatty():
        return None
    done = iter(range(1, total + 1))

    def listener(finding: TestsFinding) -> None:
        print(f"{next(done)}/{total} {finding.fault}: {finding.verdict}", file=sys.stderr)

    return listener


def show(audit: Audit, file: TextIO | None = None) -> None:
    """Print the matrix, what each law alone kills, the survivors and the summary."""
    console = Console(file=file or sys.stdout, highlight=False, markup=False, emoji=False)
    laws = killers(audit)
    sign = symbols(console.encoding)
    console.print(Text("faults and the laws that notice them", "bold"))
    for line in matrix(audit, laws, hit=sign.flow["may"], miss=sign.flow["cannot"]):
        console.print(Text(line), soft_wrap=True)
    console.print()
    alone = audit.alone()
    for number, law in enumerate(laws, 1):
        kills = sum(law in finding.laws for finding in audit.findings)
        only = f", alone {len(alone[law])}" if law in alone else ""
        console.print(Text(f" {number:>2} {law}: {kills}{only}"), soft_wrap=True)
    for law, names in alone.items():
        console.print()
        text = f"{law} alone kills: {', '.join(names)}"
        console.print(Text("\n".join(textwrap.wrap(text, console.width - 1))))
    console.print()
    _survivors(console, audit)
    console.print(Text(summary(audit), "bold"))


def killers(audit: Audit) -> list[str]:
    """Return the laws that notice any fault, those that notice most first."""
    kills: dict[str, int] = {}
    for finding in audit.findings:
        for law in finding.laws:
            kills[law] = kills.get(law, 0) + 1
    return sorted(kills, key=lambda law: (-kills[law], law))


def matrix(audit: Audit, laws: list[str], *, hit: str, miss: str) -> Iterator[str]:
    """Yield the lines of the matrix: a column for each law, its number written downwards."""
    numbers = [f"{number:>2}" for number in range(1, len(laws) + 1)]
    for digit in range(2):
        yield " " * (NAME + 2) + "".join(number[digit] for number in numbers).rstrip()
    family = ""
    for finding in sorted(audit.findings, key=lambda each: each.family):
        if finding.family != family:
            family = finding.family
            yield family
        cells = "".join(hit if law in finding.laws else miss for law in laws)
        if finding.refusal:
            cells = f"refused: {finding.refusal}"[:60]
        elif not finding.laws:
            cells = "survives"
        size = "" if finding.shape is None else f" {finding.shape[0]}x{finding.shape[1]}"
        yield f"  {finding.mutant[:NAME]:<{NAME}}{cells}{size} {finding.seconds:.1f}s"


def _survivors(console: Console, audit: Audit) -> None:
    for finding in audit.survivors:
        failed = f"the check itself failed: {finding.failure}" if finding.failure else ""
        reason = finding.survives or failed or "a gap: no law notices it"
        console.print(Text(f"survives: {finding.mutant}: {reason}"), soft_wrap=True)
    for fault, laws in audit.lost.items():
        console.print(Text(f"lost: {fault} is no longer noticed by {', '.join(laws)}"))
    if audit.survivors or audit.lost:
        console.print()


def summary(audit: Audit) -> str:
    """Return the counts in one line."""
    total, lost = len(audit.findings), len(audit.survivors)
    seconds = statistics.median(finding.seconds for finding in audit.findings)
    named = sum(finding.diagnosed for finding in audit.findings)
    return (
        f"{total - lost} of {total} faults killed, {lost} survive, {len(audit.unexplained)} of "
        f"them unexplained; {named} named by their mistake; median {seconds:.1f} s"
    )


def show_tests(audit: TestsAudit, file: TextIO | None = None) -> None:
    """Print what a user's tests notice, and of what they miss what was wrong and how to see it."""
    console = Console(file=file or sys.stdout, highlight=False, markup=False, emoji=False)
    console.print(Text(f"{audit.command}, faults in {', '.join(audit.targets)}", "bold"))
    for finding in audit.findings:
        line = Text(f" {finding.verdict:<12}", VERDICTS[finding.verdict]) + Text(finding.fault)
        console.print(line)
    missed = audit.of("missed")
    if missed:
        console.print()
        console.print(Text("These tests would miss:", "bold red"))
    for finding in missed:
        mistake = MISTAKES[finding.mistake]
        console.print(Text(f"  {finding.fault}: {finding.sentence}"), soft_wrap=True)
        console.print(Text(f"    Fix: {mistake.fix}.", "dim"), soft_wrap=True)
    console.print()
    counts = ", ".join(f"{len(audit.of(verdict))} {verdict}" for verdict in VERDICTS)  # type: ignore[arg-type]  # the keys are the verdicts
    console.print(Text(f"{counts}; one run takes {audit.seconds:.1f} s", "bold"))
