"""The heat map: leaves and laws down, releases across, in units of rounding noise."""

from __future__ import annotations

import math
from html import escape
from typing import TYPE_CHECKING

from bnverify.show.symbols import UNICODE

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from bnverify.upgrade.judgement import Judgement

_UNIT = "The largest difference in units of rounding noise: up to 1 it is rounding."
_LEGEND = (
    "= is equal to the last bit, ~ other initial values of the same distribution, ? no digits to "
    "compare, ✗ beyond rounding. A law's number is its error in units of the error allowed; "
    "■ is proved, ✓ held, ✗ violated, ? not reached, ○ exempt."
)
_LARGEST = 6.0  # decades above rounding at which the shade is full


def heat_map(judgements: Sequence[Judgement]) -> Iterator[str]:
    """Yield the section's HTML; nothing where no values were compared."""
    leaves = _ordered(leaf for j in judgements for leaf in _sizes(j))
    laws = _ordered(law for j in judgements for law in j.comparison.new["laws"])
    if not leaves:
        return
    yield "<h2>Leaves and laws against releases</h2>"
    yield f'<p class="soft">{escape(_UNIT)}</p><div class="wide"><table><thead><tr><th></th>'
    yield "".join(f"<th>{escape(j.new)}</th>" for j in judgements) + "</tr></thead><tbody>"
    columns = [_sizes(j) for j in judgements]
    for leaf in leaves:
        cells = "".join(column.get(leaf, "<td></td>") for column in columns)
        yield f"<tr><th><code>{escape(leaf)}</code></th>{cells}</tr>"
    broken = [law for law in laws if any(_status(j, law) == "violated" for j in judgements)]
    yield from _law_rows(judgements, broken)
    yield "</tbody></table></div>"
    yield f'<p class="soft">{escape(_LEGEND)}</p>'
    holding = [law for law in laws if law not in broken]
    if holding:
        more = "the other" if broken else "the"
        yield f"<details><summary>{more} {len(holding)} laws</summary>"
        yield '<div class="wide"><table><tbody>'
        yield from _law_rows(judgements, holding)
        yield "</tbody></table></div></details>"


def _law_rows(judgements: Sequence[Judgement], laws: list[str]) -> Iterator[str]:
    for law in laws:
        cells = "".join(_law(j, law) for j in judgements)
        yield f"<tr><th>{escape(law.replace('_', ' '))}</th>{cells}</tr>"


def _status(judgement: Judgement, law: str) -> str:
    told = judgement.comparison.new["laws"].get(law)
    return str(told["status"]) if told else ""


def _ordered(names: Iterator[str]) -> list[str]:
    return list(dict.fromkeys(names))


def _sizes(judgement: Judgement) -> dict[str, str]:
    """Return leaf -> its cell."""
    cells = {}
    for leaf, distance in judgement.comparison.distances.items():
        size = distance.worst.size if distance.worst else 0.0
        cells[leaf] = _cell(size) if distance.compared else '<td class="heat">?</td>'
    for difference in judgement.comparison.differences:
        if difference.leaf and difference.leaf.startswith("init/"):
            if difference.kind == "meaning":
                cells[difference.leaf] = f'<td class="heat bad">{UNICODE.status["violated"]}</td>'
            else:
                cells[difference.leaf] = '<td class="heat">~</td>'
        elif difference.kind in {"structure", "dtype"} and difference.leaf:
            sign = UNICODE.status["violated"]
            cells[difference.leaf] = f'<td class="heat bad">{sign} {difference.kind}</td>'
    return cells


def _cell(size: float) -> str:
    if size == 0:
        return '<td class="heat">=</td>'
    decades = _LARGEST if math.isinf(size) else max(0.0, math.log10(size))
    shade = 0.06 + (0.5 * min(decades / _LARGEST, 1.0) if size > 1 else 0.0)
    number = "∞" if math.isinf(size) else f"{size:.2g}"
    sign, name = (f"{UNICODE.status['violated']} ", " bad") if size > 1 else ("", "")
    return f'<td class="heat{name}" style="--shade:{shade:.2f}">{sign}{number}</td>'


def _law(judgement: Judgement, law: str) -> str:
    told = judgement.comparison.new["laws"].get(law)
    if told is None:
        return "<td></td>"
    sign = UNICODE.status.get(told["status"], "?")
    name = "heat bad" if told["status"] == "violated" else "heat"
    residual = told["residual"]
    number = f" {residual:.2g}" if residual else ""
    return f'<td class="{name}" title="{escape(str(told["status"]))}">{sign}{number}</td>'
