"""From the violations of a step to the most likely mistake: one table of rules, tried from the top.

A rule recognises a mistake by which laws are violated and which are not, by which inputs can affect
which outputs in the traced step, and by clues: what the numbers of a violating case say
(``bnverify.clues``). The most specific rules come first. A rule that applies explains the violated laws
that list its mistake in their ``mistakes=``; later rules explain the remaining ones. A law that no rule
explains gets the first mistake of its own list that no rule covers, or else the first of its list.

To have a mistake recognised, add a rule. The rules are written by hand; nothing is fitted to data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from bnverify.evidence import Cause, Evidence
from bnverify.laws import LAWS


@dataclass(frozen=True)
class Findings:
    """The findings about a step that the rules look at.

    Attributes:
        broken: the names of the violated laws, in the order of reports.
        flows: output tree -> the input trees that may affect it; empty if the step was not traced.
        clues: what the numbers of violating cases say; see ``bnverify.clues``.
    """

    broken: tuple[str, ...]
    flows: Mapping[str, Iterable[str]] = field(default_factory=dict)
    clues: Mapping[str, Any] = field(default_factory=dict)

    def broke(self, *laws: str) -> bool:
        """Return whether all of these laws are violated."""
        return set(laws) <= set(self.broken)

    def any(self, *laws: str) -> bool:
        """Return whether any of these laws is violated."""
        return not set(laws).isdisjoint(self.broken)

    def clue(self, name: str, *values: str) -> bool:
        """Return whether a clue has one of these values."""
        return self.clues.get(name) in values

    def never_reads(self, output: str, source: str) -> bool:
        """Return whether the trace proves that ``output`` does not depend on ``source``."""
        return output in self.flows and source not in self.flows[output]

    def may_read(self, output: str, source: str) -> bool:
        """Return whether ``output`` may depend on ``source``, according to the trace."""
        return source in self.flows.get(output, ())

    @property
    def factor(self) -> float:
        """The gradient divided by the slope of the reported loss; 1 if that is not one number."""
        return float(self.clues.get("gradient_factor", 1.0))


@dataclass(frozen=True)
class Rule:
    """How a mistake is recognised.

    Attributes:
        mistake: the name of the mistake.
        applies: whether the findings show it.
        seen: what was seen, in one clause; names in braces are replaced by clues.
    """

    mistake: str
    applies: Callable[[Findings], bool]
    seen: str = ""

    def describe(self, findings: Findings) -> str:
        """Return ``seen`` with this step's clues filled in; empty if one of them is missing."""
        try:
            return self.seen.format_map(_Readable(findings.clues))
        except KeyError:
            return ""


class _Readable(dict[str, Any]):
    """Clues, formatted for a sentence."""

    def __getitem__(self, name: str) -> Any:
        value = super().__getitem__(name)
        if isinstance(value, dict):
            value = [f"{leaf} by {_short(factor)} times" for leaf, factor in value.items()]
        if isinstance(value, list):
            rest = f" and {len(value) - MOST_LEAVES} more" if len(value) > MOST_LEAVES else ""
            return ", ".join(map(str, value[:MOST_LEAVES])) + rest
        return _short(value) if isinstance(value, float) else value


MOST_LEAVES = 4
"""The largest number of leaves listed by name."""


def _short(number: float) -> str:
    """Return a number in five digits, or as "1 + 3e-06" if it is close to 1."""
    off = number - 1
    if 0 < abs(off) < 1e-4:
        return f"1 {'+' if off > 0 else '-'} {abs(off):.2g}"
    return f"{number:.5g}"


MODES = "eval_at_the_batchs_own_moments_is_the_training_loss"
SLOPE = "gradients_are_gradients_of_the_loss"
OLD = "training_is_free_of_old_statistics"
FINITE = ("eval_loss_is_finite", "a_constant_feature_gives_a_finite_step")
ROWS = "eval_rows_are_independent"
DOUBLED = "doubling_the_batch_changes_nothing"
FORM = (
    "params_keep_their_tree",
    "batch_stats_keep_their_tree",
    "state_signature_is_a_fixed_point",
)


