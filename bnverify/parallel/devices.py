"""Compare a data-parallel step, mapped over devices in several ways, with the single-device step.

XLA reads the number of devices once, when JAX starts. A step given by its target is therefore checked
in a separate process with four simulated devices; the number of devices of this process stays as it is.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from bnverify import another_process, compile_cache, shrink
from bnverify.errors import UsageError, first_line
from bnverify.evidence import DEVICES, Cause, Counterexample, Evidence
from bnverify.jaxpr.tracing import Tracer
from bnverify.judge import Judge
from bnverify.laws import LAWS
from bnverify.laws.arithmetic import alike, holds_if, wide, within_noise
from bnverify.laws.mismatch import factor
from bnverify.lazy import jax
from bnverify.model import Case, Domain, Parallel, Transition, Tree
from bnverify.observe import CompiledSubject, observe
from bnverify.parallel.modes import MODES, PMAP, UNEQUAL, has_pmap, split
from bnverify.profile import Profile, ProfileName, named
from bnverify.pytree import path_name, stack, take
from bnverify.runs import Tally
from bnverify.stacks import stacked_cases
from bnverify.target import load

NAMES = tuple(name for name, law in LAWS.items() if law.kind == "parallel")
"""The laws of the family "parallel", in the order of reports."""

REPLICAS = "replicas_agree_to_the_bit"

MILD = Domain(max_abs_x=100.0, max_abs_y=100.0, max_lr=0.5)
"""With larger inputs, float32 rounding usually leaves no digits to compare."""

ROWS = (8, 7, 4, 16, 5)
"""Batch sizes, the first two for a quick check; 7 and 5 are not divisible by the number of devices.

