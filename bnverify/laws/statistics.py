"""Laws of the running statistics: an exponential moving average (EMA) of the batch's moments.

The model is a black box: its momentum is measured from outside, see ``momentum`` in
``bnverify/laws/arithmetic.py``.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from bnverify.laws.arithmetic import (
    all_finite,
    all_over,
    any_over,
    apart_by,
    floats,
    folded,
    frozen,
    holds_if,
    max_over,
    measurable,
    min_over,
    moments,
    momentum,
    residual,
    same,
    smallest,
    trees,
    unit,
    when,
    wide,
    worst_of,
    xp,
)
from bnverify.laws.law import law
from bnverify.lazy import jax, jnp
from bnverify.model import Transition, Tree
from bnverify.pytree import is_floating, path_name
from bnverify.reruns import AVERAGE, FAR, other_statistic, own_weight
from bnverify.statistic_names import moments_among

IOFFE = "Ioffe & Szegedy 2015, https://arxiv.org/abs/1502.03167"
FLAX_SOURCE = "Flax, linen/normalization.py, BatchNorm"


def _by_layer(batch_stats: Tree) -> dict[str, dict[str, Any]]:
    """Return a dict: path of a layer -> "mean" or "var" -> the leaf; other statistics are left out."""
    layers: dict[str, dict[str, Any]] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(batch_stats)[0]:
        layer, _, name = path_name(path).rpartition("/")
        layers.setdefault(layer, {})[name] = leaf
    return {layer: moments_among(leaves) for layer, leaves in layers.items()}


def _shaped(value: Any, leaf: Any) -> Any:
    """Return a moment of each feature, (K, *features), in the shape of the leaf that records it."""
    return value.reshape(value.shape[:1] + leaf.shape[1:])


def _measured(t: Transition) -> list[tuple[Any, Any]]:
    """Return (measured momentum, new(0)), both elementwise, of each floating-point statistic."""
    zeros = floats(t.reruns["zero_statistics"].state.batch_stats)
    highs = floats(t.reruns["huge_statistics"].state.batch_stats)
    return [(momentum(zero, high), zero) for zero, high in zip(zeros, highs, strict=True)]


@law(
    "statistics",
    observes=(*AVERAGE, "step:other_statistics"),
    capabilities=("batch_stats",),
    mistakes=(
        "statistics_reinitialised",
        "new_statistics_dropped",
        "statistics_trained_as_params",
        "train_step_in_eval_mode",
        "statistics_in_low_precision",
        "average_not_steady",
        "parameters_change_dtype",
        "statistics_nested",
        "statistics_of_another_layer",
        "wrong_moments",
        "rows_normalised_alone",
    ),
    source=f"{IOFFE}, section 3.1; {FLAX_SOURCE}",
)
def batch_stats_change_only_by_ema(t: Transition) -> Any:
    """Each statistic becomes m * old + (1 - m) * b, with m and b independent of the old value.

    Two re-runs, from statistics of 0 and of a huge S, give m = (new(S) - new(0)) / S and
    (1 - m) b = new(0). For two more old values s, the observed one and another, new(s) must then be
    m s + new(0). With u = 2^-24 the products and sums of the step and of the two re-runs err by at
    most 4 u |m s| + 3 u |new(0)| together, and b by one more rounding if the re-runs are vectorised
    differently: 8 u (|m s| + |new(0)|) in all.
    """
    zero = t.reruns["zero_statistics"].state.batch_stats
    high = t.reruns["huge_statistics"].state.batch_stats
    other = t.reruns["other_statistics"].state.batch_stats
    other_before = jax.tree_util.tree_map(_other, t.before.batch_stats)
    old, new = (t.before.batch_stats, other_before), (t.after.batch_stats, other)
    return trees(folded, old, new, (zero, zero), (high, high))


def _other(value: Any) -> Any:
    return other_statistic(value).astype(value.dtype) if is_floating(value) else value


@law(
    "statistics",
    observes=AVERAGE,
    capabilities=("batch_stats",),
    mistakes=(
        "new_statistics_dropped",
        "statistics_reinitialised",
        "train_step_in_eval_mode",
        "statistics_in_low_precision",
        "statistics_trained_as_params",
        "momentum_reversed",
        "ema_applied_twice",
        "weights_do_not_sum_to_one",
        "update_dropped",
        "statistics_fed_to_the_optimizer",
        "parameters_change_dtype",
        "wrong_moments",
    ),
    source=FLAX_SOURCE,
)
def one_momentum_for_the_whole_model(t: Transition) -> Any:
    """All running statistics have the same momentum, a number in [0, 1).

    m is measured with an error of at most 3 u (a product and a sum in the step, the subtraction of
    (1 - m) b), so two elements may differ by 6 u, plus u each for rounding the decimal: 8 u. With a
    momentum of 1 the statistics would never change, so 1 - m must be at least 8 u.
    """
    measured = _measured(t)
    places = 8 * max((unit(zero) for _, zero in measured), default=0.0)
    most, least = xp.full(1, -np.inf), xp.full(1, np.inf)
    parts = []
    for m, zero in measured:
        usable = measurable(zero) & xp.isfinite(m)
        most = xp.maximum(most, max_over(xp.where(usable, m, -np.inf), initial=-np.inf))
        least = xp.minimum(least, min_over(xp.where(usable, m, np.inf), initial=np.inf))
        allowed = xp.where(usable, places, np.inf)
        within = xp.clip(m, 0.0, 1 - 2 * places)
        parts.append(residual(m, within, allowed, of=zero, quantity="momentum"))
    parts.append(residual(most, least, places, quantity="largest momentum of any statistic"))
    return worst_of(parts)


@law(
    "statistics",
    observes=AVERAGE,
    capabilities=("batch_stats", "momentum"),
    mistakes=(
        "ema_applied_twice",
        "momentum_reversed",
        "new_statistics_dropped",
        "statistics_in_low_precision",
        "weights_do_not_sum_to_one",
        "statistics_reinitialised",
        "train_step_in_eval_mode",
        "statistics_trained_as_params",
        "statistics_fed_to_the_optimizer",
        "wrong_moments",
        "average_not_steady",
        "update_dropped",
        "statistics_overflow",
        "momentum_not_as_declared",
        "pass_dropped",
    ),
    source=f"{FLAX_SOURCE}: momentum is the weight of the old value (in PyTorch, of the new one)",
)
def momentum_is_as_declared(t: Transition) -> Any:
    """The measured momentum is the declared one: the moving average is applied exactly once.

    The measured m errs by 3 u, and rounding the declared number to float32 adds u: 4 u, since m is
    below 1, doubled for layers that compute 1 - m first.
    """
    declared = t.facts["momenta"]
    return worst_of(
        [
            residual(
                m,
                float(number),
                xp.where(measurable(zero), 8 * unit(zero), np.inf),
                of=zero,
                quantity="momentum",
            )
            for (m, zero), number in zip(_measured(t), declared, strict=True)
        ]
    )


@law(
    "statistics",
    observes=(*AVERAGE, "layer_inputs", "layer_input_noise"),
    capabilities=("batch_stats", "layer_inputs"),
    mistakes=(
        "sample_variance",
        "statistics_over_the_wrong_axis",
        "train_step_in_eval_mode",
        "weights_do_not_sum_to_one",
        "wrong_moments",
        "statistics_from_another_batch",
        "statistics_in_low_precision",
        "rows_treated_unequally",
        "statistics_of_another_layer",
        "statistics_reinitialised",
        "statistics_of_part_of_the_batch",
        "ema_applied_twice",
        "statistics_overflow",
        "statistics_fed_to_the_optimizer",
        "variances_averaged",
        "average_not_steady",
        "pass_dropped",
        "rows_normalised_alone",
    ),
    source=f"{IOFFE}, algorithm 1: the biased variance; {FLAX_SOURCE}",
)
def batch_moments_are_the_layers_own(t: Transition) -> Any:
    """The moments averaged are the mean and the biased variance (divisor N) of the layer's input.

    The moments are measured as b = new(0) / (1 - m). The subtraction 1 - m turns the 3 u error of m
    into 3 u / (1 - m), or into half a unit in the last place if m is a decimal with four places. A
    sum of n equal terms errs by up to n / 4 u where XLA adds them one after another. So the mean and
    E[h^2] err by (n / 4 + 16) u sqrt(E[h^2]) and u E[h^2], all else that is rounded included, and the
    fast variance E[h^2] - E[h]^2 by 2 (n / 4 + 8) u E[h]^2 more.

    The expected moments come from the layer's input in float64, read from the traced step. The step
    computes that input in its own precision, so the rounding noise of everything before the layer
    is allowed, too: how far mean and variance move if every element moves by its noise.
    """
    zeros = _by_layer(t.reruns["zero_statistics"].state.batch_stats)
    highs = _by_layer(t.reruns["huge_statistics"].state.batch_stats)
    parts = []
    for path, given in t.facts["layer_inputs"].items():
        zero, high = zeros.get(path, {}), highs.get(path, {})
        own = moments(given)
        if not {"mean", "var"} <= set(zero) or own.mean[0].size != zero["mean"][0].size:
            continue
        of_mean, of_var = apart_by(given, own, wide(t.facts["layer_input_noise"][path].value))
        square = own.var + own.mean**2
        places = own.count / 4 + 16
        of_squares = places * square + 2 * (places - 8) * own.mean**2
        for name, expected, moved, errs in (
            ("mean", own.mean, of_mean, places * xp.sqrt(square)),
            ("var", own.var, of_var, of_squares),
        ):
            weight = own_weight(wide(zero[name]), wide(high[name]), zero[name].dtype, xp)
            u, own_moment = unit(zero[name]), _shaped(expected, zero[name])
            # (1 - m) b and h^2 may be flushed to zero if subnormal.
            flushed = 4 * smallest(zero[name]) / weight
            rounded = _shaped(u * errs, zero[name])
            rounded = rounded + 8 * u / weight * xp.abs(own_moment)
            allowed = rounded + flushed + _shaped(moved, zero[name])
            usable = xp.where(measurable(zero[name]) & (weight > 0), allowed, np.inf)
            parts.append(
                residual(
                    wide(zero[name]) / weight,
                    own_moment,
                    usable,
                    of=zero[name],
                    quantity=f"batch {name} averaged",
                )
            )
    return worst_of(parts)


@law(
    "statistics",
    kind="witness",
    observes=("step:zero_statistics", "step:far_statistics"),
    capabilities=("batch_stats",),
    mistakes=("statistics_in_low_precision",),
    source="https://github.com/tensorflow/tensorflow/issues/8535",
    never="the new statistics never had more significant bits than a 16-bit format holds",
)
def running_statistics_hold_float32_digits(t: Transition) -> Any:
    """Running statistics use float32's digits: some have more significant bits than 16 bits hold.

    A float32 that passed through bfloat16 or float16 has at most 11 significant bits, and then the
    change made by a batch is lost. A layer may compute in 16 bits: its moments b then have few
    digits, but the float32 average m old + (1 - m) b has more, for an old value of 2^13 (1 - m) b.
    The law holds if, in at least one case, every averaged statistic has more than 11 significant bits.
    """
    reached, some, shown = (xp.full(1, value) for value in (True, False, True))
    before = t.reruns["zero_statistics"].state.batch_stats
    after = t.reruns["far_statistics"].state.batch_stats
    for zero, new in zip(floats(before), floats(after), strict=True):
        if unit(zero) > 2.0**-24:
            continue  # a violation of batch_stats_are_float32
        m = (wide(new) - wide(zero)) / xp.where(zero == 0, 1.0, FAR * wide(zero))
        known = xp.isfinite(m)
        averaged = known & (m > 1e-3) & (m < 1 - 1e-5)
        is_average = ~all_over(known & ~averaged)  # not a counter or a frozen statistic
        asked = averaged & (xp.abs(zero) > smallest(zero))
        reached = reached & (any_over(asked) | ~is_average)
        some = some | is_average
        shown = shown & (any_over(asked & ~_is_narrow(new)) | ~is_average)
    return when(reached & some, holds_if(shown))


NARROW_BITS = 11
"""The significant bits of a float16; a bfloat16 has 8."""


def _is_narrow(value: Any) -> Any:
    """Return where a value has no more significant bits than a float16."""
    scaled = xp.ldexp(xp.frexp(wide(value))[0], NARROW_BITS)
    return scaled == xp.round(scaled)


@law(
    "statistics",
    kind="structure",
    observes=("look",),
    capabilities=("look", "passes"),
    mistakes=("pass_dropped",),
    source="https://github.com/carpedm20/DCGAN-tensorflow/issues/266",
)
def every_pass_reaches_the_statistics(t: Transition) -> list[str]:
    """Every forward pass that trains a layer updates its running statistics."""
    return [
        f"batch_stats/{each.layer}: the statistics from forward pass {each.number} of the step"
        f"{_at(each.at)} are dropped: the step returns those of another pass"
        for each in t.facts["look"].passes
        if each.folds == 0
    ]


@law(
    "statistics",
    kind="structure",
    observes=("look",),
    capabilities=("look", "parts"),
    mistakes=("pass_dropped",),
    source="Huang et al. 2019, GPipe, https://arxiv.org/abs/1811.06965, section 2.2: the moving averages "
    "of the statistics are those over the whole mini-batch",
)
def every_part_reaches_the_statistics(t: Transition) -> list[str]:
    """If a loop processes the batch in parts, every part that trains updates the statistics.

    Each part either starts from the statistics of the part before it, or the statistics of all parts
    are averaged. If every part starts from those before the step, the last one overwrites all others.
    The step is evaluated in float64 with and without changes to some rows of a part. If the new params
    depend on these rows, the new statistics must, too.
    """
    return [
        f"a loop normalises the batch in parts ({each.layers}), but the new statistics do not depend "
        f"on {each.rows}, which train the params"
        for each in t.facts["look"].parts
        if not each.reaches
    ]


@law(
    "statistics",
    kind="structure",
    observes=("look",),
    capabilities=("look", "passes"),
    mistakes=("ema_applied_twice",),
    source="https://github.com/davda54/sam/issues/17",
)
def each_batch_is_folded_in_once(t: Transition) -> list[str]:
    """A batch that goes through a layer several times in a step updates its statistics once."""
    return [
        f"batch_stats/{each.layer}: the batch of forward pass {each.number}{_at(each.at)} updates the "
        f"running statistics {each.folds} times in one step, once in each forward pass"
        for each in t.facts["look"].passes
        if each.folds > 1
    ]


def _at(line: str) -> str:
    return f" at {line}" if line else ""


@law(
    "statistics",
    kind="structure",
    observes=("look",),
    capabilities=("look", "axes"),
    mistakes=("statistics_over_the_wrong_axis",),
    source=f"{IOFFE}, section 3.2: convolutions are normalised per feature map",
)
def layers_keep_the_feature_axis(t: Transition) -> list[str]:
    """A normalisation's feature axis is that of the convolution or matrix product before it."""
    return [
        f"batch_stats/{each.layer} normalises each index of axis {each.kept} of its input "
        f"{each.shape}, but the features are on axis {each.features}: BatchNorm(axis={each.features})"
        for each in t.facts["look"].axes
        if each.kept != each.features
    ]


