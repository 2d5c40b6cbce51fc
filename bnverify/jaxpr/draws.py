"""The random choices of each row: relative errors, and which side of a kink it takes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from bnverify.jaxpr.values import Array, limits, per_row

_SMALL = 512
"""Up to this size every element has its own draw; larger arrays have one sign per axis index."""

_MANTISSA = 23  # stored bits of a float32's fraction
_SCALE = 1.0408  # root mean square of the uniform distribution on 0.5 to 1.5
_CACHE_BYTES = 2**24


@dataclass(frozen=True)
class Sides:
    """Which side of a kink each row in doubt takes.

    Attributes:
        seed: distinct for each equation.
        count: the number of rows.
    """

    seed: int
    count: int

    def bits(self, shape: tuple[int, ...]) -> Array:
        """Return random 32-bit integers, (rows, 1, *shape)."""
        draws = np.random.default_rng(self.seed).integers(2**32, size=1 + self.count, dtype="u4")
        place = np.arange(math.prod(shape), dtype=np.uint32) + draws[0]
        mixed = (place * (draws[1:, None] | 1) ^ (place >> 3)) * np.uint32(0x9E3779B1)
        return np.reshape(mixed, (self.count, 1, *shape))

    def choices(self, shape: tuple[int, ...]) -> Array:
        """Return random booleans, (rows, 1, *shape); all equal within every fourth row.

        Those rows make sure that "all elements on one side" occurs, whatever the random draws.
        """
        random = self.bits(shape) >> np.uint32(31) == 1
        uniform, upper = uniform_rows(self.count), upper_rows(self.count)
        return np.where(per_row(uniform, random), per_row(upper, random), random)


def uniform_rows(count: int) -> Array:
    """Return, for each row, whether all its elements take the same side of a kink, (rows,)."""
    return np.asarray(np.arange(count) % 4 == 3)


def upper_rows(count: int) -> Array:
    """Return, for each of the uniform rows, whether that is the upper side, (rows,)."""
    return np.asarray(np.arange(count) % 8 == 3)


class Draws:
    """Random relative errors with root mean square 1, for each row and element.

    Draws depend on the seed and the shape only, and are cached.

    Args:
        count: the number of rows; row 0 has no errors.

    Attributes:
        tied: (rows,), the half of the rows in which values with equal digits get equal errors.
            These are not the rows that force a side of a kink, so that both effects are seen.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        numbers = np.arange(count)
        self.tied = (numbers % 4 < 2) & (numbers > 0)
        self._cache: dict[Any, Array] = {}
        self._room = _CACHE_BYTES

    def sides(self, seed: int) -> Sides:
        """Return which side of a kink each row takes; ``seed`` is distinct for each equation."""
        return Sides(seed, self.count)

    def independent(self, seed: int, shape: tuple[int, ...]) -> Array:
        """Return independent draws, (rows, 1, *shape); 0 in row 0.

        Args:
            seed: distinct for each equation.
            shape: the shape of the rounded value, without rows and cases.
        """
        key = seed, shape
        if key not in self._cache:
            draw = self._independent(seed, shape)
            if draw.nbytes > self._room:
                return draw
            self._room -= draw.nbytes
            self._cache[key] = draw
        return self._cache[key]

    def _independent(self, seed: int, shape: tuple[int, ...]) -> Array:
        rng = np.random.default_rng(seed)

        def normal(*axes: int) -> Array:
            signs = 2.0 * rng.integers(0, 2, axes) - 1
            return signs * rng.uniform(0.5, 1.5, axes) / _SCALE

        if math.prod(shape) <= _SMALL:
            draw = normal(self.count, 1, *shape)
            draw[0] = 0
            return draw
        # A product of one random sign per axis index: pairwise independent, and cheap to draw.
        draw = normal(self.count, 1, *[1] * len(shape))
        draw[0] = 0
        for axis, size in enumerate(shape):
            others = [1] * len(shape)
            others[axis] = size
            draw = draw * (2.0 * rng.integers(0, 2, (self.count, 1, *others)) - 1)
        return draw

    def tie(self, seed: int, exact: Array, dtype: Any, scale: float, *, out: Array) -> None:
        """Overwrite the ``tied`` rows of ``out`` with ``scale`` times draws.

        Values with equal digits get equal errors, whatever their sign and exponent, as in real
        rounding. A sum over a batch of n equal rows then has n times the error, where independent
        errors add up to sqrt(n). In float32 the difference is small compared with the tolerance of
        a short sum; in 16-bit dtypes it is not.

        Args:
            seed: distinct for each equation.
            exact: the values without rounding, (cases, *shape).
            dtype: the dtype they are rounded to.
            scale: a factor for the draws.
            out: the errors to overwrite, (rows, cases, *shape).
        """
        rng = np.random.default_rng(seed)
        odd = rng.integers(-(2**30), 2**30, self.count, np.int32) * 2 + 1
        size = scale * (rng.uniform(0.5, 1.5, self.count) / _SCALE)
        # Hash the digits that the program holds, so values that differ in float64 only are equal.
        # The top bit of the product with an odd number depends on every bit; it becomes the error's
        # sign.
        held = exact.astype(np.float32).view(np.int32)
        dropped = _MANTISSA - int(limits(dtype).nmant)
        if dropped > 0:  # to the nearest, ties to even
            held = held + (2 ** (dropped - 1) - 1 + (held >> dropped & 1))
            held = held & ~np.int32(2**dropped - 1)
        digits = held & np.int32(2**_MANTISSA - 1) | np.int32(2**_MANTISSA)
        mixed = np.empty_like(digits)
        for row in np.flatnonzero(self.tied):
            np.multiply(digits, np.int32(odd[row]), out=mixed)
            # The top bit is also the sign bit of a float32.
            np.copysign(size[row], mixed.view(np.float32), out=out[row])
