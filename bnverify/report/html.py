"""Reports as self-contained HTML pages that do not rely on colour or a large screen.

This module assembles the content as plain data; ``templates`` has the layout. The template engine
escapes every value.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from html import escape
from typing import TYPE_CHECKING, Any, get_args

import jinja2

from bnverify.evidence import Status
from bnverify.laws import FAMILIES, LAWS
from bnverify.report.findings import groups
from bnverify.report.matrix import LEGEND, legend, matrix, scope
from bnverify.report.symbols import UNICODE

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from bnverify.audit.run import Audit
    from bnverify.evidence import Counterexample, Evidence, Report
    from bnverify.model import Case
    from bnverify.report.formats import AnyReport
    from bnverify.upgrade.policy import Difference, Judgement

_OK, _BAD = UNICODE.status["held"], UNICODE.status["violated"]
_MARKS = {"failing": f"{_BAD} fails", "accepted": f"{_OK} accepted", "reported": f"{_OK} reported"}
_SHOWN = 8  # differences shown; the rest is collapsed
_DECADES = (-3, 9)  # range of a ruler, in decades of the tolerance
_LARGEST = 6.0  # decades beyond the tolerance with the darkest shade
_HIGHEST = 12  # largest decade of an axis; larger values get a bar of full length
_TICKS = 6  # approximate number of labels on an axis
_FEW = 16  # bars shown; the rest is collapsed
_MOST = 8  # rows and columns of a counterexample's table
_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@functools.cache
def _templates() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.PackageLoader("bnverify.report", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def page(reports: Sequence[AnyReport]) -> str:
    """Return the page of one report, or of several upgrades side by side."""
    from bnverify.evidence import Report
    from bnverify.upgrade.policy import Judgement

    first = reports[0]
    if isinstance(first, Report):
        return _render("check.html", _of_check(first))
    if isinstance(first, Judgement):
        upgrades = [each for each in reports if isinstance(each, Judgement)]
        return _render("upgrade.html", _of_upgrades(upgrades))
    return _render("audit.html", _of_audit(first))


def fragment(report: Report) -> str:
    """Return a check's page for a notebook, in an iframe that isolates its style."""
    frame = "width:100%;height:32rem;border:0"
    return f'<iframe title="bnverify" style="{frame}" srcdoc="{escape(page([report]))}"></iframe>'


def _render(template: str, context: Mapping[str, Any]) -> str:
    return _templates().get_template(template).render(context) + "\n"


# A check.


def _of_check(report: Report) -> dict[str, Any]:
    statuses = Counter(each.status for each in report.results)
    families = []
    for family in FAMILIES:
        results = [evidence for evidence in report.results if evidence.family == family]
        if results:
            counts = Counter(each.status for each in results)
            families.append(
                {
                    "name": family,
                    "counts": ", ".join(f"{number} {status}" for status, number in counts.items()),
                    "bad": counts["violated"] > 0,
                    "laws": [_law(evidence) for evidence in results],
                }
            )
    return {
        "title": f"{report.subject}: {report.verdict}",
        "name": report.subject,
        "ok": report.ok,
        "sign": _OK if report.ok else _BAD,
        "verdict": report.verdict,
        "counts": report.counts,
        "settings": f"profile {report.profile}, seed {report.seed}",
        "statuses": [
            {"name": name, "sign": UNICODE.status[name], "count": statuses[name]}
            for name in get_args(Status)
        ],
        "groups": [{"of": group, "table": _table(group.shown)} for group in groups(report)],
        "claims": {name: law.claim for name, law in LAWS.items()},
        "bars": _residuals(report),
        "families": families,
        "influence": _influence(
            report.influence,
            held=_with(report, "held"),
            violated=_with(report, "violated"),
            unjudged=_with(report, "untriggered"),
        ),
        "paths": _paths(report),
        "notes": list(report.notes),
        "versions": dict(report.versions),
    }


def _with(report: Report, status: Status) -> list[str]:
    return [evidence.law for evidence in report.results if evidence.status == status]


