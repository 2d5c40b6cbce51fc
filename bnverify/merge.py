"""Merging the reports of all shards of a check or an audit into one."""

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

SAME = ("bnverify", "subject", "command", "targets", "profile", "seed")
"""Fields that must agree in all shards that have them."""


def merge(texts: Mapping[str, str]) -> Merged:
    """Return the report that a single run would have made.

    The search for counterexamples depends on the laws of a shard, so with a profile that runs several stacks
    for each shape, the number of cases or a residual may differ from those of a single run.

    Args:
        texts: file name -> its JSON report; all shards of one ``check`` or ``audit``.

    Raises:
        UsageError: a file is not a shard, or the shards do not belong together.
    """
    parts = {name: _read(name, text) for name, text in texts.items()}
    found: dict[Shard, str] = {}
    for name, part in parts.items():
        shard = Shard.parse(part["shard"])
        if shard in found:
            raise UsageError(f"{found[shard]} and {name} are both shard {part['shard']}")
        found[shard] = name
    _refuse_differences(parts)
    count = next(iter(found)).count
    whole = [Shard(index, count) for index in range(1, count + 1)]
    missing = [f"{shard.index}/{count}" for shard in whole if shard not in found]
    if missing:
        raise UsageError(f"missing: shard {', '.join(missing)}")
    ordered = [parts[found[shard]] for shard in whole]
    return _report(ordered) if "results" in ordered[0] else _audit(ordered)


def _read(name: str, text: str) -> Part:
    try:
        data = json.loads(text)
    except ValueError as error:
        raise UsageError(f"{name} is not JSON: {error}") from None
    if not isinstance(data, dict) or not {"results", "findings"} & set(data):
        raise UsageError(f"{name} was not written by `bnverify check` or `bnverify audit`")
    if "shard" not in data or "of" not in data:
        raise UsageError(f"{name} is not a shard: it was written without --shard K/N")
    return data


def _work(part: Part) -> dict[str, Any]:
    """Return what must agree in all shards, keyed by its name in messages."""
    return {
        "kind": "check" if "results" in part else "audit",
        "number of shards": Shard.parse(part["shard"]).count,
        **{field: part.get(field) for field in SAME},
        **part.get("versions", {}),
        "selection": part["of"],
    }


def _refuse_differences(parts: Mapping[str, Part]) -> None:
    (first, one), *others = ((name, _work(part)) for name, part in parts.items())
    for name, other in others:
        for field in {**one, **other}:
            here, there = one.get(field), other.get(field)
            if here != there:
                said = "" if field == "selection" else f": {here} and {there}"
                raise UsageError(f"{first} and {name} differ in {field}{said}")


def _all(parts: Sequence[Part], field: str, key: str) -> list[Any]:
    """Return the results of all parts, in the order of a single run."""
    found = {each[key]: each for part in parts for each in part[field]}
    names = parts[0]["of"]
    missing = [name for name in names if name not in found]
    if missing:
        raise UsageError(f"no shard contains {missing[0]}")
    return [found[name] for name in names]


def _report(parts: Sequence[Part]) -> Report:
    reports = [Report.from_json(part) for part in parts]
    results = [Evidence.from_json(each) for each in _all(parts, "results", "law")]
    # The cause of a violation is diagnosed from the violations of all shards.
    results = [replace(each, cause=None) if each.law in STEP_LAWS else each for each in results]
    influence = next((report.influence for report in reports if report.influence), {})
    return replace(
        reports[0],
        results=tuple(diagnosed(results, influence)),
        cases=max(report.cases for report in reports),  # the shards draw the same cases
        seconds=sum(report.seconds for report in reports),
        influence=influence,
        notes=tuple(dict.fromkeys(note for report in reports for note in report.notes)),
    )


def _audit(parts: Sequence[Part]) -> Audit:
    findings = tuple(Finding(**each) for each in _all(parts, "findings", "fault"))
    seconds = max(part["seconds"] for part in parts)  # each also ran the tests without a fault
    return Audit(parts[0]["command"], tuple(parts[0]["targets"]), seconds, findings)
