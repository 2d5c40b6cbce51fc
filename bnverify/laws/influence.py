"""Laws of influence: which inputs of a step must, and must not, affect which outputs.

If the jaxpr has no path from an input to an output, independence is proved for all values.
Otherwise the law is judged by comparing runs that differ in that input alone.
"""

from __future__ import annotations

from typing import Any

from bnverify.laws.arithmetic import any_over, differs, holds_if, same, when, within_noise
from bnverify.laws.law import law
from bnverify.model import Transition

FLAX_SOURCE = "Flax, linen/normalization.py: train mode normalises by the batch's moments"


def _several_rows(t: Transition) -> bool:
    return t.case.shape[0] > 1


@law(
    "influence",
    observes=("step:other_statistics",),
    capabilities=("batch_stats",),
    must_not_reach=(
        ("params", "batch_stats"),
        ("opt_state", "batch_stats"),
        ("loss", "batch_stats"),
    ),
    mistakes=(
        "train_step_in_eval_mode",
        "statistics_fed_to_the_optimizer",
        "loss_reads_old_statistics",
        "statistics_trained_as_params",
        "wrong_gradient",
        "update_dropped",
    ),
    source=FLAX_SOURCE,
)
def training_is_free_of_old_statistics(t: Transition) -> Any:
    """The new params, optimizer state and training loss do not depend on the old batch_stats."""
    other = t.reruns["other_statistics"]
    return same(
        (other.state.params, other.state.opt_state, other.info),
        (t.after.params, t.after.opt_state, t.info),
    )


@law(
    "influence",
    must_not_reach=(
        ("eval_batch_stats", "x"),
        ("eval_batch_stats", "y"),
        ("eval_batch_stats", "params"),
    ),
    observes=("after_eval",),
    capabilities=("batch_stats", "after_eval"),
    mistakes=("eval_in_train_mode",),
    source=FLAX_SOURCE,
)
def eval_statistics_are_the_ones_passed_in(t: Transition) -> Any:
    """Evaluation returns the batch_stats that it was given, whatever the batch."""
    return same(t.facts["after_eval"].batch_stats, t.after.batch_stats)


@law(
    "influence",
    kind="witness",
    never="changing y never changed the new params",
    observes=("step:other_targets",),
    must_reach=(("params", "y"),),
    mistakes=("update_dropped", "targets_ignored"),
    source="a training step learns from its targets",
)
def targets_reach_the_params(t: Transition) -> Any:
    """Changing the targets changes the new params in at least one case."""
    return holds_if(differs(t.reruns["other_targets"].state.params, t.after.params))


@law(
    "influence",
    kind="witness",
    never="assigning y to other rows never changed the training loss",
    observes=("noise", "step:reversed_targets"),
    capabilities=("loss",),
    must_reach=(("loss", "y"),),
    mistakes=(
        "broadcast_loss",
        "targets_ignored",
        "gradient_of_another_loss",
        "rows_normalised_alone",
    ),
    source="NumPy, broadcasting rules: (N, 1) and (N,) make (N, N)",
)
def targets_belong_to_their_rows(t: Transition) -> Any:
    """Assigning the targets to other rows changes the training loss in at least one case.

    If predictions (N, 1) minus targets (N,) broadcast to (N, N), the loss does not depend on which
    target belongs to which row. Differences within rounding noise do not count.
    """
    other, loss, noise = t.reruns["reversed_targets"].info.loss, t.info.loss, t.noise.info.loss
    other_rows = any_over(t.case.x[:, 1:] != t.case.x[:, :1])
    other_targets = any_over(t.case.y != t.case.y[:, ::-1])
    return when(other_rows & other_targets, holds_if(within_noise(other, loss, noise) > 1))


@law(
    "influence",
    kind="witness",
    never="changing x never changed the new params",
    observes=("step:other_inputs",),
    must_reach=(("params", "x"),),
    mistakes=(
        "inputs_ignored",
        "update_dropped",
        "rows_normalised_alone",
    ),
    source="a training step learns from its batch",
)
def inputs_reach_the_params(t: Transition) -> Any:
    """Changing the inputs changes the new params in at least one case with two or more rows.

    A single row normalises to 0, whatever its values. A step that changes no params violates
    ``step_moves_the_params`` instead.
    """
    moved = differs(t.after.params, t.before.params)
    other = t.reruns["other_inputs"].state.params
    return when(_several_rows(t) & moved, holds_if(differs(other, t.after.params)))


@law(
    "influence",
    kind="witness",
    never="changing x never changed the new batch_stats",
    observes=("step:other_inputs",),
    capabilities=("batch_stats",),
    must_reach=(("batch_stats", "x"),),
    mistakes=(
        "inputs_ignored",
        "new_statistics_dropped",
        "train_step_in_eval_mode",
        "update_dropped",
        "pass_dropped",
    ),
    source=FLAX_SOURCE,
)
def inputs_reach_the_statistics(t: Transition) -> Any:
    """Changing the inputs changes the new batch_stats in at least one case."""
    other = t.reruns["other_inputs"].state.batch_stats
    return holds_if(differs(other, t.after.batch_stats))


