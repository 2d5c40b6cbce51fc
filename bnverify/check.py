"""Check a training step: proofs first, then cases, then checkpoints, then several devices.

:func:`verify` makes one report. A :class:`Check` can make several for one subject, and reuses what was
traced and compiled. A listener receives events about the progress.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from importlib import metadata
from typing import Any, TypeAlias

from bnverify import compile_cache, proof
from bnverify.clues import flow_clues, tree_clues
from bnverify.diagnose import diagnosed
from bnverify.errors import UsageError, did_you_mean
from bnverify.evidence import READ_ONLY, Counterexample, Evidence, Report, Violation
from bnverify.laws import FAMILIES, LAWS, STEP_LAWS, Law
from bnverify.lifetime.life import Life
from bnverify.lifetime.lives import Lives
from bnverify.model import Case, Parallel, Subject, Target
from bnverify.parallel import devices
from bnverify.probe import subject_of
from bnverify.profile import Profile, ProfileName, named
from bnverify.remarks import remarks
from bnverify.runs import Run, Runner

STOPPED = "stopped at a violation"


@dataclass(frozen=True)
class Started:
    """A check has started.

    Attributes:
        subject: the name of the subject.
        laws: the names of the laws that are checked.
    """

    subject: str
    laws: tuple[str, ...]


@dataclass(frozen=True)
class PhaseStarted:
    """A phase of the check has started, or made progress.

    Attributes:
        phase: what is being done. A phase may be reported several times.
        cases: the number of cases run so far.
        done: the fraction of the planned phases that are finished, from 0 to 1.
    """

    phase: str
    cases: int
    done: float = 0.0


@dataclass(frozen=True)
class LawJudged:
    """A law has been judged.

    Attributes:
        evidence: the evidence, still without the likely cause, which depends on all laws.
    """

    evidence: Evidence


@dataclass(frozen=True)
class Finished:
    """A check has finished.

    Attributes:
        report: its report.
    """

    report: Report


Event: TypeAlias = Started | PhaseStarted | LawJudged | Finished
Listener: TypeAlias = Callable[[Event], None]


def choose(
    select: Collection[str], ignore: Collection[str], *, parallel: bool = False
) -> list[str]:
    """Return the names of the laws that are selected and not ignored, in the order of reports.

    Args:
        select: names of laws or families, or one name; empty: all families that apply.
        ignore: names of laws or families, or one name.
        parallel: whether the family "parallel" is among the default.

    Raises:
        UsageError: a name is neither a law nor a family.
    """
    select, ignore = ([n] if isinstance(n, str) else n for n in (select, ignore))
    for name in (*select, *ignore):
        if name not in LAWS and name not in FAMILIES:
            close = did_you_mean(name, (*LAWS, *FAMILIES)) or "; see `bnverify list`"
            raise UsageError(f"no law or family is named {name!r}{close}")
    chosen = set(select) or {each for each in FAMILIES if each != "parallel" or parallel}
    return [
        name
        for name, law in LAWS.items()
        if {name, law.family} & chosen and not {name, law.family} & set(ignore)
    ]


class _Found:
    """What one run of a check has found so far; each finding is an event.

    Args:
        fail_fast: whether to stop at a violation.
        proofs_only: whether to read only the traced step.

    Attributes:
        fail_fast: as given.
        known: law name -> its evidence.
        cases: the number of cases run.
        notes: the notes for the report.
        planned: the number of planned phases, without those that shrink counterexamples.
    """

    def __init__(self, *, fail_fast: bool, proofs_only: bool) -> None:
        self.fail_fast = fail_fast
        self.planned = 1
        self._begun: dict[str, None] = {}
        self.known: dict[str, Evidence] = {}
        self.cases = 0
        self.notes: list[str] = []
        self._proofs_only = proofs_only

    def settle(self, evidence: Evidence) -> LawJudged:
        """Take the evidence for a law as known."""
        self.known[evidence.law] = evidence
        return LawJudged(evidence)

    def phase(self, name: str, done: int = 0) -> PhaseStarted:
        """Begin a phase, or go on with it after ``done`` cases of its run."""
        self._begun.setdefault(name)
        behind = min((len(self._begun) - 1) / max(self.planned, 1), 0.95)
        return PhaseStarted(name, self.cases + done, behind)

    @property
    def idle(self) -> str:
        """Why nothing more is to be run; empty if the check goes on."""
        if self._proofs_only:
            return READ_ONLY
        broken = any(evidence.status == "violated" for evidence in self.known.values())
        return STOPPED if self.fail_fast and broken else ""


class Check:
    """Checks one training step, for any number of seeds.

    Args:
        what: the subject; see :func:`verify` for all arguments.
        profile: how much to do.
        select: names of laws or families to check.
        ignore: names of laws or families to leave out.
        proofs_only: only read the traced step; run nothing.
        target: the name of the subject in counterexample scripts.

    Raises:
        ValueError: an unknown profile, law or family is named.
    """

    def __init__(
        self,
        what: Target,
        profile: ProfileName | Profile = "ci",
        *,
        select: Collection[str] = (),
        ignore: Collection[str] = (),
        proofs_only: bool = False,
        target: str | None = None,
    ) -> None:
        self._what = what
        self._subject = subject_of(what)
        self._plan = named(profile)
        self._chosen = choose(select, ignore, parallel=isinstance(what, Parallel))
        self._laws = [LAWS[name] for name in self._chosen if name in STEP_LAWS]
        self._proofs_only = proofs_only
        self._target = target

    def run(
        self,
        seed: int = 0,
        *,
        fail_fast: bool = False,
        listener: Listener | None = None,
    ) -> Report:
        """Run the check and return its report.

        Args:
            seed: the seed of all cases; the same seed gives the same report.
            fail_fast: stop after the proofs, or the stack of cases, that first show a violation.
            listener: called with the events of the check.

        Raises:
            UsageError: the seed is not a whole number of at least 0.
        """
        for event in self.events(seed, fail_fast=fail_fast):
            if listener is not None:
                listener(event)
        assert isinstance(event, Finished)
        return event.report

    def events(self, seed: int = 0, *, fail_fast: bool = False) -> Iterator[Event]:
        """Yield what happens, as it happens; ``Finished``, with the report, at the end.

        Where Ctrl-C interrupts the check after some laws were judged, a report of those is yielded
        before KeyboardInterrupt is raised.

        Args:
            seed: as for :meth:`run`.
            fail_fast: as for :meth:`run`.

        Raises:
            UsageError: the seed is no whole number of at least 0.
        """
        if not hasattr(seed, "__index__") or seed < 0:
            raise UsageError(f"seed must be a whole number, at least 0, got {seed!r}")
        started = time.perf_counter()
        yield Started(self._what.name, tuple(self._chosen))
        found = _Found(fail_fast=fail_fast, proofs_only=self._proofs_only)
        beyond = {LAWS[name].family for name in self._chosen if name not in STEP_LAWS}
        found.planned = bool(self._laws) + len(beyond)
        try:
            if self._laws:
                yield from self._check_step(found, seed)
            for family in ("life", "parallel"):
                names = [name for name in self._chosen if LAWS[name].family == family]
                if names:
                    yield from self._check_beyond(found, family, names, seed)
        except KeyboardInterrupt:
            if found.known:
                found.notes.append("interrupted: this is what was known by then")
                yield Finished(self._report(found, seed, started))
            raise
        yield Finished(self._report(found, seed, started))

    def _report(self, found: _Found, seed: int, started: float) -> Report:
        influence = _matrix(self._reading) if self._laws else {}
        results = [
            found.known.get(name) or Evidence.of(name, "untriggered", reason="interrupted")
            for name in self._chosen
        ]
        return Report(
            subject=self._what.name,
            profile=self._plan.name,
            seed=seed,
            results=tuple(diagnosed(results, influence)),
            cases=found.cases,
            seconds=time.perf_counter() - started,
            versions=versions(),
            influence=influence,
            notes=tuple(found.notes),
        )

    def _check_step(self, found: _Found, seed: int) -> Iterator[Event]:
        """Prove what can be proved about the step, and run it for the remaining laws."""
        yield found.phase("tracing")
        for evidence in self._proved:
            yield found.settle(evidence)
        found.notes += self._notes
        if not found.idle:
            found.planned += sum(runner.phases(seed) for runner in self._runners)
        for runner in self._runners:
            if reason := found.idle:
                for law in runner.laws:
                    if law.name not in found.known:
                        yield found.settle(Evidence.of(law.name, "untriggered", reason=reason))
                continue
            compile_cache.enable()
            run = Run(runner, seed, fail_fast=found.fail_fast)
            for phase, done in run.steps():
                yield found.phase(phase, done)
            found.cases += run.cases
            found.notes += run.notes
            results = run.evidence(self._target)
            clues = {}
            if broken := [each for each in results if each.status == "violated"]:
                yield found.phase("looking for causes")
                flows = self._reading.influence
                of_flows = flow_clues(flows.leaves) if flows is not None else {}
                clues = {**of_flows, **runner.clues(broken, seed)}
            for evidence in results:
                # Without the dependency in the jaxpr the law stays violated; a run only adds a counterexample.
                if evidence.status == "violated":
                    yield found.settle(self._explained(replace(evidence, clues=clues)))
                elif evidence.law not in found.known:
                    yield found.settle(evidence)

    def _check_beyond(
        self, found: _Found, family: str, names: list[str], seed: int
    ) -> Iterator[Event]:
        """Check the laws of the families "life" and "parallel"."""
        if reason := found.idle:
            results, cases = [Evidence.of(n, "untriggered", reason=reason) for n in names], 0
        elif family == "life":
            yield found.phase("checkpoints of the state")
            results, cases = self._lives.run(seed), self._lives.cases
        else:
            yield found.phase("several devices")
            results, cases = self._mapped(names, seed)
        found.cases += cases
        for evidence in results:
            yield found.settle(evidence)

    def judge(self, law: Law, case: Case) -> Evidence:
        """Return the evidence from one case for a law about one step, even if the law is exempt.

        Args:
            law: one of ``STEP_LAWS``.
            case: run by itself, as a user would.
        """
        if law.kind == "structure":
            return self._explained(proof.judge_structure(law, self._reading))
        missing = proof.prove_missing(law, self._reading)
        if missing is not None:
            return self._explained(missing)
        *_, runner = self._running([law])
        return self._explained(runner.hold(law, case))

    @cached_property
    def _reading(self) -> proof.Reading:
        return proof.read(self._subject)

    @cached_property
    def _proved(self) -> list[Evidence]:
        """The evidence for every law that needs no run."""
        known = _without_running(self._laws, self._subject, self._reading, self._target)
        return [self._explained(evidence) for evidence in known]

    @cached_property
    def _notes(self) -> list[str]:
        return list(_notes(self._subject, self._reading))

    @cached_property
    def _runners(self) -> list[Runner]:
        """What runs the laws that need running."""
        known = {each.law for each in self._proved if not _missing_flow(each)}
        return self._running([law for law in self._laws if law.name not in known])

    def _running(self, laws: Collection[Law]) -> list[Runner]:
        """Return the runners for some laws.

        If the optimizer's state is empty, laws about it are run last, with a momentum optimizer.
        """
        reading, probe = self._reading, self._reading.probe
        probed = [law for law in laws if probe is not None and "opt_state" in law.capabilities]
        own = [law for law in laws if law not in probed]
        runners = [
            Runner(
                reading.tracer(self._subject),
                reading.abstract,
                own,
                self._plan,
                refusal=reading.refusal,
            )
        ]
        if probe is not None and probed:
            few = replace(self._plan, tiny=1, shapes=0, blocks=1, examples=1, large=())
            # Nobody trains with this optimizer, so its step is read and not compiled.
            runners.append(
                Runner(probe.tracer, probe.abstract, probed, few, note=proof.PROBED, how="read")
            )
        return runners

    def _explained(self, evidence: Evidence) -> Evidence:
        """Return the evidence of a violation with its line of code, data flow and hint."""
        if evidence.status != "violated":
            return evidence
        law, mismatch = LAWS[evidence.law], evidence.mismatch
        return replace(
            evidence,
            hint=self._subject.hints.get(evidence.law, ""),
            line=proof.user_line(law, self._reading, mismatch.leaf if mismatch is not None else ""),
            path=proof.offending_path(law, self._reading),
        )

    @cached_property
    def _lives(self) -> Lives:
        lived = self._what.single if isinstance(self._what, Parallel) else self._what
        names = [name for name in self._chosen if LAWS[name].family == "life"]
        calls = self._runners[0].single if self._laws and not self._reading.refusal else None
        return Lives(lived, self._plan, names, self._target, calls)

    def _mapped(self, names: Collection[str], seed: int) -> tuple[list[Evidence], int]:
        if not isinstance(self._what, Parallel):
            reason = "the step cannot run on several devices; declare one that can with bnverify.Parallel"
            return [Evidence.of(name, "exempt", reason=reason) for name in names], 0
        return devices.run(self._what, self._target, self._plan, seed, names)


def verify(
    what: Target,
    profile: ProfileName | Profile = "ci",
    *,
    seed: int = 0,
    select: Collection[str] = (),
    ignore: Collection[str] = (),
    proofs_only: bool = False,
    fail_fast: bool = False,
    target: str | None = None,
    listener: Listener | None = None,
) -> Report:
    """Check a training step against the laws and return a report.

    Args:
        what: a Subject; a CheckpointedSubject, which has its own functions to save and restore; or a
            Parallel, whose single-device step is checked as well.
        profile: how much to do: "quick", "ci", "nightly" or a Profile.
        seed: the seed of all cases, at least 0; the same seed gives the same report.
        select: names of laws or families to check; empty: all families that apply.
        ignore: names of laws or families to leave out.
        proofs_only: only read the traced step; run nothing.
        fail_fast: stop after the proofs, or the stack of cases, that first show a violation.
        target: the name of the subject in counterexample scripts, as ``bnverify.load`` takes it;
            None: the scripts leave a placeholder.
        listener: called with the events of the check: ``Started``, ``PhaseStarted``, ``LawJudged``
            and ``Finished``.

    Returns:
        The evidence for each selected law. ``report.ok`` is True if none is violated.

    Raises:
        UsageError: an unknown law or family is named, or the seed is not a whole number.
        ValueError: an unknown profile is named.
    """
    check = Check(
        what, profile, select=select, ignore=ignore, proofs_only=proofs_only, target=target
    )
    return check.run(seed, fail_fast=fail_fast, listener=listener)


def replay(what: Target, case: Case, law: str) -> float | None:
    """Check one law on one case, as counterexample scripts do.

    Args:
        what: the subject, as for :func:`verify`.
        case: the case.
        law: the name of a law about one step, or of the family "parallel".

    Returns:
        The residual, the error divided by the tolerance; None if the case does not meet the law's
        precondition.

    Raises:
        Violation: the case violates the law.
        UsageError: no law has that name, or it is not about one step.
    """
    if law not in LAWS:
        raise UsageError(f"no law is named {law!r}{did_you_mean(law, LAWS)}")
    if isinstance(what, Parallel) and LAWS[law].family == "parallel":
        evidence = devices.judge(what, case, law)
    elif law in STEP_LAWS:
        evidence = Check(what, "quick", select=[law]).judge(LAWS[law], case)
    else:
        raise UsageError(f"{law} is not about one step, so no single case shows it")
    if evidence.status == "violated":
        raise Violation(evidence)
    return evidence.residual


def show_again(what: Target, counterexample: Counterexample) -> None:
    """Run a counterexample again on ``what``.

    Raises:
        Violation: the law is still violated.
    """
    if counterexample.history:
        Life(what).live(counterexample.history)
    elif counterexample.case is not None:
        replay(what, counterexample.case, counterexample.law)


def versions() -> dict[str, str]:
    """Return package name -> version, for the packages that affect the verdict."""
    names = ("bnverify", "jax", "jaxlib", "flax", "optax", "numpy", "hypothesis")
    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:  # run from a source tree
            found[name] = "unknown"
    return found


def _without_running(
    laws: Collection[Law], subject: Subject, reading: proof.Reading, target: str | None
) -> Iterator[Evidence]:
    """Yield the evidence for every law that needs no run: exempt, structure or proved."""
    abstract = reading.abstract
    shown = proof.capabilities(subject, abstract, reading.probe) if abstract is not None else None
    for law in laws:
        reason = proof.exemption(law, subject, shown) if shown is not None else None
        if reason is not None:
            yield Evidence.of(law.name, "exempt", reason=reason)
        elif law.kind == "structure":
            evidence = proof.judge_structure(law, reading)
            if evidence.status == "violated":
                shows = Counterexample(law.name, target=target)
                clues = tree_clues(abstract) if abstract is not None else {}
                evidence = replace(evidence, counterexample=shows, clues=clues)
            yield evidence
        else:
            proved = proof.prove_influence(law, reading) or proof.prove_missing(law, reading)
            if proved is not None and proved.status == "violated":
                proved = replace(proved, counterexample=Counterexample(law.name, target=target))
            if proved is not None:
                yield proved


def _missing_flow(evidence: Evidence) -> bool:
    """Return whether a witness law is violated by the trace; running may add a counterexample."""
    return evidence.status == "violated" and LAWS[evidence.law].kind == "witness"


def _matrix(reading: proof.Reading) -> Mapping[str, Any]:
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


def _notes(subject: Subject, reading: proof.Reading) -> Iterator[str]:
    if reading.refusal:
        yield f"not traced: {reading.refusal}"
    if reading.influence is not None and reading.influence.unknown:
        yield "primitives read conservatively: " + ", ".join(reading.influence.unknown)
    yield from subject.notes
    yield from remarks(subject, reading.influence)
