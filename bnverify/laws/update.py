"""Laws of the update: params change by the optimizer's update for the gradient of the loss."""

from __future__ import annotations

from typing import Any

import numpy as np

from bnverify.laws.arithmetic import (
    UNDERFLOW,
    alike,
    all_finite,
    frozen,
    max_over,
    never,
    per_case,
    residual,
    same,
    smallest,
    sum_over,
    trees,
    unit,
    when,
    wide,
    widest,
    within_noise,
    worst_of,
    xp,
)
from bnverify.laws.law import law
from bnverify.lazy import jax
from bnverify.model import Transition, Tree
from bnverify.pytree import is_floating, path_name
from bnverify.reruns import SHAKEN

OPTAX = "Optax, apply_updates: https://optax.readthedocs.io/en/latest/api/apply_updates.html"


@law(
    "update",
    observes=("expected_update", "gradient_noise"),
    capabilities=("optimizer", "grads"),
    mistakes=(
        "update_dropped",
        "wrong_sign",
        "update_applied_twice",
        "old_optimizer_state_kept",
        "update_scaled",
        "decay_of_norm_parameters",
        "wrong_gradient",
        "decay_outside_the_learning_rate",
        "decay_grows_params",
        "optimizer_reinitialised",
        "learning_rate_ignored",
        "params_of_another_state",
        "hidden_state",
        "low_precision",
        "learning_rate_applied_twice",
        "optimizer_bypassed",
    ),
    source=OPTAX,
)
def params_follow_the_optimizer(t: Transition) -> Any:
    """The new params are optax.apply_updates(params, updates), with updates from tx.update.

    The expected update is computed from the same gradient in a separately compiled program, whose
    few operations may round differently: 16 u (|old| + |new|). Where the terms of an update cancel,
    their rounding dominates, so the tolerance also includes how far the new params move when the
    gradient, or the optimizer's state, is perturbed by 16 u.

    A compiler may compute the gradient g twice, once to return it and once for the update; the two
    results differ by the rounding noise n. If n < |g| / 64, the tolerance also includes
    2 (64 n / |g|) times the change of the params when g changes by |g| / 64; otherwise the element
    is not compared.
    """

    def leaf(old: Any, new: Any, expected: Any, far: Any, share: Any, *moved: Any) -> Any:
        scale = xp.abs(wide(old)) + xp.abs(wide(expected))
        # The inputs were perturbed by 8 u.
        cancelled = 2 * sum(xp.abs(wide(value) - wide(expected)) for value in moved)
        twice = xp.where(share <= 1, 2 * xp.abs(wide(far) - wide(expected)) * share, np.inf)
        allowed = 16 * unit(new) * scale + cancelled + twice + smallest(new)
        return residual(new, expected, allowed)

    expected = t.facts["expected_update"].params
    far = t.facts.get("shaken_update", t.facts["expected_update"]).params
    moved = [update.params for update in t.facts["nudged_updates"]]
    structure = jax.tree_util.tree_structure(t.before.params)
    shares = jax.tree_util.tree_unflatten(structure, _shares(t))
    return trees(leaf, t.before.params, t.after.params, expected, far, shares, *moved)


def _shares(t: Transition) -> list[Any]:
    """Return the noise of each leaf of the gradient in units of |g| / 64; 0 if it is unknown."""
    grads = jax.tree_util.tree_leaves(t.info.grads)
    noise = t.facts.get("gradient_noise")
    if noise is None:
        return [np.zeros(grad.shape) for grad in grads]
    return [
        xp.where(known <= smallest(grad), 0.0, known / (SHAKEN * xp.abs(wide(grad))))
        for grad, known in zip(grads, jax.tree_util.tree_leaves(noise), strict=True)
    ]


