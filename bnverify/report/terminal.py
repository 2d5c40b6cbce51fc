"""A report as text for a terminal of 80 columns; colour only repeats signs and words."""

from __future__ import annotations

import io
import os
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, TextIO, get_args

from rich.console import Console
from rich.table import Table
from rich.text import Text

from bnverify.evidence import READ_ONLY, Status
from bnverify.laws import FAMILIES, LAWS
from bnverify.report.findings import Group, groups
from bnverify.report.matrix import legend, matrix, scope
from bnverify.report.symbols import STYLES, Symbols, in_ascii, symbols

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bnverify.evidence import Evidence, Report

QUIET, NORMAL, VERBOSE = -1, 0, 1
"""Verbosity: the verdict; also families and violations; also every law."""

ALIKE = 3
"""Up to this many untriggered laws of a family with one reason are listed; more are counted."""

NAMED = 6
"""Up to this many laws that no case exercised are named below the families."""

IN_FULL = 3
"""Up to this many violations with one cause are shown in full; of the rest, only the names."""


def render(report: Report, stream: TextIO | None = None, verbosity: int = NORMAL) -> str:
    """Return ``report`` as text for a stream, with its width, colours and encoding.

    Args:
        report: what to print.
        stream: the destination; None: a file, 80 columns wide.
        verbosity: ``QUIET``, ``NORMAL`` or ``VERBOSE``.
    """
    return Screen(stream).report(report, verbosity)


def count(number: int) -> str:
    """Return a count in at most five characters: 1,034, 12k, 3.1M."""
    if number < 10_000:
        return f"{number:,}"
    if number < 1_000_000:
        return f"{number // 1000}k"
    return f"{number / 1e6:.1f}M"


