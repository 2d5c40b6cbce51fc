"""A law is one function: on a stack of transitions it gives what it gives on each of them."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from bnverify import compat, reference
from bnverify.case import Case
from bnverify.engine.exploration import Again, Solution
from bnverify.engine.judge import derivation, static_facts
from bnverify.engine.volume import NEEDS
from bnverify.laws import LAWS
from bnverify.observe import Calls, observe
from bnverify.transition import Outcome, Transition

# Every law is compiled twice here; on the other releases what runs whole checks runs them stacked.
pytestmark = pytest.mark.once

STACK = 256
SHAPE = (3, 2)


@pytest.fixture(scope="module")
def transitions() -> Transition:
    """256 stacked transitions of the reference with momentum, all that laws can ask in them."""
    subject = reference.momentum()
    # Ordinary numbers: what is compared here is two ways to run a law, not a law's conditioning.
    rng = np.random.default_rng(0)
    cases = Case(
        seed=np.arange(STACK, dtype=np.int32),
        x=rng.normal(size=(STACK, *SHAPE)).astype(np.float32),
        y=rng.normal(size=(STACK, SHAPE[0])).astype(np.float32),
        lr=rng.random(STACK).astype(np.float32) / 10,
        warmup=(np.arange(STACK) % 3).astype(np.int32),
    )
    t = observe(Calls(subject, "stacked"), cases, NEEDS)
    outcome = Outcome(t.after, t.info, t.eval_loss)
    # Any tolerance serves here, as long as it is far above the last place of what is compared.
    noise, of_inputs = jax.tree_util.tree_map(
        lambda leaf: 1e-3 * (np.abs(leaf.astype(np.float64)) + 1),
        (outcome, t.facts["layer_inputs"]),
    )
    again = Again(t.before, t.after, t.info, t.eval_loss, t.before, t.before)
    zeros = np.zeros(STACK)
    facts = {
        **t.facts,
        "again": again,
        "eager": outcome,
        "stacked": outcome,
        "layer_input_noise": of_inputs,
        "solution": Solution(t.eval_loss, t.eval_loss),
        "direction": t.before.params,
        "directional_derivative": (zeros, zeros + 1.0, zeros == 0),
    }
    return t._replace(facts=facts, noise=noise, exact=outcome)


NUMERIC = sorted(name for name, law in LAWS.items() if law.kind != "structure")


@pytest.mark.parametrize("name", NUMERIC)
def test_stacked_residuals_are_those_of_single_transitions(
    transitions: Transition, name: str
) -> None:
    """Under vmap a law gives 256 residuals, and each is what the law gives alone."""
    one = jax.tree_util.tree_map(lambda leaf: leaf[0], transitions)
    static = static_facts(reference.momentum(), one)

    def residual(t: Transition) -> object:
        facts = {**t.facts, **static, "oracle": derivation(reference.oracle, t)}
        return LAWS[name].check(t._replace(facts=facts))

    with compat.enable_x64():
        stacked = np.asarray(jax.jit(jax.vmap(residual))(transitions))
        single = jax.jit(residual)
        alone = [
            float(single(jax.tree_util.tree_map(lambda leaf, i=i: leaf[i], transitions)))
            for i in range(STACK)
        ]
    assert stacked.shape == (STACK,)
    # An error is a difference of values known to 2^-53, in units of at least 2^-24 of them.
    np.testing.assert_allclose(stacked, alone, rtol=2.0**-29, atol=2.0**-29)