def _shares_of_state(t: Transition) -> Tree:
    """Return a tree like the optimizer's state: for each leaf, the share of the gradient it is made of.

    For a leaf that belongs to a param it is the param's share, otherwise the largest of all.
    """
    leaves = jax.tree_util.tree_flatten_with_path(t.info.grads)[0]
    shares = dict(zip((path_name(path) for path, _ in leaves), _shares(t), strict=True))
    most = xp.zeros(1)
    for share in shares.values():
        most = xp.maximum(most, max_over(share, initial=0.0))
    most = xp.minimum(most, 2.0**64)  # finite, so that times 0 it is 0

    def leaf(path: Any, value: Any) -> Any:
        name = path_name(path)
        fitting = [
            own
            for own, share in shares.items()
            if f"/{name}".endswith(f"/{own}") and share.shape[1:] == value.shape[1:]
        ]
        if fitting:
            return shares[max(fitting, key=len)]
        return xp.broadcast_to(per_case(most, value), value.shape)

    return jax.tree_util.tree_map_with_path(leaf, t.before.opt_state)


@law(
    "update",
    observes=("expected_update", "gradient_noise"),
    capabilities=("optimizer", "grads", "opt_state"),
    mistakes=(
        "old_optimizer_state_kept",
        "optimizer_reinitialised",
        "wrong_gradient",
        "update_dropped",
        "update_applied_twice",
        "low_precision",
        "update_scaled",
        "parameters_change_dtype",
    ),
    source=OPTAX,
)
def optimizer_state_follows_the_optimizer(t: Transition) -> Any:
    """The new optimizer state is the one that tx.update returns.

    The tolerance is 16 u max(|old|, |new|), with the maximum over the whole leaf, because the terms
    of a decayed sum may cancel. The noise n of a gradient g that is computed twice is allowed for
    as for the params, at any size: it changes a second moment by n (2 |g| + n), that is by
    64 n / |g| (1 + n / |g|) times the change for |g| / 64, and a first moment by less.
    """

    def leaf(old: Any, new: Any, expected: Any, far: Any, share: Any) -> Any:
        if not is_floating(new):
            return same(new, expected)
        scale = xp.maximum(widest(old), widest(expected))
        twice = 2 * xp.abs(wide(far) - wide(expected)) * share * (1 + SHAKEN * share)
        twice = xp.where(xp.isnan(twice), np.inf, twice)  # from 0 times infinity
        allowed = 16 * unit(new) * per_case(scale, new) + twice + smallest(new)
        return residual(new, expected, allowed)

    expected = t.facts["expected_update"].opt_state
    far = t.facts.get("shaken_update", t.facts["expected_update"]).opt_state
    return trees(leaf, t.before.opt_state, t.after.opt_state, expected, far, _shares_of_state(t))


@law(
    "update",
    observes=("step:zero_lr",),
    capabilities=("lr",),
    mistakes=(
        "learning_rate_ignored",
        "decay_outside_the_learning_rate",
        "decay_grows_params",
        "params_of_another_state",
        "low_precision",
        "wrong_sign",
        "parameters_change_dtype",
    ),
    source="the step's definition: params + lr * direction",
)
def zero_learning_rate_moves_nothing(t: Transition) -> Any:
    """With lr = 0, params stay bit-identical (subnormals may flush to 0)."""
    # 0 * inf is NaN in a correct step, too.
    usable = all_finite((t.before, t.reruns["zero_lr"].info, t.info))
    moved = trees(
        lambda new, old: residual(new, old, smallest(old)),
        t.reruns["zero_lr"].state.params,
        t.before.params,
    )
    return when(usable, moved)


@law(
    "update",
    capabilities=("look", "frozen_params"),
    mistakes=("frozen_params_move",),
    source="Optax, multi_transform: https://optax.readthedocs.io/en/latest/api/combining_optimizers.html",
)
def frozen_params_stay(t: Transition) -> Any:
    """Frozen params stay bit-identical: neither their gradient nor weight decay changes them."""
    return frozen(t, t.facts["look"].frozen_params)


