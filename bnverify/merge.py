"""The findings of all shards of one piece of work as the findings of one machine."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

from bnverify.audit.run import Audit, Finding
from bnverify.diagnose import diagnosed
from bnverify.errors import UsageError
from bnverify.evidence import Evidence, Report
from bnverify.laws import STEP_LAWS
from bnverify.profile import Shard

Part: TypeAlias = Mapping[str, Any]
Merged: TypeAlias = Report | Audit

SAME = ("bnverify", "versions", "subject", "command", "targets", "profile", "seed", "of")
"""What all shards of one piece of work say alike, where they say it."""


def merge(texts: Mapping[str, str]) -> Merged:
    """Return what one machine would have found.

    The laws that a shard checks steer where it looks for bad cases. So where a profile looks more
    than once at a shape, a number of cases or a residual may differ from the one machine's.

    Args:
        texts: file name -> what ``--json`` wrote there, all shards of one ``check`` or ``audit``.

    Raises:
        UsageError: in one line, which files are no shards, or not all those of one piece of work.
    """
    parts = {name: _read(name, text) for name, text in texts.items()}
    ordered = _in_order(parts)
    kinds = {_kind(part) for part in ordered}
    if len(kinds) > 1:
        raise UsageError(f"shards of different work: {' and '.join(sorted(kinds))}")
    for field in SAME:
        _same(field, parts)
    return _report(ordered) if "results" in ordered[0] else _audit(ordered)


def _read(name: str, text: str) -> Part:
    try:
        data = json.loads(text)
    except ValueError as error:
        raise UsageError(f"{name} is not JSON: {error}") from None
    if not isinstance(data, dict) or not {"results", "command"} & set(data):
        raise UsageError(f"{name} was not written by `bnverify check` or `bnverify audit`")
    if "shard" not in data or "of" not in data:
        raise UsageError(f"{name} is no shard: it was written without --shard K/N")
    return data


def _in_order(parts: Mapping[str, Part]) -> list[Part]:
    """Return the parts by their number; refuse them where they are not one of each."""
    found: dict[int, str] = {}
    shards = {name: Shard.parse(part["shard"]) for name, part in parts.items()}
    (first, one), *_ = shards.items()
    for name, shard in shards.items():
        if shard.count != one.count:
            raise UsageError(f"{first} is shard {one}, {name} is {shard}: not of the same work")
        if shard.index in found:
            raise UsageError(f"{found[shard.index]} and {name} are both shard {shard}")
        found[shard.index] = name
    missing = [f"{k}/{one.count}" for k in range(1, one.count + 1) if k not in found]
    if missing:
        raise UsageError(f"missing: shard {', '.join(missing)}")
    return [parts[found[index]] for index in sorted(found)]


def _kind(part: Part) -> str:
    return "check" if "results" in part else "audit"


def _same(field: str, parts: Mapping[str, Part]) -> None:
    (first, one), *others = parts.items()
    for name, part in others:
        if part.get(field) != one.get(field):
            here, there = one.get(field), part.get(field)
            if isinstance(here, dict) and isinstance(there, dict):
                field = next(key for key in {**here, **there} if here.get(key) != there.get(key))
                here, there = here.get(field), there.get(field)
            if field == "of":
                raise UsageError(f"{first} and {name} are parts of different selections")
            raise UsageError(f"{first} and {name} differ in {field}: {here} and {there}")


def _whole(parts: Sequence[Part], field: str, key: str) -> list[Any]:
    """Return what all parts found, in the order of the one machine."""
    found = {each[key]: each for part in parts for each in part[field]}
    names = parts[0]["of"]
    missing = [name for name in names if name not in found]
    if missing:
        raise UsageError(f"no shard says anything of {missing[0]}")
    return [found[name] for name in names]


def _report(parts: Sequence[Part]) -> Report:
    reports = [Report.from_json(part) for part in parts]
    results = [Evidence.from_json(each) for each in _whole(parts, "results", "law")]
    influence = next((report.influence for report in reports if report.influence), {})
    notes = dict.fromkeys(note for report in reports for note in report.notes)
    return replace(
        reports[0],
        # A mistake is recognised by what is broken in all shards. Laws beyond one step know theirs by
        # themselves.
        results=tuple(
            diagnosed(
                [replace(each, cause=None) if each.law in STEP_LAWS else each for each in results],
                influence,
            )
        ),
        cases=max(report.cases for report in reports),  # they draw the same ones
        seconds=sum(report.seconds for report in reports),
        influence=influence,
        notes=tuple(notes),
    )


def _audit(parts: Sequence[Part]) -> Audit:
    findings = tuple(Finding(**each) for each in _whole(parts, "findings", "fault"))
    seconds = max(part["seconds"] for part in parts)  # each ran the tests as they are, too
    return Audit(parts[0]["command"], tuple(parts[0]["targets"]), seconds, findings)