@law(
    "statistics",
    kind="witness",
    observes=("step:zero_statistics",),
    capabilities=("batch_stats",),
    mistakes=("rows_normalised_alone",),
    source="https://github.com/google/flax/issues/1247",
    never="a batch of different rows never gave a variance above 0",
)
def unlike_rows_have_a_variance(t: Transition) -> Any:
    """In at least one case, a batch of different rows has a batch variance above 0.

    A normalisation that sees one row at a time, as under ``jax.vmap`` without an axis name, computes
    a variance of 0 and normalises every row to 0. Only layers whose running mean the batch changes
    are judged.
    """
    unlike = any_over(t.case.x[:, 1:] != t.case.x[:, :1])
    reached, shown = xp.zeros(1, dtype=bool), xp.ones(1, dtype=bool)
    for leaves in _by_layer(t.reruns["zero_statistics"].state.batch_stats).values():
        if {"mean", "var"} <= set(leaves):
            enters = any_over(wide(leaves["mean"]) != 0)
            reached = reached | enters
            shown = shown & (any_over(wide(leaves["var"]) > 0) | ~enters)
    return when(unlike & reached, holds_if(shown))


@law(
    "statistics",
    kind="structure",
    observes=("look",),
    capabilities=("look", "copies"),
    mistakes=("stale_statistics",),
    source="https://github.com/DLR-RM/stable-baselines3/issues/996",
)
def a_copy_of_the_params_takes_their_statistics(t: Transition) -> list[str]:
    """A copy of the params, such as a target network or an EMA, also updates its batch_stats."""
    return [
        f"{copy.batch_stats} is never updated, though {copy.params} is: it keeps its initial mean 0 "
        "and variance 1"
        for copy in t.facts["look"].copies
        if not copy.written
    ]


