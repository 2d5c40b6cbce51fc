"""One report on a step: the laws first, then the life of its state, then its run on many devices."""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import replace
from typing import NamedTuple

from bnverify import deadline
from bnverify.checking import devices
from bnverify.checking.claims import CLAIMS, choose
from bnverify.claim import Claim
from bnverify.engine import verify as engine
from bnverify.evidence import Evidence, Report
from bnverify.laws import LAWS
from bnverify.lifetime.applies import Untraceable
from bnverify.lifetime.check import Lives
from bnverify.lifetime.checkpoint import Lived, subject_of
from bnverify.parallel.check import Check
from bnverify.parallel.subject import Parallel
from bnverify.profile import Profile, named
from bnverify.target import Target


def guarded(what: Target, seconds: float) -> Target:
    """Return ``what`` with a limit on each call of its step's functions; see ``deadline.guard``."""
    if isinstance(what, Parallel):
        return replace(what, single=deadline.guard(what.single, seconds))
    if isinstance(what, Lived):
        return replace(what, subject=deadline.guard(what.subject, seconds))
    return deadline.guard(what, seconds)


class Part(NamedTuple):
    """A part of a report.

    Attributes:
        results: the evidence of some claims.
        cases: how many cases, or lives, were run for them.
    """

    results: list[Evidence]
    cases: int = 0


def verify(
    what: Target,
    profile: str | Profile = "ci",
    *,
    seed: int = 0,
    select: Collection[str] = (),
    ignore: Collection[str] = (),
    proofs_only: bool = False,
    fail_fast: bool = False,
    target: str | None = None,
    listener: engine.Listener | None = None,
) -> Report:
    """Hold a training step to everything that is claimed of one and return what is known.

    Args:
        what: a Subject; a Lived, to hold its own way to save and restore to the claims about
            the life of a state; a Parallel, to hold its single-device step to the laws and the
            step itself to the claims about many devices.
        profile: how much to do: "quick", "ci", "nightly" or a Profile.
        seed: from which all cases are drawn; the same seed gives the same report.
        select: names of laws, claims or families to check; empty: all that apply.
        ignore: names of laws, claims or families to leave out.
        proofs_only: read the traced step and run nothing.
        fail_fast: stop at the first proofs or shape that show a violation.
        target: how the counterexample scripts name it: "module:name" or "file.py:name". A
            Parallel with a target is run in a process of its own, with four devices; without
            one, on the devices of this process.
        listener: told of progress.

    Raises:
        ValueError: naming an unknown profile, claim or family.
    """
    started = time.perf_counter()
    plan = named(profile)
    chosen = choose(select, ignore, parallel=isinstance(what, Parallel))
    tell: engine.Listener = listener or (lambda doing, cases, evidence: None)
    laws = [name for name in chosen if name in LAWS]
    report = Report("", plan.name, seed, (), 0, 0.0, engine.versions())
    if laws:
        report = engine.verify(
            subject_of(what),
            profile,
            seed=seed,
            select=laws,
            proofs_only=proofs_only,
            fail_fast=fail_fast,
            target=target,
            listener=listener,
        )
    results, cases = list(report.results), report.cases
    for family, part in (("life", _life), ("parallel", _parallel)):
        names = [name for name in chosen if CLAIMS[name].family == family]
        if not names:
            continue
        stopped = fail_fast and any(result.status == "violated" for result in results)
        if proofs_only or stopped:
            reason = "only the traced step was read" if proofs_only else "stopped at a violation"
            part_found = Part([untriggered(name, reason) for name in names])
        else:
            tell("the life of the state" if family == "life" else "many devices", cases, None)
            part_found = part(what, plan, seed, names, target)
        for evidence in part_found.results:
            tell("", 0, evidence)
        results += part_found.results
        cases += part_found.cases
    return replace(
        report,
        subject=what.name,
        results=tuple(results),
        cases=cases,
        seconds=time.perf_counter() - started,
    )


def _life(
    what: Target, plan: Profile, seed: int, names: Collection[str], target: str | None
) -> Part:
    lived = what.single if isinstance(what, Parallel) else what
    try:
        lives = Lives(lived, plan, seed, names, target)
        results = lives.run()
    except Untraceable as refusal:
        return Part([untriggered(name, str(refusal)) for name in names])
    return Part(results, lives.cases)


def _parallel(
    what: Target, plan: Profile, seed: int, names: Collection[str], target: str | None
) -> Part:
    if not isinstance(what, Parallel):
        reason = "the step is for one device; bnverify.Parallel makes one for many"
        return Part([_claim(name).evidence("exempt", reason=reason) for name in names])
    if target is not None:
        found = devices.run([target], plan, seed, select=names)[target]
        return Part(found.results, found.cases)
    check = Check(what, plan, seed, select=names)
    return Part(check.run(), check.cases)


def untriggered(name: str, reason: str) -> Evidence:
    """Return that a claim was not reached, and why."""
    return _claim(name).evidence("untriggered", reason=reason)


def _claim(name: str) -> Claim:
    claim = CLAIMS[name]
    assert isinstance(claim, Claim)
    return claim
