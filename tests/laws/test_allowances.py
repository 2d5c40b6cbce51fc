"""Rounding and overflow in a correct step violate no law."""

from __future__ import annotations

from types import SimpleNamespace

import jax
import numpy as np
import optax
import pytest

from bnverify.laws import LAWS, UNTRIGGERED
from bnverify.model import Case, LayerInput, Outcome, State, StepInfo, Transition
from bnverify.pytree import stack
from bnverify.reruns import huge, nudged_inputs, shaken

CASE = stack([Case.of(0, [[1.0]], [0.0], 0.1)])


def transition(before: State, after: State, grads: object, **known: object) -> Transition:
    """Return a stacked transition of one case with only these observations."""
    given = {"reruns": {}, "evals": {}, "facts": {}, **known}
    return Transition(CASE, before, after, StepInfo(None, grads), None, **given)


def test_an_update_whose_terms_cancel_may_round_otherwise() -> None:
    """If momentum and gradient cancel, a fused multiply-add only errs by the rounding of its terms."""
    law = LAWS["params_follow_the_optimizer"]
    tx = optax.sgd(0.1, momentum=0.9)
    rng = np.random.default_rng(0)
    momenta = rng.uniform(1, 2, (1, 512)).astype(np.float32)
    grads = {"w": (-0.9 * momenta).astype(np.float32)}
    params = {"w": np.zeros((1, 512), np.float32)}
    before = State(params, {}, (optax.TraceState({"w": momenta}), optax.EmptyState()))

    def updated(grads: object, state: State) -> State:
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        return State(optax.apply_updates(state.params, updates), {}, opt_state)

    fused = grads["w"] + np.float64(np.float32(0.9)) * momenta
    after = State({"w": (-0.1 * fused).astype(np.float32)}, {}, before.opt_state)
    expected = updated(grads, before)
    nudged = [updated(*given) for given in nudged_inputs(grads, before)]

    def error(moved: list[State]) -> float:
        facts = {"expected_update": expected, "nudged_updates": moved}
        return law.check(transition(before, after, grads, facts=facts)).item()

    assert error(nudged) <= 1
    assert error([]) > 1


@pytest.mark.parametrize(
    "name", ["params_follow_the_optimizer", "optimizer_state_follows_the_optimizer"]
)
def test_a_gradient_that_is_computed_twice_may_differ_by_its_noise(name: str) -> None:
    """The one that is returned and the one by which the params move; not by more than that."""
    law = LAWS[name]
    tx = optax.adam(0.1)
    grads = {"w": np.linspace(1e-8, 9e-8, 8, dtype=np.float32)[None]}
    params = {"w": np.ones((1, 8), np.float32)}
    state = jax.tree_util.tree_map(
        lambda leaf: np.asarray(leaf)[None], tx.init({"w": params["w"][0]})
    )
    before = State(params, {}, state)

    def updated(grads: object, state: State) -> State:
        opt_state = jax.tree_util.tree_map(lambda leaf: leaf[0], state.opt_state)
        given = jax.tree_util.tree_map(lambda leaf: leaf[0], (grads, state.params))
        updates, opt_state = tx.update(given[0], opt_state, given[1])
        made = State(optax.apply_updates(given[1], updates), {}, opt_state)
        return State(*jax.tree_util.tree_map(lambda leaf: np.asarray(leaf)[None], made))

    used = {"w": (grads["w"] * np.float32(1 + 5e-3)).astype(np.float32)}
    after, expected = updated(used, before), updated(grads, before)
    nudged = [updated(*given) for given in nudged_inputs(grads, before)]
    far = updated(shaken(grads), before)

    def error(relative: float | None) -> float:
        noise = None if relative is None else {"w": relative * np.abs(grads["w"].astype(float))}
        facts = {
            "expected_update": expected,
            "nudged_updates": nudged,
            "shaken_update": far,
            "gradient_noise": noise,
        }
        return law.check(transition(before, after, grads, facts=facts)).item()

    assert error(1e-2) <= 1
    assert error(1e-5) > 1
    assert error(None) > 1  # nothing could be read
    assert error(np.inf) <= 0  # nothing is known: of a float leaf nothing is compared


def test_biases_of_a_run_that_has_diverged_are_not_judged() -> None:
    """If gradients overflow even without rounding, a gradient of 0 cannot be expected."""
    law = LAWS["bias_before_norm_has_no_gradient"]
    grads = {"bias": np.float16([[2.0]]), "kernel": np.float16([[[1.0]]])}
    state = State(grads, {}, ())
    nothing = {"bias": np.zeros((1, 1)), "kernel": np.zeros((1, 1, 1))}
    noise = Outcome(state, StepInfo(None, nothing))
    facts = {"biases_before_norm": ("bias",)}

    def error(kernel: float) -> float:
        exact = {"bias": np.zeros((1, 1)), "kernel": np.full((1, 1, 1), kernel)}
        known = {"facts": facts, "noise": noise, "exact": Outcome(state, StepInfo(None, exact))}
        return law.check(transition(state, state, grads, **known)).item()

    assert error(1.0) > 1
    assert error(np.inf) == UNTRIGGERED


