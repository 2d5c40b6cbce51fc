"""Laws of evaluation: running statistics in, one number out, nothing written."""

from __future__ import annotations

from typing import Any

from bnverify.laws.law import UNTRIGGERED, law
from bnverify.laws.residuals import (
    residual,
    same,
    smallest,
    when,
    wide,
    within_noise,
    worst_of,
)
from bnverify.lazy import jnp
from bnverify.reruns import NUDGES
from bnverify.transition import Transition

FLAX_GUIDE = (
    "Flax, Applying batch normalization: "
    "https://flax.readthedocs.io/en/latest/guides/training_techniques/batch_norm.html"
)

NUDGED = tuple(f"nudged_statistics_{pattern}" for pattern in range(NUDGES))


@law(
    "evaluation",
    needs=("noise",),
    mistakes=("division_by_zero_variance", "statistics_overflow"),
    source="the seed's Problem; limits: bnverify.case.Domain",
)
def eval_loss_is_finite(t: Transition) -> Any:
    """After one step from the initial state the eval loss is finite.

    A step in float64 tells an overflow that the numbers ask for (lr = 1 where rounding has
    cancelled the batch variance) from a division by nothing: where the exact loss is a number
    beyond the range of its dtype, or rounding leaves no digit of it, nothing is claimed.
    """
    exact, largest = wide(t.exact.eval_loss), float(jnp.finfo(t.eval_loss.dtype).max)
    claimed = ~jnp.isfinite(exact) | (jnp.abs(exact) + t.noise.eval_loss <= largest)
    finite = jnp.all(jnp.isfinite(t.eval_loss) | ~claimed)
    return when((t.case.warmup == 0) & jnp.any(claimed), jnp.where(finite, 0.0, jnp.inf))


@law(
    "evaluation",
    needs=("after_eval",),
    requires=("after_eval",),
    mistakes=("eval_in_train_mode",),
    source=FLAX_GUIDE,
)
def eval_writes_nothing(t: Transition) -> Any:
    """Evaluation leaves params, statistics and optimizer state as they are, to the bit."""
    return same(t.facts["after_eval"], t.after)


@law(
    "evaluation",
    kind="witness",
    needs=("eval:other_statistics",),
    requires=("batch_stats",),
    demands=(("eval_loss", "batch_stats"),),
    mistakes=("eval_in_train_mode", "eval_of_stale_state"),
    source=FLAX_GUIDE,
)
def eval_uses_the_running_statistics(t: Transition) -> Any:
    """Changing the running statistics changes the eval loss, in some case at least."""
    changed = jnp.any(t.evals["other_statistics"] != t.eval_loss)
    return when(jnp.all(jnp.isfinite(t.eval_loss)), jnp.where(changed, 0.0, jnp.inf))


@law(
    "evaluation",
    needs=("noise", "eval:rows"),
    requires=("row_losses",),
    mistakes=("eval_in_train_mode", "broadcast_loss"),
    source=FLAX_GUIDE,
)
def eval_rows_are_independent(t: Transition) -> Any:
    """A row's prediction does not depend on its batch: the eval loss is the mean over rows.

    Each row's loss carries the rounding of one evaluation; the mean of N of them, taken in
    float64, no more than the whole batch's noise in units of the mean: both sides err by it.
    """
    if "rows" not in t.evals:
        return jnp.asarray(UNTRIGGERED)  # a batch of more rows than are evaluated one by one
    rows = wide(t.evals["rows"])
    n = rows.shape[0]
    noise = t.noise.eval_loss + 4 * n**0.5 * 2.0**-24 * jnp.mean(rows)
    return residual(t.eval_loss, jnp.mean(rows, axis=0), 2 * noise + smallest(t.eval_loss))


@law(
    "evaluation",
    needs=("noise", "eval:own_statistics", *(f"eval:{name}" for name in NUDGED)),
    requires=("batch_stats", "loss", "eval_is_training_loss"),
    mistakes=("eval_in_train_mode", "statistics_from_another_batch", "sample_variance"),
    source="Ioffe & Szegedy 2015, algorithms 1 and 2",
)
def eval_at_the_batchs_own_moments_is_the_training_loss(t: Transition) -> Any:
    """Where the statistics are the batch's own moments, eval and training loss are equal.

    The moments are read from outside and rounded, by 2 u and less. What that does to the loss is
    measured: the same evaluation from moments moved by 8 u, up and down, in three patterns, since
    in one of them the effects on several features may cancel. Sixteen times the largest effect and
    the step's own noise are allowed.
    """
    own = t.evals["own_statistics"][0]
    moved = [jnp.abs(wide(own) - wide(t.evals[name][0])) for name in NUDGED]
    noise = t.noise.info.loss + 8 * worst_of(moved)
    return within_noise(own, t.info.loss, noise)


@law(
    "evaluation",
    needs=("noise",),
    requires=("oracle",),
    mistakes=(
        "eval_in_train_mode",
        "eval_of_stale_state",
        "broadcast_loss",
        "sample_variance",
    ),
    source="bnverify/oracle.py, derived by hand",
)
def eval_loss_equals_the_hand_derivation(t: Transition) -> Any:
    """The eval loss equals the one derived by hand, within the step's own rounding noise."""
    return within_noise(t.eval_loss, t.facts["oracle"].eval_loss, t.noise.eval_loss)


@law(
    "evaluation",
    needs=("again",),
    mistakes=("hidden_state",),
    source="JAX, pure functions: https://docs.jax.dev/en/latest/notebooks/Common_Gotchas_in_JAX.html",
)
def eval_repeats_to_the_bit(t: Transition) -> Any:
    """Evaluating twice gives the same bits."""
    return same(t.facts["again"].eval_loss, t.eval_loss)
