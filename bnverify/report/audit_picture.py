"""The matrix of faults and laws as a picture: SVG written by hand, self-contained."""

from __future__ import annotations

from typing import TYPE_CHECKING
from xml.sax.saxutils import escape

from bnverify.report.audit import killers, summary

if TYPE_CHECKING:
    from bnverify.mutants.audit import Audit

CELL = 9
LEFT, TOP = 320, 300
INK, HIT, ALONE, MISS, GAP = "#222222", "#3b6ea8", "#c2410c", "#eef1f5", "#b91c1c"


def draw(audit: Audit) -> str:
    """Return the picture: a row for each fault, a column for each law that notices any.

    A square is filled where the law notices the fault, in another shade and with a cross where
    it alone does; a survivor's row is struck through, so colour only repeats what shapes say.
    """
    laws = killers(audit)
    rows = sorted(audit.findings, key=lambda finding: (finding.family, -len(finding.laws)))
    width, height = LEFT + CELL * len(laws) + 20, TOP + CELL * len(rows) + 40
    parts = [
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
            f'viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="8" '
            f'fill="{INK}">'
        ),
        f"<title>{escape(summary(audit))}</title>",
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        f'<text x="10" y="20" font-size="12">{escape(summary(audit))}</text>',
    ]
    for column, law in enumerate(laws):
        x = LEFT + CELL * column + CELL - 2
        parts.append(f'<text transform="translate({x},{TOP - 4}) rotate(-90)">{escape(law)}</text>')
    for row, finding in enumerate(rows):
        y = TOP + CELL * row
        parts.append(
            f'<text x="{LEFT - 6}" y="{y + CELL - 2}" text-anchor="end">'
            f"{escape(finding.mutant)}</text>"
        )
        parts += [
            _cell(LEFT + CELL * column, y, hit=law in finding.laws, alone=len(finding.laws) == 1)
            for column, law in enumerate(laws)
        ]
        if not finding.killed:
            middle = y + CELL / 2
            parts.append(
                f'<line x1="{LEFT}" y1="{middle}" x2="{LEFT + CELL * len(laws)}" y2="{middle}" '
                f'stroke="{GAP}"/>'
            )
    return "\n".join([*parts, "</svg>"]) + "\n"


def _cell(x: int, y: int, *, hit: bool, alone: bool) -> str:
    fill = (ALONE if alone else HIT) if hit else MISS
    square = f'<rect x="{x}" y="{y}" width="{CELL - 1}" height="{CELL - 1}" fill="{fill}"/>'
    if not (hit and alone):
        return square
    end = CELL - 2
    return (
        f'{square}<path d="M{x + 1} {y + 1} L{x + end} {y + end} M{x + end} {y + 1} '
        f'L{x + 1} {y + end}" stroke="#ffffff"/>'
    )