@law(
    "influence",
    kind="structure",
    observes=("look",),
    capabilities=("look", "draws"),
    mistakes=("same_key_in_each_step",),
    source="JAX, Pseudorandom numbers: a key is used once; https://github.com/google/flax/pull/2631",
)
def each_step_draws_anew(t: Transition) -> list[str]:
    """Each step draws new random numbers: not those of the previous step, nor those of init."""
    lines = []
    for draw in t.facts["look"].draws:
        what = f"the random numbers drawn at {draw.at}" if draw.at else "the random numbers"
        if not draw.keys:
            lines.append(f"{what} come from a constant key: they are the same in each step")
        elif not draw.moves:
            held = " and ".join(draw.keys)
            lines.append(
                f"{what} come from {held}, which the step never changes: they are the same in each step"
            )
        elif draw.of_init:
            lines.append(f"{what} in the first step come from a key that init has already used")
    return lines


@law(
    "influence",
    kind="witness",
    never="changing the old batch_stats never changed the new batch_stats",
    observes=("step:other_statistics",),
    capabilities=("batch_stats", "momentum"),
    must_reach=(("batch_stats", "batch_stats"),),
    mistakes=("statistics_reinitialised",),
    source="Ioffe & Szegedy 2015, https://arxiv.org/abs/1502.03167, section 3.1",
)
def old_statistics_reach_the_new(t: Transition) -> Any:
    """Changing the old batch_stats changes the new batch_stats in at least one case.

    A momentum of 0 discards the old values by design.
    """
    other = t.reruns["other_statistics"].state.batch_stats
    remembers = any(declared > 0 for declared in t.facts["momenta"])
    return when(remembers, holds_if(differs(other, t.after.batch_stats)))


@law(
    "influence",
    kind="witness",
    never="changing params, or changing x, never changed the training loss",
    observes=("step:other_params", "step:other_inputs"),
    capabilities=("loss",),
    must_reach=(("loss", "params"), ("loss", "x")),
    mistakes=(
        "inputs_ignored",
        "gradient_of_another_loss",
        "rows_normalised_alone",
    ),
    source="a training loss depends on the model's predictions",
)
def loss_reads_params_and_inputs(t: Transition) -> Any:
    """Changing params changes the training loss, and so does changing the inputs, in some case.

    Cases with a single row are skipped: it normalises to 0, whatever its values.
    """
    by_params = differs(t.reruns["other_params"].info.loss, t.info.loss)
    by_inputs = differs(t.reruns["other_inputs"].info.loss, t.info.loss)
    return when(_several_rows(t), holds_if(by_params & by_inputs))


@law(
    "influence",
    kind="witness",
    never="changing x never changed the eval loss",
    observes=("eval:other_inputs",),
    must_reach=(("eval_loss", "x"),),
    mistakes=("inputs_ignored", "eval_of_stale_state"),
    source="an eval loss depends on the model's predictions",
)
def inputs_reach_the_evaluation(t: Transition) -> Any:
    """Changing the inputs changes the eval loss in at least one case.

    There is no such law for params, because evaluation may use an average of them.
    """
    return holds_if(differs(t.evals["other_inputs"], t.eval_loss))


@law(
    "influence",
    kind="witness",
    never="changing y never changed the eval loss",
    observes=("eval:other_targets",),
    must_reach=(("eval_loss", "y"),),
    mistakes=("targets_ignored",),
    source="an eval loss compares predictions with targets",
)
def targets_reach_the_evaluation(t: Transition) -> Any:
    """Changing the targets changes the eval loss in at least one case."""
    return holds_if(differs(t.evals["other_targets"], t.eval_loss))


@law(
    "influence",
    kind="witness",
    must_change=("params",),
    never="the step never changed params",
    observes=("step:zero_lr",),
    capabilities=("lr",),
    mistakes=("update_dropped", "learning_rate_ignored"),
    source="a training step moves its params",
)
def step_moves_the_params(t: Transition) -> Any:
    """The step changes the params in at least one case."""
    return holds_if(differs(t.after.params, t.before.params))


@law(
    "influence",
    kind="witness",
    must_change=("batch_stats",),
    never="the step never changed batch_stats",
    capabilities=("batch_stats",),
    mistakes=("new_statistics_dropped", "train_step_in_eval_mode", "update_dropped"),
    source=FLAX_SOURCE,
)
def step_moves_the_statistics(t: Transition) -> Any:
    """The step changes batch_stats in at least one case."""
    return holds_if(differs(t.after.batch_stats, t.before.batch_stats))
