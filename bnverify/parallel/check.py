"""Running a data-parallel step under every mapping, beside the single-device step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from bnverify.case import Case, Domain
from bnverify.claim import Broken
from bnverify.engine.noise import Noise
from bnverify.engine.tally import complexity
from bnverify.evidence import Evidence
from bnverify.lazy import jax
from bnverify.parallel.compat import has_pmap, shard_map
from bnverify.parallel.subject import CLAIMS, DEVICES, Parallel
from bnverify.profile import PROFILES, Profile
from bnverify.stacks import stacked_cases
from bnverify.subject import Subject
from bnverify.transition import Calls, Transition, observe, path_name
from bnverify.unusable import first_line

MILD = Domain(max_abs_x=100.0, max_abs_y=100.0, max_lr=0.5)
"""Wilder inputs leave float32 no digits to compare more often than not."""

Mapped = Callable[..., Any]


class Mode(NamedTuple):
    """A way to map a step over devices.

    Attributes:
        claim: the claim that it is held to.
        make: Parallel -> ``(state, x, y, lr) -> (State, StepInfo)``, every leaf with a leading
            axis over the devices.
        devices: how many devices it needs.
    """

    claim: str
    make: Callable[[Parallel], Mapped]
    devices: int


def by_vmap(parallel: Parallel) -> Mapped:
    """Return the step under ``jax.vmap`` with an axis name, compiled."""
    mapped = jax.jit(jax.vmap(parallel.step, in_axes=(None, 0, 0, None), axis_name=parallel.axis))
    return lambda state, x, y, lr: mapped(state, split(x), split(y), lr)


def by_pmap(parallel: Parallel) -> Mapped:
    """Return the step under ``jax.pmap``."""
    mapped = jax.pmap(
        parallel.step,
        in_axes=(None, 0, 0, None),
        axis_name=parallel.axis,
        devices=jax.devices()[:DEVICES],
    )
    return lambda state, x, y, lr: mapped(state, split(x), split(y), lr)


def by_shard_map(parallel: Parallel) -> Mapped:
    """Return the step under ``shard_map``, compiled."""
    spec = jax.sharding.PartitionSpec
    shared, sharded = spec(), spec(parallel.axis)

    def one(*args: Any) -> Any:
        return jax.tree_util.tree_map(lambda leaf: leaf[None], parallel.step(*args))

    specs = (shared, sharded, sharded, shared)
    mapped: Mapped = jax.jit(shard_map(one, _mesh(parallel.axis), specs, sharded))
    return mapped


def by_shardings(parallel: Parallel) -> Mapped:
    """Return the whole step under ``jax.jit`` with its batch sharded and the rest on all devices."""
    spec = jax.sharding.PartitionSpec
    mesh = _mesh(parallel.axis)
    shared = jax.sharding.NamedSharding(mesh, spec())
    sharded = jax.sharding.NamedSharding(mesh, spec(parallel.axis))
    step = parallel.sharded_step or parallel.single.step
    jitted = jax.jit(
        step,
        in_shardings=(shared, sharded, sharded, shared),
        out_shardings=shared,
    )

    def run(*args: Any) -> Any:
        return jax.tree_util.tree_map(lambda leaf: np.asarray(leaf)[None], jitted(*args))

    return run


def _mesh(axis: str) -> Any:
    return jax.sharding.Mesh(np.array(jax.devices()[:DEVICES]), (axis,))


def split(rows: Any) -> Any:
    """Return rows (N, ...) as shards (DEVICES, N / DEVICES, ...)."""
    return rows.reshape(DEVICES, -1, *rows.shape[1:])


MODES = {
    "vmap": Mode("vmap_with_an_axis_equals_one_device", by_vmap, 1),
    "pmap": Mode("pmap_equals_one_device", by_pmap, DEVICES),
    "shard_map": Mode("shard_map_equals_one_device", by_shard_map, DEVICES),
    "jit": Mode("jit_with_shardings_equals_one_device", by_shardings, DEVICES),
}


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
    """

    parallel: Parallel
    profile: str | Profile = "ci"
    seed: int = 0
    given: Case | None = None
    found: dict[str, Found] = field(default_factory=lambda: {name: Found() for name in CLAIMS})
    refusals: dict[str, str] = field(default_factory=dict)

    def run(self) -> list[Evidence]:
        """Run every mode on every shape and return the evidence of each claim."""
        plan = PROFILES.get(self.profile) if isinstance(self.profile, str) else self.profile
        if plan is None:
            raise ValueError(f"profile must be one of {', '.join(PROFILES)}, got {self.profile!r}")
        more = plan.shapes > 1
        count = min(max(plan.examples, 8), 64)
        width = self.parallel.single.features[0] if self.parallel.single.features else 2
        for rows in (8, 4, 16) if more else (8,):
            self.equal((rows, width), count)
        if self.parallel.counted_step is not None:
            for rows in (7, 5) if more else (7,):
                self.unequal((rows, width), count)
        return [self.evidence(name) for name in CLAIMS]

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
        for mode in MODES.values():
            if mode.devices > jax.device_count():
                reason = f"this process has {jax.device_count()} of the {mode.devices} devices"
                self.refusals[mode.claim] = reason
            elif mode.claim == "pmap_equals_one_device" and not has_pmap():
                self.refusals[mode.claim] = "this release of jax has no pmap"
            elif mode.claim not in self.parallel.exempt:
                self._mode(mode, known, count)

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
            if mode.claim in {"pmap_equals_one_device", "shard_map_equals_one_device"}:
                self._agree(seen, t)

    def unequal(self, shape: tuple[int, int], count: int) -> None:
        """Run the step on ``count`` cases of one shape, padded to shards of equal size."""
        step = self.parallel.counted_step
        assert step is not None
        known = self._single(shape, count)
        axes = (None, 0, 0, 0, None)
        mapped = jax.jit(jax.vmap(step, in_axes=axes, axis_name=self.parallel.axis))
        room = -(-shape[0] // DEVICES) * DEVICES
        missing = room - shape[0]
        weights = split((np.arange(room) < shape[0]).astype(np.float32))
        name = "unequal_shards_equal_one_device"
        for index in range(count):
            t = at(known, index)
            # Zeros are what padding usually is; a fault that counts them shows in the moments.
            x = np.concatenate([t.case.x, np.zeros((missing, shape[1]), np.float32)])
            y = np.concatenate([t.case.y, np.zeros(missing, np.float32)])
            try:
                out = mapped(t.before, split(x), split(y), weights, t.case.lr)
            except Exception as error:  # noqa: BLE001 - whatever a user's code raises
                self.refusals[name] = f"it raises {first_line(error)}"
                return
            self._compare(name, jax.tree_util.tree_map(np.asarray, out), t)

    def _compare(self, name: str, seen: Any, t: Transition) -> None:
        residuals = differences(seen, t)
        worst = max(residuals.values())
        unequal = name == "unequal_shards_equal_one_device"
        self.found[name].add(t.case, worst, lambda: explain(seen, t, residuals, unequal=unequal))

    def _agree(self, seen: Any, t: Transition) -> None:
        apart = disagreeing(seen)
        reason = f"{', '.join(apart[:3])} differs between devices"
        statistics = any(path.startswith("batch_stats") for path in apart)
        mistake = "statistics_not_synchronised" if statistics else "gradients_not_synchronised"
        residual = float("inf") if apart else 0.0
        self.found["replicas_agree_to_the_bit"].add(t.case, residual, lambda: (mistake, reason))

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
                script=script(self.parallel, name, found.case),
                shape=found.case.shape,
                residual=found.worst,
            ).evidence(found.cases)
        refusal = self.refusals.get(name, "")
        if refusal.startswith("it raises"):
            return Broken(claim, refusal).evidence(0)
        if found.cases:
            return claim.evidence("held", cases=found.cases, residual=found.worst)
        if name == "unequal_shards_equal_one_device" and self.parallel.counted_step is None:
            return claim.evidence("exempt", reason="the step takes no padding: no counted_step")
        return claim.evidence("untriggered", reason=refusal or "no case had digits to compare")


