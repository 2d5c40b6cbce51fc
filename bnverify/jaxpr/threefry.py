"""The Threefry-2x32 generator of ``jax.random`` in NumPy, bit for bit.

A key is its key data, (..., 2) uint32. All functions are vectorised over the leading axes of the
keys.

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (2011), and the default
generator of https://docs.jax.dev/en/latest/jax.random.html. Which counters a call hashes depends
on ``jax.config.jax_threefry_partitionable``.
"""

from __future__ import annotations

import math

import jax
import numpy as np

from bnverify.jaxpr.values import Array

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = np.uint32(0x1BD11BDA)


def threefry2x32(key1: Array, key2: Array, count1: Array, count2: Array) -> tuple[Array, Array]:
    """Hash two uint32 counters under two uint32 key words; all four arrays broadcast."""
    keys = (key1, key2, key1 ^ key2 ^ _PARITY)
    x, y = count1 + keys[0], count2 + keys[1]
    x, y = (np.array(part) for part in np.broadcast_arrays(x, y))  # copies, modified in place below
    spare = np.empty_like(y)
    for turn in range(5):
        for rotation in _ROTATIONS[turn % 2]:
            x += y
            np.right_shift(y, np.uint32(32 - rotation), out=spare)
            np.left_shift(y, np.uint32(rotation), out=y)
            y |= spare
            y ^= x
        x += keys[(turn + 1) % 3]
        y += keys[(turn + 2) % 3] + np.uint32(turn + 1)
    return x, y


def seed(numbers: Array) -> Array:
    """Return the key of each integer seed, (*shape, 2): its high and low 32 bits."""
    wide = numbers.astype(np.int64 if numbers.dtype.kind == "i" else np.uint64)
    high = wide >> 32 if numbers.dtype.itemsize == 8 else np.zeros_like(wide)
    return np.stack([high, wide], axis=-1).astype(np.uint32)


def fold_in(key1: Array, key2: Array, data: Array) -> Array:
    """Fold a uint32 number into each key, given by its two words; all arguments broadcast.

    The hashed counters are (0, number), the key data of that number as a seed.
    """
    return np.stack(threefry2x32(key1, key2, np.zeros_like(data), data), axis=-1)


def split(keys: Array, shape: tuple[int, ...]) -> Array:
    """Return new keys, (*keys.shape[:-1], *shape, 2)."""
    size = math.prod(shape)
    if _is_partitionable():
        new = np.stack(_partitionable(keys, size), axis=-1)
    else:
        new = _halves(keys, 2 * size)
    return new.reshape(*keys.shape[:-1], *shape, 2)


def random_bits(keys: Array, bit_width: int, shape: tuple[int, ...]) -> Array:
    """Return random bits, (*keys.shape[:-1], *shape) of the unsigned type of ``bit_width`` bits.

    Raises:
        NotImplementedError: more than 2**32 - 1 words are asked for of one key.
    """
    size, dtype = math.prod(shape), np.dtype(f"uint{bit_width}")
    words = math.ceil(size * bit_width / 32)
    if words >= 2**32 - 1:
        raise NotImplementedError(f"{words} words of random bits: a key gives 2**32 - 2 at most")
    if _is_partitionable():
        high, low = _partitionable(keys, size)
        bits = (
            high.astype(dtype) << dtype.type(32) | low
            if bit_width == 64
            else (high ^ low).astype(dtype)
        )
    else:
        bits = _halves(keys, words)
        if bit_width == 64:
            high, low = np.split(bits, 2, axis=-1)
            bits = high.astype(dtype) << dtype.type(32) | low
        elif bit_width < 32:
            # Each word is split starting with its low bits, on machines of either byte order.
            parts = np.arange(0, 32, bit_width, dtype=np.uint32)
            bits = (bits[..., None] >> parts).astype(dtype)
            bits = bits.reshape(*keys.shape[:-1], -1)[..., :size]
    return bits.reshape(*keys.shape[:-1], *shape)


def _is_partitionable() -> bool:
    # A type checker does not see the options of jax.config as attributes.
    return bool(getattr(jax.config, "jax_threefry_partitionable"))  # noqa: B009


def _partitionable(keys: Array, size: int) -> tuple[Array, Array]:
    """Return two words for each of ``size`` counters of 64 bits, (*keys.shape[:-1], size)."""
    counts = np.arange(size, dtype=np.uint64)
    high, low = (counts >> np.uint64(32)).astype(np.uint32), counts.astype(np.uint32)
    return threefry2x32(keys[..., 0, None], keys[..., 1, None], high, low)


def _halves(keys: Array, words: int) -> Array:
    """Return ``words`` words, (*keys.shape[:-1], words).

    The first half of the counters is hashed with the second half.
    """
    counts = np.arange(words, dtype=np.uint32)
    if words % 2:
        counts = np.append(counts, np.uint32(0))
    first, second = np.split(counts, 2)
    hashed = threefry2x32(keys[..., 0, None], keys[..., 1, None], first, second)
    return np.concatenate(hashed, axis=-1)[..., :words]
