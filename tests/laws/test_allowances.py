"""What rounding, overflow and 16 bits do to a correct step breaks no law."""

from __future__ import annotations

import numpy as np
import optax

from bnverify import zoo
from bnverify.case import Case
from bnverify.engine.judge import Judge
from bnverify.laws import LAWS
from bnverify.laws.law import UNTRIGGERED
from bnverify.observe import Calls, observe
from bnverify.reruns import nudged_inputs
from bnverify.stacks import stacked_cases
from bnverify.subject import State, StepInfo
from bnverify.transition import Outcome, Transition

CASE = Case.of(0, [[1.0]], [0.0], 0.1)


def transition(before: State, after: State, grads: object, **known: object) -> Transition:
    """Return what an observed step would be of which only this is asked."""
    return Transition(CASE, before, after, StepInfo(None, grads), None, {}, {}, **known)


def test_an_update_whose_terms_cancel_may_round_otherwise() -> None:
    """Momentum against the gradient: what a fused multiply and add gives is off by its rounding alone."""
    law = LAWS["params_follow_the_optimizer"]
    tx = optax.sgd(0.1, momentum=0.9)
    rng = np.random.default_rng(0)
    momenta = rng.uniform(1, 2, 512).astype(np.float32)
    grads = {"w": (-0.9 * momenta).astype(np.float32)}
    params = {"w": np.zeros(512, np.float32)}
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
        return float(law.check(transition(before, after, grads, facts=facts)))

    assert error(nudged) <= 1
    assert error([]) > 1


def test_biases_of_a_run_that_has_diverged_are_not_judged() -> None:
    """Where gradients overflow without rounding too, the zero of one is no longer to be had."""
    law = LAWS["bias_before_norm_has_no_gradient"]
    grads = {"bias": np.float16([2.0]), "kernel": np.float16([[1.0]])}
    state = State(grads, {}, ())
    nothing = {"bias": np.zeros(1), "kernel": np.zeros((1, 1))}
    noise = Outcome(state, StepInfo(None, nothing))
    facts = {"biases_before_norm": ("bias",)}

    def error(kernel: float) -> float:
        exact = Outcome(
            state, StepInfo(None, {"bias": np.zeros(1), "kernel": np.full((1, 1), kernel)})
        )
        return float(
            law.check(transition(state, state, grads, facts=facts, exact=exact, noise=noise))
        )

    assert error(1.0) > 1
    assert error(np.inf) == UNTRIGGERED


def test_a_stack_rounds_to_16_bits_in_every_program_alike() -> None:
    """A row is its own mean: what is left of it is rounding, by which two programs may not differ."""
    law = LAWS["eval_at_the_batchs_own_moments_is_the_training_loss"]
    cases = stacked_cases(np.random.default_rng(0), (1, 1), 512)
    t = observe(Calls(zoo.bfloat16(), "stacked"), cases, law.needs)
    assert Judge(zoo.bfloat16(), {}, 512).residuals(t, [law])[law.name].max() <= 1
