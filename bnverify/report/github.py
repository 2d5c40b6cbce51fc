"""Reports as GitHub annotations, and as Markdown for the job summary."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from bnverify.report.findings import Finding, Findings

_SIZE = 60_000  # characters of scripts; a summary may have 1 MB


def messages(reports: Sequence[Findings]) -> str:
    """Return workflow commands, one per line: errors for failures, notices for the rest."""
    return "".join(f"{line}\n" for report in reports for line in _messages(report))


def _messages(report: Findings) -> Iterator[str]:
    for failures in report.failures:
        yield _message("error", failures)
    for finding in report.all:
        if finding.outcome != "failed" and finding.noted:
            yield _message("notice", [finding])
    level = "notice" if report.ok else "error"
    yield f"::{level} title=bnverify::{_data(f'{report.name}: {report.verdict}')}"


def _message(level: str, findings: Sequence[Finding]) -> str:
    """Return one annotation for a finding, or for several findings with one cause."""
    first, *more = findings
    title = (
        f"{first.cause}: {len(findings)} laws violated" if more else f"{first.rule} {first.leaf}"
    )
    where = f"title={_property(f'bnverify: {title}'.strip())}"
    place = next((finding.place for finding in findings if finding.place is not None), None)
    if place is not None:
        path, line = place
        where += f",file={_property(relative(path))},line={line}"
    lines = []
    for finding in findings:
        lines += [
            f"{finding.rule}: {finding.message}" if more else finding.message,
            finding.details,
        ]
    text = "\n".join(filter(None, (*lines, first.remedy)))
    return f"::{level} {where}::{_data(text)}"


def relative(path: str) -> str:
    """Return ``path`` relative to the working directory if it is inside it."""
    inside = Path.cwd() in Path(path).resolve().parents
    return Path(os.path.relpath(path)).as_posix() if inside else Path(path).as_posix()


def summary(reports: Sequence[Findings]) -> str:
    """Return Markdown for the file named by ``GITHUB_STEP_SUMMARY``."""
    return "\n".join(line for report in reports for line in _summary(report)) + "\n"


def _summary(report: Findings) -> Iterator[str]:
    sign = "\N{WHITE HEAVY CHECK MARK}" if report.ok else "\N{CROSS MARK}"
    yield f"## {sign} {_cell(report.name)}: {_cell(report.verdict)}"
    yield ""
    rows = [finding for finding in report.all if finding.outcome == "failed" or finding.noted]
    if rows:
        yield "| rule | leaf | what | |"
        yield "|---|---|---|---|"
    for finding in rows:
        cells = (finding.rule, finding.leaf, finding.message, finding.outcome)
        yield "| " + " | ".join(_cell(cell) for cell in cells) + " |"
    yield ""
    for failures in report.failures:
        if failures[0].remedy:
            laws = ", ".join(_cell(finding.rule) for finding in failures)
            yield f"{_cell(failures[0].remedy)} ({laws})"
            yield ""
    left = _SIZE
    for finding in rows:
        if finding.script and len(finding.script) <= left:
            left -= len(finding.script)
            yield f"<details><summary>Script: {_cell(finding.leaf or finding.rule)}</summary>"
            yield ""
            # Four backticks, because a script may contain three.
            yield f"````python\n{finding.script.rstrip()}\n````"
            yield "</details>"
            yield ""


def _cell(text: str) -> str:
    text = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;")
    for sign in "\\|`*_[]":
        text = text.replace(sign, f"\\{sign}")
    return text


def _data(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")
