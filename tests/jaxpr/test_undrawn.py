"""With all random bits equal, a correct step does the same for a batch and for its rows twice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnverify.jaxpr.rounding import evaluate_stacked
from bnverify.jaxpr.tracing import trace
from bnverify.jaxpr.undrawn import UndrawnReading, draws_can_be_equal

X = np.random.default_rng(0).normal(size=(1, 4, 3)).astype(np.float32)
KEY = np.zeros((1, 2), np.uint32)

Function = Callable[[Any, Any], Any]


def traced(function: Function, x: Any) -> Any:
    """Return the trace of a function of one key and one batch."""
    return trace(function, KEY[0], x[0])


def once_and_twice(function: Function) -> tuple[float, float]:
    """Return the result for a batch and for its rows twice, with equal random numbers."""
    both = X, np.concatenate([X, X], axis=1)
    return tuple(  # type: ignore[return-value]
        float(evaluate_stacked(traced(function, x), KEY, x, reading=UndrawnReading(count=1))[0])
        for x in both
    )


def two_rows(key: Any, x: Any) -> Any:
    """Each row mixed with a row of a random order, in a random proportion."""
    order, share = jax.random.split(key)
    mixed = x[jax.random.permutation(order, len(x))]
    weight = jax.random.uniform(share)
    return jnp.mean((weight * x + (1 - weight) * mixed) ** 2)


RIGHT: dict[str, Function] = {
    "dropout": lambda key, x: jnp.mean(
        jnp.where(jax.random.bernoulli(key, 0.9, x.shape), x / 0.9, 0.0) ** 2
    ),
    "noise": lambda key, x: jnp.mean((x + 0.1 * jax.random.normal(key, x.shape)) ** 2),
    "a time for each row": lambda key, x: jnp.mean(
        x.sum(1) * (1 + jax.random.randint(key, (len(x),), 0, 1000))
    ),
    "a row of the batch": lambda key, x: jnp.mean(
        (x - x[jax.random.randint(key, (len(x),), 0, len(x))]) ** 2
    ),
    "categories": lambda key, x: jnp.mean(jax.random.categorical(key, x) * 1.0),
    "a key for each row": lambda key, x: jnp.mean(
        jax.vmap(lambda k, row: row * jax.random.normal(k, (3,)))(jax.random.split(key, len(x)), x)
    ),
    "mixed rows": two_rows,
}


@pytest.mark.parametrize("name", RIGHT)
def test_a_mean_is_the_same_for_repeated_rows(name: str) -> None:
    """Each way to use random numbers treats all rows alike."""
    assert draws_can_be_equal(traced(RIGHT[name], X).jaxpr)
    once, twice = once_and_twice(RIGHT[name])
    assert np.isfinite(once)
    assert abs(once) > 1e-6
    assert twice == pytest.approx(once, rel=1e-9)


def test_a_sum_over_a_constant_is_not() -> None:
    """The mistake that dropout would hide."""

    def function(key: Any, x: Any) -> Any:
        kept = jax.random.bernoulli(key, 0.5, x.shape)
        return jnp.sum(jnp.where(kept, x / 0.5, 0.0) ** 2) / 256

    once, twice = once_and_twice(function)
    assert twice == pytest.approx(2 * once, rel=1e-9)


@pytest.mark.parametrize(
    "draw",
    [
        lambda key, x: jax.random.poisson(key, 3.0, (len(x),)).sum(),
        lambda key, x: jax.random.gamma(key, 3.0, (len(x),)).sum(),
    ],
    ids=["poisson", "gamma"],
)
def test_draws_until_a_number_is_accepted_are_left_out(draw: Function) -> None:
    """With equal bits they might never end, or would not be equal."""
    assert not draws_can_be_equal(traced(draw, X).jaxpr)
