"""The formats that every report comes in, and where each is written."""

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

    from bnverify.evidence import Report
    from bnverify.mutants.audit import Audit
    from bnverify.mutants.users_tests import TestsAudit
    from bnverify.upgrade.judgement import Judgement

    Told: TypeAlias = Report | Judgement | Audit | TestsAudit

FORMATS = ("terminal", "json", "junit", "html", "github", "sarif")


@dataclass(frozen=True)
class Output:
    """One place for a report.

    Attributes:
        format: one of ``FORMATS``.
        file: where it is written; None: to a stream.
        option: how the command line asked for it.
        error: whether that stream is standard error, where the standard output holds JSON.
    """

    format: str
    file: Path | None = None
    option: str = "--format"
    error: bool = False


def parse(
    requests: Sequence[str], *, output: str | None = None, json: str | None = None
) -> list[Output]:
    """Return where the report goes.

    Args:
        requests: each ``FORMAT`` or ``FORMAT=FILE``; empty: the terminal's.
        output: the file for the format that names none.
        json: one more file, for JSON; "-": standard output, which moves the text to standard error.

    Raises:
        UsageError: an unknown format, a file that cannot be written, or two for standard output.
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
        raise UsageError(
            "only one --format can go to standard output; give the others as FORMAT=FILE"
        )
    if output is not None:
        if not to_stream:
            raise UsageError(
                f"--output {output} is for a --format without =FILE, and there is none"
            )
        file_ = _writable(output, "--output")
        found = [Output(e.format, e.file or file_, "--output") for e in found]
    if json == "-":
        if any(each.file is None and each.format != "terminal" for each in found):
            raise UsageError("--json - and --format cannot both go to standard output")
        found = [Output(e.format, e.file, e.option, error=True) for e in found]
        found.append(Output("json", option="--json"))
    elif json is not None:
        found.append(Output("json", _writable(json, "--json"), "--json"))
    return found


def _writable(file: str, option: str) -> Path:
    """Refuse a file that cannot be written before an hour of checking, not after."""
    path = Path(file)
    if path.is_dir():
        raise UsageError(f"{option} {file} is a directory")
    if not os.access(path.resolve().parent, os.W_OK):
        raise UsageError(f"{option} {file} cannot be written: no such directory, or not yours")
    return path


def write(
    told: Sequence[Told],
    outputs: Sequence[Output],
    verbosity: int = 0,
    *,
    json: str | None = None,
) -> None:
    """Write the report in every format asked for.

    Args:
        told: what to report; several upgrades stand beside each other.
        outputs: see :func:`parse`.
        verbosity: of the text for terminals, see ``bnverify.report.terminal``.
        json: the JSON text, where it says more than the report itself.

    Raises:
        UsageError: a file cannot be written.
    """
    for output in outputs:
        stream = (sys.stderr if output.error else sys.stdout) if output.file is None else None
        if output.format == "json" and json is not None:
            text = json
        else:
            text = render(told, output.format, stream, verbosity)
        if stream is not None:
            stream.write(text)
        else:
            assert output.file is not None
            save(output.file, text, output.option)
        page = os.environ.get("GITHUB_STEP_SUMMARY")
        if output.format == "github" and page:
            _append(page, render(told, "github summary"))


def save(file: Path, text: str, option: str) -> None:
    """Write a file.

    Raises:
        UsageError: it cannot be written; the message names the option that asked for it.
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
    told: Sequence[Told], name: str, stream: TextIO | None = None, verbosity: int = 0
) -> str:
    """Return the text of reports in one format.

    Args:
        told: what to report.
        name: one of ``FORMATS``, or "github summary".
        stream: where it is to go, for what depends on a terminal; None: a file.
        verbosity: likewise.
    """
    if name == "terminal":
        return "\n".join(_terminal(each, stream, verbosity) for each in told)
    if name == "json":
        return _json(told)
    if name == "html":
        from bnverify.report import html

        return html.page(told)
    from bnverify.report import github, junit, sarif
    from bnverify.report.findings import findings

    found = [findings(each) for each in told]
    writers = {
        "junit": junit.junit,
        "github": github.messages,
        "github summary": github.summary,
        "sarif": sarif.sarif,
    }
    return writers[name](found)


def _json(told: Sequence[Told]) -> str:
    from json import dumps

    if len(told) == 1 and isinstance(text := told[0].to_json(), str):
        return text
    data = [each.to_json() for each in told]
    return dumps(data[0] if len(data) == 1 else data, indent=2, allow_nan=False) + "\n"


def _terminal(told: Told, stream: TextIO | None, verbosity: int) -> str:
    from bnverify.evidence import Report
    from bnverify.upgrade.judgement import Judgement

    if isinstance(told, Report):
        from bnverify.report import terminal

        return terminal.render(told, stream, verbosity)
    if isinstance(told, Judgement):
        from bnverify.report import upgrade

        return upgrade.render(told, stream, verbosity)
    from bnverify.report import audit

    return audit.render(told, stream, verbosity)
