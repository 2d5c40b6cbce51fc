"""A data-parallel step under every mapping, held to the single-device step."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import numpy as np

from bnverify.broken import Broken
from bnverify.case import Case
from bnverify.engine.tally import complexity
from bnverify.engine.volume import simpler
from bnverify.evidence import Evidence
from bnverify.lazy import jax
from bnverify.parallel.claims import CLAIMS
from bnverify.parallel.compat import has_pmap
from bnverify.parallel.counterexample import script
from bnverify.parallel.differences import differences, disagreeing
from bnverify.parallel.explain import explain, explain_apart
from bnverify.parallel.modes import MODES, Mode
from bnverify.parallel.one_device import one_device
from bnverify.parallel.subject import Parallel
from bnverify.profile import Profile, named
from bnverify.pytree import stack, stacks, take
from bnverify.transition import Transition
from bnverify.unusable import first_line

PMAP = "pmap_equals_one_device"
UNEQUAL = "unequal_shards_equal_one_device"
REPLICAS = "replicas_agree_to_the_bit"
REPLICATED = (PMAP, "shard_map_equals_one_device")
"""Where every device has a state of its own."""

ROUNDS = 12  # of making a case simpler


class Seen(NamedTuple):
    """What one case shows of one claim.

    Attributes:
        claim: its name.
        residual: the error in units of the error allowed; below 0: nothing to compare.
        explain: returns the likeliest mistake, and in what the outcome differs.
    """

    claim: str
    residual: float
    explain: Callable[[], tuple[str, str]]


@dataclass
class Found:
    """What was seen of one claim.

    Attributes:
        cases: how many cases had digits to compare.
        worst: the largest error in units of the error allowed.
        case: the simplest case beyond it.
        mistake: what explains that case.
        reason: in what it differs, one line.
    """

    cases: int = 0
    worst: float = -1.0
    case: Case | None = None
    mistake: str = ""
    reason: str = ""

    def add(self, case: Case, seen: Seen) -> None:
        """Count one case and what it shows."""
        if seen.residual < 0:
            return
        self.cases += 1
        self.worst = max(self.worst, seen.residual)
        broken = seen.residual > 1
        if broken and (self.case is None or complexity(case) < complexity(self.case)):
            self.case = case
            self.mistake, self.reason = seen.explain()


@dataclass
class Check:
    """One check of a data-parallel step.

    Args:
        parallel: the step.
        profile: how much to do.
        seed: from which the cases are drawn.
        target: how counterexample scripts find the step.
        select: names of claims; empty: all.

    Attributes:
        cases: how many cases were run, under every mapping.
    """

    parallel: Parallel
    profile: str | Profile = "ci"
    seed: int = 0
    target: str | None = None
    select: Collection[str] = ()
    cases: int = 0
    found: dict[str, Found] = field(default_factory=lambda: {name: Found() for name in CLAIMS})
    refusals: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._single = one_device(self.parallel.single)
        self._mapped = {mode.claim: mode.make(self.parallel) for mode in self._possible()}

    def run(self) -> list[Evidence]:
        """Run every mode on every shape and return the evidence of each claim."""
        plan = named(self.profile)
        more = plan.shapes > 1
        count = min(max(plan.examples, 8), 64)
        width = self.parallel.single.features[0] if self.parallel.single.features else 2
        for claim in self._mapped:
            small, further = ((7,), (5,)) if claim == UNEQUAL else ((8,), (4, 16))
            for rows in small + further * more:
                self.cases += count
                self._hold(claim, self._single.drawn((rows, width), count, self.seed))
        for claim in self.asked:
            self._simplify(claim, count)
        return [self.evidence(name) for name in self.asked]

    @property
    def asked(self) -> list[str]:
        """The claims that are selected."""
        return [name for name in CLAIMS if not self.select or name in self.select]

    def replay(self, claim: str, case: Case) -> None:
        """Run the one case that is said to break ``claim``."""
        known = self._single.runs(stack([case]))
        for mapped in self._mapped:
            self._hold(mapped, known)

    def _possible(self) -> Iterator[Mode]:
        """Yield the modes that are asked for and can be run; keep why the others cannot."""
        for mode in MODES.values():
            replicas = mode.claim in REPLICATED and REPLICAS in self.asked
            if mode.claim in self.parallel.exempt or not (mode.claim in self.asked or replicas):
                continue
            if mode.claim == UNEQUAL and self.parallel.counted_step is None:
                continue
            if mode.devices > jax.device_count():
                reason = f"this process has {jax.device_count()} of the {mode.devices} devices"
                self.refusals[mode.claim] = reason
            elif mode.claim == PMAP and not has_pmap():
                self.refusals[mode.claim] = "this release of jax has no pmap"
            else:
                yield mode

    def _hold(self, claim: str, known: Transition) -> None:
        """Hold every one of some stacked cases to a claim."""
        for index in range(len(known.case.lr)):
            t = take(known, index)
            try:
                seen = self._seen(claim, t)
            except Exception as error:  # noqa: BLE001 - whatever a user's code raises
                self.refusals[claim] = f"it raises {first_line(error)}"
                return
            for each in seen:
                self.found[each.claim].add(t.case, each)

    def _seen(self, claim: str, t: Transition) -> list[Seen]:
        out = self._mapped[claim](t.before, t.case.x, t.case.y, t.case.lr)
        out = jax.tree_util.tree_map(np.asarray, out)
        residuals = differences(out, t)
        why = partial(explain, out, t, residuals, unequal=claim == UNEQUAL)
        seen = [Seen(claim, max(residuals.values()), why)]
        if claim in REPLICATED:
            residual = float("inf") if disagreeing(out) else 0.0
            seen.append(Seen(REPLICAS, residual, partial(explain_apart, out)))
        return seen

    def _simplify(self, claim: str, count: int) -> None:
        """Put a simpler case in the place of the one that breaks ``claim``."""
        found = self.found[claim]
        showing = REPLICATED if claim == REPLICAS else (claim,)
        by = [name for name in self._mapped if name in showing and name not in self.refusals]
        for _ in range(ROUNDS):
            if found.case is None or not self._simpler(found, claim, by, count):
                return

    def _simpler(self, found: Found, claim: str, by: list[str], count: int) -> bool:
        assert found.case is not None
        candidates = sorted(simpler(found.case), key=complexity)
        for cases, many in stacks(candidates, count):
            known = self._single.runs(cases)
            for index, mapped in itertools.product(range(many), by):
                for seen in self._seen(mapped, take(known, index)):
                    if seen.claim == claim and seen.residual > 1:
                        mistake, reason = seen.explain()
                        if mistake == found.mistake:
                            found.case, found.reason = take(cases, index), reason
                            return True
        return False

    def evidence(self, name: str) -> Evidence:
        """Return what was seen of one claim."""
        claim, found = CLAIMS[name], self.found[name]
        if name in self.parallel.exempt:
            return claim.evidence("exempt", reason=self.parallel.exempt[name])
        if found.case is not None:
            return Broken(
                claim,
                found.reason,
                mistake=found.mistake,
                script=script(self.parallel, name, found.case, self.target),
                shape=found.case.shape,
                residual=found.worst,
            ).evidence(found.cases)
        refusal = self.refusals.get(name, "")
        if refusal.startswith("it raises"):
            return Broken(claim, refusal).evidence(0)
        if found.cases:
            return claim.evidence("held", cases=found.cases, residual=found.worst)
        if name == UNEQUAL and self.parallel.counted_step is None:
            return claim.evidence("exempt", reason="the step takes no padding: no counted_step")
        return claim.evidence("untriggered", reason=refusal or "no case had digits to compare")


def replay(parallel: Parallel, case: Case, claim: str) -> float:
    """Run one case, as a counterexample's script does, and return the worst residual.

    Raises:
        Broken: the case breaks the claim.
        ValueError: no claim has that name.
    """
    if claim not in CLAIMS:
        raise ValueError(f"no claim about data-parallel steps is named {claim!r}")
    check = Check(parallel, select=(claim,))
    check.replay(claim, case)
    evidence = check.evidence(claim)
    if evidence.status == "violated":
        found = check.found[claim]
        raise Broken(CLAIMS[claim], evidence.reason, mistake=found.mistake, residual=found.worst)
    return check.found[claim].worst
