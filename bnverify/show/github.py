"""Reports as GitHub annotations; and in full on the job's summary page."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from bnverify.show.findings import Findings

_SIZE = 60_000  # characters of scripts; a summary takes a megabyte


def messages(reports: Sequence[Findings]) -> str:
    """Return workflow commands, one a line: an error for what fails, a notice for the rest."""
    return "".join(f"{line}\n" for report in reports for line in _messages(report))


def _messages(report: Findings) -> Iterator[str]:
    for finding in report.all:
        if finding.outcome != "failed" and not finding.noted:
            continue
        level = "error" if finding.outcome == "failed" else "notice"
        title = f"bnverify: {finding.rule} {finding.leaf}".strip()
        where = f"title={_property(title)}"
        if finding.place is not None:
            path, line = finding.place
            where += f",file={_property(relative(path))},line={line}"
        text = "\n".join(filter(None, (finding.message, finding.details)))
        yield f"::{level} {where}::{_data(text)}"
    level = "notice" if report.ok else "error"
    yield f"::{level} title=bnverify::{_data(f'{report.name}: {report.verdict}')}"


def relative(path: str) -> str:
    """Return a path as the repository's own, from the directory the command runs in."""
    inside = Path.cwd() in Path(path).resolve().parents
    return Path(os.path.relpath(path)).as_posix() if inside else Path(path).as_posix()


def summary(reports: Sequence[Findings]) -> str:
    """Return the Markdown for the file that ``GITHUB_STEP_SUMMARY`` names."""
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
    left = _SIZE
    for finding in rows:
        if finding.script and len(finding.script) <= left:
            left -= len(finding.script)
            yield f"<details><summary>Script: {_cell(finding.leaf or finding.rule)}</summary>"
            yield ""
            # Four backticks: no Python holds so many in a row by accident.
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
