"""Laws on stacked transitions: cases are judged independently, and a correct step passes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnverify import compat, reference
from bnverify.judge import Undrawn
from bnverify.laws import LAWS, STEP_LAWS, UNTRIGGERED
from bnverify.laws.arithmetic import array_namespace, sum_over
from bnverify.model import Case, LayerInput, Look, Outcome, Transition
from bnverify.observe import Again, CompiledSubject, Solution, Uncompiled, observe

STACK = 256
SHAPE = (2, 2)
NUMERIC = [name for name, law in STEP_LAWS.items() if law.kind != "structure"]

STATIC = {
    "momenta": (reference.MOMENTUM,) * 2,
    "biases_before_norm": ("Dense_0/bias",),
    "wide_range": True,
    "look": Look(
        frozen_params=("params/Dense_0/kernel",),
        frozen_statistics=("batch_stats/BatchNorm_0/mean",),
    ),
}
"""Facts that are not arrays."""


def at_rest(t: Transition) -> Transition:
    """Return transitions that change nothing, as for frozen params and statistics."""
    return t._replace(after=t.before)


def all_padding(t: Transition) -> Transition:
    """Return transitions with rows of weight 0, whose inputs have no effect."""
    outcome = Outcome(t.after, t.info)
    return t._replace(
        reruns={**t.reruns, "other_padding": outcome},
        evals={**t.evals, "other_padding": t.eval_loss},
        facts={**t.facts, "row_weights": 0 * t.case.y},
    )


PREPARED: dict[str, Callable[[Transition], Transition]] = {
    "frozen_statistics_stay": at_rest,
    "frozen_params_stay": at_rest,
    "rows_of_weight_zero_change_nothing": all_padding,
}
"""Law whose precondition the reference does not meet -> transitions that meet it."""


@pytest.fixture(scope="module")
def transitions() -> Transition:
    """256 stacked transitions of the reference, with all observations."""
    # Ordinary numbers: how a law copes with bad conditioning is not in question here.
    rng = np.random.default_rng(0)
    cases = Case(
        seed=np.arange(STACK, dtype=np.int32),
        x=rng.normal(size=(STACK, *SHAPE)).astype(np.float32),
        y=rng.normal(size=(STACK, SHAPE[0])).astype(np.float32),
        lr=rng.random(STACK).astype(np.float32) / 10,
        warmup=(np.arange(STACK) % 3).astype(np.int32),
    )
    needs = {need for law in STEP_LAWS.values() for need in law.observes}
    t = observe(CompiledSubject(reference.momentum()), cases, needs)
    outcome = Outcome(t.after, t.info, t.eval_loss)
    # Any tolerance will do that is far above what two rows leave of float32.
    noise = jax.tree_util.tree_map(lambda leaf: 4e-3 * (np.abs(leaf) + np.float64(1)), outcome)
    dense = t.before.params["Dense_0"]
    hidden = cases.x @ dense["kernel"].astype(np.float64) + dense["bias"][:, None]
    inputs = {"BatchNorm_0": LayerInput(hidden)}
    direction = jax.tree_util.tree_map(lambda leaf: 1 - 0.1 * leaf[:1], t.before.params)
    along = jax.tree_util.tree_map(lambda g, v: sum_over(g * v), t.info.grads, direction)
    slope = sum(jax.tree_util.tree_leaves(along))
    oracle = reference.oracle.expected(t.before, t.case.x, t.case.y, t.case.lr)
    loss = reference.oracle.evaluate(t.after.params, t.after.batch_stats, t.case.x, t.case.y)
    facts = {
        **t.facts,
        "again": Again(t.before, t.after, t.info, t.eval_loss),
        "eager": Uncompiled(*outcome, t.before, t.before),
        "stacked": outcome,
        "solution": Solution(t.eval_loss, t.eval_loss),
        "layer_inputs": inputs,
        "layer_input_noise": jax.tree_util.tree_map(lambda leaf: 1e-6 + 0 * leaf, inputs),
        "direction": direction,
        "directional_derivative": (slope, 1e-3 * np.abs(slope), slope != 0),
        "oracle": oracle._replace(eval_loss=loss),
        "exact_constant_features": t.reruns["constant_features"],
        "exact_evaluation": t.eval_loss,
        "eval_noise": noise.eval_loss,
        "undrawn": Undrawn(outcome, t.reruns["doubled_batch"], noise),
    }
    return t._replace(facts=facts, noise=noise, exact=outcome)


def check(name: str, t: Transition) -> Any:
    t = PREPARED[name](t) if name in PREPARED else t
    return LAWS[name].check(t._replace(facts={**t.facts, **STATIC}))


@pytest.fixture(scope="module")
def singles(transitions: Transition) -> list[Transition]:
    """The same transitions, as 256 stacks of one case each."""
    direction = transitions.facts["direction"]  # the same for all cases
    found = []
    for case in range(STACK):
        t = jax.tree_util.tree_map(lambda leaf, case=case: leaf[case : case + 1], transitions)
        found.append(t._replace(facts={**t.facts, "direction": direction}))
    return found


@pytest.mark.parametrize("name", NUMERIC)
def test_each_case_is_judged_by_itself(
    transitions: Transition, singles: list[Transition], name: str
) -> None:
    """A stack of 256 cases has 256 float64 residuals, bit-identical to those of single cases."""
    stacked = check(name, transitions)
    assert stacked.shape == (STACK,)
    assert stacked.dtype == np.float64
    alone = [check(name, single).item() for single in singles]
    np.testing.assert_array_equal(stacked, alone)


@pytest.mark.parametrize("name", NUMERIC)
def test_a_correct_step_violates_no_law(transitions: Transition, name: str) -> None:
    """Every residual is at most 1, witness laws have a witness, and no law is untriggered."""
    residuals = check(name, transitions)
    if LAWS[name].kind == "witness":
        assert 0 in residuals
    elif name == "sgd_moves_params_by_minus_lr_times_gradient":
        assert residuals.max() > 1  # the reference with momentum is no plain SGD
    else:
        assert residuals.max() <= 1
    assert residuals.max() > UNTRIGGERED


def _statistics(t: Transition, change: Callable[[Any], Any]) -> Any:
    return t.after._replace(batch_stats=jax.tree_util.tree_map(change, t.after.batch_stats))


def _inputs(t: Transition, change: Callable[[Any], Any]) -> Any:
    inputs = {path: LayerInput(change(g.value)) for path, g in t.facts["layer_inputs"].items()}
    return t._replace(facts={**t.facts, "layer_inputs": inputs})


WRONG: dict[str, Callable[[Transition], Transition]] = {
    "batch_stats_change_only_by_ema": lambda t: t._replace(
        after=_statistics(t, lambda leaf: leaf * np.float32(1 + 1e-5) + np.float32(1e-5))
    ),
    "params_follow_the_optimizer": lambda t: t._replace(
        after=t.after._replace(params=t.before.params)
    ),
    "batch_moments_are_the_layers_own": lambda t: _inputs(t, lambda value: value * 1.01 + 0.01),
    "gradients_are_gradients_of_the_loss": lambda t: t._replace(
        info=t.info._replace(
            grads=jax.tree_util.tree_map(lambda leaf: leaf + np.float32(10), t.info.grads)
        )
    ),
    "bias_before_norm_has_no_gradient": lambda t: t._replace(
        info=t.info._replace(
            grads=jax.tree_util.tree_map(lambda leaf: leaf + np.float32(1), t.info.grads)
        )
    ),
    "eval_loss_is_finite": lambda t: t._replace(eval_loss=np.full_like(t.eval_loss, np.inf)),
    "eval_loss_equals_the_hand_derivation": lambda t: t._replace(
        eval_loss=2 * t.eval_loss + np.float32(1)
    ),
    "statistics_stay_finite": lambda t: t._replace(after=_statistics(t, lambda leaf: leaf / 0)),
}


@pytest.mark.parametrize("name", WRONG)
def test_one_wrong_case_leaves_the_others_alone(transitions: Transition, name: str) -> None:
    """With a fault in every fourth case, exactly those of them that meet the precondition are violated."""
    with np.errstate(all="ignore"):
        wrong = WRONG[name](transitions)
    faulty = np.arange(STACK) % 4 == 0

    def mixed(right: Any, other: Any) -> Any:
        if len(right) != STACK:
            return right
        return np.where(faulty.reshape(-1, *[1] * (right.ndim - 1)), other, right)

    residuals = check(name, jax.tree_util.tree_map(mixed, transitions, wrong))
    right = check(name, transitions)
    np.testing.assert_array_equal(residuals[~faulty], right[~faulty])
    triggered = faulty & (right != UNTRIGGERED)
    assert triggered.any()
    assert (residuals[triggered] > 1).all()


def test_momentum_is_held_to_what_the_model_declares(transitions: Transition) -> None:
    """Declaring 0.01 for 0.99, as in PyTorch's convention, is wrong in every case."""
    facts = {**transitions.facts, "momenta": (0.01, 0.01)}
    residuals = LAWS["momentum_is_as_declared"].check(transitions._replace(facts=facts))
    assert (residuals > 1).all()


