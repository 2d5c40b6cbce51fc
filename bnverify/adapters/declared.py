"""Declarations about a step, the same for every adapter, and the laws that they make exempt.

A step that violates a law by design is exempt from it, with the reason. The report on a violation says
which declaration would make the law exempt.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypedDict

TARGETS = (
    "targets_reach_the_params",
    "targets_belong_to_their_rows",
    "targets_reach_the_evaluation",
)
ROWS = ("eval_rows_are_independent", "doubling_the_batch_changes_nothing")
ONE_FOLD = (
    "batch_stats_change_only_by_ema",
    "batch_like_the_statistics_is_a_fixed_point",
    "equal_steps_converge_geometrically",
    "eval_at_the_batchs_own_moments_is_the_training_loss",
)
PARTS = ("row_order_changes_nothing", "doubling_the_batch_changes_nothing")
OLD_STATISTICS = (
    "training_is_free_of_old_statistics",
    "eval_at_the_batchs_own_moments_is_the_training_loss",
)
MIXED_STATISTICS = (
    "batch_stats_change_only_by_ema",
    "one_momentum_for_the_whole_model",
    "momentum_is_as_declared",
    "batch_moments_are_the_layers_own",
    "batch_like_the_statistics_is_a_fixed_point",
    "equal_steps_converge_geometrically",
)
GRADIENT = ("gradients_are_gradients_of_the_loss",)
FREE_STATISTICS = ("batch_stats_are_free_of_targets",)
OWN_EVALUATION = ("eval_uses_the_running_statistics",)
INITIAL = ("initial_statistics_are_zero_and_one",)

HINTS = {
    "eval_rows_are_independent": "if rows are compared by design: row_losses=False; if they have "
    "weights or a mask: weights=",
    "doubling_the_batch_changes_nothing": "if rows are compared by design: row_losses=False",
    **dict.fromkeys(TARGETS, "if the loss has no targets: targets=False"),
    "training_is_free_of_old_statistics": "if training also normalises by running statistics by "
    "design: online=True; if some layers are frozen: frozen=[...]",
    "momentum_is_as_declared": "if a layer processes several batches per step by design: passes=",
    "one_momentum_for_the_whole_model": "if a layer processes several batches per step by design: "
    "passes=",
    "initial_statistics_are_zero_and_one": "if training starts from a pretrained model: "
    "pretrained=True",
    "each_step_draws_anew": "if the same numbers are intended: exempt=",
    "every_pass_reaches_the_statistics": "if a forward pass is left out by design: passes=",
    "each_batch_is_folded_in_once": "if a layer processes several batches per step by design: passes=",
    "layers_keep_the_feature_axis": "if another axis is normalised by design: exempt=",
    "frozen_statistics_stay": "if the statistics should follow the new data: frozen=False",
    "frozen_params_stay": "if only the statistics are frozen: frozen=['LAYER/mean', 'LAYER/var']",
    "trained_params_come_with_their_statistics": "if nothing is pretrained: pretrained=False",
    "schedule_counts_updates": "if training has another number of batches: batches=",
    "step_moves_the_statistics": "if they are frozen by design: frozen=[...]",
    "inputs_reach_the_statistics": "if they are frozen by design: frozen=[...]",
    "batch_stats_change_only_by_ema": "if some of these variables are not moving averages: "
    "carried=[...]",
    "gradients_are_gradients_of_the_loss": "if the reported loss is not the differentiated one by "
    "design (it lacks a penalty, or smooths no labels): penalty=True",
    "eval_at_the_batchs_own_moments_is_the_training_loss": "if the two losses differ by design: "
    "same_loss=False",
}
"""Law -> what to declare if a step violates it by design."""


@dataclass(frozen=True)
class Declared:
    """What a user declares about a step. None: bnverify finds out.

    Attributes:
        targets: whether the loss has targets. None: if y is in the batch and is used.
        row_losses: whether the eval loss is a mean over independent rows. None: unless it divides by
            a number that depends on the batch, or multiplies rows with rows.
        online: whether training also normalises by running statistics. None: if a gradient through
            running statistics is stopped, as in batch renormalisation.
        carried: patterns (``fnmatch``) of paths in batch_stats that are no moving averages.
        frozen: patterns of paths in params and batch_stats that no step may change: "backbone/*" for
            a whole layer, "backbone/mean" for one statistic. False: the statistics of layers with
            frozen params may change. Empty: frozen layers are found.
        passes: the number of batches that each layer processes per step. None: counted.
        weights: (x, y) -> (N,), the weight of each row in the loss.
        pretrained: whether params and statistics start from a pretrained model. None: found.
        batches: the number of batches in training, with gradient accumulation; a learning-rate
            schedule must be shorter. None: an integer in the user's code whose name says so.
        same_loss: whether training and evaluation compute the same loss of outputs and targets.
        penalty: whether the differentiated loss differs from the reported one: it has a penalty on
            the params, or smoothed labels. None: whether the trace shows a penalty.
        exempt: law name -> why it does not apply.
    """

    targets: bool | None = None
    row_losses: bool | None = None
    online: bool | None = None
    carried: Sequence[str] = ()
    frozen: Sequence[str] | Literal[False] = ()
    passes: int | None = None
    weights: Callable[[Any, Any], Any] | None = None
    pretrained: bool | None = None
    batches: int | None = None
    same_loss: bool = False
    penalty: bool | None = None
    exempt: Mapping[str, str] = field(default_factory=dict)


class Declarations(TypedDict, total=False):
    """The fields of ``Declared`` as keywords."""

    targets: bool | None
    row_losses: bool | None
    online: bool | None
    carried: Collection[str]
    frozen: Collection[str] | Literal[False]
    passes: int | None
    weights: Callable[[Any, Any], Any] | None
    pretrained: bool | None
    batches: int | None
    same_loss: bool
    penalty: bool | None
    exempt: Mapping[str, str] | None


def declared_by(given: Declarations) -> Declared:
    """Return the declarations in some keyword arguments.

    Raises:
        TypeError: there is no such declaration.
    """
    unknown = sorted(set(given) - set(Declarations.__annotations__))
    if unknown:
        raise TypeError(f"unexpected keyword argument {unknown[0]!r}")
    said: Any = {**given, "exempt": dict(given.get("exempt") or {})}
    return Declared(**said)


def because(reason: str, *laws: Iterable[str]) -> dict[str, str]:
    """Return a dict from each law in some groups to ``reason``."""
    return dict.fromkeys((law for group in laws for law in group), reason)