def _paths(report: Report) -> list[dict[str, Any]]:
    """Return the paths of forbidden dependencies, each with the laws that forbid it."""
    found: dict[tuple[str, ...], list[str]] = {}
    for evidence in report.violated:
        if evidence.path:
            found.setdefault(evidence.path, []).append(evidence.law)
    return [{"steps": steps, "laws": laws} for steps, laws in found.items()]


def _residuals(report: Report) -> dict[str, Any] | None:
    """Return a bar for each law with a measured error, largest first."""
    known = [(each, size) for each in report.results if (size := _worst(each)) is not None]
    known.sort(key=lambda pair: (pair[0].status == "violated", pair[1]), reverse=True)
    rows = [
        _bar(
            evidence.law,
            f"{UNICODE.status[evidence.status]} {_times(size)}",
            size,
            bad=evidence.status == "violated",
        )
        for evidence, size in known
        if size > 0
    ]
    exact = [evidence.law for evidence, size in known if size == 0]
    return _bars(rows, "tolerance", f"Error 0: {', '.join(exact)}." if exact else "")


def _worst(evidence: Evidence) -> float | None:
    """Return the largest error in units of the tolerance; None if the law measures no error.

    A witness law has no error. The counterexample was found after the cases were counted, so its
    error may be the largest.
    """
    if evidence.law not in LAWS or LAWS[evidence.law].kind == "witness":
        return None
    shown = evidence.mismatch.times if evidence.mismatch is not None else None
    return max((size for size in (evidence.residual, shown) if size is not None), default=None)


def _times(size: float) -> str:
    return f"{size:.2g}" if math.isfinite(size) else "∞"


def _table(shown: Counterexample | None) -> dict[str, Any] | None:
    """Return a counterexample as a table: a batch by rows, or a history by calls."""
    if shown is None:
        return None
    if shown.history:
        calls = [
            [str(number), name, _argument(argument)]
            for number, (name, argument) in enumerate(shown.history, 1)
        ]
        return {
            "caption": "History",
            "head": ["", "call", "argument"],
            "rows": calls,
            "css": "calls",
        }
    case = shown.case
    if case is None:
        return None
    caption = f"Batch; seed {int(case.seed)}, lr {float(case.lr):.6g}"
    if case.warmup:
        caption += f", after {int(case.warmup)} steps on the same batch"
    rows, features = case.shape
    columns, lines = min(features, _MOST), min(rows, _MOST)
    more_columns, more_lines = ["…"] * (features > columns), rows > lines
    table = [
        [
            str(n),
            *(f"{value:.6g}" for value in case.x[n, :columns]),
            *more_columns,
            f"{case.y[n]:.6g}",
        ]
        for n in range(lines)
    ]
    table += [["…"] * (columns + len(more_columns) + 2)] * more_lines
    head = ["row", *(f"x[{d}]" for d in range(columns)), *more_columns, "y"]
    caption += f", x of shape ({rows}, {features})"
    return {"caption": caption, "head": head, "rows": table, "css": "case"}


def _argument(argument: Case | str | None) -> str:
    if argument is None or isinstance(argument, str):
        return argument or ""
    rows, features = argument.shape
    return f"a batch of shape ({rows}, {features}), lr {float(argument.lr):.6g}"


def _law(evidence: Evidence) -> dict[str, Any]:
    worst = _worst(evidence)
    return {
        "name": evidence.law,
        "claim": LAWS[evidence.law].claim if evidence.law in LAWS else "",
        "status": evidence.status,
        "sign": UNICODE.status[evidence.status],
        "cases": f"{evidence.cases:,} case{'s' * (evidence.cases > 1)}" if evidence.cases else "",
        "reason": f"at most {worst:.2g}x the tolerance"
        if worst and evidence.status == "held"
        else evidence.reason,
    }


# Bars on a logarithmic axis, in units of the bound.


def _bar(name: str, label: str, size: float, *, bad: bool) -> dict[str, Any]:
    return {"name": name, "label": label, "size": size, "bad": bad}


