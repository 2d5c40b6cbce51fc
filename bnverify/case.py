"""The input of a training step: how it is validated, and the domain on which the laws are claimed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

INT32 = np.iinfo(np.int32)
FLOAT32_MAX = float(np.finfo(np.float32).max)


class InvalidCase(ValueError):
    """An invalid input; the message names the argument, its value and the limit."""


class Case(NamedTuple):
    """One input of a training step. Create it with :meth:`of`, which validates it.

    Attributes:
        seed: the seed of the initial state, int32 scalar.
        x: the batch, (N, D) float32.
        y: the targets, (N,) float32.
        lr: the learning rate, float32 scalar.
        warmup: the number of steps on the same batch before the observed step, int32 scalar. With
            gradient accumulation, the number of updates up to and including the observed step.
    """

    seed: Any
    x: Any
    y: Any
    lr: Any
    warmup: Any = np.int32(0)

    @classmethod
    def of(cls, seed: object, x: object, y: object, lr: object, warmup: int = 0) -> Case:
        """Return a validated case, converted to float32.

        Args:
            seed: a finite real number; it is truncated to an integer, which must fit in int32.
            x: (N, D) with N and D at least 1, real and finite in float32.
            y: (N,), real and finite in float32.
            lr: a real number, at least 0 and finite in float32.
            warmup: a number of steps, at least 0.

        Raises:
            InvalidCase: an argument is invalid; the message names it, its value and the limit.
        """
        rows = _array("x", x, rank=2, shape="(N, D)")
        if 0 in rows.shape:
            raise InvalidCase(
                f"x must have at least one row and one feature, got shape {rows.shape}"
            )
        targets = _array("y", y, rank=1, shape="(N,)")
        if len(targets) != len(rows):
            raise InvalidCase(
                f"y must have one value for each row of x: got {len(targets)} for {len(rows)} rows"
            )
        rate = _number("lr", lr)
        if rate < 0:
            raise InvalidCase(f"lr must be at least 0, got {rate!r}")
        if rate > FLOAT32_MAX:
            raise InvalidCase(f"lr must fit in float32, at most {FLOAT32_MAX:.3g}, got {rate!r}")
        if warmup < 0:
            raise InvalidCase(f"warmup must be at least 0 steps, got {warmup}")
        return cls(np.int32(_seed(seed)), rows, targets, np.float32(rate), np.int32(warmup))

    @property
    def shape(self) -> tuple[int, int]:
        """(N, D)."""
        rows, features = np.shape(self.x)[-2:]
        return rows, features

    def to_json(self) -> dict[str, Any]:
        """Return a dict for JSON; ``from_json`` restores the case exactly."""
        return {name: np.asarray(value).tolist() for name, value in self._asdict().items()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Case:
        """Return the case that ``to_json`` wrote.

        Raises:
            InvalidCase: the data is not a valid case.
        """
        return cls.of(**data)

    def code(self) -> str:
        """Return a Python expression for this case.

        Long arrays are written as calls, such as ``np.zeros((2, 64))``, if that is shorter.
        """
        warmup = f", warmup={int(self.warmup)}" if self.warmup else ""
        return (
            f"bnverify.Case.of(seed={int(self.seed)}, x={_literal(self.x)}, "
            f"y={_literal(self.y)}, lr={_digits(np.float32(self.lr))}{warmup})"
        )


@dataclass(frozen=True)
class Domain:
    """The inputs for which the laws are claimed; any valid :class:`Case` may be run.

    There is no lower limit: zeros and subnormals are included. The upper limits keep one step with
    lr = 1 in the range of float32 unless rounding has cancelled the batch variance: a kernel gradient
    is at most |x| |dL/dh| = 1e4 * 1e3 / sqrt(epsilon) = 3e9, and the eval loss the square of a product
    of two such steps and |x|. If a large offset cancels the variance, no such bound exists, and laws
    that compare values skip the case.

    Attributes:
        max_rows: the largest N.
        max_features: the largest D.
        max_abs_x: the largest magnitude in x.
        max_abs_y: the largest magnitude in y.
        max_lr: the largest learning rate.
        max_warmup: the largest number of steps before the observed one.
    """

    max_rows: int = 64
    max_features: int = 16
    max_abs_x: float = 1e4
    max_abs_y: float = 1e3
    max_lr: float = 1.0
    max_warmup: int = 2

    def contains(self, case: Case) -> bool:
        """Return whether the laws are claimed for ``case``."""
        rows, features = case.shape
        return bool(
            rows <= self.max_rows
            and features <= self.max_features
            and np.max(np.abs(case.x)) <= self.max_abs_x
            and np.max(np.abs(case.y)) <= self.max_abs_y
            and float(case.lr) <= self.max_lr
            and int(case.warmup) <= self.max_warmup
        )


def _array(name: str, value: object, *, rank: int, shape: str) -> npt.NDArray[np.float32]:
    try:
        array = np.asarray(value)
    except ValueError as error:  # ragged nested sequences
        raise InvalidCase(f"{name} must be an array of shape {shape}: {error}") from None
    if array.dtype == np.bool_ or not _is_real(array.dtype):
        raise InvalidCase(f"{name} must hold real numbers, got dtype {array.dtype}")
    if array.ndim != rank:
        raise InvalidCase(f"{name} must have shape {shape}, got {array.shape}")
    with np.errstate(over="ignore"):  # values that overflow become infinite and are refused below
        single = array.astype(np.float32)
    bad = ~np.isfinite(single)
    if bad.any():
        where = tuple(int(i) for i in np.argwhere(bad)[0])
        raise InvalidCase(
            f"{name} must be finite in float32 (at most {FLOAT32_MAX:.3g}), "
            f"got {array[where]} at {list(where)}"
        )
    return single


def _is_real(dtype: np.dtype[Any]) -> bool:
    # ml_dtypes such as bfloat16 have kind "V" in NumPy but convert to float.
    if np.issubdtype(dtype, np.integer) or np.issubdtype(dtype, np.floating):
        return True
    return dtype.kind == "V" and dtype.names is None and "float" in dtype.name


def _number(name: str, value: object) -> float:
    if isinstance(value, np.ndarray) or hasattr(value, "__array__"):
        array = np.asarray(value)
        if array.ndim == 0 and _is_real(array.dtype):
            value = float(array)
    if isinstance(value, bool) or not isinstance(value, Real):
        raise InvalidCase(f"{name} must be a real number, got {value!r}")
    number = float(value)
    if not math.isfinite(number):
        raise InvalidCase(f"{name} must be finite, got {number!r}")
    return number


def _seed(value: object) -> int:
    number = math.trunc(_number("seed", value))
    if not INT32.min <= number <= INT32.max:
        raise InvalidCase(f"seed must fit in int32, {INT32.min} to {INT32.max}, got {value!r}")
    return number


PLAIN = 8
"""Arrays of up to this many numbers are always written out."""


def _literal(array: npt.NDArray[np.float32]) -> str:
    """Return a Python expression for an array: its numbers, or a NumPy call if that is shorter."""
    array = np.asarray(array)
    written = _written(array)
    if array.size <= PLAIN:
        return written
    flat = array.ravel()
    if (flat == flat[0]).all():
        size = repr(array.shape) if array.ndim > 1 else str(array.size)
        plain = {0.0: f"np.zeros({size})", 1.0: f"np.ones({size})"}
        if not (flat[0] == 0 and np.signbit(flat[0])):
            return plain.get(float(flat[0]), f"np.full({size}, {_digits(flat[0])})")
    shape = f".reshape{array.shape!r}" if array.ndim > 1 else ""
    made = []
    counted = flat[0] + np.arange(flat.size, dtype=np.float32)
    if float(flat[0]).is_integer() and (flat == counted).all():
        made.append(f"np.arange({_digits(flat[0])}, {_digits(flat[0] + flat.size)}){shape}")
    starts = np.flatnonzero(np.concatenate([[True], flat[1:].view("i4") != flat[:-1].view("i4")]))
    lengths = np.diff([*starts, flat.size]).tolist()
    made.append(f"np.repeat({_written(flat[starts])}, {lengths}){shape}")
    return min([*made, written], key=len)


def _written(array: npt.NDArray[np.float32]) -> str:
    if array.ndim == 0:
        return _digits(array[()])
    return "[" + ", ".join(_written(entry) for entry in array) + "]"


def _digits(value: Any) -> str:
    # The shortest digits of the float32, not those of the float64 that repr would print.
    if 1e-4 <= abs(value) < 1e7 or value == 0:
        return np.format_float_positional(value, trim="0")
    return np.format_float_scientific(value, trim="0")
