"""The central types: a subject runs a case, and a transition is what one observed step did.

A subject is a training step as pure functions over a split state; with the user's own functions to save
and restore it is a ``CheckpointedSubject``, on several devices a ``Parallel``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from numbers import Real
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

INT32 = np.iinfo(np.int32)
FLOAT32_MAX = float(np.finfo(np.float32).max)

Tree = Any  # a JAX pytree of arrays: no narrower type exists across the supported releases


# What is verified.


class State(NamedTuple):
    """Everything a training step carries from one batch to the next.

    Attributes:
        params: the trainable leaves.
        batch_stats: the running statistics, written by the forward pass and not trained.
        opt_state: the optimizer's state, for ``params`` only.
        extra: everything else: PRNG keys, a step counter, a loss scale, variables that are not moving
            averages. Usually empty.
    """

    params: Tree
    batch_stats: Tree
    opt_state: Tree
    extra: Tree = ()


class StepInfo(NamedTuple):
    """What a training step returns besides the new state.

    Attributes:
        loss: the training loss before the update, a scalar; None if it is unknown.
        grads: the gradient of ``loss``, a tree like ``params``; None if it is unknown.
    """

    loss: Tree
    grads: Tree


class LayerInput(NamedTuple):
    """The input of a normalisation layer in a training step.

    Attributes:
        value: the input, (R, *features), with all axes that the layer reduces over moved to the
            front and flattened into R.
        weights: broadcastable to ``value``; 0 is masked out, 1 is not. None: no mask.
    """

    value: Tree
    weights: Tree = None


class Draw(NamedTuple):
    """Random numbers that a training step draws.

    Attributes:
        at: "path:line (function)" of the user's code that draws them; "" if unknown.
        keys: the leaves of the state from which their key is derived; empty: the key is constant.
        moves: whether a step may change one of these leaves.
        of_init: whether ``init`` draws from the same key.
    """

    at: str
    keys: tuple[str, ...]
    moves: bool
    of_init: bool = False


class Pass(NamedTuple):
    """A batch that goes through a normalisation layer in one or several forward passes of a step.

    Attributes:
        layer: the path of the layer in ``batch_stats``.
        number: the number of the first of these forward passes in the step, counted from 1.
        at: "path:line (function)" of the user's code that creates the batch or calls the model.
        folds: in how many of these passes the batch updates the running statistics.
    """

    layer: str
    number: int
    at: str
    folds: int


class Part(NamedTuple):
    """Rows of a batch that a loop inside the step normalises in parts, as gradient accumulation does.

    Attributes:
        layers: the normalisation layers in the loop, in words.
        rows: the rows, in words.
        reaches: whether the new running statistics depend on these rows.
    """

    layers: str
    rows: str
    reaches: bool


class Teacher(NamedTuple):
    """A network that no step changes, and whose outputs the training loss uses as targets.

    Attributes:
        layer: the path of its first normalisation layer in its model.
        at: "path:line (function)" of the user's code that calls it; "" if unknown.
        training: whether the layer is in train mode.
    """

    layer: str
    at: str
    training: bool


class Lookahead(NamedTuple):
    """An ``optax.LookaheadParams`` in the params.

    Attributes:
        path: its path in the state.
        at_fast: whether the gradient depends on the fast params; False: on the slow ones alone.
    """

    path: str
    at_fast: bool


class Copy(NamedTuple):
    """A copy or an average of the params in the state, and the running statistics that go with it.

    Attributes:
        params: the path of the copy in the state.
        batch_stats: the path of its statistics in the state.
        written: whether a step may change these statistics.
    """

    params: str
    batch_stats: str
    written: bool


class Mask(NamedTuple):
    """A mask of rows in a loss: the loss depends on a row's predictions only through it.

    Attributes:
        loss: "training" or "eval".
        at: "path:line (function)" of the user's code that applies it.
        counted: whether the divisor of the loss depends on the mask; False: it is the number of
            all rows.
    """

    loss: str
    at: str
    counted: bool


class Pairing(NamedTuple):
    """Where a loss combines every row of the batch with every row by elementwise arithmetic.

    Attributes:
        loss: "training" or "eval".
        at: "path:line (function)" of the user's code.
        shapes: of the two values, such as "(N, 1) and (N,)".
        by_design: whether the user's code spread the values, by an index or a reshape; False:
            broadcasting alone did.
    """

    loss: str
    at: str
    shapes: str
    by_design: bool


class Axis(NamedTuple):
    """The feature axis of a normalisation layer.

    Attributes:
        layer: the path of the layer in ``batch_stats``.
        kept: the axis that the layer does not reduce over.
        features: the feature axis of the convolution or matrix product before it.
        shape: the shape of the layer's input.
    """

    layer: str
    kept: int
    features: int
    shape: tuple[int, ...]


class Schedule(NamedTuple):
    """A learning-rate schedule with gradient accumulation.

    Attributes:
        batches: the number of batches in training.
        told: where that number comes from, in words.
        ends: whether the schedule ends after exactly that many updates.
    """

    batches: int
    told: str
    ends: bool


class RateUse(NamedTuple):
    """How a hyperparameter is kept for float32 params, or how the learning rate reaches one.

    Attributes:
        path: the path of the hyperparameter in the optimizer's state, or of the param.
        narrow: whether it is stored in 16 bits, or rounded to them on every path to the update.
    """

    path: str
    narrow: bool


class PaperCheck(NamedTuple):
    """An Optax optimizer, compared with the formula of its paper over several updates.

    Attributes:
        optimizer: the function that makes it, such as "optax.adam".
        source: the paper.
        differs: the first update that differs from the formula, in words; empty if none does.
    """

    optimizer: str
    source: str
    differs: str


class Look(NamedTuple):
    """What an analysis of the traced step has found.

    Attributes:
        draws: the random numbers that affect the results of the step.
        passes: the batches of layers that process several batches, or one batch several times.
        parts: rows that a loop inside the step normalises in parts.
        teachers: the networks that no step changes and that make targets of the training loss.
        lookaheads: the params of ``optax.lookahead``.
        copies: the copies of the params that the step updates without a gradient.
        pretrained: (layer with pretrained params, whether its statistics are pretrained, too).
        frozen_params: the paths of the frozen params, such as "params/Dense_0/kernel".
        frozen_statistics: the paths of the frozen running statistics in the state.
        scaled: (frozen param, other param whose update its gradient affects).
        axes: the feature axes of layers after a convolution or a matrix product with params.
        masks: the masks of rows in the losses.
        pairings: where the losses combine every row with every row.
        skips: whether the step leaves params as they are if a gradient is not finite.
        schedules: the learning-rate schedules with gradient accumulation.
        rates: how the learning rate reaches the updates of float32 params.
        papers: how the Optax optimizers in the user's optimizer compare with their papers.
    """

    draws: tuple[Draw, ...] = ()
    passes: tuple[Pass, ...] = ()
    parts: tuple[Part, ...] = ()
    teachers: tuple[Teacher, ...] = ()
    lookaheads: tuple[Lookahead, ...] = ()
    copies: tuple[Copy, ...] = ()
    pretrained: tuple[tuple[str, bool], ...] = ()
    frozen_params: tuple[str, ...] = ()
    frozen_statistics: tuple[str, ...] = ()
    scaled: tuple[tuple[str, str], ...] = ()
    axes: tuple[Axis, ...] = ()
    masks: tuple[Mask, ...] = ()
    pairings: tuple[Pairing, ...] = ()
    skips: bool = False
    schedules: tuple[Schedule, ...] = ()
    rates: tuple[RateUse, ...] = ()
    papers: tuple[PaperCheck, ...] = ()


@dataclass(frozen=True, repr=False)
class Subject:
    """A training step under verification.

    Every function must be pure and traceable by ``jax.jit``. Laws that need something that the
    subject does not provide, such as its optimizer, are exempt.

    Attributes:
        name: its name in reports.
        init: ``(seed: int32 scalar, x: (N, D) float32) -> State``.
        step: ``(state, x, y: (N,) float32, lr: float32 scalar) -> (State, StepInfo)``.
        evaluate: ``(state, x, y) -> (1,)``, the loss in eval mode.
        features: the values of D that it accepts; None: any.
        rows: a divisor of the number of rows. None: found if the step refuses other batches.
        optimizer: ``lr -> optax.GradientTransformation``; None if it is unknown.
        exempt: law name -> why the law does not apply.
        momentum: the momentum of its normalisation layers, the weight of the old value; None if it
            is unknown or differs between layers.
        layer_inputs: ``(state, x, y) -> {path in batch_stats: LayerInput}``, the inputs of the
            normalisation layers in the training step. Paths are joined by "/".
        after_eval: ``(state, x, y) -> State``, the state after evaluation, if evaluation returns
            one.
        with_optimizer: ``optimizer -> Subject``, the same step with another optimizer. Used to
            check the optimizer state of a step whose own optimizer has none.
        biases_before_norm: the paths in ``params`` of biases added right before a normalisation,
            which have no effect on the training loss.
        solution: ``(seed: float, x, y, lr: float) -> (1,)``, a function that does init, one step and
            evaluation in one call, if there is one.
        oracle: a module like ``bnverify.oracle`` with an independent derivation in float64.
        capabilities: what else laws may rely on: "lr" (the update is scaled by lr), "row_losses"
            (the eval loss is a mean over rows), "eval_is_training_loss" (training and evaluation
            compute the same loss).
        notes: remarks for the report, one line each.
        hints: law name -> what to declare if the step violates the law by design.
        row_weights: ``(x, y) -> (N,)``, the weight of each row in the losses; None: all equal.
        updates_every: the number of steps per update of the params: 4 under
            ``optax.MultiSteps(..., 4)``.
        look: what an analysis of the traced step has found; None: it was not analysed.
    """

    name: str
    init: Callable[..., State]
    step: Callable[..., tuple[State, StepInfo]]
    evaluate: Callable[..., Tree]
    features: tuple[int, ...] | None = None
    optimizer: Callable[[Any], Any] | None = None
    exempt: Mapping[str, str] = field(default_factory=dict)
    momentum: float | None = None
    layer_inputs: Callable[..., Mapping[str, LayerInput]] | None = None
    after_eval: Callable[..., State] | None = None
    with_optimizer: Callable[[Callable[[Any], Any]], Subject] | None = None
    biases_before_norm: tuple[str, ...] = ()
    solution: Callable[..., Tree] | None = None
    oracle: Any = None
    capabilities: frozenset[str] = frozenset({"lr", "row_losses", "eval_is_training_loss"})
    notes: tuple[str, ...] = ()
    hints: Mapping[str, str] = field(default_factory=dict, repr=False)
    row_weights: Callable[..., Tree] | None = None
    updates_every: int = 1
    look: Look | None = None
    rows: int | None = None

    def width(self, otherwise: int) -> int:
        """Return the first D that the subject accepts; ``otherwise`` if it accepts any."""
        return self.features[0] if self.features else otherwise

    def __repr__(self) -> str:
        """Return the name and the optional attributes that are set."""
        optional = ("optimizer", "momentum", "layer_inputs", "after_eval", "solution", "oracle")
        known = [name for name in optional if getattr(self, name) is not None]
        shows = f", with {', '.join(known)}" if known else ""
        return f"Subject({self.name!r}{shows})"


@dataclass(frozen=True)
class CheckpointedSubject:
    """A subject with the user's own functions to save and restore.

    Attributes:
        subject: the training step.
        save: (state) -> anything, by value: it must not keep a reference to the state.
        restore: (a state initialised from another seed, what ``save`` returned) -> the state.
        begin: called before each sequence of steps: remove old checkpoints from the directory here.
    """

    subject: Subject
    save: Callable[[State], Any]
    restore: Callable[[State, Any], Any]
    begin: Callable[[], None] | None = None

    @property
    def name(self) -> str:
        """The name of the training step."""
        return self.subject.name


@dataclass(frozen=True)
class Parallel:
    """A data-parallel step under verification.

    Attributes:
        name: its name in reports.
        single: the same step on one device, which it must equal; its ``init`` makes the state.
        step: the step on one shard, called with ``axis`` mapped over the devices: ``(state, x, y, lr)
            -> (State, StepInfo)``; the state is the same on all devices.
        axis: the name of the mapped axis.
        counted_step: the same for shards with padding, ``(state, x, y, weights, lr)``: weights
            (n,) are 1 for real rows and 0 for padding. None: padding is not supported.
        sharded_step: the whole step, to call under ``jax.jit`` with a sharded batch; None: that is
            the single-device step, which JAX partitions.
        exempt: law name -> why the law does not apply.
    """

    name: str
    single: Subject
    step: Callable[..., tuple[State, StepInfo]]
    axis: str = "data"
    counted_step: Callable[..., tuple[State, StepInfo]] | None = None
    sharded_step: Callable[..., tuple[State, StepInfo]] | None = None
    exempt: Mapping[str, str] = field(default_factory=dict)


Target: TypeAlias = Subject | CheckpointedSubject | Parallel
"""What can be verified."""


# The input.


Shape: TypeAlias = tuple[int, int]
"""(N, D)."""


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
        multiple: a divisor of the number of rows, for a step that splits its batch.
    """

    max_rows: int = 64
    max_features: int = 16
    max_abs_x: float = 1e4
    max_abs_y: float = 1e3
    max_lr: float = 1.0
    max_warmup: int = 2
    multiple: int = 1

    def contains(self, case: Case) -> bool:
        """Return whether the laws are claimed for ``case``."""
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


# The result.


class Outcome(NamedTuple):
    """The result of one call of ``step``, and of an evaluation after it if there was one."""

    state: State
    info: StepInfo
    eval_loss: Any = None


class Transition(NamedTuple):
    """One observed step. Every leaf may have a leading stack axis.

    Attributes:
        case: the input.
        before: the state before the step.
        after: the state after it.
        info: its loss and gradients.
        eval_loss: (1,), evaluated on the same batch after the step.
        reruns: name of a re-run -> its outcome; see ``bnverify.reruns``.
        evals: name of a re-evaluation -> (1,), see ``bnverify.reruns``; "rows" -> (N, 1), each row alone.
        facts: name -> other observations of the subject.
        exact: the outcome in float64; None if rounding was not analysed.
        noise: the rounding error allowed for each value of ``exact``; an Outcome. Infinite where
            rounding leaves no digits to compare.
    """

    case: Case
    before: State
    after: State
    info: StepInfo
    eval_loss: Any
    reruns: Mapping[str, Outcome]
    evals: Mapping[str, Any]
    facts: Mapping[str, Any]
    exact: Any = None
    noise: Any = None


# How a case is validated, and written as Python code.


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
