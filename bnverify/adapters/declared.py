"""What a user can declare of a step, in every adapter alike, and the laws that it settles.

A law that a step breaks by design is exempt from it, with the reason; a violation that one of
these declarations would rightly silence says so.
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
    "eval_rows_are_independent": "if rows are compared or weighed by design: row_losses=False, or "
    "weights= for a mask of rows",
    "doubling_the_batch_changes_nothing": "if rows are compared by design: row_losses=False",
    **dict.fromkeys(TARGETS, "if the loss has no targets: targets=False"),
    "training_is_free_of_old_statistics": "if training normalises by running values by design: "
    "online=True; if some layers are frozen: frozen=[...]",
    "momentum_is_as_declared": "if a layer folds in several batches a step by design: passes=",
    "one_momentum_for_the_whole_model": "if a layer folds in several batches a step by design: "
    "passes=",
    "initial_statistics_are_zero_and_one": "if training starts from a trained model: "
    "pretrained=True",
    "each_step_draws_anew": "if the same numbers are meant: exempt=",
    "every_pass_reaches_the_statistics": "if a pass is left out by design: passes=",
    "each_batch_is_folded_in_once": "if a layer folds in several batches a step by design: passes=",
    "layers_keep_the_feature_axis": "if another axis is normalised by design: exempt=",
    "frozen_statistics_stay": "if they are to follow the new data: frozen=False",
    "frozen_params_stay": "if only the statistics are frozen: frozen=['LAYER/mean', 'LAYER/var']",
    "trained_params_come_with_their_statistics": "if nothing is trained yet: pretrained=False",
    "schedule_counts_updates": "if training has another number of batches: batches=",
    "step_moves_the_statistics": "if they are frozen by design: frozen=[...]",
    "inputs_reach_the_statistics": "if they are frozen by design: frozen=[...]",
    "batch_stats_change_only_by_ema": "if some of these variables are no moving averages: "
    "carried=[...]",
    "gradients_are_gradients_of_the_loss": "if the reported loss is not the differentiated one by "
    "design (it lacks a penalty, or smooths no labels): penalty=True",
    "eval_at_the_batchs_own_moments_is_the_training_loss": "if the two losses differ by design: "
    "same_loss=False",
}
"""Law -> what to declare where a step breaks it by design."""


@dataclass(frozen=True)
class Declared:
    """What a user says of a step. None leaves it to be found.

    Attributes:
        targets: whether the loss has targets. None: whether y enters the batch, and anything is made
            of it.
        row_losses: whether the eval loss is a mean over rows that do not know of each other. None:
            unless its program divides by what the batch gives, or multiplies rows with rows.
        online: whether training normalises by running values too. None: where a gradient is stopped
            at a value made of them, as batch renormalisation does.
        carried: patterns (``fnmatch``) of paths in the statistics that are no moving averages.
        frozen: patterns of paths in params and statistics that no step may change: "backbone/*" for
            a whole layer, "backbone/mean" for a statistic. False: of what the optimizer leaves alone
            the statistics may move. By default found.
        passes: how many batches each layer folds in a step. None: counted.
        weights: (x, y) -> (N,): how much each row counts in the loss.
        pretrained: whether params and statistics start from a trained model. None: found.
        batches: how many batches training has, where gradients are accumulated: a schedule of the
            learning rate must end sooner. None: what the user's code calls so.
        same_loss: whether training and evaluation report one formula.
        penalty: whether the loss that is differentiated is another one than is reported: it has a
            term of params alone, or smooths labels. None: whether its program shows such a term.
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
    """Return what keywords declare.

    Raises:
        TypeError: there is no such declaration.
    """
    unknown = sorted(set(given) - set(Declarations.__annotations__))
    if unknown:
        raise TypeError(f"unexpected keyword argument {unknown[0]!r}")
    said: Any = {**given, "exempt": dict(given.get("exempt") or {})}
    return Declared(**said)


def because(reason: str, *laws: Iterable[str]) -> dict[str, str]:
    """Return the laws of some groups, each with the reason why it does not apply."""
    return dict.fromkeys((law for group in laws for law in group), reason)
