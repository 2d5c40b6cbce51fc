"""Laws of evaluation: it reads the running statistics, returns one loss and writes nothing."""

from __future__ import annotations

from typing import Any

from bnverify.laws.arithmetic import (
    all_finite,
    all_over,
    any_over,
    differs,
    holds_if,
    numbers,
    residual,
    same,
    smallest,
    when,
    wide,
    within_noise,
    worst_of,
    xp,
)
from bnverify.laws.law import law
from bnverify.lazy import jnp
from bnverify.model import State, Transition
from bnverify.reruns import NUDGES

FLAX_GUIDE = (
    "Flax, Applying batch normalization: "
    "https://flax.readthedocs.io/en/latest/guides/training_techniques/batch_norm.html"
)

NUDGED = tuple(f"nudged_statistics_{pattern}" for pattern in range(NUDGES))


@law(
    "evaluation",
    observes=("noise", "eval_noise"),
    mistakes=(
        "division_by_zero_variance",
        "exponential_overflows",
        "log_of_zero",
        "division_by_zero",
        "slope_is_infinite",
        "outside_the_domain",
        "variance_below_zero",
        "number_overflows",
        "statistics_overflow",
        "sample_variance",
        "statistics_trained_as_params",
        "wrong_moments",
    ),
    source="bnverify.reference; limits: bnverify.model.Domain",
)
def eval_loss_is_finite(t: Transition) -> Any:
    """After one step from the initial state, the eval loss is finite.

    A case is skipped if the exact loss, from the same step in float64, exceeds the range of its dtype
    or is lost in rounding, and so is that of evaluating the step's new state in float64. That tells a
    legitimate overflow (lr = 1 where rounding has cancelled the batch variance) from a division by zero.
    """
    largest = float(jnp.finfo(t.eval_loss.dtype).max)
    exact, noise = wide(t.exact.eval_loss), t.noise.eval_loss
    claimed = ~xp.isfinite(exact) | (xp.abs(exact) + noise <= largest)
    # The rounding of the step alone may be unknown, as that of Adam where a gradient is exactly 0.
    evaluated, noise = wide(t.facts["exact_evaluation"]), t.facts["eval_noise"]
    claimed = claimed | (xp.abs(evaluated) + noise <= largest)
    finite = all_over(xp.isfinite(t.eval_loss) | ~claimed)
    return when((t.case.warmup == 0) & any_over(claimed), holds_if(finite))


@law(
    "evaluation",
    observes=("after_eval",),
    capabilities=("after_eval",),
    returns_unchanged=tuple((f"eval_{tree}", tree) for tree in State._fields),
    mistakes=("eval_in_train_mode", "new_statistics_dropped"),
    source=FLAX_GUIDE,
)
def eval_writes_nothing(t: Transition) -> Any:
    """Evaluation leaves params, batch_stats and optimizer state bit-identical."""
    return same(t.facts["after_eval"], t.after)


@law(
    "evaluation",
    kind="witness",
    never="changing batch_stats never changed the eval loss",
    observes=("eval:other_statistics",),
    capabilities=("batch_stats",),
    must_reach=(("eval_loss", "batch_stats"),),
    mistakes=("eval_in_train_mode", "eval_of_stale_state", "statistics_nested"),
    source=FLAX_GUIDE,
)
def eval_uses_the_running_statistics(t: Transition) -> Any:
    """Changing batch_stats changes the eval loss in at least one case."""
    changed = differs(t.evals["other_statistics"], t.eval_loss)
    return when(all_finite(t.eval_loss), holds_if(changed))


@law(
    "evaluation",
    observes=("eval_noise", "eval:rows"),
    capabilities=("row_losses",),
    mistakes=(
        "eval_in_train_mode",
        "broadcast_loss",
        "rows_treated_unequally",
        "losses_differ",
        "loss_not_a_mean_over_rows",
        "modes_differ",
        "targets_misaligned",
        "inputs_ignored",
    ),
    source=FLAX_GUIDE,
)
def eval_rows_are_independent(t: Transition) -> Any:
    """A row's prediction does not depend on the other rows: the eval loss is the mean over rows.

    With declared row weights w it is the weighted mean sum(w * loss) / sum(w). All evaluations are of
    the same state, so the noise is that of one evaluation alone. Each row's loss has it, and the
    float64 mean of N of them has no more noise than the loss of the whole batch. Both sides may err
    by that much, hence twice the noise.
    """
    if "rows" not in t.evals:
        return worst_of([])  # the batch has too many rows to evaluate them one by one
    rows = wide(t.evals["rows"])
    weights = t.facts.get("row_weights")
    counts = xp.ones_like(rows) if weights is None else wide(weights)[..., None]
    total = xp.maximum(xp.sum(counts, axis=1, keepdims=True), smallest(t.eval_loss))
    # A row of weight 0 may have any loss, even NaN.
    terms = xp.where(counts > 0, rows * counts, 0.0) / total
    mean, size = xp.sum(terms, axis=1), xp.sum(xp.abs(terms), axis=1)
    noise = t.facts["eval_noise"] + 4 * rows.shape[1] ** 0.5 * 2.0**-24 * size
    return residual(t.eval_loss, mean, 2 * noise + smallest(t.eval_loss))


