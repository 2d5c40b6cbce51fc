"""Faults of the normalisation layer: its statistics, how it normalises, and one layer of several."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from tests.faults.catalogue import enter
from tests.faults.steps import (
    DECAY,
    CanonicalStep,
    HandwrittenNorm,
    Moments,
    Tree,
    averaged,
    by_path,
    carried,
    edited,
    masked_decay,
    of_two_positions,
    rounded,
)


def sample_variance(h: Any, mean: Any) -> Any:
    """Return the variance of h (N, channels) with the divisor N - 1, at least 1."""
    return jnp.sum((h - mean) ** 2, axis=0) / jnp.maximum(h.shape[0] - 1, 1)


def sample_moments(s: Any, h: Any, layer: int) -> Moments:
    mean = jnp.mean(h, axis=0)
    return mean, sample_variance(h, mean)


def roots_averaged(s: Any, old: Moments, batch: Moments, layer: int) -> Moments:
    roots = jnp.sqrt(old[1]), jnp.sqrt(batch[1])
    mean, deviation = s.right.fold((old[0], roots[0]), (batch[0], roots[1]), layer)
    return mean, deviation**2


def shards_variances_averaged(s: Any, h: Any, batch: Moments, layer: int) -> Moments:
    """Average the variances of even and odd rows, weighted by their number."""
    parity = (jnp.arange(h.shape[0]) % 2)[:, None] == jnp.array([0, 1])  # (N, 2)
    share = jnp.mean(parity, axis=0)
    total = jnp.maximum(jnp.sum(parity, axis=0), 1)
    means = (parity.T @ h) / total[:, None]
    squares = ((h[:, None, :] - means) ** 2 * parity[:, :, None]).sum(axis=0)
    return batch[0], share @ (squares / total[:, None])


def all_but_the_last_folded(s: Any, old: Moments, batch: Moments, layer: int) -> Moments:
    new = s.right.fold(old, batch, layer)
    return jnp.where(is_last(s), old[0], new[0]), jnp.where(is_last(s), old[1], new[1])


def is_last(s: Any) -> Any:
    """Return, for each channel, whether it is the last one."""
    return jnp.arange(s.hidden) == s.hidden - 1


def with_the_statistics_of(other: Any) -> Any:
    """Return a ``loss`` whose statistics come from a pass with ``other(step, params, x)``."""

    def loss(s: Any, params: Tree, batch_stats: Tree, x: Any, y: Any) -> tuple[Any, Tree]:
        others_params, others_x = other(s, params, x)
        _, new = s.apply(others_params, batch_stats, others_x, train=True)
        return s.right.loss(params, batch_stats, x, y)[0], new

    return loss


def standardised_by(moments_in_training: Any) -> Any:
    """Return a ``standardise`` with other moments in training, computed from h and the right ones."""
    return lambda s, h, moments, affine, train, layer: s.right.standardise(
        h, moments_in_training(h, moments) if train else moments, affine, train, layer
    )


def kernels_and_one_scale(params: Tree) -> Tree:
    return by_path(lambda path, _: path.endswith("kernel") or path == "BatchNorm_1/scale", params)


def standardised_twice(
    s: Any, h: Any, moments: Moments, affine: Any, train: bool, layer: int
) -> Any:
    out = s.right.standardise(h, moments, affine, train, layer)
    if train:
        out = s.right.standardise(out, s.moments(out, layer), affine, train, layer)
    return out


def first_layers_moments(s: Any, h: Any, batch: Moments, layer: int) -> Moments:
    """Return the first layer's moments for both layers of a pass."""
    if layer == 0:
        s.seen = batch
    first, s.seen = s.seen, s.seen if layer == 0 else None
    return batch if first is None else first


def loss_of_one_mode_and_statistics_of_the_other(
    s: Any, params: Tree, batch_stats: Tree, x: Any, y: Any
) -> tuple[Any, Tree]:
    preds, _ = s.apply(params, batch_stats, x, train=False)
    _, updated = s.apply(params, batch_stats, x, train=True)
    return s.error(preds, y), updated


