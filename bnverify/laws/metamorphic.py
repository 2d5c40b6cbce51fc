"""Metamorphic laws: changes of the input, or of how the step is run, that must not matter."""

from __future__ import annotations

from typing import Any

from bnverify.laws.arithmetic import (
    UNDERFLOW,
    all_over,
    never,
    per_case,
    residual,
    same,
    smallest,
    trees,
    when,
    wide,
    within_noise,
    worst_of,
    xp,
)
from bnverify.laws.law import law
from bnverify.lazy import jax
from bnverify.model import Outcome, State, StepInfo, Transition
from bnverify.reruns import LONG_SEED, shift

PURE = "JAX, pure functions: https://docs.jax.dev/en/latest/notebooks/Common_Gotchas_in_JAX.html"


def _agrees(t: Transition, other: Outcome) -> Any:
    """Return the residual of another float32 run of the same step against the observed one."""

    def compared(outcome: Outcome) -> Any:
        # optimizer_state_follows_the_optimizer covers opt_state.
        parts = outcome.state.batch_stats, outcome.state.params, outcome.info
        return parts if other.eval_loss is None else (*parts, outcome.eval_loss)

    seen = Outcome(t.after, t.info, t.eval_loss)
    return within_noise(compared(other), compared(seen), compared(t.noise))


@law(
    "metamorphic",
    observes=("noise", "step:reversed_rows", "eval:reversed_rows"),
    mistakes=(
        "rows_treated_unequally",
        "statistics_of_part_of_the_batch",
        "inputs_ignored",
        "loss_not_reduced",
        "targets_misaligned",
        "wrong_gradient",
        "modes_differ",
    ),
    source="every reduction over the batch is symmetric",
)
def row_order_changes_nothing(t: Transition) -> Any:
    """Reversing the rows changes the results of the step and the eval loss only by rounding."""
    other = t.reruns["reversed_rows"]._replace(eval_loss=t.evals["reversed_rows"])
    return _agrees(t, other)


@law(
    "metamorphic",
    observes=("noise", "step:doubled_batch"),
    mistakes=(
        "sum_instead_of_mean",
        "sample_variance",
        "rows_treated_unequally",
        "statistics_of_part_of_the_batch",
        "hidden_state",
        "wrong_gradient",
        "inputs_ignored",
        "statistics_overflow",
        "variances_averaged",
    ),
    source="a mean loss and a biased variance do not change when the batch is repeated",
)
def doubling_the_batch_changes_nothing(t: Transition) -> Any:
    """Repeating every row gives the same loss, gradients, params and statistics, within rounding.

    In the second run every sum has twice as many terms. The rounding of a sum of n terms grows at
    most in proportion to n (``bnverify.jaxpr.arithmetic.rounding_ulps``), so that run errs by at most twice
    the noise of the first: 1.5 times the noise for each on average. A single row is skipped, because
    a sum of one term does not round.
    """
    noise = jax.tree_util.tree_map(lambda n: 1.5 * wide(n), t.noise)
    several = t.case.shape[0] > 1
    return when(several, _agrees(t._replace(noise=noise), t.reruns["doubled_batch"]))


@law(
    "metamorphic",
    observes=("undrawn",),
    capabilities=("look", "draws"),
    mistakes=(
        "sum_instead_of_mean",
        "sample_variance",
        "rows_treated_unequally",
        "statistics_of_part_of_the_batch",
        "variances_averaged",
    ),
    source="a mean loss and a biased variance do not change when the batch is repeated",
)
def doubling_changes_nothing_if_draws_are_equal(t: Transition) -> Any:
    """If all random numbers are equal, repeating every row changes the step's results only by rounding.

    Both steps are evaluated from their traces in float64, with 0 for every random bit, so all rows
    get the same dropout mask. The tolerance is that of ``doubling_the_batch_changes_nothing``, which
    applies to steps that draw no random numbers.
    """
    seen = t.facts["undrawn"]
    if seen is None:
        return worst_of([])

    def compared(state: State, info: StepInfo) -> Any:
        return state.batch_stats, state.params, info

    def leaf(doubled: Any, once: Any, noise: Any, observed: Any) -> Any:
        allowed = 3 * wide(noise) + UNDERFLOW * smallest(observed)
        return residual(doubled, once, allowed, of=observed)

    outcomes = seen.doubled, seen.step, seen.noise, (t.after, t.info)
    return trees(leaf, *(compared(*outcome[:2]) for outcome in outcomes))


