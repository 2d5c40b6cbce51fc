"""What an upgrade changed, as one HTML page that needs nothing else, nor colour, nor a large screen."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from bnverify.show.cards import cards, named
from bnverify.show.heat import heat_map
from bnverify.show.matrix import LEGEND, matrix, scope
from bnverify.show.symbols import UNICODE
from bnverify.upgrade.difference import KINDS

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from typing import Any

    from bnverify.upgrade.judgement import Judgement

_OK, _BAD = UNICODE.status["held"], UNICODE.status["violated"]


def page(judgements: Sequence[Judgement]) -> str:
    """Return the page of one upgrade, or of several beside each other."""
    return "\n".join(_page(judgements)) + "\n"


def _page(judgements: Sequence[Judgement]) -> Iterator[str]:
    subject = judgements[0].comparison.subject if judgements else "nothing"
    style = Path(__file__).with_name("report.css").read_text(encoding="utf-8")
    yield "<!doctype html>"
    yield '<html lang="en"><head><meta charset="utf-8">'
    yield '<meta name="viewport" content="width=device-width, initial-scale=1">'
    # Nothing is loaded or run, whatever a leaf, a law or a message is called.
    yield (
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'\">"
    )
    yield f"<title>{escape(subject)}: upgrade</title><style>{style}</style></head><body>"
    for judgement in judgements:
        yield from _verdict(judgement)
    titles = [f" ({escape(j.new)})" if len(judgements) > 1 else "" for j in judgements]
    yield '<div class="two"><div>'
    for judgement, title in zip(judgements, titles, strict=True):
        yield from cards(judgement, title)
    yield "</div><section>"
    yield from heat_map(judgements)
    yield "</section></div>"
    for judgement, title in zip(judgements, titles, strict=True):
        yield from _matrices(judgement, title)
        yield from _witness(judgement, title)
        yield from _costs(judgement, title)
        yield from _notes(judgement, title)
    yield "</body></html>"


def _verdict(judgement: Judgement) -> Iterator[str]:
    sign, name = (_OK, "verdict") if judgement.ok else (_BAD, "verdict bad")
    yield f'<header class="{name}"><h1>{escape(judgement.comparison.subject)}</h1>'
    yield f"<p><strong>{sign} {escape(judgement.headline())}</strong></p>"
    yield f'<p class="soft">from {escape(judgement.old)} to {escape(judgement.new)}</p>'
    moved = judgement.moved().items()
    chips = (f"<li>{escape(name)} {escape(a)} → <b>{escape(b)}</b></li>" for name, (a, b) in moved)
    yield f'<ul class="chips">{"".join(chips) or "<li>the same releases</li>"}</ul>'
    yield from _classes(judgement)
    yield "</header>"


def _classes(judgement: Judgement) -> Iterator[str]:
    """Yield how many differences of each class there are, and what the policy makes of them."""
    failing = {d.kind for d in judgement.verdict.failing}
    yield '<dl class="classes">'
    for kind in KINDS:
        count = len(judgement.comparison.of(kind))
        sign = _BAD if kind in failing else _OK if count else ""
        name = "bad" if kind in failing else "" if count else "none"
        yield f'<div class="{name}"><dt>{kind}</dt><dd>{sign} {count}</dd></div>'
    yield "</dl>"


def _witness(judgement: Judgement, title: str) -> Iterator[str]:
    shown = next((d for d in judgement.verdict.failing if d.witness), None)
    if shown is None or shown.witness is None:
        return
    yield f"<h2>See it for yourself{title}</h2>"
    yield f"<p>{escape(named(shown))}</p>"
    yield "<p class=soft>Save this script and run it in either environment: it needs jax, flax, "
    yield "NumPy and your own code, prints both values, and exits with 1 where they disagree.</p>"
    yield f"<details open><summary>the script</summary><pre>{escape(shown.witness)}</pre></details>"


def _matrices(judgement: Judgement, title: str) -> Iterator[str]:
    sides = [side["influence"] for side in (judgement.comparison.old, judgement.comparison.new)]
    if not any(side.get("matrix") for side in sides):
        return
    yield f'<h2>What reaches what{title}</h2><div class="side">'
    for name, side, other in (
        (judgement.old, sides[0], sides[1]),
        (judgement.new, sides[1], sides[0]),
    ):
        yield f"<section><h3>{escape(name)}</h3>"
        yield from _matrix(side, other)
        yield "</section>"
    yield "</div>"


def _matrix(side: Mapping[str, Any], other: Mapping[str, Any]) -> Iterator[str]:
    if not side.get("matrix"):
        yield "<p class=soft>not read in this environment</p>"
        return
    shown = matrix(side["matrix"])
    compared = matrix(other["matrix"]).rows if other.get("matrix") else {}
    yield f'<p class="soft">{escape(scope(side))}</p><div class="wide"><table><thead><tr><th></th>'
    yield "".join(f"<th>{escape(name)}</th>" for name in shown.inputs) + "</tr></thead><tbody>"
    for output, kinds in shown.rows.items():
        cells = []
        for index, kind in enumerate(kinds):
            before = compared.get(output, kinds)
            changed = index < len(before) and before[index] != kind
            name = "bad" if kind in {"leaks", "missing"} else "changed" if changed else ""
            mark = " ≠" if changed else ""
            cells.append(
                f'<td class="{name}" title="{LEGEND[kind]}">{UNICODE.flow[kind]}{mark}</td>'
            )
        yield f"<tr><th>{escape(output)}</th>{''.join(cells)}</tr>"
    yield "</tbody></table></div>"
    legend = [f"{UNICODE.flow[kind].split()[0]} {LEGEND[kind]}" for kind in shown.kinds()]
    yield f'<p class="soft">{escape("   ".join([*legend, "≠ other than on the other side"]))}</p>'


def _costs(judgement: Judgement, title: str) -> Iterator[str]:
    ratios = judgement.comparison.costs
    if not ratios:
        return
    old, new = judgement.comparison.old["costs"], judgement.comparison.new["costs"]
    beyond = {cost: bound for cost, _, bound in judgement.verdict.exceeded}
    yield f'<h2>Costs{title}</h2><div class="wide"><table><thead><tr><th></th><th>old</th>'
    yield "<th>new</th><th>new / old</th></tr></thead><tbody>"
    units = {"compile_time": "s", "run_time": "s", "program_size": "instructions"}
    for cost, ratio in ratios.items():
        bad = f" {_BAD} bound {beyond[cost]:g}" if cost in beyond else ""
        name = escape(cost.replace("_", " "))
        yield f"<tr><th>{name}, {units.get(cost, '')}</th><td>{old[cost]:.3g}</td>"
        yield f"<td>{new[cost]:.3g}</td><td>{ratio:.2f}{bad}</td></tr>"
    yield "</tbody></table></div>"


def _notes(judgement: Judgement, title: str) -> Iterator[str]:
    verdict = judgement.verdict
    notes = list(judgement.comparison.notes)
    notes += [f"accepted, but no longer occurs: {e.kind}: {e.reason}" for e in verdict.stale]
    notes += [f"expired on {e.expires}: {e.kind}: {e.reason}" for e in verdict.expired]
    if notes:
        yield f"<h2>Notes{title}</h2><ul>"
        yield from (f"<li>{escape(note)}</li>" for note in notes)
        yield "</ul>"
