"""Typical tests of such a project: the loss decreases, and the running statistics change."""

import jax
import jax.numpy as jnp
import numpy as np
import training

X = np.random.default_rng(0).normal(size=(32, 4)).astype(np.float32)
Y = X[:, 0] - 2 * X[:, 1]


def test_the_loss_falls() -> None:
    """After fifty steps the training loss is less than a tenth of its first value."""
    state = training.create(0, 4)
    state, first = training.train_step(state, X, Y)
    for _ in range(50):
        state, last = training.train_step(state, X, Y)
    assert last < 0.1 * first


def test_the_statistics_move() -> None:
    """A step changes the running statistics."""
    state = training.create(0, 4)
    after, _ = training.train_step(state, X, Y)
    before, now = (jax.tree_util.tree_leaves(each.batch_stats) for each in (state, after))
    assert not any(jnp.array_equal(a, b) for a, b in zip(before, now, strict=True))


def test_evaluation_is_a_finite_number() -> None:
    """Evaluation returns a finite number."""
    assert jnp.isfinite(training.evaluate(training.create(0, 4), X, Y))
