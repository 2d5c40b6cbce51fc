"""The operation that gives the first number that is not finite, and its kind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnverify.clues.nonfinite import nonfinite

X = jnp.asarray(np.random.default_rng(0).normal(size=(4, 3)), jnp.float32)
ZEROS, ONES = jnp.zeros((4, 3)), jnp.ones((4, 3))
NORM = nn.BatchNorm(use_running_average=False, epsilon=0.0)
VARIABLES = NORM.init(jax.random.key(0), X)


def slope(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Return the gradient of the sum of a function's results."""
    return jax.grad(lambda x: jnp.sum(function(x)))


def normalised(x: Any, *, epsilon: float) -> Any:
    """Return x after Flax's BatchNorm."""
    return NORM.clone(epsilon=epsilon).apply(VARIABLES, x, mutable=["batch_stats"])[0]


def by_length(x: Any) -> Any:
    """Return rows of length 1."""
    return x / jnp.linalg.norm(x, axis=1, keepdims=True)


def by_moments(x: Any, var: Any) -> Any:
    """Return normalised features."""
    return (x - jnp.mean(x, axis=0)) * jax.lax.rsqrt(var)


CASES: dict[str, tuple[str, str, Callable[[Any], Any], Any]] = {
    "exp": ("exponential", "exp", lambda x: jnp.exp(100 * x), X),
    "softplus": ("exponential", "exp", lambda x: jnp.log(1 + jnp.exp(100 * x)), X),
    "log of a softmax": ("logarithm", "log", lambda x: jnp.log(jax.nn.softmax(200 * x)), X),
    "log of a mean over models": (
        "logarithm",
        "log",
        lambda x: -jnp.log(jnp.mean(jax.nn.softmax(jnp.stack([x, 2 * x]) * 300), axis=0)),
        X,
    ),
    "log of 1 - p": ("logarithm", "log", lambda x: jnp.log(1 - jax.nn.sigmoid(x + 30)), X),
    "log of a negative number": ("logarithm", "log", lambda x: jnp.log(-(x**2)), X),
    "log1p": ("logarithm", "log1p", lambda x: jnp.log1p(-x), ONES),
    "log in a scan": (
        "logarithm",
        "log",
        lambda x: jax.lax.scan(lambda c, row: (c + jnp.sum(jnp.log(row)), None), jnp.zeros(()), x)[
            0
        ],
        ZEROS,
    ),
    "a masked log does not count": (
        "exponential",
        "exp",
        lambda x: jnp.where(x > 0, jnp.log(x), 0.0) + jnp.exp(100 * x),
        X,
    ),
    "slope of a masked log": (
        "division",
        "div",
        slope(lambda x: jnp.where(x > 0, jnp.log(x), 0.0)),
        ZEROS,
    ),
    "slope of sqrt": ("slope", "div", slope(jnp.sqrt), ZEROS),
    "slope of a norm": ("slope", "div", slope(lambda x: jnp.linalg.norm(x, axis=1)), ZEROS),
    "slope of a deviation": ("slope", "div", slope(lambda x: jnp.std(x, axis=0)), ONES),
    "slope of a power": ("slope", "pow", slope(lambda x: x**0.5), ZEROS),
    "slope of arccos": ("slope", "rsqrt", slope(jnp.arccos), ONES),
    "0/0": ("division", "div", lambda x: x / jnp.sum(x), ZEROS),
    "a mask without rows": ("division", "div", lambda x: jnp.sum(x) / jnp.sum(x > 9), X),
    "a vector of length 0": ("division", "div", by_length, ZEROS),
    "the length of normalised features": (
        "division",
        "div",
        lambda x: by_length(normalised(x, epsilon=1e-5)),
        1000 * ONES,
    ),
    "a mean square, not a variance": (
        "division",
        "rsqrt",
        lambda x: x * jax.lax.rsqrt(jnp.mean(x * x, axis=1, keepdims=True)),
        ZEROS,
    ),
    "BatchNorm without epsilon": (
        "zero variance",
        "rsqrt",
        lambda x: normalised(x, epsilon=0.0),
        ONES,
    ),
    "a deviation of 0": (
        "zero variance",
        "div",
        lambda x: (x - jnp.mean(x, axis=0)) / jnp.std(x, axis=0),
        ONES,
    ),
    "a running variance of 0": (
        "zero variance",
        "rsqrt",
        lambda state: by_moments(X, state["batch_stats"]["var"]),
        {"batch_stats": {"var": jnp.zeros(3)}},
    ),
    "an average with the running variance": (
        "zero variance",
        "rsqrt",
        lambda state: by_moments(
            X, 0.9 * state["batch_stats"]["var"] + 0.1 * jnp.var(ONES + X[0], 0)
        ),
        {"batch_stats": {"var": jnp.zeros(3)}},
    ),
    "a variance below 0": (
        "negative variance",
        "rsqrt",
        lambda x: by_moments(x, jnp.mean(x**2, axis=0) - 1.001 * jnp.mean(x, axis=0) ** 2),
        1000 * ONES,
    ),
    "root of a negative number": ("domain", "sqrt", lambda x: jnp.sqrt(-(x**2)), X),
    "arccos beyond 1": ("domain", "acos", lambda x: jnp.arccos(2 * x), ONES),
    "inf - inf": (
        "domain",
        "sub",
        lambda x: jax.nn.softmax(jnp.where(x < 9, -jnp.inf, x)),
        X,
    ),
    "a square": ("overflow", "square", lambda x: jnp.square(1e20 * x), X),
    "float16": ("overflow", "convert_element_type", lambda x: (1e5 * x).astype(jnp.float16), ONES),
}


@pytest.mark.parametrize("name", CASES)
def test_the_kind_of_the_first_number_that_is_not_finite(name: str) -> None:
    """Read in the program's own dtypes, so that underflow and rounding count."""
    kind, primitive, function, x = CASES[name]
    with np.errstate(all="ignore"):
        found = nonfinite(function, x)
    assert (found["nonfinite_kind"], found["nonfinite"]) == (kind, primitive)


def test_a_finite_result_gives_no_clue() -> None:
    """Masked numbers do not count either."""
    assert nonfinite(jnp.sum, X) == {}
    assert nonfinite(lambda x: jnp.where(x > 0, jnp.log(x), 0.0), X) == {}


def test_the_line_is_the_users() -> None:
    """The innermost one outside JAX and Flax."""

    def loss(x: Any) -> Any:
        return jnp.mean(jnp.log(x))

    assert nonfinite(loss, ZEROS)["nonfinite_at"].endswith("(loss)")