@law(
    "statistics",
    kind="structure",
    observes=("look",),
    capabilities=("look", "teachers"),
    mistakes=("teacher_in_train_mode",),
    source="Hinton et al. 2015, https://arxiv.org/abs/1503.02531: the targets are those of the trained "
    f"teacher; {IOFFE}, section 3.1: the trained network normalises by its running statistics",
)
def teachers_predict_in_eval_mode(t: Transition) -> list[str]:
    """A network that no step changes predicts in eval mode if its outputs are only targets.

    In train mode the target of a row would depend on the other rows of the batch. Not judged are a
    network through which a gradient flows (a fixed discriminator), whose output a trained layer takes
    (a backbone), that draws random numbers (dropout by design), or that follows the params (a momentum
    teacher).
    """
    return [
        f"the layer {each.layer or 'itself'} of a network that is never trained normalises by the batch"
        f"{_at(each.at)}, so its predictions, which are targets, depend on the other rows; its new "
        "statistics are dropped"
        for each in t.facts["look"].teachers
        if each.training
    ]


@law(
    "statistics",
    kind="structure",
    observes=("look",),
    capabilities=("look", "pretrained"),
    mistakes=("fresh_statistics",),
    source="https://github.com/google/deepvariant/issues/383",
)
def trained_params_come_with_their_statistics(t: Transition) -> list[str]:
    """A layer that starts from pretrained params also starts from the pretrained batch_stats."""
    return [
        f"the params of {layer or 'the model'} are pretrained, but its running statistics are the "
        "initial ones"
        for layer, with_statistics in t.facts["look"].pretrained
        if not with_statistics
    ]


