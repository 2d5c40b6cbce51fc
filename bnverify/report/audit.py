"""An audit on a terminal and as a picture: the matrix of faults and laws, and the survivors."""

from __future__ import annotations

import io
import statistics
import sys
import textwrap
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, TextIO
from xml.sax.saxutils import escape

from rich.console import Console
from rich.text import Text

from bnverify.mistakes import MISTAKES
from bnverify.report.symbols import in_ascii, symbols

if TYPE_CHECKING:
    from bnverify.mutants.audit import Audit, Finding
    from bnverify.mutants.users_tests import TestsAudit, TestsFinding, Verdict
    from bnverify.report.symbols import Symbols

NAME = 50  # columns for a fault's name
VERDICTS: dict[Verdict, str] = {"noticed": "green", "missed": "bold red", "not reached": "yellow"}


def progress(total: int) -> Callable[[Finding], None]:
    """Return a listener that prints each finding to stderr."""
    done = iter(range(1, total + 1))

    def listener(finding: Finding) -> None:
        what = "noticed" if finding.killed else "missed"
        print(f"{next(done)}/{total} {finding.mutant}: {what}", file=sys.stderr, flush=True)

    return listener


def tests_progress(total: int) -> Callable[[TestsFinding], None]:
    """Return a listener that prints each run of the tests to stderr."""
    done = iter(range(1, total + 1))

    def listener(finding: TestsFinding) -> None:
        line = f"{next(done)}/{total} {finding.fault}: {finding.verdict}"
        print(line, file=sys.stderr, flush=True)

    return listener


def show(audit: Audit | TestsAudit, file: TextIO | None = None) -> None:
    """Print an audit to ``file`` or stdout; see :func:`render`."""
    out = file or sys.stdout
    out.write(render(audit, out))


def render(audit: Audit | TestsAudit, stream: TextIO | None = None, verbosity: int = 0) -> str:
    """Return the summary, and which faults were noticed and missed.

    Args:
        audit: of the laws, or of a user's own tests.
        stream: the destination, for its width and encoding; None: a file.
        verbosity: -1: the summary only.
    """
    from bnverify.mutants.audit import Audit

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
    text = summary(audit) if isinstance(audit, Audit) else tests_summary(audit)
    console.print(Text(text, "bold"))
    if verbosity >= 0:
        console.print()
        if isinstance(audit, Audit):
            _faults(console, audit, sign)
        else:
            _tests(console, audit)
    return out.getvalue() if sign.unicode else in_ascii(out.getvalue())


def _faults(console: Console, audit: Audit, sign: Symbols) -> None:
    """Print the matrix, the faults that only one law notices, and the survivors."""
    laws = killers(audit)
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
    _survivors(console, audit)


def killers(audit: Audit) -> list[str]:
    """Return the laws that notice any fault, most faults first."""
    kills: dict[str, int] = {}
    for finding in audit.findings:
        for law in finding.laws:
            kills[law] = kills.get(law, 0) + 1
    return sorted(kills, key=lambda law: (-kills[law], law))


def matrix(audit: Audit, laws: list[str], *, hit: str, miss: str) -> Iterator[str]:
    """Yield the lines of the matrix: one column per law, headed by its number, vertically."""
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
    if audit.survivors or audit.lost:
        console.print()
    for finding in audit.survivors:
        text = f"survives: {finding.mutant}: {reason_of(finding)}"
        console.print(Text(text), soft_wrap=True)
    for fault, laws in audit.lost.items():
        console.print(Text(f"lost: {fault} is no longer noticed by {', '.join(laws)}"))


def reason_of(finding: Finding) -> str:
    """Return why no law notices the fault."""
    failed = f"the check itself failed: {finding.failure}" if finding.failure else ""
    return finding.survives or failed or "unexplained: no law notices it"


def summary(audit: Audit) -> str:
    """Return the counts as one line."""
    total, lost = len(audit.findings), len(audit.survivors)
    seconds = statistics.median(finding.seconds for finding in audit.findings)
    named = sum(finding.diagnosed for finding in audit.findings)
    return (
        f"{total - lost} of {total} faults killed, {lost} survive, {len(audit.unexplained)} of "
        f"them unexplained; {named} named by their mistake; median {seconds:.1f} s"
    )


def tests_summary(audit: TestsAudit) -> str:
    """Return the counts as one line."""
    counts = ", ".join(f"{len(audit.of(verdict))} {verdict}" for verdict in VERDICTS)
    return f"{counts}; one run takes {audit.seconds:.1f} s"


def _tests(console: Console, audit: TestsAudit) -> None:
    """Print which faults a user's tests notice, and the meaning and fix of those they miss."""
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


# The matrix as a picture: self-contained SVG.

CELL = 9
LEFT, TOP = 320, 300
INK, HIT, ALONE, MISS, GAP = "#222222", "#3b6ea8", "#c2410c", "#eef1f5", "#b91c1c"


def draw(audit: Audit) -> str:
    """Return the matrix as SVG: a row for each fault, a column for each law that notices any.

    A square is filled if the law notices the fault, and crossed if no other law does. The row of a
    survivor is struck through. Colours only repeat what the shapes say.
    """
    laws = killers(audit)
    rows = sorted(audit.findings, key=lambda finding: (finding.family, -len(finding.laws)))
    width, height = LEFT + CELL * len(laws) + 20, TOP + CELL * len(rows) + 40
    parts = [
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
            f'viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="8" '
            f'fill="{INK}">'
        ),
        f"<title>{escape(summary(audit))}</title>",
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        f'<text x="10" y="20" font-size="12">{escape(summary(audit))}</text>',
    ]
    for column, law in enumerate(laws):
        x = LEFT + CELL * column + CELL - 2
        parts.append(f'<text transform="translate({x},{TOP - 4}) rotate(-90)">{escape(law)}</text>')
    for row, finding in enumerate(rows):
        y = TOP + CELL * row
        parts.append(
            f'<text x="{LEFT - 6}" y="{y + CELL - 2}" text-anchor="end">'
            f"{escape(finding.mutant)}</text>"
        )
        parts += [
            _cell(LEFT + CELL * column, y, hit=law in finding.laws, alone=len(finding.laws) == 1)
            for column, law in enumerate(laws)
        ]
        if not finding.killed:
            middle = y + CELL / 2
            parts.append(
                f'<line x1="{LEFT}" y1="{middle}" x2="{LEFT + CELL * len(laws)}" y2="{middle}" '
                f'stroke="{GAP}"/>'
            )
    return "\n".join([*parts, "</svg>"]) + "\n"


def _cell(x: int, y: int, *, hit: bool, alone: bool) -> str:
    fill = (ALONE if alone else HIT) if hit else MISS
    square = f'<rect x="{x}" y="{y}" width="{CELL - 1}" height="{CELL - 1}" fill="{fill}"/>'
    if not (hit and alone):
        return square
    end = CELL - 2
    return (
        f'{square}<path d="M{x + 1} {y + 1} L{x + end} {y + end} M{x + end} {y + 1} '
        f'L{x + 1} {y + end}" stroke="#ffffff"/>'
    )
