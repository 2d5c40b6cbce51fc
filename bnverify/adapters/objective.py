"""Whether the loss that a step reports is the one that it differentiates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bnverify.jaxpr.rounding import evaluate
from bnverify.jaxpr.tracing import trace

PLACES = 1e-6  # below it, what differs is the rounding of one small step
ALIKE = 0.1  # a penalty gives one value for all batches but for rounding; anything else does not


def has_penalty(init: Callable[..., Any], step: Callable[..., Any], sizes: tuple[int, int]) -> bool:
    """Return whether the gradients are those of the reported loss and of a term of params alone.

    Along a direction v the gradient g and the slope of the reported loss L differ by
    r = g v - L'(v). A penalty on the params gives one r for every batch; a wrong gradient gives
    another r for another batch, and is for the laws to find. Three batches are run.

    Args:
        init: see ``bnverify.subject.Subject``.
        step: likewise; its loss and gradients are not None.
        sizes: (N, D) of the batches that are run.
    """

    def measured(x: Any, y: Any) -> tuple[Any, Any]:
        state = init(jnp.int32(0), x)
        direction = _direction(state.params)

        def loss(params: Any) -> Any:
            return step(state._replace(params=params), x, y, jnp.float32(0.0))[1].loss

        grads = step(state, x, y, jnp.float32(0.0))[1].grads
        parts = jax.tree_util.tree_map(lambda g, v: jnp.sum(g * v), grads, direction)
        _, slope = jax.jvp(loss, (state.params,), (direction,))
        return sum(jax.tree_util.tree_leaves(parts)), slope

    generator = np.random.default_rng(0)
    rests, program = [], None
    for shift in (0.0, 1.0, -2.0):
        x = generator.standard_normal(sizes).astype(np.float32)
        batch = x, x[:, 0] + np.float32(shift)
        program = program or trace(measured, *batch)
        along, slope = (float(part) for part in evaluate(program, *batch))
        if abs(along - slope) <= PLACES * (abs(along) + abs(slope)):
            return False
        rests.append(along - slope)
    return max(rests) - min(rests) <= ALIKE * min(map(abs, rests))


def _direction(params: Any) -> Any:
    """Return a tree like ``params`` of numbers without a pattern, each at most 1."""

    def leaf(value: Any) -> Any:
        count = jnp.arange(value.size, dtype=jnp.float32).reshape(value.shape)
        return jnp.sin(1.0 + 1.7 * count + 0.3 * value.size).astype(value.dtype)

    return jax.tree_util.tree_map(leaf, params)
