"""Check a subject: proofs first, then stacked cases by the thousand, then explicit ones."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from importlib import metadata
from typing import Any

from bnverify import compile_cache
from bnverify.case import Case
from bnverify.engine import proof
from bnverify.engine.bench import Bench
from bnverify.engine.counterexample import script
from bnverify.engine.diagnosis import diagnosed
from bnverify.engine.judge import exemption, shown_by, static_facts
from bnverify.engine.remarks import remarks
from bnverify.engine.runs import Runs
from bnverify.evidence import Evidence, Report
from bnverify.laws import LAWS, Law
from bnverify.profile import Profile, named
from bnverify.subject import Subject

Listener = Callable[[str, int, Evidence | None], None]
"""Told as a check goes: what is being done, cases so far, a law's evidence once it is known."""

READ_ONLY = "only the traced step was read"
STOPPED = "stopped at a violation"


class Checker:
    """Holds a subject to the laws, as often as is asked: what one run compiled, the next one uses.

    Args:
        subject: the training step.
        profile: how much to do: "quick", "ci", "nightly" or a Profile.
        select: names of laws to check; empty: all.
        proofs_only: read the traced step and run nothing.

    Attributes:
        subject: as given.
        plan: the profile.
        laws: the laws that are checked.

    Raises:
        ValueError: no profile has that name.
    """

    def __init__(
        self,
        subject: Subject,
        profile: str | Profile = "ci",
        *,
        select: Collection[str] = (),
        proofs_only: bool = False,
    ) -> None:
        self.subject = subject
        self.plan = named(profile)
        self.laws = [law for law in LAWS.values() if not select or law.name in select]
        self._ask = not proofs_only

    def run(
        self,
        seed: int = 0,
        *,
        fail_fast: bool = False,
        target: str | None = None,
        listener: Listener | None = None,
    ) -> Report:
        """Return what is known about each law.

        Args:
            seed: from which all cases are drawn; the same seed gives the same report.
            fail_fast: stop at the first proofs or stack of cases that show a violation.
            target: how the counterexample scripts name the subject: "module:name" or
                "file.py:name".
            listener: told of progress.
        """
        started = time.perf_counter()
        tell: Listener = listener or (lambda doing, cases, evidence: None)
        known: dict[str, Evidence] = {}

        def settle(evidence: Evidence) -> None:
            known[evidence.law] = evidence
            tell("", 0, evidence)

        tell("tracing", 0, None)
        for evidence in self._read:
            settle(evidence)
        idle = "" if self._ask else READ_ONLY
        if fail_fast and any(evidence.status == "violated" for evidence in self._read):
            idle = STOPPED
        runs: list[Runs] = []
        for bench in self._benches:
            if idle:
                for law in bench.laws:
                    settle(Evidence(law.name, law.family, "untriggered", reason=idle))
                continue
            before = sum(part.cases for part in runs)

            def report(doing: str, cases: int, before: int = before) -> None:
                tell(doing, before + cases, None)

            runs.append(Runs(bench, seed, report, fail_fast=fail_fast))
            if bench.laws:
                compile_cache.enable()
                runs[-1].run()
            for evidence in runs[-1].evidence():
                settle(evidence)
        tallies = {name: tally for part in runs for name, tally in part.tallies.items()}
        cases = {name: tally.case for name, tally in tallies.items()}
        results = [self._shown(known[law.name], law, cases, target) for law in self.laws]
        return Report(
            subject=self.subject.name,
            profile=self.plan.name,
            seed=seed,
            results=tuple(diagnosed(results)),
            cases=sum(part.cases for part in runs),
            seconds=time.perf_counter() - started,
            versions=versions(),
            influence=_matrix(self._reading),
            notes=(*self._notes, *(note for part in runs for note in part.notes)),
        )

    @cached_property
    def _reading(self) -> proof.Reading:
        return proof.read(self.subject)

    @cached_property
    def _read(self) -> list[Evidence]:
        """The evidence of every law that needs no run."""
        return list(_without_running(self.laws, self.subject, self._reading, ask=self._ask))

    @cached_property
    def _notes(self) -> list[str]:
        return list(_notes(self.subject, self._reading, ask=self._ask))

    @cached_property
    def _benches(self) -> list[Bench]:
        """What runs the other laws: those about an empty optimizer state on the probe."""
        known = {evidence.law for evidence in self._read}
        running = [law for law in self.laws if law.name not in known]
        reading, probe = self._reading, self._reading.probe
        probed = [law for law in running if probe is not None and "opt_state" in law.requires]
        own = [law for law in running if law not in probed]
        facts = static_facts(self.subject, reading.abstract) if reading.abstract else {}
        benches = [Bench(self.subject, own, facts, self.plan, refusal=reading.refusal)]
        if probe is not None and probed:
            facts = static_facts(probe.subject, probe.abstract)
            few = replace(self.plan, tiny=1, shapes=0, blocks=1, examples=1, large=())
            benches.append(Bench(probe.subject, probed, facts, few, note=proof.PROBED))
        return benches

    def _shown(
        self, evidence: Evidence, law: Law, cases: Mapping[str, Case | None], target: str | None
    ) -> Evidence:
        """Return the evidence with what shows a violation: the way of the flow, and the case."""
        if evidence.status != "violated":
            return evidence
        case, way = cases.get(law.name), proof.explain(law, self._reading)
        return replace(
            evidence,
            reason=f"{evidence.reason}; {way}" if way else evidence.reason,
            counterexample=script(law.name, case, target),
            shape=case.shape if case is not None else None,
        )


def versions() -> dict[str, str]:
    """Return the versions that a verdict depends on."""
    names = ("bnverify", "jax", "jaxlib", "flax", "optax", "numpy", "hypothesis")
    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:  # run from a source tree
            found[name] = "unknown"
    return found


def _without_running(
    laws: Collection[Law], subject: Subject, reading: proof.Reading, *, ask: bool
) -> Iterator[Evidence]:
    """Yield the evidence of every law that needs no run: exempt, structure, proved flows."""
    abstract = reading.abstract
    shown = None
    if abstract is not None:
        shown = shown_by(subject, abstract, reading.probe, ask=ask)
    for law in laws:
        reason = exemption(law, subject, shown) if shown is not None else None
        if reason is not None:
            yield Evidence(law.name, law.family, "exempt", reason=reason)
        elif law.kind == "structure":
            yield proof.judge_structure(law, reading)
        else:
            proved = proof.prove_influence(law, reading)
            if proved is not None:
                yield proved


def _matrix(reading: proof.Reading) -> dict[str, Any]:
    if reading.influence is None:
        return {}
    flows = reading.influence
    return {
        "scope": flows.scope,
        "proved": flows.proved,
        "matrix": {output: sorted(sources) for output, sources in flows.matrix.items()},
        "leaves": {output: sorted(sources) for output, sources in flows.leaves.items()},
        "unknown": list(flows.unknown),
    }


def _notes(subject: Subject, reading: proof.Reading, *, ask: bool) -> Iterator[str]:
    if reading.refusal:
        yield f"not traced: {reading.refusal}"
    if reading.influence is not None and reading.influence.unknown:
        yield "primitives read conservatively: " + ", ".join(reading.influence.unknown)
    yield from remarks(subject, reading.influence, ask=ask)