def folded_batch(batch: LayerInput, momentum: float) -> dict[str, Outcome]:
    """Return the statistics after a float32 step from 0 and from a huge value."""
    m = np.float32(momentum)
    moments = {"mean": batch.value.mean(1), "var": batch.value.var(1)}
    own = {name: (1 - m) * value.astype(np.float32) for name, value in moments.items()}
    high = {name: m * np.float32(huge(np.float32)) + value for name, value in own.items()}
    info = StepInfo(None, None)
    return {
        name: Outcome(State({}, {"norm": statistics}, ()), info)
        for name, statistics in (("zero_statistics", own), ("huge_statistics", high))
    }


@pytest.mark.parametrize("momentum", [0.0, 0.9, 0.999])
def test_an_input_that_hangs_on_rounding_is_no_wrong_moment(momentum: float) -> None:
    """Moments may err by as much as the rounding of the layer's input explains, but no more."""
    law = LAWS["batch_moments_are_the_layers_own"]
    rng = np.random.default_rng(0)
    exact = 1e-3 * rng.normal(size=(1, 8, 3))
    error = 1e-4 * rng.random((1, 8, 3))  # what an earlier layer that cancels leaves in it
    seen = LayerInput(exact + error)

    def residual(noise: float) -> float:
        facts = {
            "layer_inputs": {"norm": LayerInput(exact)},
            "layer_input_noise": {"norm": LayerInput(noise * error)},
        }
        state = State({}, {}, ())
        reruns = folded_batch(seen, momentum)
        return law.check(transition(state, state, None, reruns=reruns, facts=facts)).item()

    assert residual(1.0) <= 1
    assert residual(0.5) > 1
    assert residual(0.0) > 1


def test_only_the_biased_variance_is_the_layers_own() -> None:
    """With eight rows, the divisor N - 1 makes the variance 14% larger, far beyond rounding."""
    law = LAWS["batch_moments_are_the_layers_own"]
    given = LayerInput(np.random.default_rng(0).normal(size=(1, 8, 3)))
    facts = {
        "layer_inputs": {"norm": given},
        "layer_input_noise": {"norm": LayerInput(0 * given.value)},
    }
    state = State({}, {}, ())
    reruns = folded_batch(given, 0.9)
    t = transition(state, state, None, reruns=reruns, facts=facts)
    assert law.check(t).item() <= 1
    for outcome in reruns.values():
        statistics = outcome.state.batch_stats["norm"]
        own = reruns["zero_statistics"].state.batch_stats["norm"]["var"]
        statistics["var"] = statistics["var"] + own / np.float32(7)
    assert law.check(t).item() > 1000


def test_equal_rows_may_be_added_one_after_another() -> None:
    """The sums of the fast variance err by a fraction of the number of rows where these are equal."""
    law = LAWS["batch_moments_are_the_layers_own"]
    value = np.full((64, 512), 1.0, np.float32) + np.linspace(0, 1, 512, dtype=np.float32)
    value[0] *= np.float32(0.5)
    summed = squares = np.zeros(512, np.float32)
    for row in value:
        summed, squares = summed + row, squares + row * row
    mean = summed / np.float32(64)
    fast = squares / np.float32(64) - mean * mean
    exact = LayerInput(value.astype(np.float64)[None])
    new = State({}, {"norm": {"mean": mean[None], "var": fast[None]}}, ())
    facts = {
        "layer_inputs": {"norm": exact},
        "layer_input_noise": {"norm": LayerInput(0 * exact.value)},
    }
    # With momentum 0 the new statistics are the batch's own, whatever the old ones.
    reruns = dict.fromkeys(
        ("zero_statistics", "huge_statistics"), Outcome(new, StepInfo(None, None))
    )
    state = State({}, {}, ())
    residual = law.check(transition(state, state, None, reruns=reruns, facts=facts)).item()
    assert 0.2 < residual <= 1


@pytest.mark.parametrize(("places", "beyond"), [(0, False), (1, False), (16, True), (1000, True)])
def test_sgd_allows_two_units_in_the_last_place(places: int, *, beyond: bool) -> None:
    """Twice the rounding of a product and a sum is allowed, but no more."""
    moved = np.float32(0.875) + np.float32(places * 2.0**-24)
    t = SimpleNamespace(
        case=SimpleNamespace(seed=np.zeros(1, np.int32), lr=np.array([0.5], np.float32)),
        before=SimpleNamespace(params={"w": np.ones((1, 1), np.float32)}),
        after=SimpleNamespace(params={"w": np.full((1, 1), moved)}),
        info=SimpleNamespace(grads={"w": np.full((1, 1), np.float32(0.25))}),
    )
    (residual,) = LAWS["sgd_moves_params_by_minus_lr_times_gradient"].check(t)
    assert bool(residual > 1) is beyond
