"""What any report says, one finding a rule, for the formats that machines read.

A rule is a law of a check, a class of change of an upgrade, a fault of an audit.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Literal

from bnverify import target as targets
from bnverify.laws import LAWS
from bnverify.report.violations import groups

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bnverify.evidence import Evidence, Report
    from bnverify.mutants.audit import Audit
    from bnverify.mutants.users_tests import TestsAudit
    from bnverify.report.formats import Told
    from bnverify.upgrade.judgement import Judgement


@dataclass(frozen=True)
class Finding:
    """What is known about one rule, or one thing that breaks it.

    Attributes:
        rule: its name.
        group: what it belongs to: a family of laws.
        outcome: "failed" where it should stop a build, "skipped" where nothing is known.
        message: what was found, in one line.
        leaf: of which leaf; may be empty.
        claim: what the rule says; may be empty.
        details: more about a failure.
        cause: the name of the likely mistake; empty where none is known.
        remedy: what was done and how to fix it; likewise.
        script: what shows it; may be empty.
        place: the file and the line that it leads to; None: unknown.
        noted: whether it is worth telling although it did not fail.
    """

    rule: str
    group: str
    outcome: Literal["passed", "failed", "skipped"]
    message: str
    leaf: str = ""
    claim: str = ""
    details: str = ""
    cause: str = ""
    remedy: str = ""
    script: str = ""
    place: tuple[str, int] | None = None
    noted: bool = False


@dataclass(frozen=True)
class Findings:
    """A report.

    Attributes:
        name: what was looked at.
        verdict: in one line.
        ok: whether nothing failed.
        version: of bnverify.
        seconds: that it took.
        all: the findings; those with one likely cause follow each other.
    """

    name: str
    verdict: str
    ok: bool
    version: str
    seconds: float
    all: tuple[Finding, ...]

    @property
    def failures(self) -> list[list[Finding]]:
        """The findings that should stop a build, those with one likely cause together."""
        failed = [finding for finding in self.all if finding.outcome == "failed"]
        # Those with one cause follow each other; one without a known cause stands alone.
        runs = groupby(enumerate(failed), lambda each: each[1].cause or each[0])
        return [[finding for _, finding in run] for _, run in runs]


def findings(told: Told) -> Findings:
    """Return the findings of a report of any kind."""
    from bnverify.evidence import Report
    from bnverify.mutants.audit import Audit
    from bnverify.upgrade.judgement import Judgement

    if isinstance(told, Report):
        return _of_check(told)
    if isinstance(told, Judgement):
        return _of_upgrade(told)
    return _of_audit(told) if isinstance(told, Audit) else _of_tests(told)


def _of_check(report: Report) -> Findings:
    return Findings(
        report.subject,
        report.verdict,
        report.ok,
        report.versions.get("bnverify", ""),
        report.seconds,
        (
            *(_of_law(each, group.line) for group in groups(report) for each in group.violations),
            *(_of_law(evidence) for evidence in report.results if evidence.status != "violated"),
        ),
    )


def _of_law(evidence: Evidence, line: str | None = None) -> Finding:
    """Return the finding of a law; ``line`` is where its cause leads to, if it has no line itself."""
    claim = LAWS[evidence.law].claim if evidence.law in LAWS else ""
    if evidence.status != "violated":
        passed = evidence.status in {"proved", "held"}
        reason = evidence.reason or f"in {evidence.cases:,} cases"
        message = f"{evidence.status}: {reason}"
        outcome: Literal["passed", "skipped"] = "passed" if passed else "skipped"
        return Finding(evidence.law, evidence.family, outcome, message, claim=claim)
    shown = evidence.counterexample
    place = _place(evidence.line or line)
    if place is None and shown is not None and shown.target is not None:
        place = targets.line(shown.target)
    cause = evidence.cause
    return Finding(
        evidence.law,
        evidence.family,
        "failed",
        ", ".join(filter(None, (evidence.reason, evidence.extent))),
        evidence.mismatch.leaf if evidence.mismatch is not None else "",
        claim,
        evidence.further,
        cause.mistake if cause is not None else "",
        f"Likely cause: {cause.statement}. Fix: {cause.known.fix}." if cause is not None else "",
        shown.script if shown is not None else "",
        place,
    )


def _place(line: str | None) -> tuple[str, int] | None:
    path, _, number = (line or "").rpartition(":")
    return (path, int(number)) if path and number.isdecimal() else None


def _of_upgrade(judgement: Judgement) -> Findings:
    comparison = judgement.comparison
    return Findings(
        f"{comparison.subject} from {judgement.old} to {judgement.new}",
        f"{comparison.subject}: {judgement.headline()}",
        judgement.ok,
        str(comparison.new["bnverify"]),
        judgement.seconds,
        tuple(_of_differences(judgement)),
    )


def _of_differences(judgement: Judgement) -> Iterator[Finding]:
    from bnverify.upgrade.difference import KINDS

    told = judgement.comparison.new.get("target")
    place = targets.line(told) if told else None
    seen: set[str] = set()
    for mark, difference, why in judgement.marked():
        seen.add(difference.kind)
        message = f"{difference.text}; accepted: {why}" if why else difference.text
        failed = mark == "failing"
        yield Finding(
            difference.kind,
            "upgrade",
            "failed" if failed else "passed",
            message,
            difference.leaf or "",
            script=difference.witness or "",
            place=place,
            noted=difference.kind != "rounding",  # one a leaf would bury the others
        )
    for cost, ratio, bound in judgement.verdict.exceeded:
        seen.add("cost")
        message = f"{cost} is {ratio:.2f} times the old, the bound is {bound:g}"
        yield Finding("cost", "upgrade", "failed", message, place=place)
    for kind in (*KINDS, "cost"):
        if kind not in seen:
            yield Finding(kind, "upgrade", "passed", "nothing differs")


def _of_audit(audit: Audit) -> Findings:
    from bnverify.report.audit import reason_of, summary

    def one(each: Audit) -> Iterator[Finding]:
        for finding in each.findings:
            lost = ", ".join(finding.lost)
            missed = not finding.killed and not finding.survives
            laws = ", ".join(finding.laws) or finding.refusal
            message = f"noticed by {laws}" if finding.killed else reason_of(finding)
            if lost:
                message = f"no longer noticed by {lost}"
            outcome: Literal["passed", "failed"] = "failed" if missed or lost else "passed"
            yield Finding(finding.mutant, finding.family, outcome, message)

    seconds = sum(finding.seconds for finding in audit.findings)
    ok = not audit.unexplained and not audit.lost
    return Findings("bnverify audit", summary(audit), ok, _version(), seconds, tuple(one(audit)))


def _of_tests(audit: TestsAudit) -> Findings:
    from bnverify.mistakes import MISTAKES
    from bnverify.report.audit import tests_summary

    place = next((at for each in audit.targets if (at := targets.line(each))), None)
    outcomes: dict[str, Literal["passed", "failed", "skipped"]] = {
        "noticed": "passed",
        "missed": "failed",
        "not reached": "skipped",
    }
    found = tuple(
        Finding(
            finding.fault,
            finding.mistake,
            outcomes[finding.verdict],
            f"{finding.verdict}: {finding.sentence}",
            claim=MISTAKES[finding.mistake].title,
            place=place,
        )
        for finding in audit.findings
    )
    seconds = audit.seconds + sum(finding.seconds for finding in audit.findings)
    verdict, ok = tests_summary(audit), not audit.of("missed")
    return Findings(audit.command, verdict, ok, _version(), seconds, found)


def _version() -> str:
    from bnverify import __version__

    return str(__version__)
