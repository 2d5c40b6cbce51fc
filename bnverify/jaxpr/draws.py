"""Random relative errors: signs and sizes, of root mean square 1, for each row and element."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_SMALL = 512  # elements up to which each has its own draw; beyond, each index of each axis
_SCALE = 1.0408  # the root mean square of a size between 0.5 and 1.5


def independent(seed: int, rows: int, shape: tuple[int, ...]) -> Any:
    """Return draws that have nothing to do with each other, (1 + rows, *shape); 0 in row 0.

    Args:
        seed: another for each equation.
        rows: how many rows there are besides the exact one.
        shape: of the value that errs.
    """
    rng = np.random.default_rng(seed)

    def normal(*axes: int) -> Any:
        return rng.choice([-1.0, 1.0], axes) * rng.uniform(0.5, 1.5, axes) / _SCALE

    if math.prod(shape) <= _SMALL:
        draw = normal(1 + rows, *shape)
        draw[0] = 0
        return draw
    # Signs that multiply: independent in pairs, and as many numbers as the axes are long.
    draw = normal(1 + rows, *[1] * len(shape))
    draw[0] = 0
    for axis, size in enumerate(shape):
        others = [1] * len(shape)
        others[axis] = size
        draw = draw * jnp.asarray(rng.choice([-1.0, 1.0], (1 + rows, *others)))
    return draw


def alike(seed: int, draw: Any, exact: Any) -> Any:
    """Return ``draw``, in half of its rows a function of the values: equal ones err equally.

    A batch of n equal rows errs n-fold in a sum, where independent errors add up to sqrt(n). In
    32 bits the difference drowns in what a sum of few terms is allowed anyway; in 16 it does not.

    Args:
        seed: another for each equation.
        draw: (1 + rows, *shape).
        exact: the values without rounding, of ``shape``.
    """
    half = (len(draw) - 1) // 2
    rng = np.random.default_rng(seed)
    odd = rng.integers(2**62, 2**63, (half, *[1] * exact.ndim), np.uint64) * np.uint64(2) + 1
    bits = jax.lax.bitcast_convert_type(exact.astype(jnp.float64), jnp.uint64)
    mixed = (bits + odd) * odd
    mixed = (mixed ^ (mixed >> np.uint64(32))) * odd
    share = (mixed >> np.uint64(12)).astype(jnp.float64) / 2.0**52
    size = (0.5 + jnp.abs(2 * share - 1)) / _SCALE
    return jnp.concatenate([draw[: len(draw) - half], jnp.where(share < 0.5, -size, size)])