def loss_in_eval_mode(s: Any, params: Tree, batch_stats: Tree, x: Any, y: Any) -> tuple[Any, Tree]:
    preds, batch_stats = s.apply(params, batch_stats, x, train=False)
    return s.error(preds, y), batch_stats


# Each row in as few lines as it takes:
# fmt: off

# The statistics: which moments, over what, how they are averaged.

fault = partial(enter, family="statistics", base=HandwrittenNorm)

fault("momentum_reversed", "momentum_reversed",
      "Momentum 0.99 is the weight of the new value, as in PyTorch.",
      fold=lambda s, old, batch, layer: s.right.fold(batch, old, layer),
      source="https://github.com/pytorch/examples/issues/289")
fault("momentum_of_one_hundredth", "momentum_reversed",
      "Flax's BatchNorm has PyTorch's momentum 0.01, for an intended 0.99.",
      base=CanonicalStep,
      apply=lambda s, *a, **named: CanonicalStep(momentum=0.01).apply(*a, **named),
      source="https://github.com/scverse/scvi-tools/pull/2309")
fault("momentum_of_nine_tenths", "momentum_not_as_declared",
      "The layer has momentum 0.9, but 0.99 is declared.",
      fold=lambda s, old, batch, layer: averaged(0.9, old, batch))
fault("momentum_of_the_variance_reversed", "momentum_reversed",
      "The mean is averaged correctly, the variance with the weights swapped.",
      fold=lambda s, old, batch, layer:
          (s.right.fold(old, batch, layer)[0], s.right.fold(batch, old, layer)[1]))
fault("variance_folded_twice", "ema_applied_twice",
      "The moving average of the variance is applied twice in one pass.",
      fold=lambda s, old, batch, layer:
          ((once := s.right.fold(old, batch, layer))[0], s.right.fold(once, batch, layer)[1]))
fault("batch_moments_replace_the_running", "statistics_reinitialised",
      "There is no moving average: the running moments are those of the last batch.",
      fold=lambda s, old, batch, layer: batch)
fault("statistics_summed", "weights_do_not_sum_to_one",
      "The old value has weight 1, so the statistics only grow.",
      fold=lambda s, old, batch, layer: (old[0] + 0.01 * batch[0], old[1] + 0.01 * batch[1]))
fault("mean_never_moves", "new_statistics_dropped",
      "Only the variance is averaged; the running mean stays as it was.",
      fold=lambda s, old, batch, layer: (old[0], s.right.fold(old, batch, layer)[1]))
fault("variance_never_moves", "new_statistics_dropped",
      "Only the mean is averaged; the running variance stays as it was.",
      fold=lambda s, old, batch, layer: (s.right.fold(old, batch, layer)[0], old[1]))
fault("mean_and_variance_swapped", "wrong_moments",
      "The batch's variance moves the running mean, and its mean the running variance.",
      recorded=lambda s, h, batch, layer: (batch[1], batch[0]))
fault("sample_variance", "sample_variance",
      "The running variance has divisor N - 1.",
      recorded=lambda s, h, batch, layer: (batch[0], sample_variance(h, batch[0])), minimal=(2, 1))
fault("variance_about_zero", "wrong_moments",
      "The running variance is the mean of squares: the mean is not subtracted.",
      recorded=lambda s, h, batch, layer: (batch[0], jnp.mean(h**2, axis=0)))
fault("variance_about_the_running_mean", "wrong_moments",
      "Deviations are taken from the running mean, not from the batch's own.",
      fold=lambda s, old, batch, layer:
          s.right.fold(old, (batch[0], batch[1] + (batch[0] - old[0]) ** 2), layer))
fault("deviation_in_place_of_variance", "wrong_moments",
      "The running variance averages standard deviations.",
      recorded=lambda s, h, batch, layer: (batch[0], jnp.sqrt(batch[1])), minimal=(2, 1))
