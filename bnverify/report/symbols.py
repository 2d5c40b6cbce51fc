"""The signs used in reports, distinguishable without colour, in Unicode and in ASCII."""

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
        status: status -> sign.
        flow: kind of entry in the influence matrix -> sign.
        rule: the character that lines are drawn with.
        unicode: whether other text may contain non-ASCII characters.
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
        "open": "?",
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
        "open": "?",
        "leaks": "X leaks",
        "missing": "X missing",
    },
    rule="-",
    unicode=False,
)


def symbols(encoding: str) -> Symbols:
    """Return the signs that ``encoding`` can represent."""
    return UNICODE if encoding.lower().replace("-", "").startswith("utf") else ASCII


_ASCII: dict[int, str] = {ord("±"): "+-", ord("…"): "...", ord("→"): "->", ord("≠"): "!="}


def in_ascii(text: str) -> str:
    """Return ``text`` in ASCII; characters without an equivalent are escaped."""
    plain = text.translate(_ASCII)
    return plain.encode("ascii", "backslashreplace").decode()