@law(
    "metamorphic",
    observes=("noise", "step:shifted_bias", "layer_inputs"),
    capabilities=("biases_before_norm", "loss", "layer_inputs"),
    mistakes=(
        "train_step_in_eval_mode",
        "loss_reads_old_statistics",
        "statistics_trained_as_params",
        "modes_differ",
        "statistics_over_the_wrong_axis",
        "rows_treated_unequally",
    ),
    source="Ioffe & Szegedy 2015, section 3.2: BN(Wu + b) = BN(Wu)",
)
def shift_before_norm_changes_no_loss(t: Transition) -> Any:
    """Adding a constant before a normalisation does not change the training loss, within rounding.

    The variance E[h^2] - E[h]^2 errs in units of E[h^2]. A shift of at most sqrt(E[h^2]) makes that
    at most four times as large, and so the noise; cases with a larger shift are skipped.
    """
    squared_shift = wide(shift(t.case)) ** 2
    small: Any = bool(t.facts["layer_inputs"])
    for given in t.facts["layer_inputs"].values():
        square = xp.mean(wide(given.value) ** 2, axis=1)
        small = small & all_over(per_case(squared_shift, square) <= square)
    value = within_noise(t.reruns["shifted_bias"].info.loss, t.info.loss, 4 * t.noise.info.loss)
    return when(small, value)


@law("metamorphic", observes=("again",), mistakes=("hidden_state",), source=PURE)
def same_input_repeats_to_the_bit(t: Transition) -> Any:
    """The same seed and batch give bit-identical state, loss and gradients."""
    again = t.facts["again"]
    return same((again.before, again.state, again.info), (t.before, t.after, t.info))


@law(
    "metamorphic",
    kind="structure",
    observes=("retraced",),
    mistakes=("drawn_outside_jax", "hidden_state"),
    source=PURE,
)
def a_fresh_trace_gives_the_same(t: Transition) -> list[str]:
    """A second trace, as in another process, gives an init and a step with the same results.

    Whatever Python or NumPy draws, counts or reads from a clock during tracing becomes a constant of
    that trace. Both traces are evaluated in float64 on one batch.
    """
    found: list[str] = t.facts["retraced"]
    return found


@law("metamorphic", observes=("eager",), mistakes=("inputs_overwritten",), source=PURE)
def step_leaves_its_inputs_alone(t: Transition) -> Any:
    """The step does not modify or delete the state and batch that it is given.

    Checked without jit, where the step gets the caller's own arrays instead of tracers.
    """
    return same(t.facts["eager"].inputs_after, t.facts["eager"].inputs_before)


@law("metamorphic", observes=("noise", "eager"), mistakes=("hidden_state",), source=PURE)
def jit_equals_eager(t: Transition) -> Any:
    """With and without jax.jit, the step gives the same results within rounding."""
    return _agrees(t, t.facts["eager"])


@law(
    "metamorphic",
    observes=("noise", "stacked"),
    mistakes=("hidden_state",),
    source=PURE,
)
def vmap_equals_loop(t: Transition) -> Any:
    """Under jax.vmap over cases, the step gives the same results as single calls, within rounding."""
    return _agrees(t, t.facts["stacked"])


@law(
    "metamorphic",
    observes=("solution",),
    capabilities=("solution",),
    mistakes=("seed_not_truncated",),
    source="bnverify.reference.train_step: seed is a float, truncated to an integer",
)
def float_seeds_act_as_their_integer_part(t: Transition) -> Any:
    """A float seed gives results bit-identical to those of its integer part."""
    seen = t.facts["solution"]
    return when(abs(t.case.seed) < LONG_SEED, same(seen.fractional, seen.whole))


@law(
    "metamorphic",
    observes=("noise", "solution"),
    capabilities=("solution",),
    mistakes=("eval_of_stale_state", "eval_in_train_mode", "seed_not_truncated"),
    source="bnverify.reference.train_step",
)
def solution_is_init_step_evaluate(t: Transition) -> Any:
    """The one-call function returns the eval loss after init and one step, with shape (1,)."""
    whole = t.facts["solution"].whole
    if whole.shape[1:] != (1,):
        return never(whole, t.eval_loss)
    allowed = 2 * wide(t.noise.eval_loss)
    return when(t.case.warmup == 0, residual(wide(whole), t.eval_loss, allowed))
