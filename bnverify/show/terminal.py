"""A report in a terminal: 80 columns do, colour only repeats what signs and words say."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from bnverify.laws import FAMILIES, LAWS
from bnverify.show.matrix import LEGEND, matrix, scope
from bnverify.show.symbols import STYLES, Symbols, symbols

if TYPE_CHECKING:
    from bnverify.check import Event, Listener
    from bnverify.evidence import Evidence, Report


def show(report: Report, file: TextIO | None = None) -> None:
    """Print ``report``.

    Args:
        report: what to print.
        file: where; None: standard output.
    """
    Screen(file or sys.stdout).report(report)


@contextmanager
def progress(name: str) -> Iterator[Listener | None]:
    """Show on standard error what a check is doing; nothing where that is no terminal.

    Args:
        name: of the subject.

    Yields:
        What to give to ``verify`` as its listener.
    """
    from bnverify.check import LawJudged, PhaseStarted  # loads jax, which --help does without

    console = Console(stderr=True)
    if not console.is_terminal or console.is_dumb_terminal:
        yield None
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(escape(name))

        def listener(event: Event) -> None:
            if isinstance(event, PhaseStarted):
                seen = f", {count(event.cases)} cases" if event.cases else ""
                bar.update(task, description=escape(f"{name}: {event.phase}{seen}"))
            elif isinstance(event, LawJudged) and event.evidence.status == "violated":
                bar.console.print(f"violated: {event.evidence.law}", style=STYLES["violated"])

        yield listener


def count(number: int) -> str:
    """Return a count in at most five characters: 1,034, 12k, 3.1M."""
    if number < 10_000:
        return f"{number:,}"
    if number < 1_000_000:
        return f"{number // 1000}k"
    return f"{number / 1e6:.1f}M"


class Screen:
    """A place to print reports on.

    Args:
        file: where.
    """

    def __init__(self, file: TextIO) -> None:
        # No highlighting: colours are for statuses, not for every number.
        self._console = Console(file=file, highlight=False, markup=False, emoji=False)
        self._symbols: Symbols = symbols(self._console.encoding)

    def report(self, report: Report) -> None:
        """Print everything: laws by family, influence, violations, notes, the summary."""
        self._print(f"{report.subject}, profile {report.profile}, seed {report.seed}", style="bold")
        for family in FAMILIES:
            results = [evidence for evidence in report.results if evidence.family == family]
            if not results:
                continue
            self._print()
            self._print(family, style="bold")
            for evidence in results:
                self._law(evidence)
        if report.influence:
            self._influence(report)
        for evidence in report.violated:
            self._violation(evidence)
        for note in report.notes:
            self._print()
            self._print(f"note: {note}")
        self._summary(report)

    def _print(self, text: str | Text = "", *, style: str = "", indent: int = 0) -> None:
        whole = Text(text, style) if isinstance(text, str) else text
        for line in whole.wrap(self._console, self._console.width - indent) or [Text()]:
            line.rstrip()
            self._console.print(Text(" " * indent) + line)

    def _law(self, evidence: Evidence) -> None:
        """Print one line, and what the status rests on beside it where that fits, else below."""
        style = STYLES[evidence.status]
        sign = self._symbols.status[evidence.status]
        line = Text.assemble((f" {sign} {evidence.status:<12}", style), evidence.law)
        rests_on = _rests_on(evidence)
        room = self._console.width - line.cell_len - 2
        if rests_on and len(rests_on) <= room:
            line.append(f"{rests_on:>{room + 1}}", "dim")
            rests_on = ""
        self._print(line)
        if rests_on:
            self._print(rests_on, style="dim", indent=15)

    def _influence(self, report: Report) -> None:
        held = [evidence.law for evidence in report.results if evidence.status == "held"]
        unsettled = [e.law for e in report.results if e.status in {"violated", "untriggered"}]
        flows = report.influence.get("leaves") or report.influence["matrix"]
        entries = matrix(flows, held, unsettled)
        signs = self._symbols.flow
        self._print()
        self._print("what reaches what", style="bold")
        self._print(scope(report.influence), style="dim", indent=1)
        table = Table(box=None, padding=(0, 1), header_style="")
        table.add_column("")
        for source in entries.inputs:
            table.add_column(source, justify="center")
        for output, kinds in entries.rows.items():
            table.add_row(output, *(Text(signs[kind], _flow_style(kind)) for kind in kinds))
        self._console.print(table)
        legend = "   ".join(f"{signs[kind].split()[0]} {LEGEND[kind]}" for kind in entries.kinds())
        self._print(legend, style="dim", indent=1)

    def _violation(self, evidence: Evidence) -> None:
        sign = self._symbols.status["violated"]
        self._print()
        title = f"{self._symbols.rule * 2} {sign} {evidence.law} "
        self._print(title.ljust(self._console.width, self._symbols.rule), style="bold red")
        if evidence.law in LAWS:
            self._print(LAWS[evidence.law].claim)
        self._print(evidence.reason)
        if evidence.diagnosis:
            self._print(f"Usually: {evidence.diagnosis}")
        if evidence.counterexample:
            self._print("To see it, paste into Python:")
            self._print()
            # Neither wrapped nor indented: it must still run when pasted.
            self._console.print(Text(evidence.counterexample.script.rstrip()), soft_wrap=True)

    def _summary(self, report: Report) -> None:
        suspects = Counter(
            evidence.diagnosis.split(":")[0] for evidence in report.violated if evidence.diagnosis
        )
        versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
        unreached = any(evidence.status == "untriggered" for evidence in report.results)
        style = "bold yellow" if unreached else "bold green"
        self._print()
        self._print(f"{report.subject}: {report.verdict}", style=style if report.ok else "bold red")
        self._print(report.counts)
        for mistake, times in suspects.most_common(1):
            self._print(f"likeliest mistake, by {times} of {len(report.violated)}: {mistake}")
        self._print(versions, style="dim")


def _rests_on(evidence: Evidence) -> str:
    if evidence.status != "held":
        return evidence.reason
    text = f"{count(evidence.cases)} case{'s' if evidence.cases > 1 else ''}"
    if evidence.residual and evidence.residual >= 0.005:  # or it would read 0.00
        text += f", worst {evidence.residual:.2f}"
    return text


def _flow_style(kind: str) -> str:
    styles = {"leaks": "bold red", "missing": "bold red", "kept out": "green", "shown": "green"}
    return styles.get(kind, "")
