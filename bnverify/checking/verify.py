"""One report on a step: the laws first, then the life of its state, then its run on many devices."""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import replace
from functools import cached_property
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
from bnverify.unusable import Unusable


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


class Verifier:
    """Holds a training step to everything that is claimed of one, as often as is asked.

    What one run traced and compiled, the next one uses.

    Args:
        what: see :func:`verify`, and so the others.
        profile: how much to do.
        select: names of laws, claims or families to check.
        ignore: names of laws, claims or families to leave out.
        proofs_only: read the traced step and run nothing.
        target: how the counterexample scripts name it.

    Raises:
        ValueError: naming an unknown profile, claim or family.
    """

    def __init__(
        self,
        what: Target,
        profile: str | Profile = "ci",
        *,
        select: Collection[str] = (),
        ignore: Collection[str] = (),
        proofs_only: bool = False,
        target: str | None = None,
    ) -> None:
        self._what = what
        self._plan = named(profile)
        self._chosen = choose(select, ignore, parallel=isinstance(what, Parallel))
        self._proofs_only = proofs_only
        self._target = target
        self._laws = [name for name in self._chosen if name in LAWS]
        self._checker = engine.Checker(
            subject_of(what), self._plan, select=self._laws, proofs_only=proofs_only
        )

    def run(
        self,
        seed: int = 0,
        *,
        fail_fast: bool = False,
        listener: engine.Listener | None = None,
    ) -> Report:
        """Return what is known about each claim.

        Args:
            seed: from which all cases are drawn; the same seed gives the same report.
            fail_fast: stop at the first proofs or stack of cases that show a violation.
            listener: told of progress.
        """
        if not hasattr(seed, "__index__") or seed < 0:
            raise Unusable(f"seed must be a whole number, at least 0, got {seed!r}")
        started = time.perf_counter()
        tell: engine.Listener = listener or (lambda doing, cases, evidence: None)
        report = Report("", self._plan.name, seed, (), 0, 0.0, engine.versions())
        if self._laws:
            report = self._checker.run(
                seed, fail_fast=fail_fast, target=self._target, listener=listener
            )
        results, cases = list(report.results), report.cases
        for family, part in (("life", self._life), ("parallel", self._parallel)):
            names = [name for name in self._chosen if CLAIMS[name].family == family]
            if not names:
                continue
            stopped = fail_fast and any(result.status == "violated" for result in results)
            if self._proofs_only or stopped:
                reason = engine.READ_ONLY if self._proofs_only else engine.STOPPED
                found = Part([untriggered(name, reason) for name in names])
            else:
                tell("the life of the state" if family == "life" else "many devices", cases, None)
                found = part(names, seed)
            for evidence in found.results:
                tell("", 0, evidence)
            results += found.results
            cases += found.cases
        return replace(
            report,
            subject=self._what.name,
            results=tuple(results),
            cases=cases,
            seconds=time.perf_counter() - started,
        )

    def _life(self, names: Collection[str], seed: int) -> Part:
        try:
            results = self._lives.run(seed)
        except Untraceable as refusal:
            return Part([untriggered(name, str(refusal)) for name in names])
        return Part(results, self._lives.cases)

    @cached_property
    def _lives(self) -> Lives:
        lived = self._what.single if isinstance(self._what, Parallel) else self._what
        names = [name for name in self._chosen if CLAIMS[name].family == "life"]
        return Lives(lived, self._plan, names, self._target)

    def _parallel(self, names: Collection[str], seed: int) -> Part:
        what, target = self._what, self._target
        if not isinstance(what, Parallel):
            reason = "the step is for one device; bnverify.Parallel makes one for many"
            return Part([_claim(name).evidence("exempt", reason=reason) for name in names])
        if target is not None:
            found = devices.run([target], self._plan, seed, select=names)[target]
            return Part(found.results, found.cases)
        check = Check(what, self._plan, seed, select=names)
        return Part(check.run(), check.cases)


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
        fail_fast: stop at the first proofs or stack of cases that show a violation.
        target: how the counterexample scripts name it: "module:name" or "file.py:name". A
            Parallel with a target is run in a process of its own, with four devices; without
            one, on the devices of this process.
        listener: told of progress.

    Raises:
        ValueError: naming an unknown profile, claim or family.
    """
    verifier = Verifier(
        what,
        profile,
        select=select,
        ignore=ignore,
        proofs_only=proofs_only,
        target=target,
    )
    return verifier.run(seed, fail_fast=fail_fast, listener=listener)


def untriggered(name: str, reason: str) -> Evidence:
    """Return that a claim was not reached, and why."""
    return _claim(name).evidence("untriggered", reason=reason)


def _claim(name: str) -> Claim:
    claim = CLAIMS[name]
    assert isinstance(claim, Claim)
    return claim
