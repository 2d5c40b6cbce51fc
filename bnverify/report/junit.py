"""Reports as JUnit XML: one test case for each rule."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING
from xml.etree import ElementTree as ET

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bnverify.report.findings import Finding, Findings

_NO_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def junit(reports: Sequence[Findings]) -> str:
    """Return reports as XML text, one test suite for each."""
    root = ET.Element("testsuites")
    for report in reports:
        _suite(root, report)
    ET.indent(root)
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{ET.tostring(root, encoding="unicode")}\n'


def _suite(root: ET.Element, report: Findings) -> None:
    rules: dict[str, list[Finding]] = {}
    for finding in report.all:
        rules.setdefault(finding.rule, []).append(finding)
    suite = ET.SubElement(root, "testsuite", name=_clean(report.name), errors="0")
    failures = skipped = 0
    for rule, found in rules.items():
        classname = _clean(f"{report.name}.{found[0].group}")
        case = ET.SubElement(suite, "testcase", classname=classname, name=_clean(rule))
        failed = [finding for finding in found if finding.outcome == "failed"]
        if failed:
            failures += 1
            failure = ET.SubElement(case, "failure", message=_clean(_line(failed[0])))
            if failed[0].cause:
                failure.set("type", failed[0].cause)
            failure.text = _clean("\n\n".join(map(_text, failed)))
        elif all(finding.outcome == "skipped" for finding in found):
            skipped += 1
            ET.SubElement(case, "skipped", message=_clean(found[0].message))
        else:
            ET.SubElement(case, "system-out").text = _clean("\n".join(map(_line, found)))
    suite.set("tests", str(len(rules)))
    suite.set("failures", str(failures))
    suite.set("skipped", str(skipped))
    suite.set("time", f"{report.seconds:.3f}")


def _line(finding: Finding) -> str:
    leaf = finding.leaf if finding.leaf not in finding.message else ""
    return " ".join(f"{leaf} {finding.message}".split())


def _text(finding: Finding) -> str:
    parts = (finding.claim, _line(finding), finding.details, finding.remedy, finding.script)
    return "\n".join(filter(None, parts))


def _clean(text: str) -> str:
    return _NO_XML.sub("?", text)
