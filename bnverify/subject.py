"""What is verified: a training step as three pure functions over a split state."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

Tree = Any  # a JAX pytree of arrays: no narrower type exists across the supported releases


class State(NamedTuple):
    """Everything a training step carries from one batch to the next.

    Attributes:
        params: trainable leaves; the optimizer owns them.
        batch_stats: running statistics; the forward pass writes them, nobody trains them.
        opt_state: the optimizer's own state, for ``params`` alone.
        extra: whatever else is carried: keys of dropout, a step counter, a loss scale, variables
            that are no moving averages. Most subjects have nothing.
    """

    params: Tree
    batch_stats: Tree
    opt_state: Tree
    extra: Tree = ()


class StepInfo(NamedTuple):
    """What a training step tells besides the new state.

    Attributes:
        loss: the training loss before the update, a scalar; None where a subject hides it.
        grads: the gradient of ``loss``, a tree like ``params``; None where a subject hides it.
    """

    loss: Tree
    grads: Tree


class LayerInput(NamedTuple):
    """What one normalisation layer was given in a training step.

    Attributes:
        value: the input, (R, *features): all the axes that the layer reduces over to get its
            statistics moved to the front and flattened into R.
        weights: broadcastable to ``value``: 1 counts, 0 is masked out. None: all count.
    """

    value: Tree
    weights: Tree = None


class Draw(NamedTuple):
    """Random numbers that a training step draws.

    Attributes:
        at: "path:line (function)" of the user's code that draws them; "" where unknown.
        keys: the leaves of the state that their key is made of; empty: it is a constant.
        moves: whether a step may change one of these leaves.
        of_init: whether ``init`` draws from the same key.
    """

    at: str
    keys: tuple[str, ...]
    moves: bool
    of_init: bool = False


class Pass(NamedTuple):
    """A batch that a normalisation layer is given in training, in one pass of a model or several.

    Attributes:
        layer: its path in ``batch_stats``.
        number: which pass of a model in the step it is, or the first of them, from 1 on.
        at: "path:line (function)" of the user's code that makes the batch, or calls the model.
        folds: in how many of these passes the batch enters the new statistics.
    """

    layer: str
    number: int
    at: str
    folds: int


class Copy(NamedTuple):
    """A copy, or an average, of the params that the step carries, and the statistics beside it.

    Attributes:
        params: where the state holds these params.
        batch_stats: where it holds these statistics.
        written: whether a step may change these statistics.
    """

    params: str
    batch_stats: str
    written: bool


class Mask(NamedTuple):
    """A mask of rows in a loss, through which all that the params say of a row must go.

    Attributes:
        loss: "training" or "eval".
        at: "path:line (function)" of the user's code that applies it.
        counted: whether it enters the denominator too; False: that is the number of all rows.
    """

    loss: str
    at: str
    counted: bool


class Axis(NamedTuple):
    """The axis along which a normalisation layer keeps features.

    Attributes:
        layer: its path in ``batch_stats``.
        kept: the axis it keeps.
        features: the axis along which the convolution or product before it gives features.
        shape: of its input.
    """

    layer: str
    kept: int
    features: int
    shape: tuple[int, ...]


class Schedule(NamedTuple):
    """A learning rate's schedule under gradient accumulation.

    Attributes:
        batches: how many batches training has.
        told: how that is known, in words.
        ends: whether the schedule ends after that many updates, not sooner and not later.
    """

    batches: int
    told: str
    ends: bool


class Look(NamedTuple):
    """What a look at a step's traced program shows; "may" where it cannot tell.

    Attributes:
        draws: the random numbers that reach what the step returns.
        passes: the batches of layers that are given several, or one several times.
        copies: the copies of the params that the step moves by other means than a gradient.
        pretrained: the layers whose params are those of a trained model, each with whether its
            statistics are, too.
        frozen_params: paths of params that no step is to change: "params/Dense_0/kernel".
        frozen_statistics: likewise of running statistics, wherever the state holds them.
        scaled: pairs of a frozen param and one whose update its gradient reaches.
        axes: the layers behind a convolution or a product with params, by their axes.
        masks: the masks of rows in the losses.
        schedules: what is known of the learning rate's schedule.
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

    Every function must be pure and trace under ``jax.jit``. What a subject does not show (an
    optimizer, a layer's input) makes the laws that need it exempt, never wrong.

    Attributes:
        name: how reports call it.
        init: ``(seed: int32 scalar, x: (N, D) float32) -> State``.
        step: ``(state, x, y: (N,) float32, lr: float32 scalar) -> (State, StepInfo)``.
        evaluate: ``(state, x, y) -> (1,)``, the loss in eval mode.
        features: the D it accepts; None: any.
        rows: the N it accepts are the multiples of this number. None: found by what its step takes.
        optimizer: ``lr -> optax.GradientTransformation``, where it is known.
        exempt: law name -> why the law does not apply.
        momentum: the declared weight of the old value in the moving average, where known.
        layer_inputs: ``(state, x, y) -> {path in batch_stats: LayerInput}``: what each
            normalisation layer is given in the training step. Paths are joined by "/".
        after_eval: ``(state, x, y) -> State``: the state evaluation leaves behind, for
            subjects whose evaluation could write.
        with_optimizer: ``optimizer -> Subject``: the same step around another optimizer. Lets
            a stateful probe stand in for an optimizer whose own state is empty.
        biases_before_norm: paths in ``params`` of biases added right before a normalisation,
            which therefore cannot move the training loss.
        solution: ``(seed: float, x, y, lr: float) -> (1,)``: init, one step and evaluation in
            one call, where the subject has such a function.
        oracle: a module like ``bnverify.oracle``: an independent derivation in float64.
        capabilities: which further claims laws may rest on: "lr" (the step scales its update by lr),
            "row_losses" (the eval loss is a mean over rows), "eval_is_training_loss" (both
            modes compute one loss).
        notes: what a report should say of the subject besides the laws, one line each.
        hints: law name -> what to declare where the step breaks that law by design.
        row_weights: ``(x, y) -> (N,)``: how much each row counts in the losses; None: equally.
        updates_every: how many steps make one update of the params: 4 under
            ``optax.MultiSteps(..., 4)``.
        look: what a look at the step's program shows; None: nobody looked.
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

    def __repr__(self) -> str:
        """Return the name, and what the subject shows besides its three functions."""
        optional = ("optimizer", "momentum", "layer_inputs", "after_eval", "solution", "oracle")
        known = [name for name in optional if getattr(self, name) is not None]
        shows = f", with {', '.join(known)}" if known else ""
        return f"Subject({self.name!r}{shows})"