def at(t: Transition, index: int) -> Transition:
    """Return one of some stacked transitions."""
    return Transition(*jax.tree_util.tree_map(lambda leaf: leaf[index], tuple(t)))


def differences(seen: Any, t: Transition) -> dict[str, float]:
    """Return part of the outcome -> its worst error over the devices, in units of the noise.

    Loss and gradients are compared by their mean over the devices: whether a step reports its
    shard's own or the whole batch's is its own affair, what it does with them is not.
    """
    state, info = seen
    noise = t.noise
    parts: dict[str, tuple[Any, Any, Any]] = {
        name: (getattr(state, name), getattr(t.after, name), getattr(noise.state, name))
        for name in ("batch_stats", "params", "opt_state")
    }
    for name in ("loss", "grads"):
        reported, expected = getattr(info, name), getattr(t.info, name)
        if reported is not None and expected is not None:
            mean = jax.tree_util.tree_map(_mean, reported)
            parts[name] = (mean, expected, getattr(noise.info, name))
    return {name: _worst(*part) for name, part in parts.items()}


def _mean(leaf: Any) -> Any:
    wide = np.asarray(leaf, np.float64)
    return wide.mean(axis=0, keepdims=True).astype(leaf.dtype)


def _worst(actual: Any, expected: Any, noise: Any) -> float:
    """Return the worst error on any device: twice the noise is allowed, once for either run.

    The arithmetic of ``bnverify.laws.residuals.within_noise``, in NumPy: a case has thousands of
    such comparisons, each too small to be worth a call of JAX.
    """
    leaves, structure = jax.tree_util.tree_flatten(actual)
    if structure != jax.tree_util.tree_structure(expected):
        return float("inf")
    others, allowances = (jax.tree_util.tree_leaves(tree) for tree in (expected, noise))
    rows = zip(leaves, others, allowances, strict=True)
    return max((_residual(*row) for row in rows), default=-1.0)