@law(
    "statistics",
    capabilities=("look", "frozen_statistics"),
    mistakes=("frozen_statistics_move",),
    source="https://github.com/Lightning-AI/pytorch-lightning/issues/15062",
)
def frozen_statistics_stay(t: Transition) -> Any:
    """The running statistics of a frozen layer stay bit-identical."""
    return frozen(t, t.facts["look"].frozen_statistics)


@law(
    "statistics",
    observes=("step:other_targets",),
    capabilities=("batch_stats",),
    must_not_reach=(("batch_stats", "y"), ("batch_stats", "lr"), ("batch_stats", "opt_state")),
    mistakes=(
        "statistics_trained_as_params",
        "statistics_from_another_batch",
        "ema_applied_twice",
    ),
    source=FLAX_SOURCE,
)
def batch_stats_are_free_of_targets(t: Transition) -> Any:
    """The new batch_stats do not depend on the targets: with other targets they are bit-identical."""
    return same(t.reruns["other_targets"].state.batch_stats, t.after.batch_stats)


@law(
    "statistics",
    observes=("step:zero_statistics",),
    capabilities=("batch_stats",),
    mistakes=(
        "ema_applied_twice",
        "momentum_reversed",
        "statistics_trained_as_params",
        "variance_turns_negative",
        "wrong_moments",
    ),
    source=f"{IOFFE}, algorithm 1; https://github.com/google/flax/issues/1491",
)
def variance_is_never_negative(t: Transition) -> Any:
    """A running variance that is not negative before the step is not negative after it.

    Also checked from statistics of 0, where a batch variance E[h^2] - E[h]^2 that rounding made
    negative cannot hide behind a positive old value.
    """
    zero = jax.tree_util.tree_map(xp.zeros_like, t.before.batch_stats)
    parts = []
    for before, after in (
        (t.before.batch_stats, t.after.batch_stats),
        (zero, t.reruns["zero_statistics"].state.batch_stats),
    ):
        old = _by_layer(before)
        for layer, leaves in _by_layer(after).items():
            if "var" in leaves and "var" in old.get(layer, {}):
                new = wide(leaves["var"])
                usable = (wide(old[layer]["var"]) >= 0) & xp.isfinite(new)
                compared = xp.where(usable, 0.0, np.inf)
                negative = xp.minimum(new, 0.0)
                parts.append(residual(negative, 0.0, compared, of=leaves["var"]))
    return worst_of(parts)


