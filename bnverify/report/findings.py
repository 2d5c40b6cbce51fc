"""The content of any report as a list of findings, for machine-readable formats.

A finding is about a rule: a law of a check, a class of difference of an upgrade, a fault of an
audit.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from math import prod
from typing import TYPE_CHECKING, Literal

from bnverify import target as targets
from bnverify.laws import LAWS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bnverify.audit.run import Audit
    from bnverify.evidence import Cause, Counterexample, Evidence, Report
    from bnverify.report.formats import AnyReport
    from bnverify.upgrade.policy import Judgement


# The violations of a check by likely cause: one mistake usually breaks several laws.


@dataclass(frozen=True)
class Group:
    """Violations with one likely cause.

    Attributes:
        cause: the mistake; None if unknown, in a group of one violation.
        violations: at least one, in the order of the laws.
    """

    cause: Cause | None
    violations: tuple[Evidence, ...]

    @property
    def title(self) -> str:
        """The law's name; for several laws, the cause and their number."""
        if self.cause is None or len(self.violations) == 1:
            return self.violations[0].law
        return f"{self.cause.mistake}: {len(self.violations)} laws violated"

    @property
    def shown(self) -> Counterexample | None:
        """The counterexample with the simplest case."""
        simplest = self._simplest
        return simplest.counterexample if simplest is not None else None

    @property
    def line(self) -> str | None:
        """The first known line of the user's code among the violations."""
        return next((each.line for each in self.violations if each.line), None)

    @property
    def which(self) -> str:
        """The law of the counterexample, to append to a heading; empty if there is one law."""
        simplest = self._simplest
        return f" {simplest.law}" if simplest is not None and len(self.violations) > 1 else ""

    @property
    def _simplest(self) -> Evidence | None:
        shown = [each for each in self.violations if each.counterexample is not None]
        return min(shown, key=_simplicity, default=None)


def _simplicity(evidence: Evidence) -> tuple[bool, bool, int]:
    """Return a sort key that puts a shrunk case first, and a small one.

    The counterexamples of witness and structural laws are arbitrary cases.
    """
    shape = evidence.shape
    return evidence.mismatch is None, shape is None, prod(shape or ())


def groups(report: Report) -> list[Group]:
    """Return the violations grouped by cause, the cause with most violations first."""
    found: dict[str, list[Evidence]] = {}
    for evidence in report.violated:
        name = evidence.cause.mistake if evidence.cause is not None else f"law {evidence.law}"
        found.setdefault(name, []).append(evidence)
    ordered = sorted(found.values(), key=len, reverse=True)
    return [Group(violations[0].cause, tuple(violations)) for violations in ordered]


# Any report as findings.


@dataclass(frozen=True)
class Finding:
    """What is known about one rule, or one violation of it.

    Attributes:
        rule: the rule's name.
        group: the group of the rule, such as a family of laws.
        outcome: "failed" if it should fail a build, "skipped" if nothing is known.
        message: the result, in one line.
        leaf: the leaf concerned; may be empty.
        claim: what the rule states; may be empty.
        details: more about a failure.
        cause: the name of the likely mistake; empty if unknown.
        remedy: the likely cause and its fix, as text; empty if unknown.
        script: a script that reproduces it; may be empty.
        place: the file and line in the user's code; None if unknown.
        noted: whether to report it although it did not fail.
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
    """A report as findings.

    Attributes:
        name: what was checked.
        verdict: the verdict, in one line.
        ok: whether nothing failed.
        version: the version of bnverify.
        seconds: the time taken.
        all: the findings; those with the same likely cause are adjacent.
    """

    name: str
    verdict: str
    ok: bool
    version: str
    seconds: float
    all: tuple[Finding, ...]

    @property
    def failures(self) -> list[list[Finding]]:
        """The failed findings, grouped by likely cause."""
        failed = [finding for finding in self.all if finding.outcome == "failed"]
        # Findings with one cause are adjacent; one without a known cause is its own group.
        runs = groupby(enumerate(failed), lambda each: each[1].cause or each[0])
        return [[finding for _, finding in run] for _, run in runs]


def findings(report: AnyReport) -> Findings:
    """Return the findings of any report."""
    from bnverify.evidence import Report
    from bnverify.upgrade.policy import Judgement

    if isinstance(report, Report):
        return _of_check(report)
    if isinstance(report, Judgement):
        return _of_upgrade(report)
    return _of_audit(report)


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
    """Return the finding of a law; ``line`` is that of its cause, a fallback for its own."""
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
    from bnverify.upgrade.policy import KINDS

    target = judgement.comparison.new.get("target")
    place = targets.line(target) if target else None
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
            noted=difference.kind != "rounding",  # one for each leaf would hide the others
        )
    for cost, ratio, bound in judgement.verdict.exceeded:
        seen.add("cost")
        message = f"{cost} is {ratio:.2f}x the old value, above the bound of {bound:g}x"
        yield Finding("cost", "upgrade", "failed", message, place=place)
    for kind in (*KINDS, "cost"):
        if kind not in seen:
            yield Finding(kind, "upgrade", "passed", "no difference")


def _of_audit(audit: Audit) -> Findings:
    from bnverify.mistakes import MISTAKES
    from bnverify.report.audit import summary

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
            ": ".join(filter(None, (finding.verdict, finding.ended, finding.sentence))),
            claim=MISTAKES[finding.mistake].title,
            place=place,
        )
        for finding in audit.findings
    )
    seconds = audit.seconds + sum(finding.seconds for finding in audit.findings)
    verdict, ok = summary(audit), not audit.of("missed")
    return Findings(audit.command, verdict, ok, _version(), seconds, found)


def _version() -> str:
    from bnverify import __version__

    return str(__version__)
