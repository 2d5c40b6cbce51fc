"""Laws of influence: what may and what must not reach what.

Where the step's jaxpr shows no path from an input to an output the law is proved for all
values. Where it shows one, or cannot be read, the law is judged by running: the residual
compares runs that differ in that input alone.
"""

from __future__ import annotations

from typing import Any

from bnverify.laws.law import law
from bnverify.laws.residuals import same, when, within_noise
from bnverify.lazy import jax, jnp
from bnverify.transition import Transition

FLAX_SOURCE = "Flax, linen/normalization.py: train mode normalises by the batch's own moments"


@law(
    "influence",
    needs=("step:other_statistics",),
    requires=("batch_stats",),
    forbids=(("params", "batch_stats"), ("opt_state", "batch_stats"), ("loss", "batch_stats")),
    mistakes=(
        "train_step_in_eval_mode",
        "statistics_fed_to_the_optimizer",
        "loss_reads_old_statistics",
    ),
    source=FLAX_SOURCE,
)
def training_is_free_of_old_statistics(t: Transition) -> Any:
    """Params, optimizer state and training loss after a step do not depend on old statistics."""
    other = t.reruns["other_statistics"]
    return same(
        (other.state.params, other.state.opt_state, other.info),
        (t.after.params, t.after.opt_state, t.info),
    )


@law(
    "influence",
    forbids=(("eval_batch_stats", "x"), ("eval_batch_stats", "y"), ("eval_batch_stats", "params")),
    needs=("after_eval",),
    requires=("batch_stats", "after_eval"),
    mistakes=("eval_in_train_mode",),
    source=FLAX_SOURCE,
)
def eval_statistics_are_the_ones_passed_in(t: Transition) -> Any:
    """Evaluation hands back the statistics it was given, whatever the batch."""
    return same(t.facts["after_eval"].batch_stats, t.after.batch_stats)


def _seen(differs: Any) -> Any:
    return jnp.where(differs, 0.0, jnp.inf)


def _several_rows(t: Transition) -> Any:
    return jnp.asarray(t.case.x.shape[0] > 1)


def _differs(a: Any, b: Any) -> Any:
    """Return whether two trees differ anywhere; NaN is what NaN is."""
    leaves = zip(jax.tree_util.tree_leaves(a), jax.tree_util.tree_leaves(b), strict=True)
    return jnp.any(jnp.stack([~jnp.array_equal(x, y, equal_nan=True) for x, y in leaves]))


@law(
    "influence",
    kind="witness",
    needs=("step:other_targets",),
    demands=(("params", "y"),),
    mistakes=("update_dropped", "targets_ignored"),
    source="a training step learns from its targets",
)
def targets_reach_the_params(t: Transition) -> Any:
    """Other targets give other params, in some case at least."""
    return _seen(_differs(t.reruns["other_targets"].state.params, t.after.params))


@law(
    "influence",
    kind="witness",
    needs=("noise", "step:reversed_targets"),
    requires=("loss",),
    demands=(("loss", "y"),),
    mistakes=("broadcast_loss", "targets_ignored"),
    source="NumPy, broadcasting rules: (N, 1) and (N,) make (N, N)",
)
def targets_belong_to_their_rows(t: Transition) -> Any:
    """Targets given to other rows give another training loss, in some case at least.

    Predictions (N, 1) less targets (N,) broadcast to every pair, which does not see whose target
    a target is. What differs by rounding only does not differ.
    """
    other, loss, noise = t.reruns["reversed_targets"].info.loss, t.info.loss, t.noise.info.loss
    other_rows = jnp.any(t.case.x[1:] != t.case.x[:1])
    other_targets = jnp.any(t.case.y != t.case.y[::-1])
    return when(other_rows & other_targets, _seen(within_noise(other, loss, noise) > 1))


