"""Hypothesis strategies for the input of a training step.

All draw from a :class:`~bnverify.model.Domain`, and shrink towards one row, one feature, zeros, seed 0
and learning rate 0.

Shapes come from a pool (:mod:`bnverify.shapes`). Small arrays are drawn element by element, which
shrinks well; large ones are generated from a few numbers (:mod:`bnverify.stacks`), which is fast.
"""

from __future__ import annotations

import math
import os
import random
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import hypothesis.extra.numpy as hnp
import numpy as np
import numpy.typing as npt
from hypothesis import core, settings
from hypothesis import strategies as st
from hypothesis.errors import InvalidArgument

from bnverify.model import INT32, Case, Domain, Shape
from bnverify.shapes import DEFAULT_DOMAIN, POOL_SIZE, check_domain, shape_pool, tiny_shapes
from bnverify.stacks import KINDS, exponents, fill, largest_float32

__all__ = [
    "Optimizer",
    "batches",
    "cases",
    "learning_rates",
    "optimizers",
    "seeds",
    "shapes",
    "targets",
]

Floats = npt.NDArray[np.float32]

ELEMENTWISE = 16  # arrays up to this size are drawn element by element

HOW = ("free", "constant", "tied rows", "offset", "recipe")


def seeds() -> st.SearchStrategy[int]:
    """Strategy for seeds: any int32. Shrinks towards 0."""
    return st.integers(int(INT32.min), int(INT32.max))


def learning_rates(
    *, min_value: float = 0.0, max_value: float = DEFAULT_DOMAIN.max_lr
) -> st.SearchStrategy[float]:
    """Strategy for learning rates: float32 values, including both bounds. Shrinks towards the smallest.

    Args:
        min_value: the smallest; at least 0.
        max_value: the largest; at least ``min_value``.

    Raises:
        InvalidArgument: the bounds are not finite, negative, or in the wrong order.
    """
    for name, value in (("min_value", min_value), ("max_value", max_value)):
        if not (math.isfinite(value) and value >= 0):
            raise InvalidArgument(f"{name} must be finite and at least 0, got {value!r}")
    if min_value > max_value:
        raise InvalidArgument(
            f"min_value must be at most max_value={max_value!r}, got {min_value!r}"
        )
    low, high = -float(largest_float32(-min_value)), float(largest_float32(max_value))
    if low > high:
        raise InvalidArgument(f"no float32 lies between min_value={min_value!r} and {max_value!r}")
    decades = st.integers(0, 8).map(lambda k: max(low, float(np.float32(high * 10.0**-k))))
    # Hypothesis draws few floats between 0 and 1 except 0, at which nothing changes.
    lowest = max(low, float(np.float32(high * 1e-8)))
    return st.sampled_from(sorted({low, high})) | decades | st.floats(lowest, high, width=32)


def shapes(
    *,
    domain: Domain = DEFAULT_DOMAIN,
    features: Sequence[int] | None = None,
    size: int = POOL_SIZE,
) -> st.SearchStrategy[Shape]:
    """Strategy for shapes (N, D), from the pool of this run. Shrinks towards (1, 1).

    The pool is the same in all workers of a pytest-xdist run, in every run with one
    ``--hypothesis-seed``, and in every run with a derandomised Hypothesis profile.

    Args:
        domain: limits N and D.
        features: the values of D to choose from; None: 1 to ``domain.max_features``.
        size: the number of shapes in the pool.

    Raises:
        InvalidArgument: an argument is invalid; see :func:`bnverify.shapes.shape_pool`.
    """
    shape_pool(0, domain=domain, features=features, size=size)  # validates the arguments
    chosen = None if features is None else tuple(features)

    @st.composite
    def shape(draw: st.DrawFn) -> Shape:
        # Computed here because the settings of a test are only active inside of it.
        pool = shape_pool(_run_seed(), domain=domain, features=chosen, size=size)
        tiny = tiny_shapes(domain=domain, features=chosen)
        # The pool contains the tiny shapes, so they are twice as likely: less shrinking is needed.
        return draw(st.sampled_from([*tiny, *pool]))

    return shape()