@law(
    "statistics",
    observes=("step:own_statistics",),
    capabilities=("batch_stats",),
    mistakes=(
        "statistics_reinitialised",
        "train_step_in_eval_mode",
        "statistics_in_low_precision",
        "average_not_steady",
        "statistics_from_another_batch",
        "statistics_of_another_layer",
        "statistics_fed_to_the_optimizer",
        "wrong_moments",
    ),
    source=FLAX_SOURCE,
)
def batch_like_the_statistics_is_a_fixed_point(t: Transition) -> Any:
    """Running statistics that equal the batch's moments do not change.

    The measured moments b are rounded to float32 after a division by 1 - m, whose own error is at
    most half a unit in the last place for a decimal m and 3 u / (1 - m) otherwise; the step then
    rounds three times. The bound is |new - b| <= (8 + 4 / (1 - m)) u |b|, far below (1 - m) |b| for
    any m up to 0.999.
    """

    def leaf(zero: Any, high: Any, new: Any) -> Any:
        if not is_floating(new):
            return worst_of([])
        weight = own_weight(wide(zero), wide(high), zero.dtype, xp)
        own = wide(zero) / weight
        allowed = (8 + 4 / weight) * unit(new) * xp.abs(own) + smallest(new) / weight
        return residual(new, own, xp.where(measurable(zero) & (weight > 0), allowed, np.inf))

    return trees(
        leaf,
        t.reruns["zero_statistics"].state.batch_stats,
        t.reruns["huge_statistics"].state.batch_stats,
        t.reruns["own_statistics"].state.batch_stats,
    )


