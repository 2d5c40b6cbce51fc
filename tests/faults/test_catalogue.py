"""The catalogue: every fault has an effect, every control is correct, and all of them trace."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnverify.mistakes import MISTAKES
from bnverify.model import Domain, Subject
from tests.faults import CONTROLS, FAULTS
from tests.faults.frameworks import NnxStep, TrainStateStep
from tests.faults.steps import CanonicalStep, HandwrittenNorm, mapped

BASES = (TrainStateStep, NnxStep, HandwrittenNorm, CanonicalStep)
OBSERVED = 3  # steps: the default domain has at most two before the observed one
SETTINGS = ("hidden", "momentum", "layers", "epsilon", "bias", "fast_variance")

TRACED = [name for name, fault in FAULTS.items() if not fault.raises]
REFUSED = [name for name, fault in FAULTS.items() if fault.raises]
TOLERATED = [name for name, fault in FAULTS.items() if fault.tolerated]
SURVIVING = [name for name, fault in FAULTS.items() if fault.survives]
SHOWING = [name for name in TRACED if name not in SURVIVING]


def batch(rows: int, features: int, size: float = 3.0) -> tuple[Any, Any]:
    rng = np.random.default_rng(100 * rows + features)
    x = size * rng.normal(size=(rows, features)) + size
    return x.astype(np.float32), (10 * rng.normal(size=rows)).astype(np.float32)


def constant(rows: int, value: float) -> tuple[Any, Any]:
    x, y = batch(rows, 2)
    return np.full_like(x, value), y


def batches() -> Iterator[tuple[Any, Any]]:
    """Yield simple batches, the simplest first."""
    yield batch(2, 1)
    yield batch(3, 2)
    yield constant(3, 1000.3)
    yield batch(3, 2, 1e3)
    yield batch(3, 2, 1e5)
    yield batch(3, 2, 1e-2)
    yield constant(3, 0.0)


def right(subject: Subject) -> Subject:
    """Return the step that the author of ``subject`` meant to write."""
    parts = subject.step.__self__  # type: ignore[attr-defined]
    base = next(base for base in BASES if isinstance(parts, base))
    meant = {name: getattr(parts, name) for name in SETTINGS}
    return base(optimizer=parts.optimizer, **meant).subject("right")


def observations(subject: Subject, x: Any, y: Any) -> Iterator[Any]:
    """Yield everything observable of ``subject`` on a batch, step by step."""
    state = subject.init(np.int32(1), x)
    yield state
    # Without an old variance, a small change is not rounded away; a large mean magnifies it.
    for value in (0.0, 1e3):
        other = state._replace(
            batch_stats=mapped(partial(jnp.full_like, fill_value=value), state.batch_stats)
        )
        yield subject.step(other, x, y, np.float32(0.05)), subject.evaluate(other, x, y)
    for _ in range(OBSERVED):
        given = np.array(x)
        state, info = subject.step(state, given, y, np.float32(0.05))
        yield state, info, given
        yield subject.evaluate(state, x, y)
        if subject.after_eval is not None:
            yield subject.after_eval(state, x, y)


def close(one: Any, other: Any) -> bool:
    """Return whether two trees agree in structure, shapes, types and, within rounding, values."""
    if jax.tree_util.tree_structure(one) != jax.tree_util.tree_structure(other):
        return False
    pairs = zip(jax.tree_util.tree_leaves(one), jax.tree_util.tree_leaves(other), strict=True)
    return all(
        jnp.shape(a) == jnp.shape(b)
        and jnp.asarray(a).dtype == jnp.asarray(b).dtype
        and getattr(a, "weak_type", False) == getattr(b, "weak_type", False)
        and np.allclose(a, b, rtol=0, atol=2e-5 * float(np.max(np.abs(b))))
        for a, b in pairs
    )


def differs(faulty: Subject, meant: Subject, x: Any, y: Any) -> bool:
    """Return whether anything observable of two steps differs on a batch."""
    pairs = zip(observations(faulty, x, y), observations(meant, x, y), strict=True)
    return any(not close(one, other) for one, other in pairs)


def shows(faulty: Subject, x: Any, y: Any) -> bool:
    """Return whether ``faulty`` differs from the correct step: itself, probed, or in one call."""
    if differs(faulty, right(faulty), x, y):
        return True
    if faulty.solution is not None:
        meant = CONTROLS["one_call"].make().solution
        assert meant is not None
        seeds = (1.7, 2.0**24 + 1.7)
        return any(not close(faulty.solution(s, x, y, 0.05), meant(s, x, y, 0.05)) for s in seeds)
    if faulty.with_optimizer is not None:
        probe = CONTROLS["momentum"].make().optimizer
        assert probe is not None
        probed = faulty.with_optimizer(probe)
        return differs(probed, right(probed), x, y)
    return False


@pytest.mark.nightly
@pytest.mark.parametrize("name", SHOWING)
def test_every_fault_shows_on_a_simple_batch(name: str) -> None:
    """A fault without an effect on any simple input would be a correct step or a survivor."""
    fault = FAULTS[name]
    assert any(shows(fault.make(), x, y) for x, y in (batch(*fault.minimal), *batches()))


@pytest.mark.nightly
@pytest.mark.parametrize("name", SURVIVING)
def test_survivors_agree_with_what_was_meant(name: str) -> None:
    """A survivor has no effect on any input of the domain, as its reason says."""
    subject = FAULTS[name].make()
    assert not any(shows(subject, x, y) for x, y in [batch(2, 1), batch(40, 6)])


@pytest.mark.nightly
@pytest.mark.parametrize("name", TOLERATED)
def test_what_is_tolerated_shows(name: str) -> None:
    """A tolerated fault has an effect; without one it would be a survivor."""
    assert not FAULTS[name].survives
    assert shows(FAULTS[name].make(), *batch(40, 6))


@pytest.mark.parametrize(
    "name", [*(pytest.param(n, marks=pytest.mark.nightly) for n in TRACED), *CONTROLS]
)
def test_every_step_traces_under_jit_and_vmap(name: str) -> None:
    """Cases are run in stacks, in one compiled call, so each step must trace."""
    subject = (FAULTS.get(name) or CONTROLS[name]).make()

    def run(seed: Any, x: Any, y: Any, lr: Any) -> Any:
        state = subject.init(seed, x)
        after, info = subject.step(state, x, y, lr)
        told = subject.evaluate(after, x, y), info
        if subject.after_eval is not None:
            told += (subject.after_eval(after, x, y),)
        if subject.layer_inputs is not None:
            told += (
                {path: given.value for path, given in subject.layer_inputs(state, x, y).items()},
            )
        return after, told

    x, y = batch(3, 2)
    one = np.int32(1), x, y, np.float32(0.05)
    jax.eval_shape(jax.jit(jax.vmap(run)), *(np.stack([entry, entry]) for entry in one))


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_library_refuses_is_named(name: str) -> None:
    """A fault that cannot run names the exception that the library raises."""
    fault = FAULTS[name]
    subject = fault.make()
    x, y = batch(3, 2)
    state = subject.init(np.int32(1), x)
    with pytest.raises(Exception, match=r"\w") as caught:
        subject.step(state, x, y, np.float32(0.05))
    assert type(caught.value).__name__ == fault.raises


@pytest.mark.parametrize("name", CONTROLS)
def test_controls_declare_what_they_do(name: str) -> None:
    """The layer inputs of a control give the statistics that its step writes."""
    subject = CONTROLS[name].make()
    assert subject.layer_inputs is not None
    x, y = batch(5, 3)
    state = subject.init(np.int32(1), x)
    after, _ = subject.step(state, x, y, np.float32(0.05))
    inputs = subject.layer_inputs(state, x, y)
    assert set(inputs) == set(state.batch_stats)
    for path, given in inputs.items():
        value = np.asarray(given.value, np.float64)
        counts = np.broadcast_to(1.0 if given.weights is None else given.weights, value.shape)
        mean = np.average(value, axis=0, weights=counts)
        var = np.average((value - mean) ** 2, axis=0, weights=counts)
        assert subject.momentum is not None
        old, keep = state.batch_stats[path], subject.momentum
        for key, now in (("mean", mean), ("var", var)):
            expected = keep * np.asarray(old[key]) + (1 - keep) * now
            np.testing.assert_allclose(after.batch_stats[path][key], expected, rtol=1e-4, atol=1e-5)


def test_every_entry_is_described() -> None:
    """Every fault has a mistake, a sentence, and a shape in the domain."""
    domain = Domain()
    for name, fault in FAULTS.items():
        assert name == fault.name
        assert fault.mistake in MISTAKES
        assert fault.sentence.endswith(".")
        rows, features = fault.minimal
        assert fault.survives or (rows <= domain.max_rows and features <= domain.max_features)
        assert not fault.source or fault.source.startswith("https://")
    assert all(control.sentence.endswith(".") for control in CONTROLS.values())


def test_the_catalogue_is_large_and_half_of_it_blind() -> None:
    """Only faults written before the laws give an unbiased first kill rate."""
    assert len(FAULTS) >= 80
    assert sum(fault.blind for fault in FAULTS.values()) >= 45