fault("deviations_averaged_then_squared", "wrong_moments",
      "Standard deviations are averaged and the average is squared.",
      fold=roots_averaged)
fault("absolute_deviation", "wrong_moments",
      "The running variance is the square of the mean absolute deviation.",
      recorded=lambda s, h, batch, layer: (batch[0], jnp.mean(jnp.abs(h - batch[0]), axis=0) ** 2),
      minimal=(2, 1))
fault("variance_held_above_a_thousandth", "wrong_moments",
      "A batch variance below 0.001 is recorded as 0.001.",
      recorded=lambda s, h, batch, layer: (batch[0], jnp.maximum(batch[1], 1e-3)))
fault("epsilon_recorded_with_the_variance", "wrong_moments",
      "The recorded variance already contains epsilon, which evaluation then adds again.",
      recorded=lambda s, h, batch, layer: (batch[0], batch[1] + s.epsilon))
fault("moments_over_all_axes", "statistics_over_the_wrong_axis",
      "The recorded moments are taken over rows and channels, so all channels are equal.",
      recorded=lambda s, h, batch, layer:
          (jnp.mean(h) * jnp.ones(h.shape[-1]), jnp.var(h) * jnp.ones(h.shape[-1])))
fault("channels_reversed", "statistics_over_the_wrong_axis",
      "The recorded moments are in the wrong order of channels.",
      recorded=lambda s, h, batch, layer: (batch[0][::-1], batch[1][::-1]))
fault("statistics_of_the_activations", "statistics_from_another_batch",
      "The moments are recorded after the activation function, not before the normalisation.",
      recorded=lambda s, h, batch, layer: s.moments(jnp.maximum(h, 0.0), layer))
fault("statistics_of_the_initial_params", "statistics_from_another_batch",
      "The statistics come from a model with the params of seed 0, which the step closes over.",
      base=CanonicalStep,
      loss=with_the_statistics_of(lambda s, params, x: (s.variables(0, x)["params"], x)))
