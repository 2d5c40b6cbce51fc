"""The report of an audit on a terminal: which faults a user's own tests notice and miss."""

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
    """Return a listener that prints each run of the tests to stderr; the first has no fault."""
    print("running the tests without a fault first", file=sys.stderr, flush=True)
    done = iter(range(1, total + 1))

    def listener(finding: Finding) -> None:
        line = f"{next(done)}/{total} {finding.fault}: {finding.verdict}"
        print(line, file=sys.stderr, flush=True)

    return listener


def render(audit: Audit, stream: TextIO | None = None, verbosity: int = 0) -> str:
    """Return the summary, which faults were noticed and missed, and the fixes of those missed.

    Args:
        audit: of a user's own tests.
        stream: the destination, for its width and encoding; None: a file.
        verbosity: -1: the summary only; 1: also what the tests last printed where they did not fail.
    """
    out = io.StringIO()
    # Through memory, because rich would swallow the error of a closed pipe.
    console = Console(
        file=out,
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
        _findings(console, audit, verbosity)
    return out.getvalue() if sign.unicode else in_ascii(out.getvalue())


def summary(audit: Audit) -> str:
    """Return the counts as one line."""
    counts = ", ".join(f"{len(audit.of(verdict))} {verdict}" for verdict in VERDICTS)
    return f"{counts}; one run takes {audit.seconds:.1f} s"


def _findings(console: Console, audit: Audit, verbosity: int) -> None:
    console.print(Text(f"{audit.command}, faults in {', '.join(audit.targets)}", "bold"))
    for finding in audit.findings:
        line = Text(f" {finding.verdict:<12}", VERDICTS[finding.verdict]) + Text(finding.fault)
        console.print(line + Text(f": {finding.ended}" if finding.ended else ""))
        if finding.printed and (finding.ended or verbosity > 0):
            lines = finding.printed.splitlines()
            console.print(Text("\n".join(f"    | {each}" for each in lines), "dim"), soft_wrap=True)
    missed = audit.of("missed")
    if missed:
        console.print()
        console.print(Text("These tests would miss:", "bold red"))
    for finding in missed:
        mistake = MISTAKES[finding.mistake]
        console.print(Text(f"  {finding.fault}: {finding.sentence}"), soft_wrap=True)
        console.print(Text(f"    Fix: {mistake.fix}.", "dim"), soft_wrap=True)