@law(
    "influence",
    kind="witness",
    needs=("step:other_inputs",),
    demands=(("params", "x"),),
    mistakes=("inputs_ignored", "update_dropped"),
    source="a training step learns from its batch",
)
def inputs_reach_the_params(t: Transition) -> Any:
    """Other inputs give other params, in some case of two rows and more at least.

    One row is its own mean: normalised it is 0, whatever it was. A step that moves nothing breaks
    a law of its own.
    """
    moved = _differs(t.after.params, t.before.params)
    other = t.reruns["other_inputs"].state.params
    return when(_several_rows(t) & moved, _seen(_differs(other, t.after.params)))


@law(
    "influence",
    kind="witness",
    needs=("step:other_inputs",),
    requires=("batch_stats",),
    demands=(("batch_stats", "x"),),
    mistakes=("inputs_ignored", "new_statistics_dropped", "train_step_in_eval_mode"),
    source=FLAX_SOURCE,
)
def inputs_reach_the_statistics(t: Transition) -> Any:
    """Other inputs give other running statistics, in some case at least."""
    return _seen(_differs(t.reruns["other_inputs"].state.batch_stats, t.after.batch_stats))


@law(
    "influence",
    kind="witness",
    needs=("step:other_statistics",),
    requires=("batch_stats", "momentum"),
    demands=(("batch_stats", "batch_stats"),),
    mistakes=("statistics_reinitialised",),
    source="Ioffe & Szegedy 2015, https://arxiv.org/abs/1502.03167, section 3.1",
)
def old_statistics_reach_the_new(t: Transition) -> Any:
    """Other running statistics before the step give other ones after it, in some case at least.

    A momentum of 0 forgets them by design.
    """
    other = t.reruns["other_statistics"].state.batch_stats
    remembers = any(declared > 0 for declared in t.facts["momenta"])
    return when(jnp.asarray(remembers), _seen(_differs(other, t.after.batch_stats)))


@law(
    "influence",
    kind="witness",
    needs=("step:other_params", "step:other_inputs"),
    requires=("loss",),
    demands=(("loss", "params"), ("loss", "x")),
    mistakes=("inputs_ignored", "gradient_of_another_loss"),
    source="a training loss judges what the model makes of its inputs",
)
def loss_reads_params_and_inputs(t: Transition) -> Any:
    """Other params and other inputs give other training losses, in some case at least.

    One row may be normalised to 0, whatever it was.
    """
    others = (t.reruns["other_params"].info.loss, t.reruns["other_inputs"].info.loss)
    seen = [_differs(other, t.info.loss) for other in others]
    return when(_several_rows(t), _seen(seen[0] & seen[1]))


@law(
    "influence",
    kind="witness",
    needs=("eval:other_inputs",),
    demands=(("eval_loss", "x"),),
    mistakes=("inputs_ignored",),
    source="an eval loss judges what the model makes of its inputs",
)
def inputs_reach_the_evaluation(t: Transition) -> Any:
    """Other inputs give another eval loss, in some case at least.

    Of the params nothing is asked: what is evaluated may be an average of them.
    """
    return _seen(_differs(t.evals["other_inputs"], t.eval_loss))


@law(
    "influence",
    kind="witness",
    needs=("eval:other_targets",),
    demands=(("eval_loss", "y"),),
    mistakes=("targets_ignored",),
    source="an eval loss compares with targets",
)
def targets_reach_the_evaluation(t: Transition) -> Any:
    """Other targets give another eval loss, in some case at least."""
    return _seen(_differs(t.evals["other_targets"], t.eval_loss))


@law(
    "influence",
    kind="witness",
    needs=("step:zero_lr",),
    requires=("lr",),
    mistakes=("update_dropped", "learning_rate_ignored"),
    source="a training step moves its params",
)
def step_moves_the_params(t: Transition) -> Any:
    """The step changes the params, in some case at least."""
    return _seen(_differs(t.after.params, t.before.params))


@law(
    "influence",
    kind="witness",
    requires=("batch_stats",),
    mistakes=("new_statistics_dropped", "train_step_in_eval_mode"),
    source=FLAX_SOURCE,
)
def step_moves_the_statistics(t: Transition) -> Any:
    """The step changes the running statistics, in some case at least."""
    return _seen(_differs(t.after.batch_stats, t.before.batch_stats))