@law(
    "statistics",
    observes=(*AVERAGE, "step:zero_lr", "step:second_step"),
    capabilities=("batch_stats",),
    mistakes=(
        "new_statistics_dropped",
        "ema_applied_twice",
        "statistics_reinitialised",
        "statistics_in_low_precision",
        "statistics_trained_as_params",
        "statistics_fed_to_the_optimizer",
        "average_not_steady",
        "statistics_from_another_batch",
        "statistics_of_another_layer",
        "wrong_moments",
        "rows_normalised_alone",
    ),
    source=FLAX_SOURCE,
)
def equal_steps_converge_geometrically(t: Transition) -> Any:
    """A second step on the same batch with lr = 0 applies the same moving average again.

    With lr = 0 the params do not change, so new2 = m new1 + new(0), within the tolerance of
    ``batch_stats_change_only_by_ema``: 8 u (|m new1| + |new(0)|).
    """
    rested = same(t.reruns["zero_lr"].state.params, t.before.params)
    value = trees(
        folded,
        t.reruns["zero_lr"].state.batch_stats,
        t.reruns["second_step"].state.batch_stats,
        t.reruns["zero_statistics"].state.batch_stats,
        t.reruns["huge_statistics"].state.batch_stats,
    )
    return when(rested == 0, value)  # zero_learning_rate_moves_nothing reports params that move


@law(
    "statistics",
    capabilities=("batch_stats",),
    mistakes=("statistics_reinitialised",),
    source=FLAX_SOURCE,
)
def initial_statistics_are_zero_and_one(t: Transition) -> Any:
    """Before the first step every running mean is exactly 0 and every running variance exactly 1."""
    parts = [
        residual(wide(leaves[name]), start, 0.0, of=leaves[name])
        for leaves in _by_layer(t.before.batch_stats).values()
        for name, start in (("mean", 0.0), ("var", 1.0))
        if name in leaves
    ]
    return when(t.case.warmup == 0, worst_of(parts))


@law(
    "statistics",
    capabilities=("batch_stats",),
    mistakes=("statistics_overflow", "sample_variance"),
    source="float32 holds the square of inputs up to 1e19",
)
def statistics_stay_finite(t: Transition) -> Any:
    """Finite running statistics stay finite for every batch in the domain."""
    usable = all_finite(t.before.batch_stats) & (t.case.warmup == 0)
    return when(usable, holds_if(all_finite(t.after.batch_stats)))


@law(
    "statistics",
    observes=("step:constant_features", "exact:constant_features"),
    mistakes=(
        "variance_below_zero",
        "division_by_zero_variance",
        "exponential_overflows",
        "log_of_zero",
        "division_by_zero",
        "slope_is_infinite",
        "outside_the_domain",
        "number_overflows",
    ),
    source="https://github.com/google/flax/issues/1491",
)
def a_constant_feature_gives_a_finite_step(t: Transition) -> Any:
    """In the first step, a feature of 1000.1 or 0.1 in every row gives a finite loss and new state.

    These values, and the multiples of them that are tried, are not exact in float32, so the variance
    E[h^2] - E[h]^2 may round to a negative number, whose square root is NaN. Values above 2^-30 of the
    range of their dtype in a float64 run of the same step are not compared. Steps that compute in
    float16, whose largest number is 65504, are skipped.
    """
    run, exact = t.reruns["constant_features"], t.facts["exact_constant_features"]
    finite = xp.ones(1, dtype=bool)
    pairs = zip(floats((run.info, run.state)), floats((exact.info, exact.state)), strict=True)
    for actual, expected in pairs:
        huge = xp.abs(wide(expected)) > 2.0**-30 * float(jnp.finfo(actual.dtype).max)
        finite = finite & all_over(xp.isfinite(actual) | huge)
    several = t.case.x.shape[1] > 1
    usable = (t.case.warmup == 0) & all_finite(t.before) & several & t.facts["wide_range"]
    return when(usable, holds_if(finite))