def batches(
    shape: Shape | st.SearchStrategy[Shape] | None = None, *, domain: Domain = DEFAULT_DOMAIN
) -> st.SearchStrategy[Floats]:
    """Strategy for x, (N, D) float32, at most ``domain.max_abs_x`` in magnitude. Shrinks towards zeros.

    It draws magnitudes from the smallest subnormal to the limit, both signs, zeros, constants, equal
    rows, constant columns, and offsets far larger than the spread.

    Args:
        shape: (N, D), or a strategy for it; None: :func:`shapes`.
        domain: limits the values.

    Raises:
        InvalidArgument: an argument is invalid; the message names it, its value and the limit.
    """
    check_domain(domain)
    return _shapes(shape, domain).flatmap(lambda s: _arrays(s, domain.max_abs_x))


def targets(rows: int, *, domain: Domain = DEFAULT_DOMAIN) -> st.SearchStrategy[Floats]:
    """Strategy for y, (N,) float32, at most ``domain.max_abs_y`` in magnitude. Shrinks towards zeros.

    Args:
        rows: N, at least 1.
        domain: limits the values.

    Raises:
        InvalidArgument: an argument is invalid; the message names it, its value and the limit.
    """
    check_domain(domain)
    if rows < 1:
        raise InvalidArgument(f"rows must be at least 1, got {rows!r}")
    return _arrays((rows, 1), domain.max_abs_y).map(lambda column: column[:, 0])


def cases(
    *,
    domain: Domain = DEFAULT_DOMAIN,
    shape: Shape | st.SearchStrategy[Shape] | None = None,
    seed: st.SearchStrategy[int] | None = None,
    lr: st.SearchStrategy[float] | None = None,
    warmup: st.SearchStrategy[int] | None = None,
) -> st.SearchStrategy[Case]:
    """Strategy for complete inputs of a step: each is a :class:`Case` in ``domain``.

    Args:
        domain: limits everything that is not given.
        shape: (N, D), or a strategy for it; None: :func:`shapes`.
        seed: a strategy for the seed; None: :func:`seeds`.
        lr: a strategy for the learning rate; None: :func:`learning_rates` up to ``domain.max_lr``.
        warmup: a strategy for the number of steps before the observed one; None: 0 to
            ``domain.max_warmup``.

    Raises:
        InvalidArgument: an argument is invalid; the message names it, its value and the limit.
    """
    check_domain(domain)
    shape_strategy = _shapes(shape, domain)
    seed_strategy = seeds() if seed is None else seed
    lr_strategy = learning_rates(max_value=domain.max_lr) if lr is None else lr
    warmup_strategy = st.integers(0, domain.max_warmup) if warmup is None else warmup

    @st.composite
    def case(draw: st.DrawFn) -> Case:
        rows, width = draw(shape_strategy)
        return Case.of(
            draw(seed_strategy),
            draw(_arrays((rows, width), domain.max_abs_x)),
            draw(targets(rows, domain=domain)),
            draw(lr_strategy),
            draw(warmup_strategy),
        )

    return case()


@dataclass(frozen=True)
class Optimizer:
    """A function of the learning rate that returns an Optax optimizer; its repr is the call.

    Attributes:
        name: the name of the function in optax.
        options: its keyword arguments, without the learning rate.
        stateful: whether the optimizer's state has leaves.
    """

    name: str
    options: dict[str, Any] = field(default_factory=dict, hash=False)
    stateful: bool = True

    def __call__(self, lr: Any) -> Any:
        """Return the ``optax.GradientTransformation`` for learning rate ``lr``."""
        import optax

        return getattr(optax, self.name)(lr, **self.options)

    def __repr__(self) -> str:
        options = "".join(f", {name}={value!r}" for name, value in self.options.items())
        return f"optax.{self.name}(lr{options})"


OPTIMIZERS = (
    Optimizer("sgd", stateful=False),
    Optimizer("sgd", {"momentum": 0.9}),
    Optimizer("sgd", {"momentum": 0.5, "nesterov": True}),
    Optimizer("adam"),
    Optimizer("adamw", {"weight_decay": 1e-2}),
    Optimizer("rmsprop"),
)