fault("statistics_of_the_first_shard", "statistics_of_part_of_the_batch",
      "Only the moments of the first half of the batch are recorded.",
      recorded=lambda s, h, batch, layer: s.moments(h[: (h.shape[0] + 1) // 2], layer),
      minimal=(2, 1), source="https://github.com/google/flax/issues/877")
fault("variances_averaged_over_shards", "variances_averaged",
      "The recorded variance is the mean of two shards' variances, without the spread of their means.",
      recorded=shards_variances_averaged, minimal=(2, 1),
      source="https://github.com/tensorflow/tpu/issues/321")
fault("statistics_of_the_batch_reversed_in_sign", "statistics_from_another_batch",
      "The statistics come from a pass over -x, an augmentation not used for the gradient.",
      base=CanonicalStep, loss=with_the_statistics_of(lambda s, params, x: (params, -x)),
      source="https://github.com/andreped/GradientAccumulator/issues/6")
fault("mean_debiased", "weights_do_not_sum_to_one",
      "The running mean is divided by 1 - momentum, as in Adam's bias correction.",
      fold=lambda s, old, batch, layer:
          ((new := s.right.fold(old, batch, layer))[0] / (1 - 0.99), new[1]))
fault("train_step_in_eval_mode", "train_step_in_eval_mode",
      "The training loss runs the model with train=False: the statistics never move.",
      base=CanonicalStep, loss=loss_in_eval_mode,
      source="https://github.com/KaiyuanZh/FLIP/issues/6")
fault("statistics_move_but_eval_mode_normalises", "loss_reads_old_statistics",
      "The statistics are updated in a separate pass; the loss itself runs in eval mode.",
      base=CanonicalStep, loss=loss_of_one_mode_and_statistics_of_the_other,
      source="https://github.com/mlcommons/algorithmic-efficiency/pull/798")
fault("one_channel_left_out", "new_statistics_dropped",
      "The last channel's statistics keep their old values.",
      fold=all_but_the_last_folded)

# How the layer normalises.

fault = partial(enter, family="layer", base=HandwrittenNorm)

fault("epsilon_forgotten", "division_by_zero_variance",
      "Nothing is added to the variance: a constant channel divides by zero.",
      inverse_deviation=lambda s, var, train, layer: jax.lax.rsqrt(var))
fault("epsilon_forgotten_in_training", "division_by_zero_variance",
      "Epsilon is added in evaluation and not in training.",
      inverse_deviation=lambda s, var, train, layer:
          (jax.lax.rsqrt(var) if train else s.right.inverse_deviation(var, train, layer)))
fault("epsilon_of_evaluation_is_a_hundredth", "modes_differ",
      "Training adds 0.00001 to the variance, evaluation 0.01.",
      inverse_deviation=lambda s, var, train, layer:
          jax.lax.rsqrt(var + (s.epsilon if train else 1e-2)))
fault("epsilon_outside_the_root_in_evaluation", "modes_differ",
      "Evaluation adds epsilon to the deviation, training to the variance.",
      inverse_deviation=lambda s, var, train, layer: (
          s.right.inverse_deviation(var, train, layer) if train
          else 1.0 / (jnp.sqrt(var) + s.epsilon)))
fault("old_running_moments_normalise", "loss_reads_old_statistics",
      "Training normalises by the old running moments, but still computes the new ones.",
      training_moments=lambda s, batch, old, new, layer: old)
fault("new_running_moments_normalise", "loss_reads_old_statistics",
      "Training normalises by the running moments, with this batch folded in.",
      training_moments=lambda s, batch, old, new, layer: new,
      source="https://github.com/patrick-kidger/equinox/pull/675")
fault("mean_overwritten_before_it_is_used", "loss_reads_old_statistics",
      "The batch is centred by the new running mean, as if it shared the buffer of the batch's mean.",
      training_moments=lambda s, batch, old, new, layer: (new[0], batch[1]),
      source="https://github.com/tenstorrent/tt-metal/pull/45578")
fault("running_variance_normalises", "loss_reads_old_statistics",
      "Training centres by the batch's mean but scales by the old running variance.",
      training_moments=lambda s, batch, old, new, layer: (batch[0], old[1]), minimal=(2, 1))
fault("sample_variance_normalises", "sample_variance",
      "The variance that normalises in training has divisor N - 1, the recorded one N.",
      moments=sample_moments,
      recorded=lambda s, h, batch, layer: s.right.moments(h, layer), minimal=(2, 1))
fault("sample_variance_throughout", "sample_variance",
      "Both the normalising and the recorded variance have divisor N - 1.",
      moments=sample_moments, minimal=(2, 1))
fault("sample_variance_of_a_single_row", "sample_variance",
      "The recorded variance is N / (N - 1) times the batch's, which is NaN for a batch of one row.",
      recorded=lambda s, h, batch, layer: (batch[0], batch[1] * (len(h) / jnp.float32(len(h) - 1))),
      blind=False, source="https://github.com/FluxML/Flux.jl/issues/1992")
fault("root_forgotten_in_training", "modes_differ",
      "Training divides by the variance, evaluation by its root.",
      inverse_deviation=lambda s, var, train, layer:
          (1.0 / (var + s.epsilon) if train else s.right.inverse_deviation(var, train, layer)),
      minimal=(2, 1))
fault("mean_not_subtracted_in_training", "modes_differ",
      "Training scales without centring.",
      training_moments=lambda s, batch, old, new, layer: (jnp.zeros_like(batch[0]), batch[1]))
fault("bias_before_scale", "modes_differ",
      "In training the bias is added before the scale is applied.",
      standardise=lambda s, h, moments, affine, train, layer: s.right.standardise(
          h, moments, (affine[0], affine[1] * affine[0] if train else affine[1]), train, layer),
      minimal=(2, 1))
fault("scale_ignored", "wrong_gradient",
      "The layer has a scale and never uses it.",
      standardise=lambda s, h, moments, affine, train, layer:
          s.right.standardise(h, moments, (1.0, affine[1]), train, layer),
      minimal=(2, 1),
      tolerated="equivalent to a layer without a scale: the unused leaf has no gradient and does not change")
fault("mask_counted_before_it_is_broadcast", "wrong_moments",
      "The sums run over two positions of each row, but the mask that counts them has one.",
      moments=lambda s, h, layer: of_two_positions(h, len(h)), blind=False,
      source="https://github.com/keras-team/keras/pull/20815")
fault("moments_over_rows_and_channels", "statistics_over_the_wrong_axis",
      "Training normalises all channels by one mean and one variance; the recorded ones are right.",
      training_moments=lambda s, batch, old, new, layer: (
          batch[0].mean() * jnp.ones_like(batch[0]),
          (batch[1].mean() + batch[0].var()) * jnp.ones_like(batch[1])))
fault("rows_normalised_in_training", "statistics_over_the_wrong_axis",
      "Training normalises each row over its channels, as LayerNorm would.",
      standardise=standardised_by(lambda h, moments: (
          h.mean(axis=1, keepdims=True), h.var(axis=1, keepdims=True))))
fault("last_channel_not_normalised", "modes_differ",
      "In training the last channel is neither centred nor scaled.",
      training_moments=lambda s, batch, old, new, layer: (
          jnp.where(is_last(s), 0.0, batch[0]), jnp.where(is_last(s), 1.0, batch[1])))
fault("moments_of_the_first_rows", "rows_treated_unequally",
      "The normalising and the recorded moments are those of the first half of the batch.",
      moments=lambda s, h, layer: s.right.moments(h[: (h.shape[0] + 1) // 2], layer),
      minimal=(2, 1))
fault("moments_weigh_the_first_row_double", "rows_treated_unequally",
      "The first row counts twice in the moments.",
      moments=lambda s, h, layer: s.right.moments(jnp.concatenate([h[:1], h]), layer),
      minimal=(2, 1))
fault("cancellation_unclipped", "variance_turns_negative",
      "E[h^2] - E[h]^2 is not clipped at 0: rounding makes it negative, and its root NaN.",
      moments=lambda s, h, layer:
          ((mean := jnp.mean(h, axis=0)), jnp.mean(h**2, axis=0) - mean**2),
      minimal=(2, 1), source="https://github.com/google/flax/issues/1491")
fault("normalised_twice", "modes_differ",
      "In training the layer's output is normalised again, by its own moments.",
      standardise=standardised_twice, minimal=(2, 1))
fault("each_row_without_itself", "rows_treated_unequally",
      "Every row is centred by the mean of the other rows.",
      standardise=standardised_by(lambda h, moments: (
          (len(h) * moments[0] - h) / jnp.maximum(len(h) - 1, 1), moments[1])),
      source="https://github.com/FluxML/Flux.jl/issues/1992")

# One of several layers, numbered from 0.

fault = partial(enter, family="one_layer", base=HandwrittenNorm, layers=2)
of_flax = partial(fault, base=CanonicalStep)

of_flax("second_layers_statistics_dropped", "new_statistics_dropped",
        "Of two layers, only the first one's new statistics are returned.",
        thread=carried(batch_stats=lambda old, new: {**new, "BatchNorm_1": old["BatchNorm_1"]}))
of_flax("layers_statistics_swapped", "statistics_of_another_layer",
        "The two layers' new statistics are returned under each other's names.",
        thread=carried(batch_stats=lambda old, new:
            {"BatchNorm_0": new["BatchNorm_1"], "BatchNorm_1": new["BatchNorm_0"]}))
of_flax("first_layers_statistics_copied", "statistics_of_another_layer",
        "The first layer's new statistics are returned for both layers.",
        thread=carried(batch_stats=lambda old, new:
            {"BatchNorm_0": new["BatchNorm_0"], "BatchNorm_1": new["BatchNorm_0"]}))
of_flax("second_layer_in_eval_mode", "train_step_in_eval_mode",
        "The second layer always uses its running statistics and never moves them.",
        normalise=lambda s, h, train, layer, weights:
            s.right.normalise(h, train and layer == 0, layer, weights))
of_flax("second_layer_in_train_mode", "eval_in_train_mode",
        "The second layer is never switched to eval mode: evaluation moves its statistics.",
        normalise=lambda s, h, train, layer, weights:
            s.right.normalise(h, train or layer == 1, layer, weights),
        # Initialised without a pass that could change them.
        variables=lambda s, seed, x: CanonicalStep(layers=2).variables(seed, x))
fault("second_layers_momentum_reversed", "momentum_reversed",
      "The second layer's momentum is the weight of the new value.",
      fold=lambda s, old, batch, layer:
          (s.right.fold(old, batch, layer) if layer == 0 else s.right.fold(batch, old, layer)))
fault("first_layers_average_twice", "ema_applied_twice",
      "The first layer's moving average is applied twice.",
      fold=lambda s, old, batch, layer:
          s.right.fold(s.right.fold(old, batch, layer) if layer == 0 else old, batch, layer))
fault("middle_layers_sample_variance", "sample_variance",
      "Of three layers, the middle one records a variance divided by N - 1.",
      layers=3,
      recorded=lambda s, h, batch, layer:
          (batch[0], batch[1] * (len(h) / jnp.maximum(len(h) - 1, 1) if layer == 1 else 1.0)),
      minimal=(2, 1))
fault("second_layers_statistics_rounded", "statistics_in_low_precision",
      "The second layer's statistics are rounded to bfloat16 in each step.",
      fold=lambda s, old, batch, layer: tuple(
          rounded(leaf, "bfloat16") if layer == 1 else leaf
          for leaf in s.right.fold(old, batch, layer)))
of_flax("second_bias_gradient_off", "wrong_gradient",
        "The gradient of the second layer's bias is off by a thousandth.",
        slope=lambda s, grads, *_: edited(grads, "BatchNorm_1/bias", lambda g: g * 1.001),
        minimal=(2, 1))
fault("second_layers_moments_held_constant", "wrong_gradient",
      "No gradient flows through the second layer's moments.",
      training_moments=lambda s, batch, old, new, layer:
          (jax.lax.stop_gradient(batch) if layer == 1 else batch),
      minimal=(2, 1))
fault("second_layer_uses_old_moments", "loss_reads_old_statistics",
      "In training the second layer is normalised by its old running moments.",
      training_moments=lambda s, batch, old, new, layer: old if layer == 1 else batch,
      minimal=(2, 1))
of_flax("second_layer_evaluated_with_the_first_ones_statistics", "eval_ignores_variables",
        "Evaluation gives both layers the first one's statistics.",
        evaluate=lambda s, state, x, y: s.right.evaluate(state._replace(
            batch_stats=dict.fromkeys(state.batch_stats, state.batch_stats["BatchNorm_0"])), x, y))
of_flax("decay_reaches_the_second_scale", "decay_of_norm_parameters",
        "The mask of the decay misses one leaf, the second layer's scale.",
        optimizer=masked_decay, probed=False,
        tx=lambda s, lr: optax.chain(
            optax.add_decayed_weights(DECAY, mask=kernels_and_one_scale), optax.sgd(lr)),
        source="https://github.com/google-deepmind/optax/issues/25")
of_flax("second_layers_params_not_updated", "update_dropped",
        "Scale and bias of the second layer stay as they were.",
        thread=carried(params=lambda old, new: {**new, "BatchNorm_1": old["BatchNorm_1"]}),
        source="https://github.com/lightly-ai/lightly/issues/1438", minimal=(2, 1))
fault("second_layer_records_the_first_ones_input", "statistics_of_another_layer",
      "Both layers record the moments of the first one's input.",
      recorded=first_layers_moments, seen=None)