Multiplied by ``Subject.rows``, so that each device has a number of rows that the step accepts.
"""

MOST = 64
"""The most cases of a shape."""

EXPLAINED = 0.01
"""The largest share of a difference that its explanation may leave unexplained."""

BLOCK = 16
"""The number of cases in a stack on one device."""

FLAG = "--xla_force_host_platform_device_count"
TIME_LIMIT = 1800.0
"""The time limit of the process with simulated devices, in seconds."""

Residuals: TypeAlias = npt.NDArray[np.float64]


def check_parallel(
    what: str | Parallel, profile: ProfileName | Profile = "ci", seed: int = 0
) -> list[Evidence]:
    """Check the laws of the family "parallel" and return the evidence for each.

    Args:
        what: ``package.module:name`` or ``path/file.py:name`` of a Parallel or of a function that
            returns one, which is checked in a process with four simulated devices; or a Parallel,
            which is checked in this process: laws that need more devices are "untriggered".
        profile: how much to do.
        seed: the seed of all cases.

    Raises:
        ValueError: the profile is unknown, or ``what`` is neither.
    """
    if isinstance(what, Parallel):
        return run(what, None, named(profile), seed, NAMES)[0]
    if not isinstance(what, str):
        raise UsageError(
            f"check_parallel takes a Parallel or the target of one, got a {type(what).__name__}"
        )
    return on_devices([what], named(profile), seed, NAMES)[what][0]


def run(
    parallel: Parallel, target: str | None, plan: Profile, seed: int, names: Collection[str]
) -> tuple[list[Evidence], int]:
    """Return the evidence for the laws ``names``, in this order, and the number of cases run.

    Args:
        parallel: the step.
        target: the target of the step, as for ``bnverify.load``, to check it in a process with four
            simulated devices. None: it is checked in this process, with the devices it has.
        plan: how much to do.
        seed: the seed of all cases.
        names: names of laws of the family "parallel".

    Raises:
        UsageError: the process ended without a result.
    """
    if target is not None:
        return on_devices([target], plan, seed, names)[target]
    check = DeviceCheck(parallel, names)
    return check.run(plan, seed), check.cases


def judge(parallel: Parallel, case: Case, law: str) -> Evidence:
    """Return the evidence from one case for a law of the family "parallel".

    Raises:
        UsageError: the law cannot be judged in this process, which may have too few devices.
    """
    check = DeviceCheck(parallel, [law])
    check.hold(stack([case]))
    check.confirm(law)
    evidence = check.evidence(law)
    if evidence.status == "untriggered" and check.missing:
        raise UsageError(f"{law} cannot be judged here: {evidence.reason}")
    return evidence


class DeviceCheck:
    """Checks a data-parallel step.

    Args:
        parallel: the step.
        names: the names of the laws.
        target: the name of the step in counterexample scripts.

    Attributes:
        cases: the number of cases run, counted once for each mode.
        missing: law -> why it cannot be judged in this process.
    """

    def __init__(
        self, parallel: Parallel, names: Collection[str], target: str | None = None
    ) -> None:
        self.cases = 0
        self.missing: dict[str, str] = {}
        self._parallel = parallel
        self._names = names
        self._target = target
        self._tallies = {name: Tally(LAWS[name]) for name in NAMES}
        self._raised: dict[str, tuple[Case, str]] = {}
        self._broken: dict[str, Broken] = {}
        tracer = Tracer(parallel.single)
        self._calls = CompiledSubject(parallel.single, "vmap", tracer=tracer, most=BLOCK)
        self._judge = Judge(tracer, None)
        self._mapped = {name: MODES[name].make(parallel) for name in self._possible()}

    def _possible(self) -> Iterator[str]:
        """Yield the modes that are needed and can be run; store why the others cannot."""
        for name, mode in MODES.items():
            for_replicas = mode.replicated and REPLICAS in self._names
            if name in self._parallel.exempt or not (name in self._names or for_replicas):
                continue
            if name == UNEQUAL and self._parallel.counted_step is None:
                continue
            if mode.devices > jax.device_count():
                reason = f"this process has {jax.device_count()} of the {mode.devices} devices"
                self.missing[name] = reason
            elif name == PMAP and not has_pmap():
                self.missing[name] = "this release of jax has no pmap"
            else:
                yield name

    def run(self, plan: Profile, seed: int) -> list[Evidence]:
        """Run every mode on every shape and return the evidence for each law, in order.

        Args:
            plan: how much to do.
            seed: the seed of all cases.
        """
        compile_cache.enable()
        count = min(max(plan.examples, 8), MOST)
        single = self._parallel.single
        multiple = single.rows or 1
        for parts in ROWS if plan.shapes > 1 else ROWS[:2]:
            shape = rows, _ = parts * multiple, single.width(2)
            if parts % DEVICES and not rows % DEVICES:
                if UNEQUAL in self._mapped:
                    self.missing[UNEQUAL] = (
                        f"the step only accepts multiples of {multiple} rows, which {DEVICES} devices "
                        "always share equally"
                    )
            elif self._modes(rows):
                rng = np.random.default_rng((seed, *shape))
                self.cases += count * len(self._modes(rows))
                self.hold(stacked_cases(rng, shape, count, MILD))
        for name in self._names:
            self.confirm(name)
            self._simplify(name)
        return [self.evidence(name) for name in self._names]

    def hold(self, cases: Case) -> None:
        """Run stacked cases of one shape in every mode that accepts this number of rows."""
        modes = self._modes(cases.shape[0])
        try:
            t = self._on_one_device(cases)
        except Exception as error:  # noqa: BLE001 - whatever a user's code raises
            reason = f"on one device the step raises {first_line(error)}"
            self.missing |= dict.fromkeys(modes, reason)
            return
        for mode in modes:
            if (seen := self._seen(mode, t)) is not None:
                for law, residuals in seen.judged().items():
                    self._tallies[law].add(cases, residuals)

    def _modes(self, rows: int) -> list[str]:
        """Return the modes that accept a batch of this many rows."""
        return [name for name in self._mapped if (name == UNEQUAL) == bool(rows % DEVICES)]

    def _on_one_device(self, cases: Case) -> Transition:
        """Return the transitions of stacked cases on one device, with their rounding noise."""
        return self._judge.with_rounding(observe(self._calls, cases, ()))

    def _seen(self, mode: str, t: Transition) -> Seen | None:
        """Return the outcomes of stacked cases in a mode; None if it raises, which is a violation."""
        outcomes = []
        for index in range(len(t.case.seed)):
            before, case = take((t.before, t.case), index)
            try:
                outcome = self._mapped[mode](before, case.x, case.y, case.lr)
                outcomes.append(jax.tree_util.tree_map(np.asarray, outcome))
            except Exception as error:  # noqa: BLE001 - whatever a user's code raises
                self._raised[mode] = case, f"it raises {first_line(error)}"
                return None
        state, info = stack(outcomes)
        return Seen(mode, state, info, t)

    def confirm(self, law: str) -> None:
        """Run the simplest violating case again, on its own; without one, dismiss the violation.

        The noise is estimated from other random roundings than in the stack.
        """
        tally = self._tallies[law]
        if not tally.violated:
            return
        for case in (tally.case, tally.worst_case):
            found = next(self._breaking(law, [case]), None) if case is not None else None
            if found is not None:
                self._broken[law] = found[1]
                return
        tally.dismissed = True

    def _simplify(self, law: str) -> None:
        """Replace the case that violates ``law`` by a simpler one with the same likely mistake."""
        if law not in self._broken:
            return
        broken = self._broken[law]

        def breaks(candidates: list[Case]) -> int | None:
            for start in range(0, len(candidates), BLOCK):
                for place, found in self._breaking(law, candidates[start : start + BLOCK]):
                    if found.mistake == broken.mistake:
                        self._broken[law] = found
                        return start + place
            return None

        # The simplest cases for other laws are tried first.
        others = [each.case for name, each in self._broken.items() if name != law]
        if breaks([case for case in others if case.shape == broken.case.shape]) is None:
            shrink.simplest(broken.case, breaks)

    def _breaking(self, law: str, cases: Sequence[Case]) -> Iterator[tuple[int, Broken]]:
        """Yield (index, violation) for each of the cases, all of one shape, that violates ``law``."""
        if not cases:
            return
        t = self._on_one_device(stack(cases))
        for mode in self._modes(t.case.shape[0]):
            shows = law == mode or (law == REPLICAS and MODES[mode].replicated)
            if shows and (seen := self._seen(mode, t)) is not None:
                for place in map(int, np.flatnonzero(seen.judged()[law] > 1)):
                    yield place, Broken(cases[place], *self._explained(law, seen, place))

    def _explained(self, law: str, seen: Seen, index: int) -> tuple[str, str]:
        """Return the most likely mistake in one case, and how its outcome differs."""
        apart = [path for path, differ in seen.disagreeing().items() if differ[index]]
        trees = {path.partition("/")[0] for path in apart}
        if law == REPLICAS:
            synchronised = "gradients" if "batch_stats" not in trees else "statistics"
            differs = f"{', '.join(apart[:3])} differs between devices"
            return f"{synchronised}_not_synchronised", differs
        off = {name: part[index] for name, part in seen.parts().items() if part[index] > 1}
        said = [f"{name}: the error is {factor(by)} the tolerance" for name, by in off.items()]
        return self._mistake(seen, index, set(off), trees), "; ".join(said)

    def _mistake(self, seen: Seen, index: int, off: set[str], apart: set[str]) -> str:
        """Return the most likely mistake, from the wrong trees and those that differ between devices."""
        if seen.mode == UNEQUAL:
            return "unequal_shards" if "batch_stats" in off else "mean_of_means"
        wrong = seen.statistics_off(index) if "batch_stats" in off else set()
        kinds: tuple[tuple[str, Callable[[], bool]], ...] = (
            (
                "statistics_not_synchronised",
                lambda: "batch_stats" in apart or bool(wrong - {"var"}),
            ),
            (
                "moments_used_before_averaged",
                lambda: "loss" in off and self._normalises_alone(seen, index),
            ),
            # Averaged variances omit the variance of the devices' means; the means are right.
            ("variances_averaged", lambda: bool(wrong)),
            ("gradients_not_synchronised", lambda: not apart.isdisjoint({"params", "opt_state"})),
            ("mean_of_means", lambda: off == {"loss"}),
            ("gradients_summed", lambda: _is_summed(seen, index)),
            (
                "clipped_before_averaged",
                lambda: "loss" not in off and self._is_right_for_equal_shards(seen, index),
            ),
        )
        return next((mistake for mistake, fits in kinds if fits()), "wrong_gradient")

    def _normalises_alone(self, seen: Seen, index: int) -> bool:
        """Return whether the loss is the mean of those that each shard has on one device, by itself."""
        case, before = take((seen.t.case, seen.t.before), index)
        shards = [
            case._replace(x=x, y=y) for x, y in zip(split(case.x), split(case.y), strict=True)
        ]
        try:
            alone = self._calls.step(stack([before] * DEVICES), stack(shards)).info.loss
        except Exception:  # noqa: BLE001 - a user's step may refuse so few rows
            return False
        reported, expected = (np.mean(wide(info.loss[index])) for info in (seen.info, seen.t.info))
        left = abs(reported - np.mean(wide(alone)))
        return bool(left <= EXPLAINED * abs(reported - expected))

    def _is_right_for_equal_shards(self, seen: Seen, index: int) -> bool:
        """Return whether the step is right if all shards are equal, when averages change nothing."""
        case = take(seen.t.case, index)
        x, y = (np.concatenate([split(rows)[0]] * DEVICES) for rows in (case.x, case.y))
        again = self._seen(seen.mode, self._on_one_device(stack([case._replace(x=x, y=y)])))
        return again is not None and bool(again.judged()[seen.mode][0] <= 1)

    def evidence(self, name: str) -> Evidence:
        """Return the evidence for a law."""
        tally = self._tallies[name]
        if name in self._parallel.exempt:
            return Evidence.of(name, "exempt", reason=self._parallel.exempt[name])
        if name in self._raised:
            case, reason = self._raised[name]
            return self._violated(name, Broken(case, "", reason), np.inf)
        if name in self._broken:
            return self._violated(name, self._broken[name], tally.worst)
        if tally.triggered:
            reason = tally.verdict[1] or self.missing.get(name, "")
            worst = None if tally.dismissed else tally.worst
            return Evidence.of(name, "held", cases=tally.triggered, residual=worst, reason=reason)
        if name == UNEQUAL and self._parallel.counted_step is None:
            reason = "the step has no counted_step, so it does not support padding"
            return Evidence.of(name, "exempt", reason=reason)
        modes = [mode for mode in MODES if name in {mode, REPLICAS}]
        reasons = [self.missing.get(mode) or self._raised.get(mode, ("", ""))[1] for mode in modes]
        reason = next(filter(None, reasons), "rounding leaves no digits to compare in any case")
        return Evidence.of(name, "untriggered", reason=reason)

    def _violated(self, name: str, broken: Broken, worst: float | None) -> Evidence:
        return Evidence.of(
            name,
            "violated",
            cases=self._tallies[name].triggered,
            residual=worst,
            reason=broken.reason,
            counterexample=Counterexample(name, broken.case, self._target, devices=True),
            cause=Cause(broken.mistake) if broken.mistake else None,
            shape=broken.case.shape,
        )


# The outcome of a mode, how far it is from that of one device, and the most likely mistake.


class Broken(NamedTuple):
    """A case that violates a law.

    Attributes:
        case: the case.
        mistake: the likely mistake, a name in ``bnverify.mistakes``; empty if the step raises.
        reason: the difference, in one line.
    """

    case: Case
    mistake: str
    reason: str


class Seen(NamedTuple):
    """The outcomes of K stacked cases in a mode, with those of the step on one device.

    Attributes:
        mode: the name of the law about the mode.
        state: the states, every leaf (K, devices, ...).
        info: losses and gradients, every leaf (K, devices, ...).
        t: the transitions on one device, every leaf (K, ...), with their rounding noise.
    """

    mode: str
    state: Any
    info: Any
    t: Transition

    def judged(self) -> dict[str, Residuals]:
        """Return law -> residuals, (K,)."""
        found = {self.mode: np.max([*self.parts().values()], axis=0)}
        if MODES[self.mode].replicated:
            found[REPLICAS] = holds_if(~np.any([*self.disagreeing().values()], axis=0))
        return found

    def parts(self) -> dict[str, Residuals]:
        """Return part of the outcome -> its largest residual over the devices, (K,).

        Loss and gradients are averaged over the devices first, because a step may report those of
        its shard or of the whole batch.
        """
        noise = self.t.noise
        found = {
            name: self._apart(getattr(self.state, name), getattr(self.t.after, name), allowed)
            for name, allowed in noise.state._asdict().items()
            if name != "extra"
        }
        for name, allowed in noise.info._asdict().items():
            reported, expected = getattr(self.info, name), getattr(self.t.info, name)
            if reported is not None and expected is not None:
                mean = jax.tree_util.tree_map(_mean_of_devices, reported)
                found[name] = self._apart(mean, expected, allowed)
        return found

    def _apart(self, actual: Tree, expected: Tree, noise: Tree) -> Residuals:
        """Return the largest residual of any device, (K,), if both runs have the noise."""

        def on_each(leaf: Any) -> Any:
            return np.repeat(leaf[:, None], devices, axis=1)

        devices = next((leaf.shape[1] for leaf in jax.tree_util.tree_leaves(actual)), 1)
        expected, noise = jax.tree_util.tree_map(on_each, (expected, noise))
        with np.errstate(all="ignore"):  # values that are not finite are not compared
            found = within_noise(actual, expected, noise)
        residuals: Residuals = np.broadcast_to(found, self.t.case.seed.shape)
        return residuals

    def statistics_off(self, index: int) -> set[str]:
        """Return the last names of the statistics that are wrong in one case, such as "mean"."""
        actual = jax.tree_util.tree_flatten_with_path(self.state.batch_stats)[0]
        trees = self.t.after.batch_stats, self.t.noise.state.batch_stats
        others = zip(*map(jax.tree_util.tree_leaves, trees), strict=True)
        return {
            path_name(path[-1:])
            # If statistics are missing or added, no mistake fits anyway.
            for (path, leaf), (expected, noise) in zip(actual, others, strict=False)
            if self._apart(leaf, expected, noise)[index] > 1
        }

    def disagreeing(self) -> dict[str, npt.NDArray[np.bool_]]:
        """Return path of a leaf of the state -> whether it differs between devices, (K,)."""
        leaves = jax.tree_util.tree_flatten_with_path(self.state)[0]
        return {path_name(path): _disagree(leaf) for path, leaf in leaves}


def _mean_of_devices(leaf: Any) -> Any:
    return np.mean(leaf, axis=1, keepdims=True, dtype=np.float64).astype(leaf.dtype)


def _disagree(leaf: Any) -> npt.NDArray[np.bool_]:
    """Return whether the bits of a leaf, (K, devices, ...), differ between devices, (K,)."""
    cases, devices = leaf.shape[:2]
    bits = np.ascontiguousarray(leaf.reshape(cases, devices, -1)).view(np.uint8)
    differ: npt.NDArray[np.bool_] = np.any(bits != bits[:, :1], axis=(1, 2))
    return differ


def _is_summed(seen: Seen, index: int) -> bool:
    """Return whether params moved DEVICES times as far as on one device, within a tenth."""

    def moved(after: Any) -> float:
        rows = alike(after, seen.t.before.params) or []
        return float(np.sqrt(sum(np.sum((wide(now) - was)[index] ** 2) for now, was in rows)))

    first = jax.tree_util.tree_map(lambda leaf: leaf[:, 0], seen.state.params)
    right = moved(seen.t.after.params)
    return bool(right > 0 and abs(moved(first) / right - DEVICES) < 0.1 * DEVICES)


# A separate process.


def on_devices(
    targets: Sequence[str], plan: Profile, seed: int, names: Collection[str]
) -> dict[str, tuple[list[Evidence], int]]:
    """Check steps in one process with simulated devices; return target -> (evidence, number of cases).

    Args:
        targets: ``package.module:name`` or ``path/file.py:name``, each a Parallel or a function
            that returns one.
        plan: how much to do.
        seed: the seed of all cases.
        names: names of laws of the family "parallel".

    Raises:
        UsageError: a target is not a Parallel, or the process ended without a result.
    """
    asked = {"targets": list(targets), "plan": asdict(plan), "seed": seed, "names": list(names)}
    try:
        with another_process.answer(
            __name__, asked, environment=environment(), time_limit=TIME_LIMIT
        ) as file:
            found = json.loads(file.read_text(encoding="utf-8"))
    except another_process.NoAnswer as error:
        process = f"the process with {DEVICES} devices"
        if error.status is None:
            raise UsageError(f"{process} did not end within {TIME_LIMIT:g} s") from error
        said = error.said or "nothing said"
        raise UsageError(f"{process} ended without a result: {said}") from error
    if "refused" in found:
        raise UsageError(found["refused"])
    return {
        target: ([Evidence.from_json(each) for each in part["results"]], part["cases"])
        for target, part in found.items()
    }


def environment() -> dict[str, str]:
    """Return the environment variables of this process, plus those for simulated CPU devices."""
    flags = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if not flag.startswith(FLAG)]
    here = str(Path(__file__).parents[2])
    path = os.pathsep.join(filter(None, (os.getcwd(), here, os.environ.get("PYTHONPATH", ""))))
    return {
        **os.environ,
        "XLA_FLAGS": " ".join([*flags, f"{FLAG}={DEVICES}"]),
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": path,
    }


def find(target: str) -> Parallel:
    """Return the data-parallel step that ``target`` names.

    Raises:
        UsageError: it names something else.
    """
    made = load(target)
    if not isinstance(made, Parallel):
        raise UsageError(f"{target} is not a bnverify.Parallel or a function that returns one")
    return made


def answer(asked: str, file: str) -> None:
    """Check each target in this process and write the results to a file for ``on_devices``."""
    given = json.loads(asked)
    plan = Profile(**{**given["plan"], "large": tuple(given["plan"]["large"])})
    found: dict[str, Any] = {}
    try:
        for target in given["targets"]:
            check = DeviceCheck(find(target), given["names"], target)
            results = [each.to_json() for each in check.run(plan, given["seed"])]
            found[target] = {"results": results, "cases": check.cases}
    except UsageError as error:
        found = {"refused": str(error)}
    Path(file).write_text(json.dumps(found), encoding="utf-8")