@law(
    "update",
    kind="structure",
    observes=("look",),
    capabilities=("look", "scaled"),
    mistakes=("frozen_gradients_scale_others",),
    source="Optax, clip_by_global_norm: the norm is taken over all gradients passed to it",
)
def frozen_gradients_scale_nothing(t: Transition) -> list[str]:
    """The gradient of a frozen param does not affect the update of any other param."""
    return [
        f"the gradient of {path}, which is frozen, affects the update of {other}, as it does when "
        "clip_by_global_norm includes frozen params"
        for path, other in t.facts["look"].scaled
        if other
    ]


@law(
    "update",
    kind="structure",
    observes=("look",),
    capabilities=("look", "lookaheads"),
    mistakes=("gradient_at_the_slow_params",),
    source="Zhang et al. 2019, Lookahead optimizer, https://arxiv.org/abs/1907.08610, algorithm 1",
)
def lookahead_takes_the_gradient_at_the_fast_params(t: Transition) -> list[str]:
    """With optax.lookahead, the loss that is differentiated depends on the fast params."""
    return [
        f"the gradient depends on {each.path}/slow but not on {each.path}/fast, which it updates"
        for each in t.facts["look"].lookaheads
        if not each.at_fast
    ]


@law(
    "update",
    kind="structure",
    observes=("look",),
    capabilities=("look", "schedules"),
    mistakes=("schedule_counts_batches",),
    source="https://github.com/AI-Hypercomputer/maxtext/pull/3452",
)
def schedule_counts_updates(t: Transition) -> list[str]:
    """With gradient accumulation, the learning-rate schedule counts updates, not batches.

    ``optax.MultiSteps(tx, k)`` calls ``tx`` once every k batches, so a schedule as long as the number
    of batches only gets 1/k of the way.
    """
    return [
        f"the schedule ends after {each.batches} updates, the number of batches ({each.told}), but "
        "with gradient accumulation there are fewer updates than batches, so it never gets there"
        for each in t.facts["look"].schedules
        if each.ends
    ]


@law(
    "update",
    kind="structure",
    observes=("look",),
    capabilities=("look", "rates"),
    mistakes=("rate_loses_digits",),
    source="https://github.com/google-deepmind/optax/issues/1414",
)
def learning_rate_keeps_its_digits(t: Transition) -> list[str]:
    """Hyperparameters of float32 params have float32 precision, whatever dtype other params have.

    The check reads the hyperparameters that ``optax.inject_hyperparams`` keeps in the optimizer's state,
    and the path of the learning rate to the update of each float32 param.
    """
    return [
        f"{each.path} is kept in 16 bits, but there are params in float32"
        if each.path.startswith("opt_state/")
        else f"the learning rate is rounded to 16 bits on its way to the float32 param {each.path}"
        for each in t.facts["look"].rates
        if each.narrow
    ]


@law(
    "update",
    kind="structure",
    observes=("look",),
    capabilities=("look", "papers"),
    mistakes=("optimizer_departs_from_its_paper",),
    source="the papers named in bnverify/optimizers.py",
)
def optimizer_follows_its_paper(t: Transition) -> list[str]:
    """An Optax optimizer makes the updates that the formula of its paper gives.

    Eight updates for gradients of very different sizes are compared in float64: those of the traced
    optimizer, without rounding, and those of the formula. The tolerance is how far the formula's updates
    move if each number computed from hyperparameters, such as 1 - b2, is rounded once to float32.
    """
    return [
        f"{each.optimizer} does not follow its paper ({each.source}): {each.differs}"
        for each in t.facts["look"].papers
        if each.differs
    ]


@law(
    "update",
    observes=("expected_update",),
    capabilities=("optimizer", "grads", "plain_sgd"),
    mistakes=(
        "wrong_sign",
        "update_dropped",
        "update_applied_twice",
        "learning_rate_ignored",
        "update_scaled",
        "wrong_gradient",
        "decay_of_norm_parameters",
        "decay_outside_the_learning_rate",
        "decay_grows_params",
        "params_of_another_state",
        "hidden_state",
        "learning_rate_applied_twice",
    ),
    source="Robbins & Monro 1951; optax.sgd",
)
def sgd_moves_params_by_minus_lr_times_gradient(t: Transition) -> Any:
    """Under plain SGD the new params are old - lr * gradient, within two roundings.

    The product and the sum round once each, and the rounding of the product carries over into the
    sum: 2 u (|lr g| + |new|).
    """

    def leaf(old: Any, new: Any, grad: Any) -> Any:
        change = per_case(wide(t.case.lr), grad) * wide(grad)
        expected = wide(old) - change
        scale = xp.abs(change) + xp.abs(expected)
        return residual(new, expected, 2 * unit(new) * scale + smallest(new))

    return trees(leaf, t.before.params, t.after.params, t.info.grads)


