"""The shapes (N, D) for which a run compiles its programs.

Compiling a step takes a thousand times as long as running it, so a run uses a small pool of shapes, and
other seeds use others. The smallest shapes are in every pool, so that counterexamples can shrink to them.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

from hypothesis.errors import InvalidArgument

from bnverify.model import Domain, Shape

TINY_SHAPES: tuple[Shape, ...] = ((1, 1), (2, 1), (2, 2))
POOL_SIZE = 8

DEFAULT_DOMAIN = Domain()


def shape_pool(
    seed: int,
    *,
    domain: Domain = DEFAULT_DOMAIN,
    features: Sequence[int] | None = None,
    size: int = POOL_SIZE,
) -> tuple[Shape, ...]:
    """Return ``size`` shapes (N, D), or as many as there are, in order of size.

    The tiny ones, ``TINY_SHAPES`` or the nearest possible ones, are always included. The others are spread
    evenly over the logarithms of N and D. If there are several, one is the largest shape of the domain,
    because some faults only appear there; the smallest has an odd N, since halves of a batch are
    unequal there and the largest N is usually even.

    Args:
        seed: chooses the shapes that are not tiny.
        domain: the limits of N and D.
        features: the possible values of D; None: all up to ``domain.max_features``.
        size: the number of shapes; at least the number of tiny ones.

    Raises:
        InvalidArgument: an argument is invalid; the message names it, its value and the limit.
    """
    if size < len(TINY_SHAPES):
        raise InvalidArgument(f"size must be at least {len(TINY_SHAPES)}, got {size!r}")
    tiny = tiny_shapes(domain=domain, features=features)
    widths = _widths(domain, features)
    pool = set(tiny)
    choose = random.Random(seed)  # noqa: S311 - test inputs, not cryptography
    strata = size - len(TINY_SHAPES)
    most = domain.max_rows // domain.multiple  # N is a multiple of domain.multiple
    if strata > 1:
        pool.add((most * domain.multiple, widths[-1]))
        strata -= 1
    for i in range(strata):
        for _ in range(10):  # if the domain has few shapes, the pool remains smaller
            at = (i + choose.random()) / strata
            parts = min(most, int(3 * (most / 3 + 1) ** at))
            if i == 0 and parts > 2:
                parts -= 1 - parts % 2
            rows = parts * domain.multiple
            width = widths[int((len(widths) + 1) ** choose.random()) - 1]
            if (rows, width) not in pool:
                pool.add((rows, width))
                break
    return (*tiny, *sorted(pool.difference(tiny), key=lambda shape: (math.prod(shape), shape)))


def tiny_shapes(
    *, domain: Domain = DEFAULT_DOMAIN, features: Sequence[int] | None = None
) -> tuple[Shape, ...]:
    """Return ``TINY_SHAPES`` or the nearest possible ones, in order of size; only two if D has one value.

    Args:
        domain: the limits of N and D.
        features: the possible values of D; None: all up to ``domain.max_features``.

    Raises:
        InvalidArgument: an argument is invalid; the message names it, its value and the limit.
    """
    check_domain(domain)
    widths = _widths(domain, features)
    most = domain.max_rows // domain.multiple
    found = {
        (min(n, most) * domain.multiple, widths[min(d, len(widths)) - 1]) for n, d in TINY_SHAPES
    }
    return tuple(sorted(found, key=lambda shape: (math.prod(shape), shape)))


def _widths(domain: Domain, features: Sequence[int] | None) -> list[int]:
    if features is not None and (not features or min(features) < 1):
        raise InvalidArgument(f"features must be one or more sizes of at least 1, got {features!r}")
    return sorted(set(features or range(1, domain.max_features + 1)))


def check_domain(domain: Domain) -> None:
    """Refuse a domain without inputs.

    Raises:
        InvalidArgument: a limit is invalid; the message names it, its value and what it must be.
    """
    given: object = domain  # not every caller uses a type checker
    if not isinstance(given, Domain):
        raise InvalidArgument(f"domain must be a bnverify.Domain, got {given!r}")
    for name in ("max_rows", "max_features"):
        if getattr(domain, name) < 1:
            raise InvalidArgument(
                f"domain.{name} must be at least 1, got {getattr(domain, name)!r}"
            )
    for name in ("max_abs_x", "max_abs_y"):
        if not 0 < getattr(domain, name) < math.inf:
            raise InvalidArgument(
                f"domain.{name} must be finite and above 0, got {getattr(domain, name)!r}"
            )
    if not 1 <= domain.multiple <= domain.max_rows:
        raise InvalidArgument(
            f"domain.multiple must be from 1 to {domain.max_rows}, got {domain.multiple!r}"
        )
    if domain.max_warmup < 0:
        raise InvalidArgument(f"domain.max_warmup must be at least 0, got {domain.max_warmup!r}")