def _bars(rows: Sequence[dict[str, Any]], unit: str, note: str = "") -> dict[str, Any] | None:
    """Return bars for sizes in units of their bounds, on one axis.

    Args:
        rows: from ``_bar``; a size of 0 has no bar.
        unit: the name of the unit.
        note: text below the bars.
    """
    if not rows:
        return None
    low = _DECADES[0]
    largest = max((each["size"] for each in rows if math.isfinite(each["size"])), default=1.0)
    high = min(max(1, math.ceil(math.log10(largest))), _HIGHEST) if largest > 0 else 1

    def at(decade: float) -> str:
        return f"{100 * min(max((decade - low) / (high - low), 0.0), 1.0):.1f}%"

    def width(size: float) -> str:
        return at(math.log10(size) if 0 < size < math.inf else math.copysign(math.inf, size - 1))

    step = math.ceil((high - low) / _TICKS)
    decades = sorted({*range(0, high + 1, step), *range(0, low - 1, -step)})
    drawn = [{**each, "width": width(each["size"])} for each in rows]
    return {
        "ticks": [{"at": at(decade), "label": _power(decade)} for decade in decades],
        "bound": at(0),
        "unit": unit,
        "rows": drawn[:_FEW],
        "rest": drawn[_FEW:],
        "note": note,
    }


def _power(decade: int) -> str:
    return "1" if decade == 0 else f"10{str(decade).translate(_RAISED)}"


def _ruler(size: float, unit: str) -> dict[str, str]:
    """Return an error's position on a logarithmic ruler, and as text."""
    low, high = _DECADES
    at = min(max((math.log10(size) - low) / (high - low), 0.0), 1.0) if math.isfinite(size) else 1.0
    return {
        "at": f"{100 * at:.1f}%",
        "edge": f"{100 * -low / (high - low):.1f}%",
        "label": f"{size:.2g}x the {unit}",
        "unit": unit,
    }


def _influence(
    flows: Mapping[str, Any],
    other: Mapping[str, Any] | None = None,
    held: Collection[str] = (),
    violated: Collection[str] | None = None,
    unjudged: Collection[str] = (),
) -> dict[str, Any] | None:
    """Return the table of dependencies; entries that differ from ``other`` are marked.

    ``held``, ``violated`` and ``unjudged`` are as in :func:`bnverify.report.matrix.matrix`.
    """
    if not flows.get("matrix"):
        return None
    shown = matrix(flows["matrix"], held, violated, unjudged)
    compared = matrix(other["matrix"]).rows if other and other.get("matrix") else shown.rows
    rows = []
    for output, kinds in shown.rows.items():
        before = compared.get(output, kinds)
        cells = []
        for index, kind in enumerate(kinds):
            changed = index < len(before) and before[index] != kind
            css = "bad" if kind in {"leaks", "missing"} else "changed" if changed else ""
            mark = f"{UNICODE.flow[kind]}{' ≠' if changed else ''}"
            cells.append({"mark": mark, "css": css, "title": LEGEND[kind]})
        rows.append({"name": output, "cells": cells})
    lines = legend(shown.kinds(), UNICODE.flow)
    lines += ["≠  differs from the other environment"] if other else []
    return {"inputs": shown.inputs, "rows": rows, "scope": scope(flows), "legend": lines}


# An upgrade.


def _of_upgrades(judgements: Sequence[Judgement]) -> dict[str, Any]:
    several = len(judgements) > 1
    return {
        "title": f"{judgements[0].comparison.subject}: upgrade",
        "upgrades": [
            _upgrade(judgement, f" ({judgement.new})" if several else "")
            for judgement in judgements
        ],
        "heat": _heat(judgements),
    }


