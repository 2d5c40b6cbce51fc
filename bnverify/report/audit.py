"""What a user's own tests miss, as text."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, TextIO

from rich.console import Console
from rich.text import Text

from bnverify.mistakes import MISTAKES
from bnverify.report.symbols import in_ascii, symbols

if TYPE_CHECKING:
    from bnverify.audit.run import Audit, Finding, Verdict

VERDICTS: dict[Verdict, str] = {"noticed": "green", "missed": "bold red", "not reached": "yellow"}


def progress(total: int) -> Callable[[Finding], None]:
    """Return a listener that tells on standard error of each run of the tests."""
    done = iter(range(1, total + 1))

    def listener(finding: Finding) -> None:
        told = f"{next(done)}/{total} {finding.fault}: {finding.verdict}"
        print(told, file=sys.stderr, flush=True)

    return listener


def render(audit: Audit, stream: TextIO | None = None, verbosity: int = 0) -> str:
    """Return the summary, what was noticed and what was missed, and how to fix what was missed.

    Args:
        audit: what was found.
        stream: where it is to go; None: a file.
        verbosity: -1: the summary alone.
    """
    told = io.StringIO()
    # What a closed pipe raises must reach the command line, so rich writes to memory.
    console = Console(
        file=told,
        force_terminal=stream.isatty() if stream is not None else False,
        width=None if stream is not None else 100,
        highlight=False,
        markup=False,
        emoji=False,
    )
    sign = symbols(getattr(stream, "encoding", None) or "utf-8")
    console.print(Text(summary(audit), "bold"))
    if verbosity >= 0:
        console.print()
        _findings(console, audit)
    return told.getvalue() if sign.unicode else in_ascii(told.getvalue())


def summary(audit: Audit) -> str:
    """Return the counts in one line."""
    counts = ", ".join(f"{len(audit.of(verdict))} {verdict}" for verdict in VERDICTS)
    return f"{counts}; one run takes {audit.seconds:.1f} s"


def _findings(console: Console, audit: Audit) -> None:
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
