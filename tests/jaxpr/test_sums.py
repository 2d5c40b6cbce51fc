"""How many numbers are added to what an equation makes."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bnverify import reference
from bnverify.jaxpr.interpreter import inner_jaxprs
from bnverify.jaxpr.sums import added

X = np.ones((4, 8), np.float32)


def by_name(function, *args):
    """Return the largest count of each primitive's equations, wherever in the program."""
    jaxpr = jax.make_jaxpr(function)(*args)
    counts = added(jaxpr)
    found: dict[str, float] = {}

    def gather(inner):
        for eqn in inner.eqns:
            name = eqn.primitive.name
            found[name] = max(found.get(name, 0), counts[id(eqn)])
            for body in inner_jaxprs(eqn):
                gather(getattr(body, "jaxpr", body))

    gather(jaxpr.jaxpr)
    return found


def test_the_terms_of_sums_multiply():
    """What is summed over 4 rows and then over 8 features is one of 32 terms."""
    counts = by_name(lambda x: jnp.sum(jnp.exp(jnp.sum(jnp.sin(x), 0))), X)
    assert counts["sin"] == 32
    assert counts["exp"] == 8
    assert counts["reduce_sum"] == 8


def test_a_product_of_matrices_is_a_sum():
    """Both of its factors are terms."""
    counts = by_name(lambda x: jnp.sin(x) @ jnp.cos(x).T, X)
    assert counts == {"sin": 8, "cos": 8, "transpose": 8, "dot_general": 1}


def test_each_addition_counts():
    """Sixteen microbatches added up one by one are sixteen terms."""

    def total(x):
        results = [jnp.sin(x * k) for k in range(1, 17)]
        return sum(results[1:], results[0])

    assert by_name(total, X)["sin"] == 16


def test_calls_and_branches_are_entered():
    """What is added after a call, or a branch, is added to what was made in it."""

    def branch(x):
        return jax.lax.cond(x[0, 0] > 0, jnp.sin, jax.jit(jnp.cos), x)

    counts = by_name(lambda x: jnp.sum(branch(x)), X)
    assert (counts["sin"], counts["cos"]) == (32, 32)
    counts = by_name(branch, X)
    assert (counts["sin"], counts["cos"]) == (1, 1)


@pytest.mark.parametrize(
    "loop",
    [
        lambda x: jax.lax.scan(lambda carry, row: (carry + row, None), x[0], x)[0],
        lambda x: jax.lax.while_loop(lambda c: c[0, 0] < 9, lambda c: c + c[::-1], x),
        lambda x: jax.lax.fori_loop(0, x.shape[0], lambda i, c: c + x[i], x[0]),
        lambda x: jax.lax.reduce(x, np.float32(0), lambda a, b: a + b * b, (0,)),
        jnp.fft.fft,
    ],
    ids=["scan", "while_loop", "fori_loop", "reduce", "fft"],
)
def test_ahead_of_a_loop_or_of_anything_unknown_any_number_is_added(loop):
    """It may add from turn to turn, or inside."""
    assert by_name(lambda x: loop(jnp.sin(x)), X)["sin"] == math.inf


def test_an_optimizer_adds_to_no_sum():
    """Adam's roots and moments stay with their own element; the step's deviations do not."""
    subject = reference.make_subject(optax.adam)
    state = jax.eval_shape(subject.init, np.int32(0), X)
    counts = by_name(subject.step, state, X, X[:, :1], np.float32(0.1))
    assert counts["sqrt"] < 16
    assert counts["rsqrt"] >= 32
