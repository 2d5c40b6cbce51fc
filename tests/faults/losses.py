"""Faults of the loss, its gradient, evaluation, and the rows and inputs that they use."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from bnverify import State, StepInfo
from tests.faults.catalogue import enter
from tests.faults.steps import (
    HandwrittenNorm,
    Model,
    Moments,
    PaddedStep,
    Tree,
    WithSolution,
    edited,
    mapped,
)

Gradients = tuple[tuple[Any, Tree], Tree]


def all_but_the_last_row(preds: Any, y: Any) -> Any:
    """Return the mean squared error without the last row, unless it is the only one."""
    counts = jnp.arange(y.shape[0]) < jnp.maximum(y.shape[0] - 1, 1)
    return jnp.sum(counts * (preds - y) ** 2) / jnp.sum(counts)


def mean_of_two_unequal_means(s: Any, preds: Any, y: Any) -> Any:
    """Return the mean of two means: that of one row and that of the others."""
    errors = (preds - y) ** 2
    others = (jnp.sum(errors) - errors[0]) / jnp.maximum(y.shape[0] - 1, 1)
    return jnp.where(y.shape[0] > 1, (errors[0] + others) / 2, errors[0])


def huber(s: Any, preds: Any, y: Any) -> Any:
    """Return the Huber loss, which grows linearly beyond 10."""
    off = jnp.abs(preds - y)
    return jnp.mean(jnp.where(off <= 10.0, off**2, 20.0 * off - 100.0))


def with_penalty(penalty: Any) -> Any:
    """Return a ``loss`` with ``penalty(old statistics, new statistics)`` on top."""

    def loss(s: Any, params: Tree, batch_stats: Tree, x: Any, y: Any) -> tuple[Any, Tree]:
        loss, new = s.right.loss(params, batch_stats, x, y)
        return loss + penalty(batch_stats["BatchNorm_0"], new["BatchNorm_0"]), new

    return loss


def divided_by_the_padded_rows(
    s: Any, params: Tree, batch_stats: Tree, x: Any, y: Any
) -> tuple[Any, Tree]:
    loss, new = s.right.loss(params, batch_stats, x, y)
    return loss * (y.shape[0] / (y.shape[0] + -y.shape[0] % 4)), new


def two_micro_batches(s: Any, state: State, x: Any, y: Any) -> Gradients:
    """Average two gradients, and keep the statistics of the second pass."""
    half = x.shape[0] // 2
    if half == 0:
        result: Gradients = s.right.gradients(state, x, y)
        return result
    (first, _), slopes = s.right.gradients(state, x[:half], y[:half])
    (second, new), others = s.right.gradients(state, x[half:], y[half:])
    return ((first + second) / 2, new), mapped(lambda a, b: (a + b) / 2, slopes, others)


def all_variables_differentiated(
    s: Any, state: State, x: Any, y: Any, lr: Any
) -> tuple[State, StepInfo]:
    def loss_fn(variables: Tree) -> tuple[Any, Tree]:
        loss: tuple[Any, Tree] = s.loss(variables["params"], variables["batch_stats"], x, y)
        return loss

    variables = {"params": state.params, "batch_stats": state.batch_stats}
    (loss, batch_stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(variables)
    params, opt_state = s.update(grads["params"], state, lr)
    return State(params, batch_stats, opt_state), StepInfo(loss, grads)


def mutable_forgotten(s: Any, params: Tree, batch_stats: Tree, x: Any, y: Any) -> tuple[Any, Tree]:
    out: Any = Model(s).apply({"params": params, "batch_stats": batch_stats}, x, train=True)
    return s.error(out.reshape(-1), y), batch_stats


def gradient_of(other: Any) -> Any:
    """Return ``gradients`` with the gradient of ``other(step, params, state, x, y)`` and the right loss."""

    def gradients(s: Any, state: State, x: Any, y: Any) -> Gradients:
        result = s.loss(state.params, state.batch_stats, x, y)
        return result, jax.grad(lambda params: other(s, params, state, x, y))(state.params)

    return gradients


def loss_after_the_update(s: Any, state: State, x: Any, y: Any, lr: Any) -> tuple[State, StepInfo]:
    new, info = s.right.step(state, x, y, lr)
    return new, info._replace(loss=s.loss(new.params, state.batch_stats, x, y)[0])


def of_length_one(s: Any, grads: Tree, *_: Any) -> Tree:
    square = sum(jnp.sum(slope**2) for slope in jax.tree_util.tree_leaves(grads))
    return mapped(lambda slope: slope / jnp.sqrt(square + 1e-12), grads)


def scale_and_bias_swapped(s: Any, grads: Tree, *_: Any) -> Tree:
    norm = grads["BatchNorm_0"]
    return {**grads, "BatchNorm_0": {"scale": norm["bias"], "bias": norm["scale"]}}


def averaged_with_the_initial_params(s: Any, state: State, x: Any, y: Any) -> Any:
    first = s.variables(0, x)["params"]
    mean = mapped(lambda one, other: 0.9 * one + 0.1 * other, state.params, first)
    return s.right.evaluate(state._replace(params=mean), x, y)


def baked_in(x: Any) -> Any:
    """Return a constant batch of the shape of ``x``, as if from tracing."""
    return jnp.sin(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape)


def kept_rows(count: Any) -> Any:
    """Return a ``batch`` that keeps the first ``count(rows)`` rows."""
    return lambda s, x, y: (x[: count(x.shape[0])], y[: count(x.shape[0])])


def one_row_in_eval_mode(
    s: Any, params: Tree, batch_stats: Tree, x: Any, y: Any
) -> tuple[Any, Tree]:
    preds, batch_stats = s.apply(params, batch_stats, x, train=x.shape[0] > 1)
    return s.error(preds, y), batch_stats


def rows_counted(s: Any, h: Any, batch: Moments, layer: int) -> Moments:
    s.rows = h.shape[0]
    return batch


def first_eight_features_updated(s: Any, old: State, new: State) -> State:
    was = jnp.asarray(old.params["Dense_0"]["kernel"])
    params = edited(new.params, "Dense_0/kernel", lambda now: was.at[:8].set(now[:8]))
    return new._replace(params=params)


def four_shards_where_they_fit(s: Any, h: Any, batch: Moments, layer: int) -> Moments:
    if h.shape[0] % 4:
        return batch
    return batch[0], h.reshape(4, h.shape[0] // 4, h.shape[1]).var(axis=1).mean(axis=0)


# Each row in as few lines as it takes:
# fmt: off

# The training loss.

fault = partial(enter, family="loss")

fault("broadcast_loss", "broadcast_loss",
      "Predictions (N, 1) minus targets (N,) make a matrix of differences of all pairs.",
      training_error=lambda s, preds, y: jnp.mean((preds[:, None] - y) ** 2), minimal=(2, 1))
fault("sum_instead_of_mean", "sum_instead_of_mean",
      "The training loss is the sum over the batch.",
      training_error=lambda s, preds, y: jnp.sum((preds - y) ** 2), minimal=(2, 1))
fault("first_row_counts_twice", "rows_treated_unequally",
      "The first row's error counts twice.",
      training_error=lambda s, preds, y:
          (jnp.sum(errors := (preds - y) ** 2) + errors[0]) / (len(y) + 1),
      minimal=(2, 1))
fault("last_row_left_out_of_the_loss", "rows_treated_unequally",
      "The last row counts in the statistics but not in the loss.",
      training_error=lambda s, preds, y: all_but_the_last_row(preds, y), minimal=(2, 1),
      source="https://github.com/google/flax/issues/1850")
fault("mean_of_unequal_shards_means", "rows_treated_unequally",
      "The loss is the mean of the means of two shards, the first row and the others.",
      training_error=mean_of_two_unequal_means, minimal=(3, 1),
      source="https://github.com/huggingface/transformers/pull/18458")
fault("targets_reversed", "targets_misaligned",
      "The targets are in the reverse order of the rows.",
      training_error=lambda s, preds, y: s.error(preds, y[::-1]), minimal=(2, 1))
fault("targets_shifted_by_one_row", "targets_misaligned",
      "Every row is compared with the target of the row before it.",
      training_error=lambda s, preds, y: s.error(preds, jnp.roll(y, 1)), minimal=(2, 1))
fault("targets_ignored", "targets_ignored",
      "The training loss compares predictions with zero.",
      training_error=lambda s, preds, y: jnp.mean(preds**2))
fault("targets_replaced_by_their_mean", "targets_ignored",
      "The training loss compares every prediction with the mean of the targets.",
      training_error=lambda s, preds, y: s.error(preds, jnp.mean(y)), minimal=(2, 1))
fault("training_loss_halved", "losses_differ",
      "The training loss has a factor 1/2 that the eval loss does not have.",
      training_error=lambda s, preds, y: s.error(preds, y) / 2)
fault("training_loss_is_huber", "losses_differ",
      "Training minimises the Huber loss; evaluation reports the squared error.",
      training_error=huber)
fault("logistic_loss_overflows", "exponential_overflows",
      "The loss is log(1 + exp(y - preds)), which overflows for errors above 88.",
      error=lambda s, preds, y: jnp.mean(jnp.log(1 + jnp.exp(y - preds))))
fault("logarithm_of_an_underflow", "log_of_zero",
      "The loss is -log(sigmoid(preds - y)); the sigmoid underflows to 0 for errors above 88.",
      error=lambda s, preds, y: -jnp.mean(jnp.log(jax.nn.sigmoid(preds - y))))
fault("loss_is_the_root_of_a_mean", "loss_not_a_mean_over_rows",
      "Training and evaluation take the root of the mean squared error.",
      error=lambda s, preds, y: jnp.sqrt(jnp.mean((preds - y) ** 2) + 1e-12))
fault("loss_has_one_axis", "loss_not_reduced",
      "The reported loss has shape (1,) instead of ().",
      report=lambda s, loss, grads: StepInfo(loss.reshape(1), grads))
fault("penalty_on_the_running_variance", "loss_reads_old_statistics",
      "The training loss contains a hundredth of the mean of the old running variance.",
      loss=with_penalty(lambda old, new: 0.01 * jnp.mean(old["var"])))
fault("penalty_on_the_new_statistics", "loss_reads_old_statistics",
      "The training loss contains the square of the new running mean, gradient included.",
      loss=with_penalty(lambda old, new: jnp.mean(new["mean"] ** 2)))
fault("padding_enters_statistics", "rows_treated_unequally",
      "The batch is padded to a multiple of four; the loss masks the padding, BatchNorm does not.",
      base=PaddedStep, mask=lambda s, weights: None,
      source="https://github.com/pytorch/pytorch/issues/70529")
fault("padding_enters_the_mean", "rows_treated_unequally",
      "Padding is masked in BatchNorm, but the loss divides by the number of padded rows.",
      base=PaddedStep, loss=divided_by_the_padded_rows)
fault("last_micro_batch_kept", "statistics_of_part_of_the_batch",
      "Gradients of two micro-batches are averaged, but only the last one's statistics are kept.",
      gradients=two_micro_batches, minimal=(2, 1),
      source="https://github.com/marin-community/marin/pull/8360")

# The gradient.

fault = partial(enter, family="gradient")

fault("gradient_of_all_variables", "gradient_of_all_variables",
      "The gradient is taken of params and statistics, and both are reported.",
      step=all_variables_differentiated)
fault("mutable_forgotten", "mutable_forgotten",
      "The training pass does not declare batch_stats mutable: Flax raises an error.",
      loss=mutable_forgotten, raises="ModifyScopeVariableError",
      source="https://github.com/google/evojax/issues/60")
fault("has_aux_forgotten", "has_aux_forgotten",
      "value_and_grad has no has_aux=True, though the loss also returns statistics: JAX raises an error.",
      gradients=lambda s, state, x, y:
          jax.value_and_grad(s.loss)(state.params, state.batch_stats, x, y),
      raises="TypeError")
fault("gradient_in_eval_mode", "wrong_gradient",
      "Loss and statistics are those of train mode, the gradient is that of eval mode.",
      gradients=gradient_of(lambda s, params, state, x, y:
          s.evaluate(state._replace(params=params), x, y)[0]))
fault("penalty_differentiated_but_not_reported", "wrong_gradient",
      "The gradient contains a penalty on the params that the reported loss does not.",
      slope=lambda s, grads, state, x: mapped(lambda g, p: g + 0.01 * p, grads, state.params))
fault("absolute_error_differentiated", "wrong_gradient",
      "The squared error is reported, but the absolute error is minimised.",
      gradients=gradient_of(lambda s, params, state, x, y:
          jnp.mean(jnp.abs(s.apply(params, state.batch_stats, x, train=True)[0] - y))))
fault("loss_reported_after_the_update", "gradient_of_another_loss",
      "The reported loss is that of the params after the update.",
      step=loss_after_the_update)
fault("gradient_of_the_sum_but_the_mean_reported", "wrong_gradient",
      "The gradient is that of the sum over the batch, the reported loss is the mean.",
      slope=lambda s, grads, state, x: mapped(lambda g: g * x.shape[0], grads), minimal=(2, 1))
fault("updates_reported_as_gradients", "wrong_gradient",
      "Half of the gradient is reported, but the update uses all of it.",
      report=lambda s, loss, grads: StepInfo(loss, mapped(lambda g: g / 2, grads)))
fault("moments_held_constant", "wrong_gradient",
      "No gradient flows through the batch's moments.",
      base=HandwrittenNorm, minimal=(2, 1),
      training_moments=lambda s, batch, old, new, layer: jax.lax.stop_gradient(batch))
fault("mean_held_constant", "wrong_gradient",
      "No gradient flows through the batch's mean, so the bias before it has a gradient.",
      base=HandwrittenNorm, minimal=(2, 1),
      training_moments=lambda s, batch, old, new, layer:
          (jax.lax.stop_gradient(batch[0]), batch[1]))
fault("variance_held_constant", "wrong_gradient",
      "No gradient flows through the batch's variance.",
      base=HandwrittenNorm, minimal=(2, 1),
      training_moments=lambda s, batch, old, new, layer:
          (batch[0], jax.lax.stop_gradient(batch[1])))
fault("backbone_frozen", "wrong_gradient",
      "The first layer's kernel gets no gradient, as if it were still frozen.",
      slope=lambda s, grads, *_: edited(grads, "Dense_0/kernel", jnp.zeros_like), minimal=(2, 1),
      source="https://github.com/lightly-ai/lightly/issues/1438")
fault("gradients_of_scale_and_bias_swapped", "wrong_gradient",
      "The gradients of the normalisation's scale and bias are swapped.",
      slope=scale_and_bias_swapped, minimal=(2, 1))
fault("gradient_passes_dead_units", "wrong_gradient",
      "The backward pass of the activation also passes gradients where the unit is inactive.",
      activate=lambda s, a: a + jax.lax.stop_gradient(jnp.maximum(a, 0.0) - a))
fault("gradient_doubled_by_two_backward_passes", "wrong_gradient",
      "The gradients of two backward passes are added: the first is never cleared.",
      slope=lambda s, grads, *_: mapped(lambda g: g + g, grads))
fault("gradient_of_one_row", "wrong_gradient",
      "Loss and statistics are those of the batch, the gradient is that of its first row.",
      gradients=gradient_of(lambda s, params, state, x, y:
          (s.apply(params, state.batch_stats, x, train=True)[0][0] - y[0]) ** 2),
      minimal=(2, 1))
fault("gradient_normalised", "wrong_gradient",
      "The gradient is scaled to length 1 before it is reported and used.",
      slope=of_length_one)
fault("gradients_above_one_cut", "wrong_gradient",
      "Every entry of the gradient is clipped to [-1, 1] before it is reported and used.",
      slope=lambda s, grads, *_: mapped(lambda g: jnp.clip(g, -1.0, 1.0), grads))
fault("not_a_number_replaced_by_zero", "wrong_gradient",
      "NaN gradients are replaced by 0, so that a broken step goes unnoticed.",
      slope=lambda s, grads, *_: mapped(jnp.nan_to_num, grads),
      survives="equivalent if gradients are finite, as they are in the whole domain")

# Evaluation.

fault = partial(enter, family="evaluation")
of_layer = partial(fault, base=HandwrittenNorm)
of_solution = partial(fault, base=WithSolution)

fault("eval_in_train_mode", "eval_in_train_mode",
      "Evaluation runs the model with train=True and drops the statistics.",
      evaluate=lambda s, state, x, y: s.loss(state.params, state.batch_stats, x, y)[0].reshape(1),
      after_eval=lambda s, state, x, y: state, source="https://github.com/yanx27/GACNet/issues/8")
fault("eval_in_train_mode_writes", "eval_in_train_mode",
      "Evaluation runs the model with train=True and keeps the statistics.",
      evaluate=lambda s, state, x, y: s.loss(state.params, state.batch_stats, x, y)[0].reshape(1),
      after_eval=lambda s, state, x, y:
          state._replace(batch_stats=s.loss(state.params, state.batch_stats, x, y)[1]))
of_layer("eval_writes_statistics", "eval_in_train_mode",
         "Evaluation uses the running statistics, and updates them with its batch.",
         written_in_eval=lambda s, running, h, layer: s.fold(running, s.moments(h, layer), layer))
of_layer("eval_centres_by_its_batch", "eval_in_train_mode",
         "Evaluation scales by the running variance but centres by the mean of its own batch.",
         evaluation_moments=lambda s, running, h, layer: (s.moments(h, layer)[0], running[1]))
of_layer("eval_scales_by_its_batch", "eval_in_train_mode",
         "Evaluation centres by the running mean but scales by the variance of its own batch.",
         evaluation_moments=lambda s, running, h, layer: (running[0], s.moments(h, layer)[1]))
of_layer("eval_folds_its_batch_first", "eval_in_train_mode",
         "Evaluation normalises by the running moments with its own batch folded in.",
         evaluation_moments=lambda s, running, h, layer:
             s.fold(running, s.moments(h, layer), layer))
fault("eval_of_initial_params", "eval_of_stale_state",
      "Evaluation closes over the initial params, those of seed 0.",
      evaluate=lambda s, state, x, y:
          s.right.evaluate(state._replace(params=s.variables(0, x)["params"]), x, y),
      source="https://github.com/google/flax/pull/3982")
fault("eval_of_initial_statistics", "eval_of_stale_state",
      "Evaluation closes over the initial statistics, mean 0 and variance 1.",
      evaluate=lambda s, state, x, y:
          s.right.evaluate(state._replace(batch_stats=s.variables(0, x)["batch_stats"]), x, y),
      source="https://github.com/google/flax/pull/3982")
of_layer("eval_ignores_the_running_mean", "eval_ignores_variables",
         "Evaluation scales by the running variance and does not centre.",
         evaluation_moments=lambda s, running, h, layer: (jnp.zeros_like(running[0]), running[1]))
of_layer("eval_ignores_the_running_variance", "eval_ignores_variables",
         "Evaluation centres by the running mean and does not scale.",
         evaluation_moments=lambda s, running, h, layer: (running[0], jnp.ones_like(running[1])))
of_layer("eval_ignores_the_scale", "eval_ignores_variables",
         "Evaluation omits the layer's scale.",
         standardise=lambda s, h, moments, affine, train, layer: s.right.standardise(
             h, moments, (affine[0] if train else 1.0, affine[1]), train, layer),
         minimal=(2, 1))
of_layer("eval_reads_the_variance_as_deviation", "modes_differ",
         "Evaluation uses the running variance as a standard deviation.",
         inverse_deviation=lambda s, var, train, layer:
             (s.right.inverse_deviation(var, train, layer) if train else 1.0 / (var + s.epsilon)))
fault("eval_ignores_the_output_bias", "eval_ignores_variables",
      "Evaluation omits the bias of the output layer.",
      evaluate=lambda s, state, x, y: s.right.evaluate(state._replace(
          params=edited(state.params, f"Dense_{s.layers}/bias", jnp.zeros_like)), x, y))
fault("eval_broadcasts", "broadcast_loss",
      "Evaluation subtracts targets (N,) from predictions (N, 1).",
      evaluation_error=lambda s, preds, y: jnp.mean((preds[:, None] - y) ** 2).reshape(1),
      minimal=(2, 1))
fault("eval_sums", "sum_instead_of_mean",
      "Evaluation reports the sum over the batch.",
      evaluation_error=lambda s, preds, y: jnp.sum((preds - y) ** 2).reshape(1), minimal=(2, 1))
fault("eval_loss_not_reduced", "loss_not_reduced",
      "Evaluation returns one error for each row.",
      evaluation_error=lambda s, preds, y: (preds - y) ** 2, minimal=(2, 1))
fault("eval_drops_the_last_row", "rows_treated_unequally",
      "Evaluation omits the last row, unless it is the only one.",
      evaluation_error=lambda s, preds, y: all_but_the_last_row(preds, y).reshape(1),
      minimal=(2, 1), source="https://github.com/huggingface/transformers/pull/17863")
fault("eval_reports_the_root", "losses_differ",
      "Evaluation reports the root of the mean squared error.",
      evaluation_error=lambda s, preds, y: jnp.sqrt(s.error(preds, y)).reshape(1))
fault("eval_reverses_the_targets", "targets_misaligned",
      "Evaluation compares predictions with the targets in reverse order.",
      evaluation_error=lambda s, preds, y: s.error(preds, y[::-1]).reshape(1), minimal=(2, 1))
fault("eval_standardises_its_batch", "eval_in_train_mode",
      "Evaluation, unlike training, first subtracts the mean of its batch from the features.",
      evaluate=lambda s, state, x, y: s.right.evaluate(state, x - jnp.mean(x, axis=0), y))
fault("eval_of_averaged_params_with_other_statistics", "modes_differ",
      "Evaluation averages the params with the initial ones, but not the statistics.",
      evaluate=averaged_with_the_initial_params,
      source="https://github.com/FlyreelAI/sesemi/issues/36")
of_solution("solution_evaluates_the_old_state", "eval_of_stale_state",
            "The one-call function evaluates the state from before its step.",
            evaluated=lambda s, before, after: before,
            source="https://github.com/google/flax/pull/3982")
of_solution("solution_evaluates_old_statistics", "eval_of_stale_state",
            "The one-call function evaluates new params with the statistics from before its step.",
            evaluated=lambda s, before, after: after._replace(batch_stats=before.batch_stats))
of_solution("solution_evaluates_old_params", "eval_of_stale_state",
            "The one-call function evaluates old params with the statistics from after its step.",
            evaluated=lambda s, before, after: after._replace(params=before.params))
of_solution("solution_rounds_its_seed", "seed_not_truncated",
            "The one-call function rounds its seed to the nearest integer.",
            truncated=lambda s, seed: jnp.round(jnp.asarray(seed)).astype(jnp.int32))
of_solution("solution_holds_its_seed_in_float32", "seed_not_truncated",
            "The one-call function converts its seed to float32, which has no odd numbers above 2^24.",
            truncated=lambda s, seed: jnp.asarray(seed, jnp.float32).astype(jnp.int32))

# Inputs, params or targets that never reach a result.

fault = partial(enter, family="ignoring", blind=False)

fault("batch_baked_in", "inputs_ignored",
      "The training step closes over the first inputs, which become a constant during tracing.",
      batch=lambda s, x, y: (baked_in(x), y))
fault("batch_baked_into_the_evaluation", "inputs_ignored",
      "Evaluation closes over the first inputs, which become a constant during tracing.",
      evaluate=lambda s, state, x, y: s.right.evaluate(state, baked_in(x), y))
fault("loss_of_the_targets_alone", "gradient_of_another_loss",
      "The reported training loss is the mean square of the targets, without the predictions.",
      step=lambda s, state, x, y, lr:
          ((done := s.right.step(state, x, y, lr))[0], done[1]._replace(loss=jnp.mean(y**2))))
fault("evaluation_of_the_predictions_alone", "targets_ignored",
      "The eval loss is the mean square of the predictions, without the targets.",
      evaluate=lambda s, state, x, y: s.right.evaluate(state, x, jnp.zeros_like(y)))

# Faults that only some numbers of rows or features show.

fault = partial(enter, family="sizes")
of_layer = partial(fault, base=HandwrittenNorm)

fault("last_row_dropped", "rows_treated_unequally",
      "Training drops the last row of every batch of more than one.",
      batch=kept_rows(lambda rows: max(rows - 1, 1)), minimal=(2, 1),
      source="https://github.com/google/flax/issues/1850")
fault("odd_row_dropped", "rows_treated_unequally",
      "Training takes rows in pairs and drops the last one of an odd number.",
      batch=kept_rows(lambda rows: max(rows // 2 * 2, 1)), minimal=(3, 1))
fault("remainder_of_four_dropped", "rows_treated_unequally",
      "Training drops the rows beyond a multiple of four, if there are more than four.",
      batch=kept_rows(lambda rows: rows // 4 * 4 if rows > 4 else rows), minimal=(5, 1),
      source="https://github.com/huggingface/transformers/pull/17863")
fault("rows_beyond_eight_left_out_of_the_loss", "rows_treated_unequally",
      "Rows after the eighth count in the statistics but not in the loss.",
      training_error=lambda s, preds, y: s.error(preds[:8], y[:8]), minimal=(9, 1))
of_layer("rows_beyond_sixteen_left_out_of_the_moments", "rows_treated_unequally",
         "Rows after the sixteenth count in neither mean nor variance.",
         moments=lambda s, h, layer: s.right.moments(h[:16], layer), minimal=(17, 1))
of_layer("rows_beyond_thirty_two_not_recorded", "statistics_of_part_of_the_batch",
         "The recorded moments are those of the first thirty-two rows.",
         recorded=lambda s, h, batch, layer: s.moments(h[:32], layer), minimal=(33, 1))
fault("sixty_four_rows_overflow_a_counter", "rows_treated_unequally",
      "The loss counts its rows modulo 64: a full batch divides by one.",
      training_error=lambda s, preds, y:
          jnp.sum((preds - y) ** 2) / jnp.maximum(y.shape[0] % 64, 1),
      minimal=(64, 1))
fault("rows_beyond_sixty_four_left_out", "rows_treated_unequally",
      "Training drops the rows after the sixty-fourth.",
      batch=kept_rows(lambda rows: 64), minimal=(65, 1),
      survives="outside the default domain, whose batches have at most 64 rows")
fault("batch_of_one_in_eval_mode", "train_step_in_eval_mode",
      "A batch of one row is trained in eval mode, to avoid its variance of 0.",
      loss=one_row_in_eval_mode, source="https://github.com/FluxML/Flux.jl/issues/1992")
of_layer("batch_of_one_not_recorded", "new_statistics_dropped",
         "A batch of one row does not change the statistics.",
         rows=0, recorded=rows_counted,
         fold=lambda s, old, batch, layer: old if s.rows == 1 else s.right.fold(old, batch, layer),
         source="https://github.com/FluxML/Flux.jl/issues/1992")
of_layer("batch_of_one_has_variance_one", "wrong_moments",
         "The recorded variance of a single row is 1, so that nothing divides by zero.",
         recorded=lambda s, h, batch, layer:
             ((batch[0], jnp.ones_like(batch[1])) if h.shape[0] == 1 else batch))
fault("last_feature_not_trained", "wrong_gradient",
      "The weights of the last feature get no gradient, if there are several features.",
      slope=lambda s, grads, state, x: (
          grads if x.shape[1] == 1
          else edited(grads, "Dense_0/kernel", lambda g: g.at[-1].set(0.0))), minimal=(2, 2))
fault("last_feature_only_evaluated", "modes_differ",
      "Training, unlike evaluation, omits the last feature, if there are several.",
      batch=lambda s, x, y: (jnp.asarray(x).at[:, -1].set(0.0) if x.shape[1] > 1 else x, y),
      minimal=(1, 2))
fault("square_batch_transposed", "rows_treated_unequally",
      "Training transposes a square batch, as if it were in the other layout.",
      batch=lambda s, x, y: (x.T if x.shape[0] == x.shape[1] else x, y), minimal=(2, 2))
fault("features_beyond_eight_not_trained", "update_dropped",
      "Weights of the features after the eighth are not updated.",
      thread=first_eight_features_updated, minimal=(2, 9))
of_layer("four_shards_where_they_fit", "variances_averaged",
         "If a batch splits into four shards, the recorded variance is the mean of theirs.",
         recorded=four_shards_where_they_fit, minimal=(4, 1),
         source="https://github.com/tensorflow/tpu/issues/321")