class Screen:
    """Renders reports for one stream.

    Args:
        stream: the destination; None: a file.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._out = io.StringIO()
        # Through memory, because rich would swallow the error of a closed pipe. Without
        # highlighting, because only statuses are coloured.
        self._console = Console(
            file=self._out,
            force_terminal=stream.isatty() if stream is not None else False,
            width=None if stream is not None else 80,
            highlight=False,
            markup=False,
            emoji=False,
        )
        encoding = getattr(stream, "encoding", None) or "utf-8"
        self._symbols: Symbols = symbols(encoding)

    def report(self, report: Report, verbosity: int) -> str:
        """Return the verdict, then the families or laws, then the violations."""
        self._verdict(report, verbosity)
        if verbosity > QUIET:
            self._print()
            self._families(report) if verbosity < VERBOSE else self._laws(report)
            if report.influence and (verbosity >= VERBOSE or _flows_matter(report)):
                self._influence(report)
            for group in groups(report):
                self._violations(group)
            for note in report.notes:
                self._print()
                self._print(f"note: {note}")
        text = self._out.getvalue()
        return text if self._symbols.unicode else in_ascii(text)

    def _print(self, text: str | Text = "", *, style: str = "", indent: int = 0) -> None:
        whole = Text(text, style) if isinstance(text, str) else text
        for line in whole.wrap(self._console, self._console.width - indent) or [Text()]:
            line.rstrip()
            self._console.print(Text(" " * indent) + line)

    def _verdict(self, report: Report, verbosity: int) -> None:
        unreached = any(evidence.status == "untriggered" for evidence in report.results)
        style = "bold yellow" if unreached else "bold green"
        style = style if report.ok else "bold red"
        self._print(f"{report.subject}: {report.verdict}", style=style)
        if verbosity <= QUIET:
            return
        group = next((each for each in groups(report) if each.cause is not None), None)
        if group is not None and group.cause is not None:
            explained, total = len(group.violations), len(report.violated)
            explains = f" (explains {explained} of {total} violations)" if total > 1 else ""
            self._print(f"Most likely cause{explains}: {group.cause.mistake}")
        self._print(report.counts)
        self._print(f"profile {report.profile}, seed {report.seed}", style="dim")
        if verbosity >= VERBOSE:
            versions = (f"{name} {version}" for name, version in report.versions.items())
            self._print(", ".join(versions), style="dim")

    def _families(self, report: Report) -> None:
        """Print a line for each family: the sign of its worst status, and the counts."""
        width = max(map(len, FAMILIES))
        for family in FAMILIES:
            seen = Counter(each.status for each in report.results if each.family == family)
            if not seen:
                continue
            worst = next(status for status in _BY_WEIGHT if seen[status])
            line = Text.assemble(
                (f" {self._symbols.status[worst]} ", STYLES[worst]), f"{family:<{width}}  "
            )
            line.append(_counts(seen))
            self._print(line)
        unreached = [each.law for each in report.results if each.status == "untriggered"]
        if 0 < len(unreached) <= NAMED:
            self._print(f"not reached (-v shows why): {', '.join(unreached)}", indent=3)

    def _laws(self, report: Report) -> None:
        for family in FAMILIES:
            results = [evidence for evidence in report.results if evidence.family == family]
            if not results:
                continue
            self._print(family, style="bold")
            shared = Counter(each.reason for each in results if each.status == "untriggered")
            for evidence in results:
                if evidence.status != "untriggered" or shared[evidence.reason] <= ALIKE:
                    self._law(evidence)
            for reason, number in shared.items():
                if number > ALIKE:
                    sign = f" {self._symbols.status['untriggered']} {'untriggered':<12}"
                    line = Text.assemble((sign, STYLES["untriggered"]), f"{number} laws: {reason}")
                    self._print(line)
            self._print()
        seen = {evidence.status for evidence in report.results}
        for status in (status for status in get_args(Status) if status in seen):
            sign = self._symbols.status[status]
            self._print(f" {sign} {status:<12}{_MEANING[status]}", style="dim")

    def _law(self, evidence: Evidence) -> None:
        """Print a law; what its status is based on goes beside it if that fits, else below."""
        style = STYLES[evidence.status]
        sign = self._symbols.status[evidence.status]
        line = Text.assemble((f" {sign} {evidence.status:<12}", style), evidence.law)
        basis = _basis(evidence)
        room = self._console.width - line.cell_len - 2
        if basis and len(basis) <= room:
            line.append(f"{basis:>{room + 1}}", "dim")
            basis = ""
        self._print(line)
        if basis:
            self._print(basis, style="dim", indent=15)

    def _influence(self, report: Report) -> None:
        held, violated, unjudged = (
            [evidence.law for evidence in report.results if evidence.status == status]
            for status in ("held", "violated", "untriggered")
        )
        flows = report.influence.get("leaves") or report.influence["matrix"]
        entries = matrix(flows, held, violated, unjudged)
        signs = self._symbols.flow
        self._print()
        self._print("what depends on what", style="bold")
        self._print(scope(report.influence), style="dim", indent=1)
        table = Table(box=None, padding=(0, 1), header_style="")
        table.add_column("")
        for source in entries.inputs:
            table.add_column(source, justify="center")
        for output, kinds in entries.rows.items():
            table.add_row(output, *(Text(signs[kind], _flow_style(kind)) for kind in kinds))
        self._console.print(table)
        for line in legend(entries.kinds(), signs):
            self._print(line, style="dim", indent=1)

    def _violations(self, group: Group) -> None:
        """Print the violations with one cause: the cause once, then each law, then one script."""
        sign, rule = self._symbols.status["violated"], self._symbols.rule
        self._print()
        title = f"{rule * 2} {sign} {group.title} "
        self._print(title.ljust(self._console.width, rule), style="bold red")
        for evidence in group.violations[:IN_FULL]:
            self._violation(evidence, named=len(group.violations) > 1)
        if others := group.violations[IN_FULL:]:
            self._print(f"Also violated: {', '.join(each.law for each in others)}")
        if group.cause is not None:
            self._print()
            self._print(f"Likely cause: {group.cause.statement}.")
            self._print(Text.assemble(("Fix: ", "bold"), f"{group.cause.known.fix}."))
            if group.cause.known.source:
                self._print(f"Seen at {group.cause.known.source}", style="dim")
        if group.shown is not None:
            self._print()
            self._print(f"To reproduce{group.which}:")
            self._print()
            # Not wrapped or indented, so that it can be pasted and run.
            self._console.print(Text(group.shown.script.rstrip()), soft_wrap=True)

    def _violation(self, evidence: Evidence, *, named: bool) -> None:
        indent = 2 if named else 0
        if named:
            self._print(evidence.law, style="bold")
        if evidence.law in LAWS:
            self._print(LAWS[evidence.law].claim, indent=indent)
        extent = f", {evidence.extent}" if evidence.extent else ""
        self._print(f"{evidence.reason}{extent}", style="red", indent=indent)
        if evidence.line:
            self._print(f"at {near(evidence.line)}", indent=indent)
        if evidence.further:
            self._print(evidence.further, style="dim", indent=indent)


_MEANING: dict[Status, str] = {
    "proved": "for all values, from the traced step",
    "held": "in all cases run; worst: the largest error, in units of the tolerance",
    "violated": "in at least one case",
    "untriggered": "not exercised by any case, so not a pass",
    "exempt": "does not apply to this step",
}

_BY_WEIGHT: Sequence[Status] = ("violated", "untriggered", "held", "proved", "exempt")


def _counts(seen: Counter[Status]) -> str:
    return ", ".join(f"{seen[status]} {status}" for status in get_args(Status) if seen[status])


def _flows_matter(report: Report) -> bool:
    """Return whether the influence matrix explains a violation, or is the only result."""
    read_only = any(each.reason == READ_ONLY for each in report.results)
    asked = "leaves" in report.influence
    broken = [LAWS[each.law] for each in report.violated if each.law in LAWS]
    wrong = {"leaks", "missing"} & set(matrix(report.influence["matrix"]).kinds())
    return (
        read_only
        or asked
        or bool(wrong and any(law.must_not_reach or law.must_reach for law in broken))
    )


def near(line: str) -> str:
    """Return ``path:line`` with the path relative to the working directory if it is inside it."""
    path, _, number = line.rpartition(":")
    here = Path.cwd()
    return f"{os.path.relpath(path)}:{number}" if here in Path(path).parents else line


def _basis(evidence: Evidence) -> str:
    if evidence.status != "held":
        return evidence.reason
    text = f"{count(evidence.cases)} case{'s' if evidence.cases > 1 else ''}"
    if evidence.residual and evidence.residual >= 0.005:  # smaller ones would print as 0.00
        text += f", worst {evidence.residual:.2f}"
    return text


def _flow_style(kind: str) -> str:
    styles = {"leaks": "bold red", "missing": "bold red", "kept out": "green", "shown": "green"}
    return styles.get(kind, "")
