"""What an upgrade changed, as GitHub annotations; and in full on the job's summary page."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bnverify.upgrade.difference import KINDS

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from bnverify.upgrade.judgement import Judgement

_LEVEL = {"failing": "error", "accepted": "notice", "reported": "notice"}
_SIZE = 60_000  # characters of witnesses; a summary takes a megabyte


def messages(judgements: Sequence[Judgement]) -> str:
    """Return workflow commands, one a line: an error for what fails, a notice for the rest."""
    return "".join(f"{line}\n" for judgement in judgements for line in _messages(judgement))


def _messages(judgement: Judgement) -> Iterator[str]:
    for mark, difference, why in judgement.marked():
        if difference.kind == "rounding" and mark == "reported":
            continue  # one a leaf would bury the others
        title = f"bnverify: {difference.kind} {difference.leaf or ''}".strip()
        text = f"{difference.text}; accepted: {why}" if why else difference.text
        yield f"::{_LEVEL[mark]} title={_property(title)}::{_data(text)}"
    for cost, ratio, bound in judgement.verdict.exceeded:
        yield f"::error title=bnverify%3A {cost}::{ratio:.2f} times the old, bound {bound:g}"
    level = "notice" if judgement.ok else "error"
    yield f"::{level} title=bnverify::{_data(f'{judgement.comparison.subject}: {judgement.headline()}')}"


def summary(judgements: Sequence[Judgement]) -> str:
    """Return the Markdown for the file that ``GITHUB_STEP_SUMMARY`` names."""
    return "\n".join(line for judgement in judgements for line in _summary(judgement)) + "\n"


def _summary(judgement: Judgement) -> Iterator[str]:
    sign = "\N{WHITE HEAVY CHECK MARK}" if judgement.ok else "\N{CROSS MARK}"
    yield f"## {sign} {_cell(judgement.comparison.subject)}: {_cell(judgement.headline())}"
    yield ""
    moved = (f"{name} {a} to {b}" for name, (a, b) in judgement.moved().items())
    yield _cell(", ".join(moved)) or "The same releases."
    yield ""
    yield "| class | leaf | size | what | |"
    yield "|---|---|---|---|---|"
    rows = sorted(judgement.marked(), key=lambda row: KINDS.index(row[1].kind))
    for mark, difference, why in rows:
        size = "" if difference.size is None else f"{difference.size:.3g}"
        told = f"{mark}: {why}" if why else mark
        cells = (difference.kind, difference.leaf or "", size, difference.text, told)
        yield "| " + " | ".join(_cell(cell) for cell in cells) + " |"
    yield ""
    left = _SIZE
    for _, difference, _ in rows:
        if difference.witness and len(difference.witness) <= left:
            left -= len(difference.witness)
            yield f"<details><summary>Script: {_cell(difference.leaf or difference.kind)}</summary>"
            yield ""
            # Four backticks: no Python holds so many in a row by accident.
            yield f"````python\n{difference.witness.rstrip()}\n````"
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
