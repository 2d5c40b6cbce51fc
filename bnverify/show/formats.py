"""The formats an upgrade's report comes in, and where each is written."""

from __future__ import annotations

import io
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from bnverify import atomic_file
from bnverify.show import github, html, junit, upgrade
from bnverify.unusable import Unusable, did_you_mean

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bnverify.upgrade.judgement import Judgement

FORMATS = ("terminal", "json", "junit", "html", "github")


def parse(requests: Sequence[str]) -> list[tuple[str, Path | None]]:
    """Return (format, file) of each ``FORMAT`` or ``FORMAT=FILE``; without any, the terminal's.

    Raises:
        Unusable: an unknown format, a file that cannot be written, or two for standard output.
    """
    found: list[tuple[str, Path | None]] = []
    for request in requests or ("terminal",):
        name, _, file = request.partition("=")
        if name not in FORMATS:
            known = ", ".join(FORMATS)
            raise Unusable(f"--format {name!r} is none of {known}{did_you_mean(name, FORMATS)}")
        path = Path(file) if file else None
        if path and (path.is_dir() or not os.access(path.resolve().parent, os.W_OK)):
            raise Unusable(f"--format {request}: the file cannot be written")
        found.append((name, path))
    if sum(path is None for _, path in found) > 1:
        raise Unusable(
            "only one --format can go to standard output; give the others as FORMAT=FILE"
        )
    return found


def write(judgements: Sequence[Judgement], outputs: Sequence[tuple[str, Path | None]]) -> None:
    """Write the report in every format asked for.

    Raises:
        Unusable: a file cannot be written.
    """
    for name, path in outputs:
        text = _text(judgements, name, sys.stdout if path is None else None)
        try:
            if path is None:
                sys.stdout.write(text)
            else:
                atomic_file.write(path, text.encode())
            if name == "github" and os.environ.get("GITHUB_STEP_SUMMARY"):
                with Path(os.environ["GITHUB_STEP_SUMMARY"]).open("a", encoding="utf-8") as page:
                    page.write(github.summary(judgements))
        except BrokenPipeError:
            raise
        except OSError as error:
            raise Unusable(f"--format {name}: cannot be written: {error}") from None


def _text(judgements: Sequence[Judgement], name: str, stream: object) -> str:
    if name == "json":
        told = [judgement.to_json() for judgement in judgements]
        whole = told[0] if len(told) == 1 else told
        return json.dumps(whole, indent=2, allow_nan=False) + "\n"
    if name == "terminal":
        buffer = io.StringIO()
        encoding = getattr(stream, "encoding", None) or "utf-8"
        for judgement in judgements:
            upgrade.show(judgement, buffer, encoding=encoding)
        return buffer.getvalue()
    if name == "junit":
        return junit.junit(judgements)
    return html.page(judgements) if name == "html" else github.messages(judgements)
