"""``directional_derivative`` is the derivative of the loss wherever there is one."""

from __future__ import annotations

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnverify import reference
from bnverify.jaxpr import directional_derivative, rounding

CASES = 128
RNG = np.random.default_rng(0)


def normal(*shape):
    """Return normal float32 numbers."""
    return RNG.normal(size=shape).astype(np.float32)


def slopes(loss, params, *rest, direction):
    """Return ``Slope`` of a loss on stacked cases."""
    first = jax.tree_util.tree_map(lambda leaf: leaf[0], (params, *rest))
    reading = rounding(loss, *first)

    known = reading.evaluate(params, *rest)
    args = (params, *rest)
    return directional_derivative(reading.program, args, direction, known.exact, known.noise)


SMOOTH = {
    "power": (lambda p, x: jnp.sum((p * x) ** 4), lambda p, x: 4 * p**3 * x**4),
    "tanh": (lambda p, x: jnp.sum(jnp.tanh(p * x)), lambda p, x: x / np.cosh(p * x) ** 2),
    "product": (
        lambda p, x: jnp.sum((jnp.ones((2, 3)) * x) @ p) ** 2,
        lambda p, x: 8 * (p * x).sum(axis=-1, keepdims=True) * x,
    ),
    "relu": (lambda p, x: jnp.sum(jax.nn.relu(p * x)), lambda p, x: x * (p * x > 0)),
    "abs": (lambda p, x: jnp.sum(jnp.abs(p * x)), lambda p, x: x * np.sign(p * x)),
    "clip": (
        lambda p, x: jnp.sum(jnp.clip(p * x, -0.5, 0.5) + jax.lax.clamp(-0.5, p * x, 0.5)),
        lambda p, x: 2 * x * (np.abs(p * x) < 0.5),
    ),
    "max": (lambda p, x: jnp.max(p * x), lambda p, x: x * _is_max(p * x)),
    "where": (
        lambda p, x: jnp.sum(jnp.where(p > x, p**2, 3 * p)),
        lambda p, x: np.where(p > x, 2 * p, 3),
    ),
    "sign": (lambda p, x: jnp.sum(jnp.sign(p) * p * x), lambda p, x: np.sign(p) * x),
    "pick": (lambda p, x: p[jnp.argmax(p * x)] * 2, lambda p, x: 2.0 * _is_max(p * x)),
    "floor": (
        lambda p, x: jnp.sum((p - jnp.floor(p)) ** 2) + 0 * x[0],
        lambda p, x: 2 * (p - np.floor(p)) + 0 * x,
    ),
    "scan": (
        lambda p, x: jax.lax.scan(lambda c, t: (c * t + p.sum(), None), p[0], x)[0],
        lambda p, x: (
            np.stack([x.prod(axis=-1), *np.zeros((2, len(x)))], axis=-1)
            + (1 + x[:, 2] * (1 + x[:, 1]))[:, None]
        ),
    ),
}


def _is_max(values):
    return values == values.max(axis=-1, keepdims=True)


@pytest.mark.parametrize("name", SMOOTH)
def test_the_slope_is_the_derivative(name):
    """On smooth pieces it agrees to about ten digits, and within ``allowed``."""
    loss, derivative = SMOOTH[name]
    p, x, v = normal(CASES, 3), normal(CASES, 3), normal(3)
    value, allowed, reliable = slopes(loss, p, x, direction=v)
    expected = np.sum(derivative(p.astype(float), x.astype(float)) * v, axis=-1)
    assert reliable.all()
    assert (np.abs(value - expected) <= allowed + 1e-13).all()
    np.testing.assert_allclose(value, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("sharp", [1e3, 1e5, 1e6, 1e7])
def test_curvature_within_the_distance_is_allowed_for(sharp):
    """The larger differences agree with each other, but not with the slope at the point."""
    p, v = normal(CASES, 2), normal(2)
    scale = np.float32(1 / sharp)
    value, allowed, reliable = slopes(
        lambda p, at: jnp.sum(p + scale * jnp.tanh((p - at) / scale)), p, p, direction=v
    )
    assert reliable.all()
    assert (np.abs(value - 2 * v.sum(axis=-1)) <= allowed + 1e-4 * np.abs(v).sum(axis=-1)).all()


def test_on_a_kink_the_slope_is_not_reliable():
    """relu(0), abs(0) and a tie of two maxima."""
    zero, v = np.zeros((CASES, 2), np.float32), normal(2)
    for loss in (
        lambda p: jnp.sum(jnp.maximum(p, 0)),
        lambda p: jnp.sum(jnp.abs(p)),
        lambda p: jnp.sum(jnp.where(p > 0, p, 2 * p)),
    ):
        assert not slopes(loss, zero, direction=v)[2].any()


def test_a_unit_that_is_always_off_is_not_a_kink():
    """relu(0 * p) has slope 0 on both sides."""
    zero, v = np.zeros((CASES, 2), np.float32), normal(2)
    value, _, reliable = slopes(
        lambda p, x: jnp.sum(jax.nn.relu(p * x)) + p[0], normal(CASES, 2), zero, direction=v
    )
    assert reliable.all()
    np.testing.assert_allclose(value, np.full(CASES, v[0]), rtol=1e-6)


def test_the_reference_reports_the_gradient_of_its_loss():
    """The float32 gradient agrees with the slope within noise; a relative fault of 1e-4 does not."""
    subject = reference.sgd()
    x, y = normal(CASES, 8, 3), normal(CASES, 8)
    state = jax.jit(jax.vmap(subject.init))(np.arange(CASES, dtype=np.int32), x)
    lr = np.full(CASES, 0.1, np.float32)

    def loss(params, state, x, y, lr):
        return subject.step(state._replace(params=params), x, y, lr)[1].loss

    v = jax.tree_util.tree_map(lambda p: normal(*p.shape[1:]), state.params)
    value, allowed, reliable = slopes(loss, state.params, state, x, y, lr, direction=v)
    info = jax.jit(jax.vmap(subject.step))(state, x, y, lr)[1]
    reading = rounding(subject.step, *jax.tree_util.tree_map(lambda a: a[0], (state, x, y, lr)))
    noise = reading.evaluate(state, x, y, lr).noise[1].grads

    def along(tree, direction):
        leaves = zip(*map(jax.tree_util.tree_leaves, (tree, direction)), strict=True)
        return sum(np.sum((np.asarray(g, float) * d).reshape(CASES, -1), axis=1) for g, d in leaves)

    slope = along(info.grads, v)
    bound = allowed + along(noise, jax.tree_util.tree_map(np.abs, v))
    assert reliable.mean() > 0.9
    assert (np.abs(slope - value) <= bound)[reliable].all()
    assert (np.abs(slope * (1 + 1e-4) - value) > bound)[reliable].mean() > 0.8


def test_chunking_does_not_change_the_slopes(monkeypatch):
    """Each case has the same slope whatever the chunk size."""
    loss, _ = SMOOTH["tanh"]
    p, x, v = normal(CASES, 3), normal(CASES, 3), normal(3)
    whole = slopes(loss, p, x, direction=v)
    monkeypatch.setattr(sys.modules[rounding.__module__], "BYTES", 1.0)
    for one, other in zip(slopes(loss, p, x, direction=v), whole, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)