def _upgrade(judgement: Judgement, title: str) -> dict[str, Any]:
    from bnverify.upgrade.policy import KINDS

    comparison, verdict = judgement.comparison, judgement.verdict
    failing = {d.kind for d in verdict.failing}
    counts = {kind: len(comparison.of(kind)) for kind in KINDS}
    shown = next((d for d in verdict.failing if d.witness), None)
    sides = comparison.old["influence"], comparison.new["influence"]
    notes = list(comparison.notes)
    notes += [f"accepted, but no longer occurs: {e.kind}: {e.reason}" for e in verdict.stale]
    notes += [f"expired on {e.expires}: {e.kind}: {e.reason}" for e in verdict.expired]
    return {
        "title": title,
        "name": comparison.subject,
        "ok": judgement.ok,
        "sign": _OK if judgement.ok else _BAD,
        "verdict": judgement.headline(),
        "old": judgement.old,
        "new": judgement.new,
        "moved": judgement.changed_versions(),
        "classes": [
            {
                "name": kind,
                "count": count,
                "sign": _BAD if kind in failing else _OK if count else "",
                "css": "bad" if kind in failing else "" if count else "none",
            }
            for kind, count in counts.items()
        ],
        "cards": _cards(judgement),
        "witness": {"what": _named(shown), "script": shown.witness} if shown else None,
        "influence": [
            {"name": judgement.old, "table": _influence(sides[0], sides[1])},
            {"name": judgement.new, "table": _influence(sides[1], sides[0])},
        ]
        if any(side.get("matrix") for side in sides)
        else [],
        "costs": _costs(judgement),
        "notes": notes,
    }


def _cards(judgement: Judgement) -> dict[str, Any]:
    """Return the differences as cards; leaves with the same difference share one.

    Rounding differences are collapsed: the table of leaves shows their sizes.
    """
    grouped: dict[tuple[str, str, str, str], list[Difference]] = {}
    for mark, difference, why in judgement.marked():
        grouped.setdefault((mark, why, difference.kind, difference.text), []).append(difference)
    cards = [_card(judgement, mark, why, found) for (mark, why, *_), found in grouped.items()]
    beyond = [card for card in cards if card["kind"] != "rounding" or card["failing"]]
    shown = beyond[:_SHOWN]
    rest = [card for card in cards if card not in shown]
    count = sum(len(card["leaves"]) or 1 for card in rest)
    rounding = all(card["kind"] == "rounding" for card in rest)
    leaves = "1 leaf differs" if count == 1 else f"{count} leaves differ"
    return {
        "shown": shown,
        "rest": rest,
        "rest_title": f"{leaves} by rounding only" if rounding else f"and {count} more",
        "nothing_beyond": not beyond and bool(cards),
    }


def _card(
    judgement: Judgement, mark: str, why: str, differences: Sequence[Difference]
) -> dict[str, Any]:
    first, failing = differences[0], mark == "failing"
    place, ruler = None, None
    if failing and len(differences) == 1 and first.kind == "meaning":
        distance = judgement.comparison.distances.get(first.leaf or "")
        place = distance.simplest if distance is not None else None
        ruler = _ruler(first.size, "rounding noise") if first.size else None
    explanation = first.explanation
    return {
        "kind": first.kind,
        "failing": failing,
        "mark": _MARKS[mark],
        "leaves": [d.leaf for d in differences if d.leaf],
        "was": f"{place.old:.5g}" if place is not None else "",
        "now": f"{place.new:.5g}" if place is not None else "",
        "ruler": ruler,
        "explanation": explanation[:1].upper() + explanation[1:],
        "text": first.text.removesuffix(f"; {explanation}") if explanation else first.text,
        "why": why,
    }


def _named(difference: Difference) -> str:
    leaf = difference.leaf
    if not leaf or difference.text.startswith(leaf):
        return difference.text
    return f"{leaf}: {difference.text}"


def _costs(judgement: Judgement) -> list[dict[str, str]]:
    from bnverify.report.upgrade import UNITS

    old, new = judgement.comparison.old["costs"], judgement.comparison.new["costs"]
    beyond = {cost: bound for cost, _, bound in judgement.verdict.exceeded}
    return [
        {
            "name": f"{cost.replace('_', ' ')}, {UNITS[cost]}",
            "old": f"{old[cost]:.3g}",
            "new": f"{new[cost]:.3g}",
            "ratio": f"{ratio:.2f}",
            "bound": f"{_BAD} bound {beyond[cost]:g}" if cost in beyond else "",
        }
        for cost, ratio in judgement.comparison.costs.items()
    ]


# The heat map of upgrades: one row per leaf or law, one column per release, in units of the noise.