def _only_cause(law: str) -> Rule:
    """Return the rule for a law that only one mistake violates."""
    (mistake,) = LAWS[law].mistakes
    return Rule(mistake, lambda k: k.broke(law))


def _nonfinite(kind: str, mistake: str) -> Rule:
    """Return the rule for a kind of operation that gives the first number that is not finite."""
    return Rule(
        mistake,
        lambda k: k.any(*FINITE) and k.clue("nonfinite_kind", kind),
        "the first number that is not finite is the result of {nonfinite} at {nonfinite_at}",
    )


RULES: tuple[Rule, ...] = (
    # Laws read off the traced program: each is about one mistake. They come first because the other
    # laws that such a mistake violates would suggest a different one.
    *(
        _only_cause(law.name)
        for law in LAWS.values()
        if "look" in law.capabilities and len(law.mistakes) == 1
    ),
    _only_cause("unlike_rows_have_a_variance"),
    # The structure of the trees.
    Rule(
        "statistics_fed_to_the_optimizer",
        lambda k: k.broke("optimizer_state_excludes_batch_stats", "momentum_is_as_declared"),
        "the optimizer state contains the statistics, and they change by more than the moving average",
    ),
    Rule(
        "optimizer_on_all_variables",
        lambda k: k.broke("optimizer_state_excludes_batch_stats"),
        "the optimizer state has a leaf for each running statistic",
    ),
    Rule(
        "gradient_of_all_variables",
        lambda k: k.clue("gradient_tree", "more leaves"),
        "the gradient has leaves that params does not have: {gradient_tree_leaves}",
    ),
    Rule(
        "wrong_gradient",
        lambda k: k.clue("gradient_tree", "fewer leaves"),
        "the gradient lacks {gradient_tree_leaves}",
    ),
    Rule("statistics_trained_as_params", lambda k: k.broke("params_hold_no_statistics")),
    Rule(
        "statistics_nested",
        lambda k: k.clue("statistics_tree", "nested"),
        "the new batch_stats has the leaves of the old one, but one level deeper",
    ),
    Rule(
        "new_statistics_dropped",
        lambda k: k.clue("statistics_tree", "fewer leaves"),
        "the new batch_stats lacks {statistics_tree_leaves}",
    ),
    Rule("statistics_in_low_precision", lambda k: k.broke("batch_stats_are_float32")),
    Rule(
        "weak_type_in_the_state",
        lambda k: "only_weak_types" in k.clues and k.broke("state_signature_is_a_fixed_point"),
        "the weak type of {only_weak_types} is lost in the first step",
    ),
    Rule("parameters_change_dtype", lambda k: k.any(*FORM)),
    Rule("optimizer_on_all_variables", lambda k: k.broke("optimizer_state_is_that_of_params")),
    Rule(
        "loss_not_reduced",
        lambda k: k.any("training_loss_is_a_scalar", "eval_loss_has_shape_one"),
    ),
    # Purity.
    Rule("inputs_overwritten", lambda k: k.broke("step_leaves_its_inputs_alone")),
    Rule(
        "hidden_state",
        lambda k: k.any("same_input_repeats_to_the_bit", "eval_repeats_to_the_bit"),
        "the same input gives a different result the second time",
    ),
    Rule(
        "hidden_state",
        lambda k: "update_of_another_trace" in k.clues,
        "traced again, the step has the same gradient but {update_of_another_trace} times the update",
    ),
    Rule("drawn_outside_jax", lambda k: k.broke("a_fresh_trace_gives_the_same")),
    Rule("seed_not_truncated", lambda k: k.broke("float_seeds_act_as_their_integer_part")),
    Rule("eval_of_stale_state", lambda k: k.broke("solution_is_init_step_evaluate")),
    # Params that are returned as they were; then nothing can have an effect on them.
    Rule(
        "update_dropped",
        lambda k: k.clue("params", "unchanged"),
        "the step returns params unchanged",
    ),
    # Arguments without effect.
    Rule(
        "eval_of_stale_state",
        lambda k: (
            k.broke("inputs_reach_the_evaluation")
            and k.never_reads("eval_loss", "params")
            and k.may_read("eval_loss", "extra")
        ),
        "in the trace, the eval loss depends on other values of the state instead of params",
    ),
    Rule(
        "inputs_ignored",
        lambda k: k.any("inputs_reach_the_params", "inputs_reach_the_evaluation"),
        "changing the inputs does not change the result",
    ),
    Rule(
        "gradient_of_another_loss",
        lambda k: k.broke("loss_reads_params_and_inputs"),
        "the reported loss does not depend on the predictions",
    ),
    # Params of which some are unchanged, and training that depends on the old statistics.
    Rule(
        "update_dropped",
        lambda k: k.clue("params", "partly unchanged"),
        "the step returns {still} unchanged, although the optimizer updates it",
    ),
    Rule(
        "statistics_trained_as_params",
        lambda k: k.broke(OLD, "batch_stats_are_free_of_targets"),
        "the loss depends on the old statistics, and the new ones depend on the targets",
    ),
    Rule(
        "train_step_in_eval_mode",
        lambda k: k.broke(OLD) and k.clue("average", "unchanged", "partly unchanged"),
        "the loss depends on the old statistics, and the step leaves {idle} unchanged",
    ),
    Rule(
        "wrong_gradient",
        lambda k: k.broke(OLD, SLOPE) and not k.broke(MODES),
        "the gradient depends on the old statistics, but the loss does not",
    ),
    Rule(
        "loss_reads_old_statistics",
        lambda k: k.broke(OLD),
        "changing the old statistics changes the loss or the new params",
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
        "the reported loss differs from the eval loss at the batch's own moments, and the gradient is "
        "not its slope",
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
        "the gradient of {gradient_leaves} is not the slope of the reported loss",
    ),
    Rule("wrong_gradient", lambda k: k.broke(SLOPE)),
    # The update.
    Rule(
        "low_precision",
        lambda k: k.clue("params", "rounded"),
        "the new params are rounded to {params_type}",
    ),
    Rule(
        "low_precision",
        lambda k: k.clue("opt_state", "rounded"),
        "the new optimizer state is rounded to {opt_state_type}",
    ),
    Rule(
        "wrong_sign",
        lambda k: k.clue("params", "opposite"),
        "the update is {factor} times the optimizer's",
    ),
    Rule(
        "wrong_sign",
        lambda k: k.clue("params", "gradient added"),
        "the params change by {factor} times the gradient",
    ),
    Rule(
        "update_applied_twice",
        lambda k: k.clue("params", "twice"),
        "the update is {factor} times the optimizer's",
    ),
    Rule(
        "update_applied_twice",
        lambda k: k.clue("params", "two updates"),
        "the new params are those after two updates by the optimizer",
    ),
    Rule(
        "update_applied_twice",
        lambda k: k.clue("opt_state", "twice"),
        "the new optimizer state is the one after two updates",
    ),
    Rule(
        "optimizer_reinitialised",
        lambda k: k.clue("params", "fresh optimizer") or k.clue("opt_state", "fresh"),
        "the update is that of a newly initialised optimizer",
    ),
    Rule(
        "optimizer_reinitialised",
        lambda k: k.clue("opt_state", "cleared"),
        "the new optimizer state is the initial one",
    ),
    Rule(
        "old_optimizer_state_kept",
        lambda k: k.clue("opt_state", "old"),
        "the step returns opt_state unchanged",
    ),
    Rule(
        "params_of_another_state",
        lambda k: k.clue("params", "another start"),
        "with lr = 0 the new params do not depend on the old ones",
    ),
    Rule(
        "decay_grows_params",
        lambda k: k.clues.get("factor_at_rate_zero", 0) > 1,
        "with lr = 0 the new params are {factor_at_rate_zero} times the old ones",
    ),
    Rule(
        "decay_outside_the_learning_rate",
        lambda k: "factor_at_rate_zero" in k.clues,
        "with lr = 0 the new params are {factor_at_rate_zero} times the old ones",
    ),
    Rule(
        "learning_rate_ignored",
        lambda k: (
            k.never_reads("params", "lr")
            and k.any("params_follow_the_optimizer", "zero_learning_rate_moves_nothing")
        ),
        "in the trace, the new params do not depend on the learning rate",
    ),
    Rule(
        "optimizer_bypassed",
        lambda k: k.clue("params", "plain descent"),
        "the params change by -lr times the gradient instead of the optimizer's update",
    ),
    Rule(
        "learning_rate_applied_twice",
        lambda k: k.clue("params", "rate twice"),
        "the update is {factor} times the optimizer's, and {factor} is the learning rate",
    ),
    Rule(
        "decay_of_norm_parameters",
        lambda k: k.clue("params", "decayed"),
        "besides the optimizer's update, leaves change by a multiple of their value: {decayed}",
    ),
    Rule(
        "update_scaled",
        lambda k: k.clue("params", "scaled"),
        "the update is {factor} times the optimizer's",
    ),
    Rule("learning_rate_ignored", lambda k: k.broke("zero_learning_rate_moves_nothing")),
    # The moving average.
    Rule(
        "sample_variance",
        lambda k: k.clue("moments", "sample variance"),
        "the variance of {moments_of} is {moments_factor} times the batch's, which is N / (N - 1)",
    ),
    Rule("statistics_overflow", lambda k: k.broke("statistics_stay_finite")),
    Rule(
        "statistics_in_low_precision",
        lambda k: k.clue("average", "rounded"),
        "{rounded} are rounded to {average_type}",
    ),
    Rule(
        "new_statistics_dropped",
        lambda k: k.clue("average", "unchanged", "partly unchanged"),
        "the step leaves {idle} unchanged",
    ),
    Rule(
        "new_statistics_dropped",
        lambda k: k.broke("step_moves_the_statistics") and k.never_reads("batch_stats", "x"),
        "in the trace, the new statistics do not depend on x",
    ),
    Rule(
        "statistics_reinitialised",
        lambda k: k.clue("average", "forgets") or k.broke("old_statistics_reach_the_new"),
        "the new statistics do not depend on the old ones",
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
        "{moments_of} records the moments of the input of {layer}",
    ),
    Rule(
        "wrong_moments",
        lambda k: "mixed" in k.clues and k.any(MODES, "batch_stats_change_only_by_ema"),
        "the new {mixed} depends on the old {mixed_with}",
    ),
    Rule(
        "wrong_moments",
        lambda k: k.clue("average", "of roots"),
        "{bent} averages standard deviations and squares the average",
    ),
    Rule(
        "average_not_steady",
        lambda k: k.clue("average", "bent"),
        "the momentum depends on the old value; for a huge one it is {momentum}",
    ),
    Rule(
        "ema_applied_twice",
        lambda k: k.clue("average", "squared"),
        "the momentum of {leaves} is {momentum}, the square of {declared}",
    ),
    Rule(
        "momentum_reversed",
        lambda k: k.clue("average", "reversed"),
        "the momentum of {leaves} is {momentum}, but {declared} is declared",
    ),
    Rule(
        "statistics_in_low_precision",
        lambda k: k.clue("average", "rounded momentum"),
        "the momentum is {momentum}, which is {declared} in bfloat16",
    ),
    # The moments that enter the average.
    Rule(
        "statistics_from_another_batch",
        lambda k: k.clue("moments", "weights") and abs(k.clues.get("moments_factor", 0) + 1) < 1e-3,
        "{moments_of} records {moments_factor} times the mean of its input",
    ),
    Rule(
        "weights_do_not_sum_to_one",
        lambda k: k.clue("moments", "weights") and abs(k.clues.get("moments_sum", 1) - 1) > 0.01,
        "in {moments_of} the weights of the old value and of the batch's moments sum to {moments_sum}",
    ),
    Rule(
        "weights_do_not_sum_to_one",
        lambda k: k.clue("moments", "weights"),
        "in {moments_of} the weight of the batch's moments is {moments_factor} times 1 - m",
    ),
    Rule(
        "statistics_in_low_precision",
        lambda k: k.clue("moments", "rounded"),
        "the recorded moments of {moments_of} are rounded to {moments_type}",
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
        "{moments_of} includes {padding} rows of zeros that are not in the batch",
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
        "reordering or repeating the rows changes the moments",
    ),
    Rule(
        "wrong_moments",
        lambda k: k.clue("moments", "another quantity"),
        "the variance that {moments_of} records is {quantity}",
    ),
    Rule(
        "wrong_moments",
        lambda k: k.clue("moments", "scaled mean"),
        "the mean that {moments_of} records is {moments_factor} times that of its input",
    ),
    Rule(
        "statistics_from_another_batch",
        lambda k: k.clue("moments", "other"),
        "the moments that {moments_of} records are not those of its input",
    ),
    Rule(
        "weights_do_not_sum_to_one",
        lambda k: k.clue("average", "another momentum") and k.clues.get("momentum", 0) >= 1,
        "the momentum is {momentum}",
    ),
    Rule(
        "momentum_not_as_declared",
        lambda k: k.clue("average", "another momentum"),
        "the momentum of {leaves} is {momentum}, but {declared} is declared",
    ),
    # Evaluation alone.
    Rule(
        "eval_in_train_mode",
        lambda k: k.any("eval_writes_nothing", "eval_statistics_are_the_ones_passed_in"),
        "evaluation changes the state",
    ),
    Rule(
        "eval_of_stale_state",
        lambda k: k.never_reads("eval_loss", "params"),
        "in the trace, the eval loss does not depend on params",
    ),
    Rule(
        "eval_in_train_mode",
        lambda k: k.broke("eval_uses_the_running_statistics", ROWS),
        "a row's prediction depends on the other rows instead of the running statistics",
    ),
    Rule(
        "eval_of_stale_state",
        lambda k: k.broke("eval_uses_the_running_statistics"),
        "changing the statistics does not change the eval loss",
    ),
    # Training compared with evaluation.
    Rule(
        "low_precision",
        lambda k: k.clue("modes", "rounded loss"),
        "the eval loss is {modes_type}",
    ),
    Rule(
        "sum_instead_of_mean",
        lambda k: k.clue("modes", "sum in training", "sum in evaluation"),
        "at the batch's own moments the eval loss is {modes_ratio} times the training loss, which is "
        "the number of rows or its inverse",
    ),
    Rule(
        "sample_variance",
        lambda k: k.clue("modes", "sample variance"),
        "training normalises by N / (N - 1) times the batch variance",
    ),
    Rule(
        "targets_misaligned",
        lambda k: k.clue("modes", "targets moved"),
        "the eval loss equals the training loss if the targets are reordered",
    ),
    Rule("targets_ignored", lambda k: k.broke("targets_reach_the_evaluation")),
    Rule(
        "targets_ignored",
        lambda k: k.clue("modes", "targets replaced") or k.never_reads("loss", "y"),
        "the training loss equals the eval loss with one target for all rows",
    ),
    Rule(
        "broadcast_loss",
        lambda k: k.clue("modes", "broadcast in training", "broadcast in evaluation"),
        "the loss does not depend on the order of the targets",
    ),
    Rule(
        "low_precision",
        lambda k: k.clue("modes", "rounded targets", "rounded inputs"),
        "the training loss equals the eval loss for {modes}",
    ),
    Rule(
        "statistics_in_low_precision",
        lambda k: k.clue("modes", "rounded statistics in evaluation"),
        "evaluation rounds the statistics to a less precise dtype",
    ),
    Rule(
        "statistics_over_the_wrong_axis",
        lambda k: k.clue("modes", "one moment for all channels"),
        "training normalises all channels by the same mean and variance",
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
        "repeating every row changes the result",
    ),
    Rule(
        "eval_of_stale_state",
        lambda k: k.clue("modes", "evaluation ignores the statistics here"),
        "in this case, changing the statistics does not change the eval loss",
    ),
    *(
        _nonfinite(*kind)
        for kind in (
            ("exponential", "exponential_overflows"),
            ("logarithm", "log_of_zero"),
            ("zero variance", "division_by_zero_variance"),
            ("negative variance", "variance_below_zero"),
            ("slope", "slope_is_infinite"),
            ("division", "division_by_zero"),
            ("domain", "outside_the_domain"),
            ("overflow", "number_overflows"),
        )
    ),
    Rule("division_by_zero_variance", lambda k: k.broke("eval_loss_is_finite")),
    Rule("variance_below_zero", lambda k: k.broke("a_constant_feature_gives_a_finite_step")),
    Rule(
        "losses_differ",
        lambda k: k.broke(MODES) and k.clue("modes", "another loss"),
        "both modes make the same predictions, but the eval loss is {modes_ratio} times the training loss",
    ),
    Rule(
        "loss_not_a_mean_over_rows",
        lambda k: (
            k.broke(ROWS) and k.clue("eval_rows", "sum over rows", "root of a mean over rows")
        ),
        "the eval loss is the {eval_rows}",
    ),
    Rule(
        "eval_in_train_mode",
        lambda k: k.broke(ROWS),
        "in evaluation, a row's prediction depends on the other rows",
    ),
    Rule(
        "eval_ignores_variables",
        lambda k: k.broke(MODES) and "unread" in k.clues,
        "in the trace, the eval loss does not depend on {unread}",
    ),
    Rule(
        "modes_differ",
        lambda k: k.broke(MODES),
        "at the batch's own moments the eval loss is {modes_ratio} times the training loss",
    ),
    Rule("variance_turns_negative", lambda k: k.broke("variance_is_never_negative")),
)