@law(
    "evaluation",
    kind="structure",
    observes=("look",),
    capabilities=("look", "masks"),
    mistakes=("padding_in_the_denominator",),
    source="https://github.com/tracel-ai/burn/issues/5568",
)
def only_rows_that_count_are_counted(t: Transition) -> list[str]:
    """A loss that masks rows out divides by the number of rows that remain."""
    return [
        f"the {mask.loss} loss masks rows out{f' at {mask.at}' if mask.at else ''} but divides by the "
        "number of all rows: padding changes the loss"
        for mask in t.facts["look"].masks
        if not mask.counted
    ]


@law(
    "evaluation",
    kind="structure",
    observes=("look",),
    capabilities=("look", "pairings"),
    mistakes=("broadcast_loss",),
    source="NumPy, broadcasting rules: (N, 1) and (N,) make (N, N)",
)
def predictions_meet_their_own_targets(t: Transition) -> list[str]:
    """Where a loss combines every row with every row, the code says so; broadcasting alone never does."""
    return [
        f"the {pair.loss} loss combines {pair.shapes}{f' at {pair.at}' if pair.at else ''}: broadcasting "
        "pairs each row of the one with every row of the other"
        for pair in t.facts["look"].pairings
        if not pair.by_design
    ]


@law(
    "evaluation",
    observes=("noise", "step:other_padding", "eval:other_padding"),
    capabilities=("row_weights",),
    mistakes=("padding_enters", "padding_in_the_denominator"),
    source="https://github.com/google/flax/issues/1850",
)
def rows_of_weight_zero_change_nothing(t: Transition) -> Any:
    """The inputs in rows of weight 0 do not affect the loss, gradients, params or statistics.

    Each of the two runs may err by the step's rounding noise.
    """
    some = any_over(wide(t.facts["row_weights"]) == 0)
    other = t.reruns["other_padding"]
    seen = (t.after.batch_stats, t.after.params, t.info, t.eval_loss)
    again = (other.state.batch_stats, other.state.params, other.info, t.evals["other_padding"])
    noise = (
        t.noise.state.batch_stats,
        t.noise.state.params,
        t.noise.info,
        t.noise.eval_loss,
    )
    return when(some, within_noise(again, seen, noise))


@law(
    "evaluation",
    observes=("noise", "eval:own_statistics", *(f"eval:{name}" for name in NUDGED)),
    capabilities=("batch_stats", "loss", "eval_is_training_loss"),
    mistakes=(
        "eval_in_train_mode",
        "statistics_from_another_batch",
        "sample_variance",
        "losses_differ",
        "eval_ignores_variables",
        "modes_differ",
        "loss_reads_old_statistics",
        "weights_do_not_sum_to_one",
        "rows_treated_unequally",
        "wrong_moments",
        "statistics_in_low_precision",
        "eval_of_stale_state",
        "gradient_of_another_loss",
        "statistics_over_the_wrong_axis",
        "targets_misaligned",
        "targets_ignored",
        "low_precision",
        "statistics_of_another_layer",
        "statistics_reinitialised",
        "broadcast_loss",
        "sum_instead_of_mean",
        "statistics_of_part_of_the_batch",
        "inputs_ignored",
        "statistics_fed_to_the_optimizer",
        "loss_not_reduced",
        "ema_applied_twice",
        "division_by_zero_variance",
        "statistics_overflow",
        "variances_averaged",
        "average_not_steady",
        "rows_normalised_alone",
    ),
    source="Ioffe & Szegedy 2015, algorithms 1 and 2",
)
def eval_at_the_batchs_own_moments_is_the_training_loss(t: Transition) -> Any:
    """With the batch's own moments as running statistics, the eval loss equals the training loss.

    The moments are measured from outside and rounded, with an error of at most 2 u. Its effect on the
    loss is measured by evaluating with moments perturbed by 8 u, up and down, in three sign patterns,
    because in a single pattern the effects on several features may cancel. The tolerance is 16 times
    the largest effect, plus the step's rounding noise.
    """
    own = numbers(t.evals["own_statistics"])
    moved = [xp.abs(wide(own) - wide(numbers(t.evals[name]))) for name in NUDGED]
    noise = t.noise.info.loss + 8 * worst_of(moved)
    return within_noise(own, t.info.loss, noise)


@law(
    "evaluation",
    observes=("noise",),
    capabilities=("oracle",),
    mistakes=(
        "eval_in_train_mode",
        "eval_of_stale_state",
        "broadcast_loss",
        "sample_variance",
    ),
    source="bnverify/oracle.py, derived by hand",
)
def eval_loss_equals_the_hand_derivation(t: Transition) -> Any:
    """The eval loss equals the hand-derived one, within the step's rounding noise."""
    return within_noise(t.eval_loss, t.facts["oracle"].eval_loss, t.noise.eval_loss)


@law(
    "evaluation",
    observes=("again",),
    mistakes=("hidden_state",),
    source="JAX, pure functions: https://docs.jax.dev/en/latest/notebooks/Common_Gotchas_in_JAX.html",
)
def eval_repeats_to_the_bit(t: Transition) -> Any:
    """Evaluating twice gives bit-identical results."""
    return same(t.facts["again"].eval_loss, t.eval_loss)
