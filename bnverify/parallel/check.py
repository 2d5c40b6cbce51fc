"""Running a data-parallel step under every mapping, beside the single-device step."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bnverify.broken import Broken
from bnverify.case import Case, Domain
from bnverify.engine.noise import Noise
from bnverify.engine.tally import complexity
from bnverify.evidence import Evidence
from bnverify.lazy import jax
from bnverify.parallel.claims import CLAIMS
from bnverify.parallel.compat import has_pmap
from bnverify.parallel.counterexample import script
from bnverify.parallel.differences import differences, disagreeing
from bnverify.parallel.explain import explain
from bnverify.parallel.modes import MODES, Mode, split
from bnverify.parallel.subject import DEVICES, Parallel
from bnverify.profile import Profile, named
from bnverify.stacks import stacked_cases
from bnverify.subject import Subject
from bnverify.transition import Calls, Transition, observe
from bnverify.unusable import first_line

PMAP = "pmap_equals_one_device"
UNEQUAL = "unequal_shards_equal_one_device"
REPLICAS = "replicas_agree_to_the_bit"
REPLICATED = (PMAP, "shard_map_equals_one_device")
"""Where every device has a state of its own."""

MILD = Domain(max_abs_x=100.0, max_abs_y=100.0, max_lr=0.5)
"""Wilder inputs leave float32 no digits to compare more often than not."""


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

    def add(self, case: Case, residual: float, explain: Callable[[], tuple[str, str]]) -> None:
        """Count one case; ``explain`` tells its mistake and in what it differs."""
        if residual < 0:
            return
        self.cases += 1
        self.worst = max(self.worst, residual)
        if residual > 1 and (self.case is None or complexity(case) < complexity(self.case)):
            self.case = case
            self.mistake, self.reason = explain()


_KNOWN: dict[Any, tuple[Subject, Transition]] = {}
"""Steps that share their single-device step share its runs; the subject is kept for its id."""


def observed(single: Subject, cases: Case) -> Transition:
    """Return stacked transitions of the single-device step with their rounding noise."""
    t = observe(Calls(single, "stacked"), cases, ())
    t = t._replace(noise=Noise(single)(t.before, t.case).noise)
    return Transition(*jax.tree_util.tree_map(np.asarray, tuple(t)))


@dataclass
class Check:
    """One check of a data-parallel step.

    Args:
        parallel: the step.
        profile: how much to do.
        seed: from which the cases are drawn.
        given: the one case to run in the place of drawn ones; None: they are drawn.
        target: how counterexample scripts find the step.
        select: names of claims; empty: all.

    Attributes:
        cases: how many cases were run, under every mapping.
    """

    parallel: Parallel
    profile: str | Profile = "ci"
    seed: int = 0
    given: Case | None = None
    target: str | None = None
    select: Collection[str] = ()
    cases: int = 0
    found: dict[str, Found] = field(default_factory=lambda: {name: Found() for name in CLAIMS})
    refusals: dict[str, str] = field(default_factory=dict)

    def run(self) -> list[Evidence]:
        """Run every mode on every shape and return the evidence of each claim."""
        plan = named(self.profile)
        more = plan.shapes > 1
        count = min(max(plan.examples, 8), 64)
        width = self.parallel.single.features[0] if self.parallel.single.features else 2
        if set(self.asked) - {UNEQUAL}:
            for rows in (8, 4, 16) if more else (8,):
                self.equal((rows, width), count)
        if UNEQUAL in self.asked and self.parallel.counted_step is not None:
            for rows in (7, 5) if more else (7,):
                self.unequal((rows, width), count)
        return [self.evidence(name) for name in self.asked]

    @property
    def asked(self) -> list[str]:
        """The claims that are selected."""
        return [name for name in CLAIMS if not self.select or name in self.select]

    def _single(self, shape: tuple[int, int], count: int) -> Transition:
        """Return stacked transitions of the single-device step with their rounding noise."""
        single = self.parallel.single
        if self.given is not None:
            return observed(single, Case(*(np.asarray(leaf)[None] for leaf in self.given)))
        key = id(single), shape, count, self.seed
        if key not in _KNOWN:
            rng = np.random.default_rng((self.seed, *shape))
            _KNOWN[key] = single, observed(single, stacked_cases(rng, shape, count, MILD))
        return _KNOWN[key][1]

    def equal(self, shape: tuple[int, int], count: int) -> None:
        """Run every mode on ``count`` cases of one shape."""
        known = self._single(shape, count)
        self.cases += count
        for mode in MODES.values():
            if mode.devices > jax.device_count():
                reason = f"this process has {jax.device_count()} of the {mode.devices} devices"
                self.refusals[mode.claim] = reason
            elif mode.claim == PMAP and not has_pmap():
                self.refusals[mode.claim] = "this release of jax has no pmap"
            elif mode.claim not in self.parallel.exempt and self._wanted(mode.claim):
                self._mode(mode, known, count)

    def _wanted(self, claim: str) -> bool:
        return claim in self.asked or (claim in REPLICATED and REPLICAS in self.asked)

    def _mode(self, mode: Mode, known: Transition, count: int) -> None:
        mapped = mode.make(self.parallel)
        for index in range(count):
            t = at(known, index)
            try:
                out = mapped(t.before, t.case.x, t.case.y, t.case.lr)
            except Exception as error:  # noqa: BLE001 - whatever a user's code raises
                self.refusals[mode.claim] = f"it raises {first_line(error)}"
                return
            seen = jax.tree_util.tree_map(np.asarray, out)
            self._compare(mode.claim, seen, t)
            if mode.claim in REPLICATED:
                self._agree(seen, t)

    def unequal(self, shape: tuple[int, int], count: int) -> None:
        """Run the step on ``count`` cases of one shape, padded to shards of equal size."""
        step = self.parallel.counted_step
        assert step is not None
        known = self._single(shape, count)
        self.cases += count
        axes = (None, 0, 0, 0, None)
        mapped = jax.jit(jax.vmap(step, in_axes=axes, axis_name=self.parallel.axis))
        room = -(-shape[0] // DEVICES) * DEVICES
        missing = room - shape[0]
        weights = split((np.arange(room) < shape[0]).astype(np.float32))
        for index in range(count):
            t = at(known, index)
            # Zeros are what padding usually is; a fault that counts them shows in the moments.
            x = np.concatenate([t.case.x, np.zeros((missing, shape[1]), np.float32)])
            y = np.concatenate([t.case.y, np.zeros(missing, np.float32)])
            try:
                out = mapped(t.before, split(x), split(y), weights, t.case.lr)
            except Exception as error:  # noqa: BLE001 - whatever a user's code raises
                self.refusals[UNEQUAL] = f"it raises {first_line(error)}"
                return
            self._compare(UNEQUAL, jax.tree_util.tree_map(np.asarray, out), t)

    def _compare(self, name: str, seen: Any, t: Transition) -> None:
        residuals = differences(seen, t)
        worst = max(residuals.values())
        self.found[name].add(
            t.case, worst, lambda: explain(seen, t, residuals, unequal=name == UNEQUAL)
        )

    def _agree(self, seen: Any, t: Transition) -> None:
        apart = disagreeing(seen)
        reason = f"{', '.join(apart[:3])} differs between devices"
        statistics = any(path.startswith("batch_stats") for path in apart)
        mistake = "statistics_not_synchronised" if statistics else "gradients_not_synchronised"
        residual = float("inf") if apart else 0.0
        self.found[REPLICAS].add(t.case, residual, lambda: (mistake, reason))

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


def at(t: Transition, index: int) -> Transition:
    """Return one of some stacked transitions."""
    return Transition(*jax.tree_util.tree_map(lambda leaf: leaf[index], tuple(t)))


def replay(parallel: Parallel, case: Case, claim: str) -> float:
    """Run one case, as a counterexample's script does, and return the worst residual.

    Raises:
        Broken: the case breaks the claim.
        ValueError: no claim has that name.
    """
    if claim not in CLAIMS:
        raise ValueError(f"no claim about data-parallel steps is named {claim!r}")
    check = Check(parallel, given=case, select=(claim,))
    if claim == UNEQUAL:
        check.unequal(case.shape, 1)
    else:
        check.equal(case.shape, 1)
    evidence = check.evidence(claim)
    if evidence.status == "violated":
        found = check.found[claim]
        raise Broken(CLAIMS[claim], evidence.reason, mistake=found.mistake, residual=found.worst)
    return check.found[claim].worst
