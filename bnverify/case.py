"""One generated input, what is accepted as one, and where the laws are claimed."""

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
    """An input that no training step can be asked about; the message names what and why."""


class Case(NamedTuple):
    """One input of a training step. Build it with :meth:`of`, which checks it.

    Attributes:
        seed: int32 scalar, from which params and batch_stats are initialised.
        x: the batch, (N, D) float32.
        y: the targets, (N,) float32.
        lr: the learning rate, float32 scalar.
        warmup: int32 scalar: how many steps on this same batch come before the observed one; where
            gradients are accumulated, how many updates, the observed step making the last of them.
    """

    seed: Any
    x: Any
    y: Any
    lr: Any
    warmup: Any = np.int32(0)

    @classmethod
    def of(cls, seed: object, x: object, y: object, lr: object, warmup: int = 0) -> Case:
        """Return the checked case, or say what is wrong with it.

        Args:
            seed: a finite real number whose integer part fits in int32.
            x: real, finite, (N, D) with N and D at least 1, within float32.
            y: real, finite, (N,), within float32.
            lr: a finite real number, at least 0, within float32.
            warmup: at least 0.

        Raises:
            InvalidCase: naming the argument, its value and the limit.
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
        """Return the case as data for JSON; ``from_json`` reads it, to the bit."""
        return {name: np.asarray(value).tolist() for name, value in self._asdict().items()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Case:
        """Return the case that ``to_json`` wrote.

        Raises:
            InvalidCase: it is none.
        """
        return cls.of(**data)

    def code(self) -> str:
        """Return an expression that makes this case again when pasted into Python.

        Long arrays are written as what makes them, ``np.zeros((2, 64))``, where that is shorter.
        """
        warmup = f", warmup={int(self.warmup)}" if self.warmup else ""
        return (
            f"bnverify.Case.of(seed={int(self.seed)}, x={_literal(self.x)}, "
            f"y={_literal(self.y)}, lr={_digits(np.float32(self.lr))}{warmup})"
        )


@dataclass(frozen=True)
class Domain:
    """The inputs on which the laws are claimed; any valid :class:`Case` may be run.

    Small values need no lower limit: zeros and subnormals are in. The upper limits keep one step
    with lr = 1 within float32 wherever the batch variance has digits left: a kernel gradient is
    at most |x| |dL/dh|, 1e4 times 1e3 / sqrt(epsilon) = 3e9, and the eval loss the square of a
    product of two such steps and |x|. Where a large offset has cancelled the variance no bound
    of this kind exists, and the laws that compare values do not claim those cases.

    Attributes:
        max_rows: the largest N generated.
        max_features: the largest D generated.
        max_abs_x: the largest magnitude in x.
        max_abs_y: the largest magnitude in y.
        max_lr: the largest learning rate.
        max_warmup: the most steps before the observed one.
        multiple: N is a multiple of it, for a step that splits its batch.
    """

    max_rows: int = 64
    max_features: int = 16
    max_abs_x: float = 1e4
    max_abs_y: float = 1e3
    max_lr: float = 1.0
    max_warmup: int = 2
    multiple: int = 1

    def contains(self, case: Case) -> bool:
        """Tell whether the laws are claimed for ``case``."""
        rows, features = case.shape
        return bool(
            rows <= self.max_rows
            and rows % self.multiple == 0
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
    with np.errstate(over="ignore"):  # what does not fit turns infinite and is refused below
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
    # ml_dtypes' bfloat16 and its kin are of kind "V" to NumPy, yet convert to float.
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
"""Numbers in an array that is written out, whatever they are."""


def _literal(array: npt.NDArray[np.float32]) -> str:
    """Return an expression of an array: its numbers, or what makes them where that is shorter.

    ``np`` in it is NumPy.
    """
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
    # repr of the float32's own digits, not of the longer float64 it widens to.
    if 1e-4 <= abs(value) < 1e7 or value == 0:
        return np.format_float_positional(value, trim="0")
    return np.format_float_scientific(value, trim="0")
