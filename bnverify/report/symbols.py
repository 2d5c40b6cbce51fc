"""The signs a report is drawn with: told apart without colour, and on an ASCII terminal too."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bnverify.evidence import Status

STYLES: dict[Status, str] = {
    "proved": "bold green",
    "held": "green",
    "violated": "bold red",
    "untriggered": "yellow",
    "exempt": "dim",
}


@dataclass(frozen=True)
class Symbols:
    """One set of signs.

    Attributes:
        status: status -> its sign.
        flow: what a cell of the influence matrix says -> its sign.
        rule: what a line is drawn with.
        unicode: whether other text may hold letters beyond ASCII.
    """

    status: dict[str, str]
    flow: dict[str, str]
    rule: str
    unicode: bool


UNICODE = Symbols(
    status={"proved": "■", "held": "✓", "violated": "✗", "untriggered": "?", "exempt": "○"},
    flow={
        "shown": "◉",
        "may": "●",
        "cannot": "·",
        "kept out": "✓",
        "leaks": "✗ leaks",
        "missing": "✗ missing",
    },
    rule="─",
    unicode=True,
)
ASCII = Symbols(
    status={"proved": "#", "held": "+", "violated": "X", "untriggered": "?", "exempt": "-"},
    flow={
        "shown": "@",
        "may": "o",
        "cannot": ".",
        "kept out": "-",
        "leaks": "X leaks",
        "missing": "X missing",
    },
    rule="-",
    unicode=False,
)


def symbols(encoding: str) -> Symbols:
    """Return the signs that text in ``encoding`` can carry."""
    return UNICODE if encoding.lower().replace("-", "").startswith("utf") else ASCII


_ASCII: dict[int, str] = {ord("±"): "+-", ord("…"): "...", ord("→"): "->", ord("≠"): "!="}


def in_ascii(text: str) -> str:
    """Return text without letters beyond ASCII; those that have no equivalent are escaped."""
    plain = text.translate(_ASCII)
    return plain.encode("ascii", "backslashreplace").decode()
