"""Check a subject: proofs first, then stacked cases by the thousand, then explicit ones."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from importlib import metadata
from typing import Any

from bnverify import compile_cache
from bnverify.engine import proof
from bnverify.engine.counterexample import script
from bnverify.engine.diagnosis import diagnosed
from bnverify.engine.judge import exemption, shown_by, static_facts
from bnverify.engine.remarks import remarks
from bnverify.engine.runs import Runs
from bnverify.evidence import Evidence, Report
from bnverify.laws import LAWS, Law
from bnverify.profile import Profile, named
from bnverify.subject import Subject
from bnverify.transition import Transition

Listener = Callable[[str, int, Evidence | None], None]
"""Told as a check goes: what is being done, cases so far, a law's evidence once it is known."""


def verify(
    subject: Subject,
    profile: str | Profile = "ci",
    *,
    seed: int = 0,
    select: Collection[str] = (),
    proofs_only: bool = False,
    fail_fast: bool = False,
    target: str | None = None,
    listener: Listener | None = None,
) -> Report:
    """Hold ``subject`` to the laws and return what is known about each.

    Args:
        subject: the training step.
        profile: how much to do: "quick", "ci", "nightly" or a Profile.
        seed: from which all cases are drawn; the same seed gives the same report.
        select: names of laws to check; empty: all.
        proofs_only: read the traced step and run nothing.
        fail_fast: stop at the first proofs or shape that show a violation.
        target: how the counterexample scripts name the subject: "module:name" or "file.py:name".
        listener: told of progress.

    Raises:
        ValueError: no profile has that name.
    """
    started = time.perf_counter()
    tell: Listener = listener or (lambda doing, cases, evidence: None)
    plan = named(profile)
    laws = [law for law in LAWS.values() if not select or law.name in select]
    known: dict[str, Evidence] = {}

    def settle(evidence: Evidence) -> None:
        known[evidence.law] = evidence
        tell("", 0, evidence)

    tell("tracing", 0, None)
    reading = proof.read(subject)
    for evidence in _without_running(laws, subject, reading, ask=not proofs_only):
        settle(evidence)
    running = [law for law in laws if law.name not in known]
    done = fail_fast and any(evidence.status == "violated" for evidence in known.values())
    idle = proofs_only or done
    if not idle:
        compile_cache.enable()
    runs = _run_all(running, subject, reading, plan, seed, tell, fail_fast=fail_fast, idle=idle)
    for part in runs:
        for evidence in part.evidence():
            settle(evidence)
    tallies = {name: tally for part in runs for name, tally in part.tallies.items()}
    results = []
    for law in laws:
        evidence = known[law.name]
        if evidence.status == "violated":
            tally = tallies.get(law.name)
            case = tally.case if tally else None
            way = proof.explain(law, reading)
            evidence = replace(
                evidence,
                reason=f"{evidence.reason}; {way}" if way else evidence.reason,
                counterexample=script(law.name, case, target),
                shape=case.shape if case is not None else None,
            )
        results.append(evidence)
    return Report(
        subject=subject.name,
        profile=plan.name,
        seed=seed,
        results=tuple(diagnosed(results)),
        cases=sum(part.cases for part in runs),
        seconds=time.perf_counter() - started,
        versions=versions(),
        influence=_matrix(reading),
        notes=(
            *_notes(subject, reading, ask=not proofs_only),
            *(note for part in runs for note in part.notes),
        ),
    )


def _run_all(
    laws: Collection[Law],
    subject: Subject,
    reading: proof.Reading,
    plan: Profile,
    seed: int,
    tell: Listener,
    *,
    fail_fast: bool,
    idle: bool,
) -> list[Runs]:
    """Run ``laws`` on the subject, and those about an empty optimizer state on the probe."""
    probe = reading.probe
    probed = [law for law in laws if probe is not None and "opt_state" in law.requires]
    own = [law for law in laws if law not in probed]
    parts: list[tuple[Subject, list[Law], Transition | None, Profile, str]]
    parts = [(subject, own, reading.abstract, plan, "")]
    if probe is not None and probed:
        abstract = proof.abstract_transition(probe.traces.runs[0], None)
        few = replace(plan, tiny=1, shapes=0, blocks=1, examples=1, large=())
        parts.append((probe.subject, probed, abstract, few, proof.PROBED))
    runs: list[Runs] = []
    for of, part, shapes, amount, note in parts:
        facts = static_facts(of, shapes) if shapes is not None else {}

        def report(doing: str, cases: int) -> None:
            tell(doing, cases + sum(run.cases for run in runs[:-1]), None)

        runs.append(
            Runs(
                of,
                part,
                facts,
                amount,
                seed,
                report,
                fail_fast=fail_fast,
                note=note,
                refusal=reading.refusal,
            )
        )
        if part and not idle:
            runs[-1].run()
    return runs


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
            yield proof.judge_structure(law, subject, reading)
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
        "unknown": list(flows.unknown),
    }


def _notes(subject: Subject, reading: proof.Reading, *, ask: bool) -> Iterator[str]:
    if reading.refusal:
        yield f"not traced: {reading.refusal}"
    if reading.influence is not None and reading.influence.unknown:
        yield "primitives read conservatively: " + ", ".join(reading.influence.unknown)
    yield from remarks(subject, reading.influence, ask=ask)
