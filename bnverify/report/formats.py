"""The formats of reports, and where each report is written."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from bnverify.errors import UsageError, cause, did_you_mean

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import TextIO

    from bnverify.audit.run import Audit
    from bnverify.evidence import Report
    from bnverify.upgrade.policy import Judgement

    AnyReport: TypeAlias = Report | Judgement | Audit

FORMATS = ("terminal", "json", "junit", "html", "github", "sarif")


@dataclass(frozen=True)
class Output:
    """One destination of a report.

    Attributes:
        format: one of ``FORMATS``.
        file: the file to write; None: a standard stream.
        option: the command-line option that asked for it.
        error: whether the stream is stderr, because stdout is used for JSON.
    """

    format: str
    file: Path | None = None
    option: str = "--format"
    error: bool = False


def parse(
    requests: Sequence[str], *, output: str | None = None, json: str | None = None
) -> list[Output]:
    """Parse the report options of the command line.

    Args:
        requests: each ``FORMAT`` or ``FORMAT=FILE``; empty: terminal.
        output: the file for the format without one.
        json: another file, for JSON; "-": stdout, which moves the text to stderr.

    Raises:
        UsageError: a format is unknown, a file is not writable, or two reports go to stdout.
    """
    found = []
    for request in requests or ("terminal",):
        name, _, file = request.partition("=")
        if name not in FORMATS:
            known = ", ".join(FORMATS)
            raise UsageError(f"--format {name!r} is none of {known}{did_you_mean(name, FORMATS)}")
        found.append(Output(name, _writable(file, "--format") if file else None))
    to_stream = [each for each in found if each.file is None]
    if len(to_stream) > 1:
        raise UsageError("only one --format can go to stdout; write the others as FORMAT=FILE")
    if output is not None:
        if not to_stream:
            raise UsageError(
                f"--output {output} needs a --format without =FILE, but every one has a file"
            )
        file_ = _writable(output, "--output")
        found = [Output(e.format, e.file or file_, "--output") for e in found]
    if json == "-":
        if any(each.file is None and each.format != "terminal" for each in found):
            raise UsageError("--json - and --format cannot both go to stdout; give one a file")
        found = [Output(e.format, e.file, e.option, error=True) for e in found]
        found.append(Output("json", option="--json"))
    elif json is not None:
        found.append(Output("json", _writable(json, "--json"), "--json"))
    return found


def _writable(file: str, option: str) -> Path:
    """Return the path; fail before a long check if it cannot be written."""
    path = Path(file)
    if path.is_dir():
        raise UsageError(f"{option} {file} is a directory; give a file")
    if not os.access(path.resolve().parent, os.W_OK):
        raise UsageError(
            f"{option} {file} cannot be written: its directory is missing or read-only"
        )
    return path


def write(
    reports: Sequence[AnyReport],
    outputs: Sequence[Output],
    verbosity: int = 0,
    *,
    json: str | None = None,
) -> None:
    """Write reports in every requested format.

    Args:
        reports: the reports; several upgrades are shown side by side.
        outputs: from :func:`parse`.
        verbosity: of text for terminals, see ``bnverify.report.terminal``.
        json: the JSON text, if it contains more than the report.

    Raises:
        UsageError: a file cannot be written.
    """
    for output in outputs:
        stream = (sys.stderr if output.error else sys.stdout) if output.file is None else None
        if output.format == "json" and json is not None:
            text = json
        else:
            text = render(reports, output.format, stream, verbosity)
        if stream is not None:
            stream.write(text)
        else:
            assert output.file is not None
            save(output.file, text, output.option)
        page = os.environ.get("GITHUB_STEP_SUMMARY")
        if output.format == "github" and page:
            _append(page, render(reports, "github summary"))


def save(file: Path, text: str, option: str) -> None:
    """Write a file.

    Raises:
        UsageError: it cannot be written; the message names ``option``.
    """
    try:
        file.write_text(text, encoding="utf-8", newline="\n")
    except OSError as error:
        raise UsageError(f"{option} {file} cannot be written: {cause(error)}") from None


def _append(page: str, text: str) -> None:
    try:
        with Path(page).open("a", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise UsageError(f"GITHUB_STEP_SUMMARY {page} cannot be written: {cause(error)}") from None


def render(
    reports: Sequence[AnyReport], name: str, stream: TextIO | None = None, verbosity: int = 0
) -> str:
    """Return reports as text in one format.

    Args:
        reports: the reports.
        name: one of ``FORMATS``, or "github summary".
        stream: the destination, for the terminal format; None: a file.
        verbosity: of the terminal format.
    """
    if name == "terminal":
        return "\n".join(_terminal(each, stream, verbosity) for each in reports)
    if name == "json":
        return _json(reports)
    if name == "html":
        from bnverify.report import html

        return html.page(reports)
    from bnverify.report import github, junit, sarif
    from bnverify.report.findings import findings

    found = [findings(each) for each in reports]
    writers = {
        "junit": junit.junit,
        "github": github.messages,
        "github summary": github.summary,
        "sarif": sarif.sarif,
    }
    return writers[name](found)


def _json(reports: Sequence[AnyReport]) -> str:
    from json import dumps

    if len(reports) == 1 and isinstance(text := reports[0].to_json(), str):
        return text
    data = [each.to_json() for each in reports]
    return dumps(data[0] if len(data) == 1 else data, indent=2, allow_nan=False) + "\n"


def _terminal(report: AnyReport, stream: TextIO | None, verbosity: int) -> str:
    from bnverify.evidence import Report
    from bnverify.upgrade.policy import Judgement

    if isinstance(report, Report):
        from bnverify.report import terminal

        return terminal.render(report, stream, verbosity)
    if isinstance(report, Judgement):
        from bnverify.report import upgrade

        return upgrade.render(report, stream, verbosity)
    from bnverify.report import audit

    return audit.render(report, stream, verbosity)