@pytest.mark.parametrize("name", ["initial_statistics_are_zero_and_one", "statistics_stay_finite"])
def test_a_case_below_the_precondition_is_untriggered(transitions: Transition, name: str) -> None:
    """A law about the first step is untriggered in exactly the cases with a warm-up."""
    residuals = check(name, transitions)
    np.testing.assert_array_equal(residuals == UNTRIGGERED, transitions.case.warmup > 0)


def test_what_was_not_observed_is_untriggered(transitions: Transition) -> None:
    """Without evaluations of single rows, the law about them is untriggered in every case."""
    evals = {name: loss for name, loss in transitions.evals.items() if name != "rows"}
    residuals = check("eval_rows_are_independent", transitions._replace(evals=evals))
    np.testing.assert_array_equal(residuals, np.full(STACK, UNTRIGGERED))


def test_a_state_of_another_form_is_wrong_in_every_case(transitions: Transition) -> None:
    """A missing leaf makes the residual infinite in every case."""
    after = transitions.after._replace(params={"Dense_0": transitions.after.params["Dense_0"]})
    residuals = check("params_follow_the_optimizer", transitions._replace(after=after))
    np.testing.assert_array_equal(residuals, np.full(STACK, np.inf))


@pytest.mark.parametrize("shape", [(STACK,), (STACK, 1)])
def test_an_eval_loss_is_one_number_of_either_shape(
    transitions: Transition, shape: tuple[int, ...]
) -> None:
    """An eval loss of shape () gives the same residuals as one of shape (1,), bit for bit."""

    def reshaped(tree: Any) -> Any:
        return jax.tree_util.tree_map(lambda leaf: leaf.reshape(shape), tree)

    of_evaluation = "exact_evaluation", "eval_noise"
    evals = dict(transitions.evals)
    rows = evals.pop("rows").reshape(STACK, SHAPE[0], *shape[1:])
    t = transitions._replace(
        eval_loss=reshaped(transitions.eval_loss),
        evals={**reshaped(evals), "rows": rows},
        noise=transitions.noise._replace(eval_loss=reshaped(transitions.noise.eval_loss)),
        facts={**transitions.facts, **{n: reshaped(transitions.facts[n]) for n in of_evaluation}},
    )
    for name in (
        "eval_rows_are_independent",
        "eval_at_the_batchs_own_moments_is_the_training_loss",
        "inputs_reach_the_evaluation",
        "row_order_changes_nothing",
    ):
        np.testing.assert_array_equal(check(name, t), check(name, transitions))


@pytest.mark.parametrize("name", NUMERIC)
def test_the_same_law_traces_under_jax(transitions: Transition, name: str) -> None:
    """With JAX's array functions a law never needs a concrete value, so it can be compiled."""
    with compat.enable_x64(), array_namespace(jnp):
        out = jax.eval_shape(lambda t: check(name, t), transitions)
    assert (out.shape, out.dtype) == ((STACK,), jnp.float64)


def test_compiled_laws_give_the_same_residuals(transitions: Transition) -> None:
    """Compiling changes only float64 rounding, here divided by tolerances of at least 2^-24."""
    names = ["batch_moments_are_the_layers_own", "params_follow_the_optimizer"]
    with compat.enable_x64(), array_namespace(jnp):
        compiled = jax.jit(lambda t: [check(name, t) for name in names])(transitions)
    for name, residuals in zip(names, compiled, strict=True):
        expected = check(name, transitions)
        np.testing.assert_allclose(residuals, expected, rtol=2.0**-29, atol=2.0**-29)
