"""What chance decides in a coarse row: relative errors of root mean square 1, and sides of a kink."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from bnverify.jaxpr.values import Array, limits, per_row

_SMALL = 512
"""Elements up to which each has its own draw; beyond, each index of each axis has."""

_MANTISSA = 23  # bits of a float32 after the leading one
_SCALE = 1.0408  # the root mean square of a size between 0.5 and 1.5
_REMEMBERED = 2**24  # bytes of draws


@dataclass(frozen=True)
class Sides:
    """Which side of a kink each row takes that may take either.

    Attributes:
        seed: another for each equation.
        count: how many rows there are.
    """

    seed: int
    count: int

    def mixed(self, shape: tuple[int, ...]) -> Array:
        """Return random 32-bit integers, (rows, 1, *shape)."""
        draws = np.random.default_rng(self.seed).integers(2**32, size=1 + self.count, dtype="u4")
        place = np.arange(math.prod(shape), dtype=np.uint32) + draws[0]
        mixed = (place * (draws[1:, None] | 1) ^ (place >> 3)) * np.uint32(0x9E3779B1)
        return np.reshape(mixed, (self.count, 1, *shape))

    def coins(self, shape: tuple[int, ...]) -> Array:
        """Return random booleans, (rows, 1, *shape), but in each fourth row all alike.

        There it is not left to chance that all elements take one side, or all the other.
        """
        tossed = self.mixed(shape) >> np.uint32(31) == 1
        return np.where(per_row(alike(self.count), tossed), per_row(up(self.count), tossed), tossed)


def alike(count: int) -> Array:
    """Return in which rows all elements take the same side of a kink."""
    return np.asarray(np.arange(count) % 4 == 3)


def up(count: int) -> Array:
    """Return in which of these rows it is the upper side."""
    return np.asarray(np.arange(count) % 8 == 3)


class Draws:
    """Random relative errors: signs and sizes, of root mean square 1, for each row and element.

    What is drawn depends on the seed and the shape alone, and is remembered.

    Args:
        count: how many rows there are; the first has no errors.

    Attributes:
        by_digits: (rows,), the half of the rows in which values of equal digits err equally. Not
            those that take a side of a kink: what cancels here would not reach it.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        numbers = np.arange(count)
        self.by_digits = (numbers % 4 < 2) & (numbers > 0)
        self._remembered: dict[Any, Array] = {}
        self._room = _REMEMBERED

    def sides(self, seed: int) -> Sides:
        """Return which sides of a kink the rows take; another seed for each equation."""
        return Sides(seed, self.count)

    def independent(self, seed: int, shape: tuple[int, ...]) -> Array:
        """Return draws that have nothing to do with each other, (rows, 1, *shape); 0 in row 0.

        Args:
            seed: another for each equation.
            shape: of the value that errs, in one case.
        """
        key = seed, shape
        if key not in self._remembered:
            draw = self._independent(seed, shape)
            if draw.nbytes > self._room:
                return draw
            self._room -= draw.nbytes
            self._remembered[key] = draw
        return self._remembered[key]

    def _independent(self, seed: int, shape: tuple[int, ...]) -> Array:
        rng = np.random.default_rng(seed)

        def normal(*axes: int) -> Array:
            signs = 2.0 * rng.integers(0, 2, axes) - 1
            return signs * rng.uniform(0.5, 1.5, axes) / _SCALE

        if math.prod(shape) <= _SMALL:
            draw = normal(self.count, 1, *shape)
            draw[0] = 0
            return draw
        # Signs that multiply: independent in pairs, and as many numbers as the axes are long.
        draw = normal(self.count, 1, *[1] * len(shape))
        draw[0] = 0
        for axis, size in enumerate(shape):
            others = [1] * len(shape)
            others[axis] = size
            draw = draw * (2.0 * rng.integers(0, 2, (self.count, 1, *others)) - 1)
        return draw

    def alike(self, seed: int, exact: Array, dtype: Any, scale: float, *, out: Array) -> None:
        """Overwrite the rows ``by_digits`` of ``out``, (rows, cases, *shape), with ``scale`` times draws.

        Values of equal digits err equally, whatever their sign and power of two, as they do when
        they are rounded. A batch of n equal rows errs n-fold in a sum, where independent errors add
        up to sqrt(n). In 32 bits the difference drowns in what a sum of few terms is allowed anyway;
        in 16 it does not.

        Args:
            seed: another for each equation.
            exact: the values without rounding, (cases, *shape).
            dtype: that they are rounded to.
            scale: what the draws are multiplied by.
            out: of errors.
        """
        rng = np.random.default_rng(seed)
        odd = rng.integers(-(2**30), 2**30, self.count, np.int32) * 2 + 1
        size = scale * (rng.uniform(0.5, 1.5, self.count) / _SCALE)
        # As the program holds them: what float64 tells apart in its last places is equal there. The
        # top bit of a product with an odd number takes every bit into account, and is its sign.
        held = exact.astype(np.float32).view(np.int32)
        dropped = _MANTISSA - int(limits(dtype).nmant)
        if dropped > 0:  # to the nearest, ties to even
            held = held + (2 ** (dropped - 1) - 1 + (held >> dropped & 1))
            held = held & ~np.int32(2**dropped - 1)
        digits = held & np.int32(2**_MANTISSA - 1) | np.int32(2**_MANTISSA)
        mixed = np.empty_like(digits)
        for row in np.flatnonzero(self.by_digits):
            np.multiply(digits, np.int32(odd[row]), out=mixed)
            # The sign of a float32 is the top bit, too.
            np.copysign(size[row], mixed.view(np.float32), out=out[row])