def _residual(actual: Any, expected: Any, noise: Any) -> float:
    if actual.shape[1:] != expected.shape:
        return float("inf")
    tiny = np.finfo(expected.dtype).tiny if np.issubdtype(expected.dtype, np.floating) else 0.0
    allowed = 2 * np.asarray(noise, np.float64) + tiny
    compared = np.isfinite(expected) & np.isfinite(allowed)
    if not compared.any():
        return -1.0
    with np.errstate(all="ignore"):  # what is not finite is settled by the masks
        error = np.abs(np.asarray(actual, np.float64) - expected)
        ratio = np.where(error == 0, 0.0, error / allowed)
    return float(np.max(np.where(np.isnan(ratio), np.inf, ratio)[:, compared], initial=-1.0))


def disagreeing(seen: Any) -> list[str]:
    """Return the paths of the leaves of the state that are not the same on every device."""
    state, _ = seen
    leaves = jax.tree_util.tree_flatten_with_path(state)[0]
    return [
        path_name(path)
        for path, leaf in leaves
        if any(one.tobytes() != leaf[0].tobytes() for one in leaf[1:])
    ]


def explain(
    seen: Any, t: Transition, residuals: Mapping[str, float], *, unequal: bool
) -> tuple[str, str]:
    """Return the likeliest mistake and in what the outcome differs."""
    off = [name for name, value in residuals.items() if value > 1]
    reason = "; ".join(f"{name} off by {residuals[name]:.3g} times the rounding" for name in off)
    if unequal:
        return ("unequal_shards" if "batch_stats" in off else "mean_of_means"), reason
    apart = disagreeing(seen)
    if any(path.startswith("batch_stats") for path in apart):
        return "statistics_not_synchronised", reason
    if "batch_stats" in off:
        return _explain_statistics(seen, t), reason
    if any(path.startswith("params") for path in apart):
        return "gradients_not_synchronised", reason
    if off == ["loss"]:
        return "mean_of_means", reason
    return ("gradients_summed" if _summed(seen, t) else "wrong_gradient"), reason


def _explain_statistics(seen: Any, t: Transition) -> str:
    """Tell averaged variances from statistics of one shard: there the means are right."""
    actual = jax.tree_util.tree_flatten_with_path(seen[0].batch_stats)[0]
    expected = jax.tree_util.tree_leaves(t.after.batch_stats)
    noise = jax.tree_util.tree_leaves(t.noise.state.batch_stats)
    off = {
        path_name(path).rpartition("/")[2]
        for (path, leaf), value, allowed in zip(actual, expected, noise, strict=True)
        if _worst(leaf, value, allowed) > 1
    }
    return "variances_averaged" if off == {"var"} else "statistics_not_synchronised"


def _summed(seen: Any, t: Transition) -> bool:
    """Return whether params moved DEVICES times as far as they should have, within a tenth."""
    moved = _length(seen[0].params, t.before.params, 0)
    right = _length(
        jax.tree_util.tree_map(lambda leaf: leaf[None], t.after.params), t.before.params, 0
    )
    return bool(right > 0 and abs(moved / right - DEVICES) < 0.1 * DEVICES)


def _length(stacked: Any, before: Any, index: int) -> float:
    pairs = zip(jax.tree_util.tree_leaves(stacked), jax.tree_util.tree_leaves(before), strict=True)
    squares = (np.sum((leaf[index].astype(np.float64) - was) ** 2) for leaf, was in pairs)
    return float(np.sqrt(sum(squares)))


def script(parallel: Parallel, name: str, case: Case) -> str:
    """Return a script that shows a violation; it needs a process with four devices."""
    return (
        "import os\n\n"
        f'os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count={DEVICES}"\n'
        "import bnverify\n"
        "from bnverify.parallel.check import replay\n\n"
        f"parallel = ...  # {parallel.name}\n"
        f"case = {case.code()}\n"
        f"replay(parallel, case, claim={name!r})\n"
    )


def replay(parallel: Parallel, case: Case, claim: str) -> float:
    """Run one case, as a counterexample's script does, and return the worst residual.

    Raises:
        Broken: the case breaks the claim.
        ValueError: no claim has that name.
    """
    if claim not in CLAIMS:
        raise ValueError(f"no claim about data-parallel steps is named {claim!r}")
    check = Check(parallel, given=case)
    if claim == "unequal_shards_equal_one_device":
        check.unequal(case.shape, 1)
    else:
        check.equal(case.shape, 1)
    evidence = check.evidence(claim)
    if evidence.status == "violated":
        found = check.found[claim]
        raise Broken(CLAIMS[claim], evidence.reason, mistake=found.mistake, residual=found.worst)
    return check.found[claim].worst
