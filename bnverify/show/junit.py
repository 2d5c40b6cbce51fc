"""What an upgrade changed, as JUnit XML: one test case for each class of change."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING
from xml.sax.saxutils import escape, quoteattr

from bnverify.upgrade.difference import KINDS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bnverify.upgrade.judgement import Judgement

_NO_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def junit(judgements: Sequence[Judgement]) -> str:
    """Return the XML text of all judgements, one test suite each."""
    suites = "".join(_suite(judgement) for judgement in judgements)
    return f'<?xml version="1.0" encoding="UTF-8"?>\n<testsuites>\n{suites}</testsuites>\n'


def _suite(judgement: Judgement) -> str:
    name = f"{judgement.comparison.subject} from {judgement.old} to {judgement.new}"
    cases, failures = [], 0
    for kind in (*KINDS, "cost"):
        problems = _problems(judgement, kind)
        failures += bool(problems)
        inner = ""
        if problems:
            text = "\n\n".join(problems)
            first = problems[0].splitlines()[0]
            inner = f"<failure message={_quoted(first)}>{_escaped(text)}</failure>"
        elif told := [d.text for d in judgement.comparison.differences if d.kind == kind]:
            inner = f"<system-out>{_escaped(chr(10).join(told))}</system-out>"
        cases.append(
            f"    <testcase classname={_quoted(name)} name={_quoted(kind)}>{inner}</testcase>"
        )
    return (
        f'  <testsuite name={_quoted(name)} tests="{len(cases)}" failures="{failures}" '
        f'errors="0" time="{judgement.seconds:.3f}">\n' + "\n".join(cases) + "\n  </testsuite>\n"
    )


def _problems(judgement: Judgement, kind: str) -> list[str]:
    if kind == "cost":
        return [
            f"{cost} is {ratio:.2f} times the old, the bound is {bound:g}"
            for cost, ratio, bound in judgement.verdict.exceeded
        ]
    return [
        f"{d.leaf or ''} {d.text}".strip() + (f"\n\n{d.witness}" if d.witness else "")
        for d in judgement.verdict.failing
        if d.kind == kind
    ]


def _escaped(text: str) -> str:
    return escape(_NO_XML.sub("?", text))


def _quoted(text: str) -> str:
    return quoteattr(_NO_XML.sub("?", text))
