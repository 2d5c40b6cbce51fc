"""Random relative errors: signs and sizes, of root mean square 1, for each row and element."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

_SMALL = 512  # elements up to which each has its own draw; beyond, each index of each axis
_MANTISSA = 23  # bits of a float32 after the leading one
_SCALE = 1.0408  # the root mean square of a size between 0.5 and 1.5


class Which(NamedTuple):
    """The rows that one evaluation holds, of all that there are.

    Attributes:
        numbers: (1 + held,) int; the first is 0, the exact row. Traced where one program evaluates
            now these, now others.
        total: how many rows there are besides the exact one.
    """

    numbers: Any
    total: int

    @staticmethod
    def all(total: int) -> Which:
        """Return that all rows are held."""
        return Which(np.arange(1 + total), total)

    def of(self, table: Any) -> Any:
        """Return the rows held of a table of all, (1 + total, ...)."""
        if isinstance(self.numbers, np.ndarray):
            return table[self.numbers]
        return jnp.asarray(table)[self.numbers]

    def column(self, value: Any, rank: int) -> Any:
        """Return what is known of each row, (1 + held,), to broadcast against arrays of ``rank``."""
        return value.reshape(-1, *[1] * (rank - 1))


def independent(seed: int, which: Which, shape: tuple[int, ...]) -> Any:
    """Return draws that have nothing to do with each other, (1 + held, *shape); 0 in row 0.

    Args:
        seed: another for each equation.
        which: the rows that are held.
        shape: of the value that errs.
    """
    rng = np.random.default_rng(seed)
    rows = 1 + which.total

    def normal(*axes: int) -> Any:
        return rng.choice([-1.0, 1.0], axes) * rng.uniform(0.5, 1.5, axes) / _SCALE

    if math.prod(shape) <= _SMALL:
        draw = normal(rows, *shape)
        draw[0] = 0
        return which.of(draw)
    # Signs that multiply: independent in pairs, and as many numbers as the axes are long.
    draw = normal(rows, *[1] * len(shape))
    draw[0] = 0
    draw = which.of(draw)
    for axis, size in enumerate(shape):
        others = [1] * len(shape)
        others[axis] = size
        draw = draw * jnp.asarray(which.of(rng.choice([-1.0, 1.0], (rows, *others))))
    return draw


def alike(seed: int, which: Which, draw: Any, exact: Any, dtype: Any) -> tuple[Any, Any, Any]:
    """Return two draws and which elements take the second: in half of the rows by their digits.

    There values of equal digits err equally, whatever their sign and power of two, as they do when
    they are rounded; in the other rows the two are ``draw``. A batch of n equal rows errs n-fold
    in a sum, where independent errors add up to sqrt(n). In 32 bits the difference drowns in what
    a sum of few terms is allowed anyway; in 16 it does not.

    Args:
        seed: another for each equation.
        which: the rows that are held.
        draw: (1 + held, *shape).
        exact: the values without rounding, of ``shape``.
        dtype: that they are rounded to.
    """
    rng = np.random.default_rng(seed)
    odd = rng.integers(-(2**30), 2**30, 1 + which.total, np.int32) * 2 + 1
    # As the program holds them: what float64 tells apart in its last places is equal there. The top
    # bit of a product with an odd number takes every bit into account, and is its sign.
    held = exact.astype(jnp.float32)
    if jnp.finfo(dtype).nmant < _MANTISSA:
        held = jax.lax.reduce_precision(held, 8, int(jnp.finfo(dtype).nmant))
    digits = jax.lax.bitcast_convert_type(held, jnp.int32) & (2**_MANTISSA - 1) | 2**_MANTISSA
    turned = digits * which.column(which.of(odd), draw.ndim) < 0
    size = which.column(which.of(rng.uniform(0.5, 1.5, 1 + which.total) / _SCALE), draw.ndim)
    # Not those that take a side of a kink (jaxpr/kinks.py): what cancels here would not reach it.
    half = which.column((which.numbers % 4 < 2) & (which.numbers > 0), draw.ndim)
    # Where all is known by now, the two are constants of the program.
    known = all(isinstance(part, np.ndarray) for part in (draw, size, half))
    where: Any = np.where if known else jnp.where
    return where(half, size, draw), where(half, -size, draw), turned
