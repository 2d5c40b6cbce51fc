"""From what is known of a step to the mistake that its author made: one table, read from the top.

A rule names a mistake and says how it is recognised: by which laws are broken and which are not, by what
can reach what in the traced step, and by the clues that the numbers of a violating case give
(``bnverify.clues``). The most specific come first. A rule that applies explains those broken laws that
name its mistake in their ``mistakes=``; what is left is explained by the next rule that applies. A law
that no rule explains is given the first mistake of its own list.

To have a mistake recognised, add a rule. Nothing here is learned, and nothing is counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from bnverify.evidence import Cause, Evidence
from bnverify.laws import LAWS


@dataclass(frozen=True)
class Known:
    """What is known of a step whose laws were judged.

    Attributes:
        broken: the names of the broken laws, in the order of reports.
        flows: output tree -> the input trees that may reach it; empty where it was not traced.
        clues: what the numbers of violating cases say, see ``bnverify.clues``.
    """

    broken: tuple[str, ...]
    flows: Mapping[str, Iterable[str]] = field(default_factory=dict)
    clues: Mapping[str, Any] = field(default_factory=dict)

    def broke(self, *laws: str) -> bool:
        """Return whether all of these laws are broken."""
        return set(laws) <= set(self.broken)

    def any(self, *laws: str) -> bool:
        """Return whether one of these laws is broken."""
        return not set(laws).isdisjoint(self.broken)

    def clue(self, name: str, *values: str) -> bool:
        """Return whether a clue has one of these values."""
        return self.clues.get(name) in values

    def never_reads(self, output: str, source: str) -> bool:
        """Return whether the trace proves that a tree does not depend on another."""
        return output in self.flows and source not in self.flows[output]

    def may_read(self, output: str, source: str) -> bool:
        """Return whether the trace shows a way from a tree to another."""
        return source in self.flows.get(output, ())

    @property
    def factor(self) -> float:
        """The gradient in units of the slope of the reported loss; 1 where it is no one number."""
        return float(self.clues.get("gradient_factor", 1.0))


@dataclass(frozen=True)
class Rule:
    """How a mistake is recognised.

    Attributes:
        mistake: its name.
        applies: whether what is known shows it.
        seen: what was seen, in one clause; names in braces stand for clues.
    """

    mistake: str
    applies: Callable[[Known], bool]
    seen: str = ""

    def told(self, known: Known) -> str:
        """Return what was seen, with the numbers of this step; empty where they are not known."""
        try:
            return self.seen.format_map(_Readable(known.clues))
        except KeyError:
            return ""


class _Readable(dict[str, Any]):
    """Clues as they read in a sentence."""

    def __getitem__(self, name: str) -> Any:
        value = super().__getitem__(name)
        if isinstance(value, dict):
            value = [f"{leaf} by {_short(factor)} times" for leaf, factor in value.items()]
        if isinstance(value, list):
            rest = f" and {len(value) - MOST_LEAVES} more" if len(value) > MOST_LEAVES else ""
            return ", ".join(map(str, value[:MOST_LEAVES])) + rest
        return _short(value) if isinstance(value, float) else value


MOST_LEAVES = 4
"""How many leaves are told by name."""


def _short(number: float) -> str:
    """Return a number in a few digits, and one close to 1 by how far it is from it."""
    off = number - 1
    if 0 < abs(off) < 1e-4:
        return f"1 {'+' if off > 0 else '-'} {abs(off):.2g}"
    return f"{number:.5g}"


MODES = "eval_at_the_batchs_own_moments_is_the_training_loss"
SLOPE = "gradients_are_gradients_of_the_loss"
OLD = "training_is_free_of_old_statistics"
ROWS = "eval_rows_are_independent"
DOUBLED = "doubling_the_batch_changes_nothing"
FORM = (
    "params_keep_their_tree",
    "batch_stats_keep_their_tree",
    "state_signature_is_a_fixed_point",
)


def _only_cause(law: str) -> Rule:
    """Return the rule that a law which one mistake alone breaks names that mistake."""
    (mistake,) = LAWS[law].mistakes
    return Rule(mistake, lambda k: k.broke(law))


RULES: tuple[Rule, ...] = (
    # What a look at the program shows: each of these laws is about one mistake, and the other laws
    # that the mistake breaks would lead to another one.
    *(_only_cause(law.name) for law in LAWS.values() if "look" in law.capabilities),
    _only_cause("unlike_rows_have_a_variance"),
    # What the trees look like.
    Rule(
        "statistics_fed_to_the_optimizer",
        lambda k: k.broke("optimizer_state_excludes_batch_stats", "momentum_is_as_declared"),
        "the optimizer's state holds the statistics, and they move by more than their average",
    ),
    Rule(
        "optimizer_on_all_variables",
        lambda k: k.broke("optimizer_state_excludes_batch_stats"),
        "the optimizer's state holds a leaf for each running statistic",
    ),
    Rule(
        "gradient_of_all_variables",
        lambda k: k.clue("gradient_tree", "more leaves"),
        "the gradient has leaves that params do not have: {gradient_tree_leaves}",
    ),
    Rule(
        "wrong_gradient",
        lambda k: k.clue("gradient_tree", "fewer leaves"),
        "the gradient has no {gradient_tree_leaves}",
    ),
    Rule("statistics_trained_as_params", lambda k: k.broke("params_hold_no_statistics")),
    Rule(
        "statistics_nested",
        lambda k: k.clue("statistics_tree", "nested"),
        "the new statistics have the old ones' leaves one level deeper",
    ),
    Rule(
        "new_statistics_dropped",
        lambda k: k.clue("statistics_tree", "fewer leaves"),
        "the new statistics have no {statistics_tree_leaves}",
    ),
    Rule("statistics_in_low_precision", lambda k: k.broke("batch_stats_are_float32")),
    Rule("parameters_change_dtype", lambda k: k.any(*FORM)),
    Rule("optimizer_on_all_variables", lambda k: k.broke("optimizer_state_is_that_of_params")),
    Rule(
        "loss_not_reduced",
        lambda k: k.any("training_loss_is_a_scalar", "eval_loss_has_shape_one"),
    ),
    # What is not a function of its arguments.
    Rule("inputs_overwritten", lambda k: k.broke("step_leaves_its_inputs_alone")),
    Rule(
        "hidden_state",
        lambda k: k.any("same_input_repeats_to_the_bit", "eval_repeats_to_the_bit"),
        "the same input gives another result the second time",
    ),
    Rule(
        "hidden_state",
        lambda k: "update_of_another_trace" in k.clues,
        "traced anew, the step gives the same gradient and {update_of_another_trace} times the update",
    ),
    Rule("seed_not_truncated", lambda k: k.broke("float_seeds_act_as_their_integer_part")),
    Rule("eval_of_stale_state", lambda k: k.broke("solution_is_init_step_evaluate")),
    # What reaches nothing.
    Rule(
        "inputs_ignored",
        lambda k: k.any("inputs_reach_the_params", "inputs_reach_the_evaluation"),
        "other inputs give the same result",
    ),
    Rule(
        "gradient_of_another_loss",
        lambda k: k.broke("loss_reads_params_and_inputs"),
        "the reported loss does not depend on what the model predicts",
    ),
    # Params that stay, and training that reads the old statistics.
    Rule(
        "update_dropped",
        lambda k: k.clue("params", "unchanged"),
        "the step returns the params that it was given",
    ),
    Rule(
        "update_dropped",
        lambda k: k.clue("params", "partly unchanged"),
        "the step returns {still} as it was given, though the optimizer moves it",
    ),
    Rule(
        "statistics_trained_as_params",
        lambda k: k.broke(OLD, "batch_stats_are_free_of_targets"),
        "the loss depends on the old statistics, and the new ones depend on the targets",
    ),
    Rule(
        "train_step_in_eval_mode",
        lambda k: k.broke(OLD) and k.clue("average", "unchanged", "partly unchanged"),
        "the loss depends on the old statistics, and the step leaves {idle} as they are",
    ),
    Rule(
        "wrong_gradient",
        lambda k: k.broke(OLD, SLOPE) and not k.broke(MODES),
        "the gradient depends on the old statistics, the loss does not",
    ),
    Rule(
        "loss_reads_old_statistics",
        lambda k: k.broke(OLD),
        "other old statistics give another loss, or other params",
    ),
    # The gradient.
    Rule(
        "wrong_sign",
        lambda k: k.broke(SLOPE) and abs(k.factor + 1) < 1e-3,
        "the gradient is {gradient_factor} times the slope of the reported loss",
    ),
    Rule(
        "gradient_of_another_loss",
        lambda k: k.broke(SLOPE, MODES),
        "the reported loss is neither what evaluation gives at the batch's own moments nor what the "
        "gradient is the slope of",
    ),
    Rule(
        "wrong_gradient",
        lambda k: k.broke(SLOPE) and k.clue("gradient", "scaled"),
        "the gradient is {gradient_factor} times the slope of the reported loss",
    ),
    Rule(
        "wrong_gradient",
        lambda k: k.broke(SLOPE) and "gradient_factor" in k.clues,
        "the gradient of {gradient_leaves} is {gradient_factor} times the slope of the reported loss",
    ),
    Rule(
        "wrong_gradient",
        lambda k: k.broke(SLOPE) and "gradient_leaves" in k.clues,
        "the gradient is not the slope of the reported loss for {gradient_leaves}",
    ),
    Rule("wrong_gradient", lambda k: k.broke(SLOPE)),
    # The update.
    Rule(
        "low_precision",
        lambda k: k.clue("params", "rounded"),
        "the new params have no more digits than {params_type} holds",
    ),
    Rule(
        "low_precision",
        lambda k: k.clue("opt_state", "rounded"),
        "the optimizer's new state has no more digits than {opt_state_type} holds",
    ),
    Rule(
        "wrong_sign",
        lambda k: k.clue("params", "opposite"),
        "the update is {factor} times the optimizer's",
    ),
    Rule(
        "wrong_sign",
        lambda k: k.clue("params", "gradient added"),
        "the params move by {factor} times the gradient",
    ),
    Rule(
        "update_applied_twice",
        lambda k: k.clue("params", "twice"),
        "the update is {factor} times the optimizer's",
    ),
    Rule(
        "update_applied_twice",
        lambda k: k.clue("params", "two updates"),
        "the params are those after two of the optimizer's updates",
    ),
    Rule(
        "update_applied_twice",
        lambda k: k.clue("opt_state", "twice"),
        "the optimizer's state is the one after two updates",
    ),
    Rule(
        "optimizer_reinitialised",
        lambda k: k.clue("params", "fresh optimizer") or k.clue("opt_state", "fresh"),
        "the update is the one of an optimizer that was initialised just now",
    ),
    Rule(
        "optimizer_reinitialised",
        lambda k: k.clue("opt_state", "cleared"),
        "the optimizer's new state is its initial one",
    ),
    Rule(
        "old_optimizer_state_kept",
        lambda k: k.clue("opt_state", "old"),
        "the step returns the optimizer's state that it was given",
    ),
    Rule(
        "params_of_another_state",
        lambda k: k.clue("params", "another start"),
        "at a learning rate of 0 the new params are the same, whatever the old ones",
    ),
    Rule(
        "decay_outside_the_learning_rate",
        lambda k: "factor_at_rate_zero" in k.clues,
        "at a learning rate of 0 the new params are {factor_at_rate_zero} times the old ones",
    ),
    Rule(
        "learning_rate_ignored",
        lambda k: (
            k.never_reads("params", "lr")
            and k.any("params_follow_the_optimizer", "zero_learning_rate_moves_nothing")
        ),
        "nothing leads from the learning rate to the new params",
    ),
    Rule(
        "optimizer_bypassed",
        lambda k: k.clue("params", "plain descent"),
        "the params move by -lr times the gradient, and not as the optimizer says",
    ),
    Rule(
        "learning_rate_applied_twice",
        lambda k: k.clue("params", "rate twice"),
        "the update is {factor} times the optimizer's, which is the learning rate again",
    ),
    Rule(
        "decay_of_norm_parameters",
        lambda k: k.clue("params", "decayed"),
        "besides the optimizer's update, leaves change by a multiple of themselves: {decayed}",
    ),
    Rule(
        "update_scaled",
        lambda k: k.clue("params", "scaled"),
        "the update is {factor} times the optimizer's",
    ),
    Rule("learning_rate_ignored", lambda k: k.broke("zero_learning_rate_moves_nothing")),
    # The moving average.
    Rule("statistics_overflow", lambda k: k.broke("statistics_stay_finite")),
    Rule(
        "statistics_in_low_precision",
        lambda k: k.clue("average", "rounded"),
        "{rounded} have no more digits than {average_type} holds",
    ),
    Rule(
        "new_statistics_dropped",
        lambda k: k.clue("average", "unchanged", "partly unchanged"),
        "the step leaves {idle} as they are",
    ),
    Rule(
        "new_statistics_dropped",
        lambda k: k.broke("step_moves_the_statistics") and k.never_reads("batch_stats", "x"),
        "nothing leads from x to the new statistics",
    ),
    Rule(
        "statistics_reinitialised",
        lambda k: k.clue("average", "forgets") or k.broke("old_statistics_reach_the_new"),
        "the new statistics are the same, whatever the old ones",
    ),
    Rule(
        "statistics_from_another_batch",
        lambda k: k.broke("batch_stats_are_free_of_targets"),
        "the new statistics depend on the targets: they come from a pass after the update",
    ),
    Rule(
        "statistics_fed_to_the_optimizer",
        lambda k: (
            k.may_read("batch_stats", "lr")
            and k.any("momentum_is_as_declared", "one_momentum_for_the_whole_model")
        ),
        "the new statistics depend on the learning rate",
    ),
    Rule(
        "statistics_of_another_layer",
        lambda k: k.clue("moments", "another layer"),
        "{moments_of} records the moments of what {layer} was given",
    ),
    Rule(
        "wrong_moments",
        lambda k: k.clue("average", "of roots"),
        "{bent} averages standard deviations and squares the average",
    ),
    Rule(
        "average_not_steady",
        lambda k: k.clue("average", "bent"),
        "the weight of the old value depends on that value; far from here it is {momentum}",
    ),
    Rule(
        "ema_applied_twice",
        lambda k: k.clue("average", "squared"),
        "the old value's weight in {leaves} is {momentum}, the square of {declared}",
    ),
    Rule(
        "momentum_reversed",
        lambda k: k.clue("average", "reversed"),
        "the old value's weight in {leaves} is {momentum}, where {declared} is declared",
    ),
    Rule(
        "statistics_in_low_precision",
        lambda k: k.clue("average", "rounded momentum"),
        "the old value's weight is {momentum}, which is {declared} in bfloat16",
    ),
    # The moments that enter the average.
    Rule(
        "sample_variance",
        lambda k: k.clue("moments", "sample variance"),
        "the variance of {moments_of} is {moments_factor} times the batch's: N / (N - 1)",
    ),
    Rule(
        "statistics_from_another_batch",
        lambda k: k.clue("moments", "weights") and abs(k.clues.get("moments_factor", 0) + 1) < 1e-3,
        "{moments_of} records {moments_factor} times the mean of what it was given",
    ),
    Rule(
        "weights_do_not_sum_to_one",
        lambda k: k.clue("moments", "weights") and abs(k.clues.get("moments_sum", 1) - 1) > 0.01,
        "in {moments_of} the weights of the old value and of the batch's moments sum to {moments_sum}",
    ),
    Rule(
        "weights_do_not_sum_to_one",
        lambda k: k.clue("moments", "weights"),
        "in {moments_of} the batch's moments enter with {moments_factor} times the weight 1 - m",
    ),
    Rule(
        "statistics_in_low_precision",
        lambda k: k.clue("moments", "rounded"),
        "the recorded moments of {moments_of} have no more digits than {moments_type} holds",
    ),
    Rule(
        "variances_averaged",
        lambda k: k.clue("moments", "shards' variances"),
        "the variance of {moments_of} is the mean of the variances of {shards} parts of the batch",
    ),
    Rule(
        "rows_treated_unequally",
        lambda k: k.clue("moments", "part of the rows") and not k.broke(MODES),
        "{moments_of} normalises by the moments of rows {rows} only",
    ),
    Rule(
        "statistics_of_part_of_the_batch",
        lambda k: k.clue("moments", "part of the rows"),
        "{moments_of} records the moments of rows {rows} only",
    ),
    Rule(
        "rows_treated_unequally",
        lambda k: k.clue("moments", "padding"),
        "{moments_of} counts {padding} rows of zeros that the batch does not have",
    ),
    Rule(
        "statistics_over_the_wrong_axis",
        lambda k: k.clue("moments", "all axes", "channels in another order"),
        "{moments_of} records the moments of {moments}",
    ),
    Rule(
        "rows_treated_unequally",
        lambda k: (
            k.any("row_order_changes_nothing", DOUBLED)
            and k.clue("moments", "other", "another quantity")
            and not k.broke(MODES)
        ),
        "the rows' order or number changes the moments",
    ),
    Rule(
        "wrong_moments",
        lambda k: k.clue("moments", "another quantity"),
        "what {moments_of} records as the variance is {quantity}",
    ),
    Rule(
        "statistics_from_another_batch",
        lambda k: k.clue("moments", "other"),
        "{moments_of} records other moments than those of what it was given",
    ),
    Rule(
        "weights_do_not_sum_to_one",
        lambda k: k.clue("average", "another momentum") and k.clues.get("momentum", 0) >= 1,
        "the old value's weight is {momentum}",
    ),
    Rule(
        "momentum_not_as_declared",
        lambda k: k.clue("average", "another momentum"),
        "the old value's weight in {leaves} is {momentum}, where {declared} is declared",
    ),
    # Evaluation by itself.
    Rule(
        "eval_in_train_mode",
        lambda k: k.any("eval_writes_nothing", "eval_statistics_are_the_ones_passed_in"),
        "evaluation changes the state",
    ),
    Rule(
        "eval_of_stale_state",
        lambda k: k.never_reads("eval_loss", "params"),
        "nothing leads from the params to the eval loss",
    ),
    Rule(
        "eval_in_train_mode",
        lambda k: k.broke("eval_uses_the_running_statistics", ROWS),
        "a row's prediction depends on the other rows, and not on the statistics",
    ),
    Rule(
        "eval_of_stale_state",
        lambda k: k.broke("eval_uses_the_running_statistics"),
        "other statistics give the same eval loss",
    ),
    # Training beside evaluation.
    Rule(
        "low_precision",
        lambda k: k.clue("modes", "rounded loss"),
        "the eval loss is {modes_type}",
    ),
    Rule(
        "sum_instead_of_mean",
        lambda k: k.clue("modes", "sum in training", "sum in evaluation"),
        "at the batch's own moments the eval loss is {modes_ratio} times the training loss: the number "
        "of rows, or one over it",
    ),
    Rule(
        "sample_variance",
        lambda k: k.clue("modes", "sample variance"),
        "training normalises by N / (N - 1) times the batch's variance",
    ),
    Rule(
        "targets_misaligned",
        lambda k: k.clue("modes", "targets moved"),
        "with the targets in another order, evaluation gives the training loss",
    ),
    Rule("targets_ignored", lambda k: k.broke("targets_reach_the_evaluation")),
    Rule(
        "targets_ignored",
        lambda k: k.clue("modes", "targets replaced") or k.never_reads("loss", "y"),
        "the training loss is what evaluation gives for one target for all rows",
    ),
    Rule(
        "broadcast_loss",
        lambda k: k.clue("modes", "broadcast in training", "broadcast in evaluation"),
        "the loss is the same in whatever order the targets are",
    ),
    Rule(
        "low_precision",
        lambda k: k.clue("modes", "rounded targets", "rounded inputs"),
        "training computes what evaluation gives for {modes}",
    ),
    Rule(
        "statistics_in_low_precision",
        lambda k: k.clue("modes", "rounded statistics in evaluation"),
        "evaluation reads the statistics with fewer digits than they have",
    ),
    Rule(
        "statistics_over_the_wrong_axis",
        lambda k: k.clue("modes", "one moment for all channels"),
        "training normalises all channels by one mean and one variance",
    ),
    Rule(
        "statistics_over_the_wrong_axis",
        lambda k: k.clue("modes", "rows by themselves"),
        "in training, a row's prediction does not depend on the other rows",
    ),
    Rule(
        "rows_treated_unequally",
        lambda k: (
            k.broke("row_order_changes_nothing")
            and (k.any(DOUBLED, ROWS) or not k.broke(MODES) or k.clue("row_order", "matters"))
        ),
        "the order of the rows changes the result",
    ),
    Rule("broadcast_loss", lambda k: k.broke("targets_belong_to_their_rows")),
    Rule(
        "rows_treated_unequally",
        lambda k: k.broke(DOUBLED),
        "every row twice gives another result than every row once",
    ),
    Rule(
        "eval_of_stale_state",
        lambda k: k.clue("modes", "evaluation ignores the statistics here"),
        "other statistics give the same eval loss in this case",
    ),
    Rule("division_by_zero_variance", lambda k: k.broke("eval_loss_is_finite")),
    Rule("modes_differ", lambda k: k.broke(MODES) and k.clue("modes", "root in evaluation")),
    Rule(
        "eval_in_train_mode",
        lambda k: k.broke(ROWS),
        "in evaluation, a row's prediction depends on the other rows",
    ),
    Rule(
        "modes_differ",
        lambda k: k.broke(MODES),
        "at the batch's own moments the eval loss is {modes_ratio} times the training loss",
    ),
    Rule("variance_turns_negative", lambda k: k.broke("variance_is_never_negative")),
)


RULED = frozenset(rule.mistake for rule in RULES)
"""The mistakes that are recognised by a rule."""


def causes(known: Known) -> dict[str, Cause]:
    """Return broken law -> the mistake that explains it, the surest mistakes first."""
    left = list(known.broken)
    found: dict[str, Cause] = {}
    for rule in RULES:
        explained = [law for law in left if rule.mistake in LAWS[law].mistakes]
        if explained and rule.applies(known):
            left = [law for law in left if law not in explained]
            found |= dict.fromkeys(explained, Cause(rule.mistake, rule.told(known)))
    surest = next(iter(found.values()), None)
    # What no rule explains is a mistake without a rule, or else follows from the surest.
    unruled: dict[str, Cause] = {}
    for law in left:
        own = [name for name in LAWS[law].mistakes if name not in RULED]
        if surest is not None and not own:
            found[law] = surest
        else:
            unruled[law] = Cause((own or LAWS[law].mistakes)[0])
    return found | unruled


def known_of(results: Sequence[Evidence], influence: Mapping[str, Any]) -> Known:
    """Return what evidence and a report's ``influence`` tell, of the laws of one step."""
    broken = [each for each in results if _unexplained(each)]
    clues: dict[str, Any] = {}
    for each in broken:
        clues = {**each.clues, **clues}
    names = tuple(each.law for each in broken if each.law in LAWS)
    return Known(names, influence.get("matrix", {}), clues)


def diagnosed(results: Sequence[Evidence], influence: Mapping[str, Any]) -> list[Evidence]:
    """Return ``results``, those of broken laws with the mistake behind them, unless one is known.

    Args:
        results: what is known about all the laws.
        influence: what may reach what, as in ``Report.influence``.
    """
    found = causes(known_of(results, influence))
    return [
        replace(each, cause=found.get(each.law)) if _unexplained(each) else each for each in results
    ]


def _unexplained(evidence: Evidence) -> bool:
    return evidence.status == "violated" and evidence.cause is None
