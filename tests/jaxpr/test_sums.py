"""``additions_after``: how many numbers are added to an equation's result."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bnverify import reference
from bnverify.jaxpr.arithmetic import additions_after
from bnverify.jaxpr.interpreter import inner_jaxprs

X = np.ones((4, 8), np.float32)


def by_name(function, *args):
    """Return the largest count for each primitive, over all nested jaxprs."""
    jaxpr = jax.make_jaxpr(function)(*args)
    counts = additions_after(jaxpr)
    found: dict[str, float] = {}

    def gather(inner):
        for eqn in inner.eqns:
            name = eqn.primitive.name
            found[name] = max(found.get(name, 0), counts[id(eqn)])
            for body in inner_jaxprs(eqn):
                gather(getattr(body, "jaxpr", body))

    gather(jaxpr.jaxpr)
    return found


def test_lengths_of_nested_sums_multiply():
    """A value summed over 4 rows and then over 8 features is one of 32 terms."""
    counts = by_name(lambda x: jnp.sum(jnp.exp(jnp.sum(jnp.sin(x), 0))), X)
    assert counts["sin"] == 32
    assert counts["exp"] == 8
    assert counts["reduce_sum"] == 8


def test_a_matrix_product_is_a_sum():
    """Both of its factors are terms."""
    counts = by_name(lambda x: jnp.sin(x) @ jnp.cos(x).T, X)
    assert counts == {"sin": 8, "cos": 8, "transpose": 8, "dot_general": 1}


def test_each_addition_counts():
    """Sixteen microbatches added one by one are sixteen terms."""

    def total(x):
        results = [jnp.sin(x * k) for k in range(1, 17)]
        return sum(results[1:], results[0])

    assert by_name(total, X)["sin"] == 16


def test_calls_and_branches_are_entered():
    """Additions after a call or a branch count for the equations within it."""

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
def test_before_a_loop_or_unknown_primitive_the_count_is_infinite(loop):
    """It may add in every iteration."""
    assert by_name(lambda x: loop(jnp.sin(x)), X)["sin"] == math.inf


def test_an_optimizer_adds_few_numbers():
    """Adam's moments are added to nothing else; the step's deviations from the mean are."""
    subject = reference.make_subject(optax.adam)
    state = jax.eval_shape(subject.init, np.int32(0), X)
    counts = by_name(subject.step, state, X, X[:, :1], np.float32(0.1))
    assert counts["sqrt"] < 16
    assert counts["rsqrt"] >= 32