RULED = frozenset(rule.mistake for rule in RULES)
"""The mistakes that have a rule."""


def causes(findings: Findings) -> dict[str, Cause]:
    """Return a dict: violated law -> the mistake that explains it, by the first rules first."""
    left = list(findings.broken)
    found: dict[str, Cause] = {}
    for rule in RULES:
        explained = [law for law in left if rule.mistake in LAWS[law].mistakes]
        if explained and rule.applies(findings):
            left = [law for law in left if law not in explained]
            found |= dict.fromkeys(explained, Cause(rule.mistake, rule.describe(findings)))
    surest = next(iter(found.values()), None)
    # A remaining law is due to a mistake without a rule, or else follows from the first one found.
    unruled: dict[str, Cause] = {}
    for law in left:
        own = [name for name in LAWS[law].mistakes if name not in RULED]
        if surest is not None and not own:
            found[law] = surest
        else:
            unruled[law] = Cause((own or LAWS[law].mistakes)[0])
    return found | unruled


def findings_of(results: Sequence[Evidence], influence: Mapping[str, Any]) -> Findings:
    """Return what the evidence and a report's ``influence`` say about one step."""
    broken = [each for each in results if _unexplained(each)]
    clues: dict[str, Any] = {}
    for each in broken:
        clues = {**each.clues, **clues}
    names = tuple(each.law for each in broken if each.law in LAWS)
    return Findings(names, influence.get("matrix", {}), clues)


def diagnosed(results: Sequence[Evidence], influence: Mapping[str, Any]) -> list[Evidence]:
    """Return ``results`` with the likely cause added to each violation that has none.

    Args:
        results: the evidence for all laws.
        influence: which inputs may affect which outputs, as in ``Report.influence``.
    """
    found = causes(findings_of(results, influence))
    return [
        replace(each, cause=found.get(each.law)) if _unexplained(each) else each for each in results
    ]


def _unexplained(evidence: Evidence) -> bool:
    return evidence.status == "violated" and evidence.cause is None