def optimizers(*, stateful: bool | None = None) -> st.SearchStrategy[Callable[[Any], Any]]:
    """Strategy for optimizers: functions lr -> optax.GradientTransformation. Shrinks towards SGD.

    There are only a few, because each needs its own compiled step.

    Args:
        stateful: True: only optimizers whose state has leaves; False: only the others; None: all.
    """
    kept = [each for each in OPTIMIZERS if stateful is None or each.stateful == stateful]
    return st.sampled_from(kept)


@st.composite
def _arrays(draw: st.DrawFn, shape: Shape, limit: float) -> Floats:
    """Draw (N, D) float32 of magnitude at most ``limit``."""
    small = math.prod(shape) <= ELEMENTWISE
    # Small and large arrays draw from the same choices here, so that a large failure survives when
    # only its shape shrinks; "recipe" comes last, since small arrays exclude it.
    how = HOW[draw(st.integers(0 if small else len(HOW) - 1, len(HOW) - 1))]
    if how == "recipe":
        return draw(_recipes(shape, limit))
    numbers = _numbers(limit)
    if how == "constant":
        return np.full(shape, draw(numbers), np.float32)
    # The offset first, then one column after another, so that a smaller shape drops adjacent draws.
    centre = draw(numbers) if how == "offset" else None
    columns = (shape[1], 1 if how == "tied rows" else shape[0])
    array = draw(hnp.arrays(np.float32, columns, elements=numbers, fill=st.nothing())).T
    if centre is not None:  # far larger than the spread: E[h^2] - E[h]^2 cancels
        largest = largest_float32(limit)
        array = np.clip(centre + array * np.float32(1e-3), -largest, largest)
    return np.broadcast_to(array, shape).astype(np.float32)


def _numbers(limit: float) -> st.SearchStrategy[float]:
    """Return a strategy for float32 numbers: small integers, every decade, any float."""
    high = float(largest_float32(limit))
    lowest, highest = exponents(limit)
    whole = st.integers(-min(3, int(limit)), min(3, int(limit))).map(float)
    decades = st.builds(
        lambda digit, exponent: float(np.float32(digit * 10.0**exponent)),
        st.integers(-9, 9),
        st.integers(lowest, highest - 1) | st.integers(-45, lowest),  # -45: the smallest subnormal
    )
    return whole | decades | st.floats(-high, high, width=32)


def _recipes(shape: Shape, limit: float) -> st.SearchStrategy[Floats]:
    """Return a strategy for arrays that are too large to draw element by element."""

    def array(kind: str, exponent: int, seed: int) -> Floats:
        rng = np.random.default_rng(seed)
        stack = fill(rng, [KINDS.index(kind)], [10.0**exponent], shape, limit)
        return stack.reshape(shape)

    numbers = st.integers(0, 2**32 - 1)
    return st.builds(array, st.sampled_from(KINDS), st.integers(*exponents(limit)), numbers)


def _shapes(
    shape: Shape | st.SearchStrategy[Shape] | None, domain: Domain
) -> st.SearchStrategy[Shape]:
    if shape is None:
        return shapes(domain=domain)
    if isinstance(shape, st.SearchStrategy):
        return shape
    if min(shape) < 1:
        raise InvalidArgument(f"shape must be (N, D) with N and D at least 1, got {shape!r}")
    return st.just(shape)


def _run_seed() -> int:
    active = settings.default
    return 0 if active is not None and active.derandomize else _random_run_seed()


@cache
def _random_run_seed() -> int:
    # Set by pytest's --hypothesis-seed, which repeats a run; not a documented name.
    forced = getattr(core, "global_force_seed", None)
    if forced is not None:
        return zlib.crc32(str(forced).encode())
    shared = os.environ.get("PYTEST_XDIST_TESTRUNUID")  # the same in all workers of one run
    return zlib.crc32(shared.encode()) if shared else random.SystemRandom().getrandbits(32)


def __dir__() -> list[str]:
    return __all__  # not the names that this module imports