@law(
    "update",
    observes=("noise",),
    capabilities=("grads", "oracle"),
    mistakes=("wrong_gradient", "broadcast_loss", "train_step_in_eval_mode"),
    source="bnverify/oracle.py, derived by hand",
)
def gradients_equal_the_hand_derivation(t: Transition) -> Any:
    """Every gradient equals the hand-derived one, within the step's rounding noise."""
    return within_noise(t.info.grads, t.facts["oracle"].grads, t.noise.info.grads)


@law(
    "update",
    observes=("noise",),
    capabilities=("loss", "oracle"),
    mistakes=("broadcast_loss", "train_step_in_eval_mode", "loss_not_reduced"),
    source="bnverify/oracle.py, derived by hand",
)
def training_loss_equals_the_hand_derivation(t: Transition) -> Any:
    """The training loss equals the hand-derived one, within the step's rounding noise."""
    return within_noise(t.info.loss, t.facts["oracle"].loss, t.noise.info.loss)


@law(
    "update",
    observes=("noise", "directional_derivative"),
    capabilities=("grads", "loss"),
    mistakes=(
        "wrong_gradient",
        "wrong_sign",
        "gradient_of_another_loss",
        "ema_applied_twice",
        "gradient_of_all_variables",
        "modes_differ",
    ),
    source="central difference of the step's own loss in float64",
)
def gradients_are_gradients_of_the_loss(t: Transition) -> Any:
    """The gradient equals the slope of the reported loss along a random direction of params.

    The tolerance is the truncation and float64 error of the central differences, plus the rounding
    noise of every gradient.
    """
    slope, allowed, usable = t.facts["directional_derivative"]
    compared = t.info.grads, t.facts["direction"], t.noise.info.grads
    rows = alike(*compared)
    if rows is None:
        return never(*compared)  # grads is not a tree like params
    along: Any = 0.0
    noise: Any = UNDERFLOW * smallest(t.info.loss)
    for grad, direction, error in rows:
        along = along + sum_over(wide(grad) * wide(direction))
        noise = noise + sum_over(wide(error) * xp.abs(wide(direction)))
    known = usable & (allowed <= 0.1 * xp.abs(slope))  # a less certain slope says nothing
    off = residual(wide(along), slope, allowed + noise, quantity="gradient along a direction")
    return when(known, off)


@law(
    "update",
    observes=("noise",),
    capabilities=("grads", "biases_before_norm"),
    mistakes=(
        "train_step_in_eval_mode",
        "wrong_gradient",
        "loss_reads_old_statistics",
        "statistics_trained_as_params",
        "modes_differ",
        "statistics_over_the_wrong_axis",
        "statistics_overflow",
    ),
    source="Ioffe & Szegedy 2015, section 3.2: the bias is subsumed",
)
def bias_before_norm_has_no_gradient(t: Transition) -> Any:
    """A bias added right before a normalisation has a gradient of 0, within rounding noise.

    A case is skipped if any gradient is not finite in exact arithmetic.
    """
    parts = []
    grads, _ = jax.tree_util.tree_flatten_with_path(t.info.grads)
    noises = jax.tree_util.tree_leaves(t.noise.info.grads)
    for (path, grad), noise in zip(grads, noises, strict=True):
        if path_name(path) in t.facts["biases_before_norm"]:
            parts.append(residual(grad, 0.0, 2 * wide(noise) + smallest(grad)))
    return when(all_finite(t.exact.info.grads), worst_of(parts))
