"""Each difference as a card: which leaf, what it was and is, and how far beyond rounding that lies."""

from __future__ import annotations

import math
from html import escape
from typing import TYPE_CHECKING

from bnverify.show.symbols import UNICODE

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bnverify.upgrade.difference import Difference
    from bnverify.upgrade.judgement import Judgement

_OK, _BAD = UNICODE.status["held"], UNICODE.status["violated"]
_MARKS = {"failing": f"{_BAD} fails", "accepted": f"{_OK} accepted", "reported": f"{_OK} reported"}
_SHOWN = 8  # cards in the open; the rest folds
_DECADES = (-3, 9)  # of the ruler, in units of rounding noise

Row = tuple[str, tuple["Difference", ...], str]


def cards(judgement: Judgement, title: str) -> Iterator[str]:
    """Yield the section's HTML; nothing where nothing changed.

    Differences that say the same of several leaves share a card. Rounding folds: the heat map has
    its numbers.
    """
    grouped: dict[tuple[str, str, str, str], list[Difference]] = {}
    for mark, difference, why in judgement.marked():
        grouped.setdefault((mark, why, difference.kind, difference.text), []).append(difference)
    rows: list[Row] = [(mark, tuple(d), why) for (mark, why, *_), d in grouped.items()]
    if not rows:
        return
    yield f"<section><h2>What changed{title}</h2>"
    shown = [row for row in rows if row[1][0].kind != "rounding" or row[0] == "failing"][:_SHOWN]
    for row in shown:
        yield from _card(judgement, *row)
    rest = [row for row in rows if row not in shown]
    if rest:
        count = sum(len(row[1]) for row in rest)
        yield f"<details><summary>and {count} more</summary>"
        for row in rest:
            yield from _card(judgement, *row)
        yield "</details>"
    yield "</section>"


def _card(
    judgement: Judgement, mark: str, differences: tuple[Difference, ...], why: str
) -> Iterator[str]:
    first = differences[0]
    failing = mark == "failing"
    leaves = ", ".join(f"<code>{escape(d.leaf)}</code>" for d in differences if d.leaf)
    yield f'<article class="difference{" bad" if failing else ""}"><h3>'
    yield f'<span class="kind">{escape(first.kind)}</span> {leaves}'
    yield f' <span class="mark">{_MARKS[mark]}</span></h3>'
    if failing and len(differences) == 1:
        yield from _values(judgement, first)
    if first.explanation:
        said = first.explanation[0].upper() + first.explanation[1:]
        yield f"<p><strong>{escape(said)}</strong></p>"
    yield f"<p>{escape(first.text.removesuffix(f'; {first.explanation}'))}</p>"
    if why:
        yield f'<p class="soft">{escape(why)}</p>'
    yield "</article>"


def _values(judgement: Judgement, difference: Difference) -> Iterator[str]:
    """Yield what the leaf was and is, large, and where that lies on the ruler of noise."""
    distance = judgement.comparison.distances.get(difference.leaf or "")
    if difference.kind != "meaning":
        return
    if distance is not None and (place := distance.simplest) is not None:
        yield f'<p class="was"><span>was <b>{place.old:.5g}</b></span> '
        yield f"<span>is <b>{place.new:.5g}</b></span></p>"
    if difference.size:
        yield ruler(difference.size)


def ruler(size: float) -> str:
    """Return a bar, logarithmic in units of rounding noise, with a mark at ``size``."""
    low, high = _DECADES
    wide = high - low
    at = min(max((math.log10(size) - low) / wide, 0.0), 1.0) if size > 0 else 0.0
    edge = -low / wide
    label = f"{size:.2g} times the rounding noise"
    return (
        f'<div class="ruler" role="img" aria-label="{label}" '
        f'style="--at:{100 * at:.1f}%;--edge:{100 * edge:.1f}%"><span>rounding</span><b>▲</b></div>'
        f'<p class="soft">{label}</p>'
    )


def named(difference: Difference) -> str:
    """Return the difference in one line that begins with its leaf."""
    leaf = difference.leaf
    if not leaf or difference.text.startswith(leaf):
        return difference.text
    return f"{leaf}: {difference.text}"