def _heat(judgements: Sequence[Judgement]) -> dict[str, Any] | None:
    columns = [_sizes(judgement) for judgement in judgements]
    leaves = list(dict.fromkeys(leaf for column in columns for leaf in column))
    if not leaves:
        return None
    verdicts = [judgement.comparison.new["laws"] for judgement in judgements]
    laws = list(dict.fromkeys(law for laws in verdicts for law in laws))
    broken = [law for law in laws if any(_status(each, law) == "violated" for each in verdicts)]

    def row(law: str) -> dict[str, Any]:
        cells = [_law_cell(each.get(law)) for each in verdicts]
        return {"name": law.replace("_", " "), "cells": cells}

    if len(judgements) == 1:
        bars = [_heat_bar(leaf, columns[0][leaf]) for leaf in leaves]
        bars += [_heat_bar(law, _law_cell(verdicts[0][law])) for law in broken]
        plot = _bars(bars, "rounding noise")
    else:
        plot = None
    return {
        "plot": plot,
        "releases": [judgement.new for judgement in judgements],
        "leaves": [
            {"name": leaf, "cells": [column.get(leaf, _cell("")) for column in columns]}
            for leaf in leaves
        ],
        "broken": [row(law) for law in broken],
        "holding": [row(law) for law in laws if law not in broken],
    }


def _cell(
    text: str, *, bad: bool = False, shade: float = 0.0, title: str = "", size: float = 0.0
) -> dict[str, Any]:
    return {"text": text, "bad": bad, "shade": f"{shade:.2f}", "title": title, "size": size}


def _heat_bar(name: str, cell: Mapping[str, Any]) -> dict[str, Any]:
    return _bar(name, cell["text"], cell["size"], bad=cell["bad"])


def _status(laws: Mapping[str, Any], law: str) -> str:
    return str(laws[law]["status"]) if law in laws else ""


def _law_cell(verdict: Mapping[str, Any] | None) -> dict[str, Any]:
    if verdict is None:
        return _cell("")
    status, residual = str(verdict["status"]), verdict["residual"]
    number = f" {residual:.2g}" if isinstance(residual, float) and residual else ""
    sign = UNICODE.status.get(status, "?")
    size = residual if isinstance(residual, float) else 0.0
    return _cell(f"{sign}{number}", bad=status == "violated", title=status, size=size)


def _sizes(judgement: Judgement) -> dict[str, dict[str, Any]]:
    """Return leaf -> its cell in the heat map."""
    cells = {}
    for leaf, distance in judgement.comparison.distances.items():
        size = distance.worst.size if distance.worst else 0.0
        cells[leaf] = _size_cell(size) if distance.compared else _cell("?")
    for difference in judgement.comparison.differences:
        if difference.leaf and difference.leaf.startswith("init/"):
            bad = difference.kind == "meaning"
            cells[difference.leaf] = _cell(_BAD if bad else "~", bad=bad)
        elif difference.kind in {"structure", "dtype"} and difference.leaf:
            cells[difference.leaf] = _cell(f"{_BAD} {difference.kind}", bad=True)
    return cells


def _size_cell(size: float) -> dict[str, Any]:
    if size == 0:
        return _cell("=")
    decades = _LARGEST if math.isinf(size) else max(0.0, math.log10(size))
    shade = 0.06 + (0.5 * min(decades / _LARGEST, 1.0) if size > 1 else 0.0)
    number = "∞" if math.isinf(size) else f"{size:.2g}"
    beyond = size > 1
    text = f"{_BAD} {number}" if beyond else number
    return _cell(text, bad=beyond, shade=shade, size=size)


# An audit.


def _of_audit(audit: Audit) -> dict[str, Any]:
    from bnverify.report.audit import summary

    rows = [
        {
            "name": finding.fault,
            "group": finding.mistake,
            "bad": finding.verdict == "missed",
            "verdict": ": ".join(filter(None, (finding.verdict, finding.ended))),
            "what": finding.sentence,
        }
        for finding in audit.findings
    ]
    ok = not audit.of("missed")
    return {
        "title": f"{audit.command}: audit",
        "name": audit.command,
        "verdict": summary(audit),
        "ok": ok,
        "sign": _OK if ok else _BAD,
        "rows": rows,
    }
