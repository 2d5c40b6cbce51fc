"""Reports as SARIF 2.1.0 for code scanning: rules, and failures with file and line.

Source: https://docs.oasis-open.org/sarif/sarif/v2.1.0/
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bnverify.report.github import relative

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bnverify.report.findings import Finding, Findings

SCHEMA = "https://json.schemastore.org/sarif-2.1.0.json"


def sarif(reports: Sequence[Findings]) -> str:
    """Return reports as JSON text, one run for each, with failures only."""
    data = {"$schema": SCHEMA, "version": "2.1.0", "runs": [_run(report) for report in reports]}
    return json.dumps(data, indent=2) + "\n"


def _run(report: Findings) -> dict[str, Any]:
    rules = {finding.rule: finding for finding in report.all}
    order = list(rules)
    driver: dict[str, Any] = {"name": "bnverify", "rules": [_rule(each) for each in rules.values()]}
    if report.version and report.version != "unknown":
        driver["version"] = report.version
    failed = [finding for failures in report.failures for finding in failures]
    return {
        "tool": {"driver": driver},
        "automationDetails": {"id": f"bnverify/{report.name}"},
        "invocations": [{"executionSuccessful": True}],
        "results": [_result(finding, order.index(finding.rule)) for finding in failed],
        "properties": {"verdict": report.verdict},
    }


def _rule(finding: Finding) -> dict[str, Any]:
    rule: dict[str, Any] = {"id": finding.rule, "properties": {"tags": [finding.group]}}
    if finding.claim:
        rule["shortDescription"] = {"text": finding.claim}
    return rule


def _result(finding: Finding, index: int) -> dict[str, Any]:
    text = "\n".join(filter(None, (finding.message, finding.details, finding.remedy)))
    result: dict[str, Any] = {
        "ruleId": finding.rule,
        "ruleIndex": index,
        "level": "error",
        "message": {"text": text},
    }
    location: dict[str, Any] = {}
    if finding.place is not None:
        path, line = finding.place
        uri = relative(path)
        absolute = Path(uri).is_absolute()
        artifact = {"uri": Path(uri).as_uri() if absolute else uri}
        location["physicalLocation"] = {
            "artifactLocation": artifact,
            "region": {"startLine": line},
        }
    if finding.leaf:
        location["logicalLocations"] = [{"fullyQualifiedName": finding.leaf, "kind": "member"}]
    if location:
        result["locations"] = [location]
    extra = {"cause": finding.cause, "counterexample": finding.script}
    if properties := {name: text for name, text in extra.items() if text}:
        result["properties"] = properties
    return result
