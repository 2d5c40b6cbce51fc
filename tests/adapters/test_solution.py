"""The adapter for a single function that returns an eval loss."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bnverify import reference, verify
from bnverify.adapters.explain import SubjectError
from bnverify.adapters.solution import AGREEMENT, OUTSIDE, solution
from bnverify.laws import LAWS
from bnverify.model import Case

# No pattern: a row at a kink of the ReLU makes compiled and eager runs differ by more than rounding.
CASE = Case.of(3, np.random.default_rng(1).standard_normal((5, 3)), np.arange(5.0), 0.1)


class Mlp(nn.Module):
    hidden: int = 11

    @nn.compact
    def __call__(self, x: Any, train: bool) -> Any:
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(self.hidden)(x))
        return nn.Dense(1)(nn.relu(x))


def one_function(
    model: nn.Module,
    *,
    evaluate_in_train_mode: bool = False,
    split_key: bool = False,
    uphill: bool = False,
) -> Callable[..., Any]:
    """Return a solution in one function, correct or with one change."""

    def train_step(seed: float, x_batch: Any, y_batch: Any, lr: float) -> Any:
        key = jax.random.PRNGKey(int(seed))
        key = jax.random.split(key)[0] if split_key else key
        variables = model.init(key, x_batch, train=False)

        def loss_fn(params: Any) -> Any:
            given = {"params": params, "batch_stats": variables["batch_stats"]}
            out, updated = model.apply(given, x_batch, train=True, mutable=["batch_stats"])
            return jnp.mean((out.reshape(-1) - y_batch) ** 2), updated

        (_, updated), grads = jax.value_and_grad(loss_fn, has_aux=True)(variables["params"])
        tx = optax.sgd(-lr if uphill else lr)
        updates, _ = tx.update(grads, tx.init(variables["params"]))
        after = {"params": optax.apply_updates(variables["params"], updates), **updated}
        out, _ = model.apply(after, x_batch, train=evaluate_in_train_mode, mutable=["batch_stats"])
        return jnp.mean((out.reshape(-1) - y_batch) ** 2).reshape(1)

    return train_step


def stepped(subject: Any) -> Any:
    """Return the eval loss after one step, as the laws see it."""
    before = subject.init(CASE.seed, CASE.x)
    after, _ = subject.step(before, CASE.x, CASE.y, CASE.lr)
    return subject.evaluate(after, CASE.x, CASE.y)


@pytest.mark.parametrize(
    "function",
    [reference.train_step, one_function(Mlp()), jax.jit(one_function(Mlp()), static_argnums=0)],
    ids=["reference", "another width", "compiled"],
)
def test_a_function_is_held_to_the_canonical_step_around_its_module(
    function: Callable[..., Any],
) -> None:
    """The result is compared with the canonical step, for any number of units."""
    subject = solution(function)
    assert not set(AGREEMENT) & set(subject.exempt)
    assert set(LAWS) - set(subject.exempt) == set(AGREEMENT)
    expected = function(float(CASE.seed), CASE.x, CASE.y, float(CASE.lr))
    np.testing.assert_allclose(stepped(subject), expected, rtol=1e-4)


def test_a_wrong_function_is_held_to_the_right_step() -> None:
    """A function that evaluates in train mode differs from the canonical step."""
    function = one_function(Mlp(), evaluate_in_train_mode=True)
    subject = solution(function)
    assert set(LAWS) - set(subject.exempt) == set(AGREEMENT)
    found = function(float(CASE.seed), CASE.x, CASE.y, float(CASE.lr))
    assert abs(float(found[0]) - float(stepped(subject)[0])) > 0.1


@pytest.mark.parametrize(
    "function",
    [
        one_function(Mlp(), split_key=True),
        lambda seed, x_batch, y_batch, lr: jnp.mean(y_batch**2).reshape(1),
    ],
    ids=["another first state", "no module"],
)
def test_a_function_of_another_kind_is_judged_from_outside(function: Callable[..., Any]) -> None:
    """With another initialisation, or without Flax, only the result is checked."""
    subject = solution(function)
    assert set(LAWS) - set(subject.exempt) == set(OUTSIDE)
    expected = function(float(CASE.seed), CASE.x, CASE.y, float(CASE.lr))
    np.testing.assert_allclose(stepped(subject), expected, rtol=1e-4)


def test_a_function_that_needs_its_seed_as_a_number_traces() -> None:
    """For a function with ``int(seed)``, a few fixed seeds replace all others under jit."""
    subject = solution(one_function(Mlp(), split_key=True))
    before = subject.init(np.int32(1), CASE.x)
    after, _ = subject.step(before, CASE.x, CASE.y, CASE.lr)
    compiled = jax.jit(subject.evaluate)(after, CASE.x, CASE.y)
    np.testing.assert_allclose(compiled, subject.evaluate(after, CASE.x, CASE.y), rtol=1e-4)


def test_a_function_that_raises_is_explained() -> None:
    """An error from Flax is explained by its mistake."""

    def forgetful(seed: float, x_batch: Any, y_batch: Any, lr: float) -> Any:
        variables = Mlp().init(jax.random.PRNGKey(int(seed)), x_batch, train=False)
        return Mlp().apply(variables, x_batch, train=True)

    with pytest.raises(SubjectError, match="mutable"):
        solution(forgetful)


@pytest.mark.nightly
def test_the_quick_profile_sees_a_reversed_gradient() -> None:
    """All cases are first steps, so that each can be compared."""
    law = "solution_is_init_step_evaluate"
    reversed_step = solution(one_function(Mlp(), uphill=True))
    (found,) = verify(reversed_step, "quick", select=[law]).results
    assert found.status == "violated"
