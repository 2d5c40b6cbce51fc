"""A training step under verification: three pure functions of a State."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

Tree = Any  # a JAX pytree of arrays; the supported releases have no narrower type


class State(NamedTuple):
    """Everything that a training step carries from one batch to the next.

    Attributes:
        params: the variables that the optimizer trains.
        batch_stats: the running statistics, which the forward pass writes.
        opt_state: the optimizer state for ``params``.
        extra: everything else: PRNG keys, a step counter, a loss scale, variables in batch_stats
            that are no moving averages. Often empty.
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


class Look(NamedTuple):
    """What an analysis of the traced step has found.

    Attributes:
        draws: the random numbers that affect the results of the step.
        passes: the batches of layers that process several batches, or one batch several times.
        copies: the copies of the params that the step updates without a gradient.
        pretrained: (layer with pretrained params, whether its statistics are pretrained, too).
        frozen_params: the paths of the frozen params, such as "params/Dense_0/kernel".
        frozen_statistics: the paths of the frozen running statistics in the state.
        scaled: (frozen param, other param whose update its gradient affects).
        axes: the feature axes of layers after a convolution or a matrix product with params.
        masks: the masks of rows in the losses.
        schedules: the learning-rate schedules with gradient accumulation.
    """

    draws: tuple[Draw, ...] = ()
    passes: tuple[Pass, ...] = ()
    copies: tuple[Copy, ...] = ()
    pretrained: tuple[tuple[str, bool], ...] = ()
    frozen_params: tuple[str, ...] = ()
    frozen_statistics: tuple[str, ...] = ()
    scaled: tuple[tuple[str, str], ...] = ()
    axes: tuple[Axis, ...] = ()
    masks: tuple[Mask, ...] = ()
    schedules: tuple[Schedule, ...] = ()


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

    def __repr__(self) -> str:
        """Return the name and the optional attributes that are set."""
        optional = ("optimizer", "momentum", "layer_inputs", "after_eval", "solution", "oracle")
        known = [name for name in optional if getattr(self, name) is not None]
        shows = f", with {', '.join(known)}" if known else ""
        return f"Subject({self.name!r}{shows})"
