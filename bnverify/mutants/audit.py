"""Verify the verifier: hold every fault of the catalogue to the laws and see which ones notice."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from bnverify.check import Check
from bnverify.errors import first_line
from bnverify.evidence import Report
from bnverify.mutants import Mutant
from bnverify.profile import Profile, ProfileName


@dataclass(frozen=True)
class Finding:
    """What the laws say about one fault.

    Attributes:
        mutant: its name.
        family: its family.
        laws: the laws that it breaks.
        refusal: how jax or flax refused it, where they must; empty where it ran.
        seconds: how long the check took.
        shape: (N, D) of the smallest counterexample; None where no case is needed.
        diagnosed: whether the mistake that is named first, at the first broken law, is the fault's own.
        survives: the stated reason why nothing need catch it.
        lost: the laws that must notice it and did not.
        failure: how the check itself broke down over it, which is no verdict; empty: it did not.
    """

    mutant: str
    family: str
    laws: tuple[str, ...]
    refusal: str
    seconds: float
    shape: tuple[int, int] | None
    diagnosed: bool
    survives: str
    lost: tuple[str, ...] = ()
    failure: str = ""

    @property
    def killed(self) -> bool:
        """Whether a law noticed, or the libraries refused the step."""
        return bool(self.laws or self.refusal)


@dataclass(frozen=True)
class Audit:
    """The findings on a catalogue."""

    findings: tuple[Finding, ...]

    @property
    def survivors(self) -> tuple[Finding, ...]:
        """The faults that no law noticed."""
        return tuple(finding for finding in self.findings if not finding.killed)

    @property
    def unexplained(self) -> tuple[Finding, ...]:
        """The survivors without a stated reason."""
        return tuple(finding for finding in self.survivors if not finding.survives)

    @property
    def lost(self) -> dict[str, tuple[str, ...]]:
        """Fault -> the laws that must notice it and did not."""
        return {finding.mutant: finding.lost for finding in self.findings if finding.lost}

    def alone(self) -> dict[str, list[str]]:
        """Return law -> the faults that it alone notices."""
        kills: dict[str, list[str]] = {}
        for finding in self.findings:
            if len(finding.laws) == 1:
                kills.setdefault(finding.laws[0], []).append(finding.mutant)
        return kills

    def to_json(self) -> str:
        """Return the findings as JSON text."""
        data = {
            "faults": len(self.findings),
            "killed": sum(finding.killed for finding in self.findings),
            "median_seconds": round(statistics.median(f.seconds for f in self.findings), 3),
            "findings": [asdict(finding) for finding in self.findings],
            "alone": self.alone(),
        }
        return json.dumps(data, indent=2) + "\n"


def audit(
    mutants: Iterable[Mutant],
    profile: ProfileName | Profile = "quick",
    *,
    seed: int = 0,
    listener: Callable[[Finding], None] | None = None,
) -> Audit:
    """Hold each of ``mutants`` to the laws.

    Args:
        mutants: the faults.
        profile: how much to do for each.
        seed: from which the cases are drawn.
        listener: told of each finding.
    """
    findings = []
    for mutant in mutants:
        finding = examine(mutant, profile, seed)
        findings.append(finding)
        if listener is not None:
            listener(finding)
    return Audit(tuple(findings))


def examine(mutant: Mutant, profile: ProfileName | Profile, seed: int) -> Finding:
    """Return what the laws say about one fault."""
    started = time.perf_counter()
    refusal = failure = ""
    report: Report | None = None
    try:
        report = Check(mutant.make(), profile, ignore=("life", "parallel")).run(seed)
    except Exception as error:  # noqa: BLE001 - a fault may raise whatever it likes
        kinds = {kind.__name__ for kind in type(error).__mro__}
        if mutant.raises in kinds:
            refusal = first_line(error)
        else:  # the checker's own trouble kills nothing
            failure = first_line(error)
    broken = report.violated if report else ()
    return Finding(
        mutant=mutant.name,
        family=mutant.family,
        laws=tuple(evidence.law for evidence in broken),
        refusal=refusal,
        seconds=time.perf_counter() - started,
        shape=_smallest([evidence.shape for evidence in broken]),
        diagnosed=any(e.cause and e.cause.mistake == mutant.mistake for e in broken[:1]),
        survives=mutant.survives or mutant.tolerated,
        lost=tuple(sorted(set(mutant.expected) - {evidence.law for evidence in broken})),
        failure=failure,
    )


def _smallest(shapes: Sequence[Any]) -> tuple[int, int] | None:
    known = [shape for shape in shapes if shape is not None]
    return min(known, key=lambda shape: (shape[0] * shape[1], shape)) if known else None
