"""Generates thousands of cases of one shape at once, in NumPy.

An array is made from a kind, a decimal exponent for the magnitude, and random numbers. The kinds are those
that :mod:`bnverify.strategies` draws one at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from bnverify.model import INT32, Case, Domain

Floats = npt.NDArray[np.float32]
Size = tuple[int, int, int]

DECADES = 12  # below the limit; "decades" and "subnormal" go further down
SUBNORMAL = np.float32(1e-38)  # the smallest normal float32 is 1.18e-38


def normal(rng: np.random.Generator, size: Size, scale: Floats) -> Floats:
    """Gaussian values."""
    return scale * rng.standard_normal(size, dtype=np.float32)


def whole(rng: np.random.Generator, size: Size, scale: Floats) -> Floats:
    """Few distinct whole numbers, including zero, so that many entries are equal."""
    return scale * rng.integers(-2, 3, size).astype(np.float32)


def zeros(rng: np.random.Generator, size: Size, scale: Floats) -> Floats:
    """Nothing but zeros."""
    return np.zeros(size, np.float32)


def constant(rng: np.random.Generator, size: Size, scale: Floats) -> Floats:
    """The same value everywhere: the batch variance is zero."""
    return np.broadcast_to(normal(rng, (size[0], 1, 1), scale), size)


def tied_rows(rng: np.random.Generator, size: Size, scale: Floats) -> Floats:
    """Each row is one of two rows."""
    pair = normal(rng, (size[0], 2, size[2]), scale)
    which = rng.integers(0, 2, (*size[:2], 1))
    return np.where(which == 0, pair[:, :1], pair[:, 1:])


def constant_columns(rng: np.random.Generator, size: Size, scale: Floats) -> Floats:
    """About half of the features are the same in every row."""
    still = rng.integers(0, 2, (size[0], 1, size[2])) == 0
    free = normal(rng, size, scale)
    return np.where(still, free[:, :1], free)


def outlier(rng: np.random.Generator, size: Size, scale: Floats) -> Floats:
    """Zeros except in one row."""
    where = rng.integers(0, size[1], (size[0], 1, 1))
    here = np.arange(size[1])[None, :, None] == where
    return np.where(here, normal(rng, (size[0], 1, size[2]), scale), np.float32(0))


def offset(rng: np.random.Generator, size: Size, scale: Floats) -> Floats:
    """An offset up to seven decades above the spread, so that differences lose digits."""
    centre = normal(rng, (size[0], 1, size[2]), scale)
    ratio = np.float32(10) ** -rng.uniform(0, 7, (size[0], 1, 1)).astype(np.float32)
    around: Floats = ratio * normal(rng, size, scale)
    return centre + around


def decades(rng: np.random.Generator, size: Size, scale: Floats) -> Floats:
    """Every entry has its own sign and magnitude, over twenty-four decades."""
    magnitude = np.exp2(rng.random(size, dtype=np.float32) * np.float32(-80))
    values: Floats = scale * np.where(rng.integers(0, 2, size) == 0, -magnitude, magnitude)
    return values


def subnormal(rng: np.random.Generator, size: Size, scale: Floats) -> Floats:
    """Values below the smallest normal float32, whatever the scale."""
    return SUBNORMAL * (2 * rng.random(size, dtype=np.float32) - 1)


Recipe = Callable[[np.random.Generator, Size, Floats], Floats]
# In the order of shrinking: the simplest kinds come first.
RECIPES: tuple[Recipe, ...] = (
    whole,
    normal,
    zeros,
    constant,
    tied_rows,
    constant_columns,
    outlier,
    offset,
    decades,
    subnormal,
)
KINDS = tuple(recipe.__name__ for recipe in RECIPES)


def exponents(limit: float) -> tuple[int, int]:
    """Return the lowest and the highest decimal exponent of a scale, for values up to ``limit``."""
    highest = math.floor(math.log10(limit))
    return highest - DECADES, highest


def fill(
    rng: np.random.Generator,
    kinds: npt.ArrayLike,
    scales: npt.ArrayLike,
    shape: tuple[int, int],
    limit: float,
) -> Floats:
    """Return a stack of arrays, each of its own kind and scale.

    Args:
        rng: the source of randomness.
        kinds: (B,) indices into ``KINDS``.
        scales: (B,) magnitudes.
        shape: of one array, (N, D).
        limit: the largest magnitude; larger values are clipped to it.

    Returns:
        (B, N, D) float32.
    """
    index = np.asarray(kinds)
    scale = np.asarray(scales, np.float32)[:, None, None]
    stack = np.empty((len(index), *shape), np.float32)
    for kind, recipe in enumerate(RECIPES):
        (chosen,) = np.nonzero(index == kind)
        if len(chosen):
            stack[chosen] = recipe(rng, (len(chosen), *shape), scale[chosen])
    largest = largest_float32(limit)
    return np.clip(stack, -largest, largest, out=stack)


def stacked_cases(
    rng: np.random.Generator,
    shape: tuple[int, int],
    count: int,
    domain: Domain | None = None,
) -> Case:
    """Return ``count`` cases of one shape, as one :class:`Case` of stacked arrays.

    Every kind of array, target, seed, learning rate and warm-up occurs; the same state of ``rng``
    gives the same cases.

    Args:
        rng: the source of randomness.
        shape: (N, D), each at least 1; not checked against the domain.
        count: at least 1.
        domain: the limits of the values; None: those of the default domain.

    Returns:
        seed (count,) int32, x (count, N, D), y (count, N), lr (count,) float32, warmup (count,)
        int32.

    Raises:
        ValueError: an argument is invalid; the message names it, its value and the limit.
    """
    if min(shape) < 1:
        raise ValueError(f"shape must be (N, D) with N and D at least 1, got {shape!r}")
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count!r}")
    bounds = domain or Domain()
    return Case(
        seed=_seeds(rng, count),
        x=_arrays(rng, shape, count, bounds.max_abs_x),
        y=_arrays(rng, (shape[0], 1), count, bounds.max_abs_y)[:, :, 0],
        lr=_learning_rates(rng, count, bounds.max_lr),
        warmup=rng.integers(0, bounds.max_warmup, count, np.int32, endpoint=True),
    )


def largest_float32(limit: float) -> Any:
    """Return the largest float32 that is at most ``limit``."""
    nearest = np.float32(limit)
    return nearest if float(nearest) <= limit else np.nextafter(nearest, np.float32(-np.inf))


def _arrays(rng: np.random.Generator, shape: tuple[int, int], count: int, limit: float) -> Floats:
    kinds = rng.integers(0, len(KINDS), count)
    return fill(rng, kinds, 10.0 ** rng.uniform(*exponents(limit), count), shape, limit)


def _seeds(rng: np.random.Generator, count: int) -> npt.NDArray[np.int32]:
    special = np.array([0, 1, -1, INT32.min, INT32.max], np.int32)
    anywhere = rng.integers(INT32.min, INT32.max, count, np.int32, endpoint=True)
    return np.where(rng.random(count) < 0.1, rng.choice(special, count), anywhere)


def _learning_rates(rng: np.random.Generator, count: int, limit: float) -> Floats:
    largest = largest_float32(limit)
    rates = (largest * 10.0 ** rng.uniform(-8, 0, count)).astype(np.float32)
    chance = rng.random(count)
    return np.where(chance < 0.1, np.float32(0), np.where(chance < 0.2, largest, rates))
