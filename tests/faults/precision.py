"""Faults of precision: too few bits, another shape, dtype or container, and small errors."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import core

from bnverify import State, StepInfo
from tests.faults.catalogue import enter
from tests.faults.steps import (
    HandwrittenNorm,
    Tree,
    adam,
    averaged,
    carried,
    edited,
    mapped,
    momentum,
    rounded,
)

ALLOWED = "a choice of precision: its rounding is part of the step, so it is within tolerance"


def cast(dtype: Any) -> Any:
    """Return a function (old, new) -> new part of the state in another dtype."""
    return lambda old, new: mapped(lambda leaf: leaf.astype(dtype), new)


def through(dtype: str) -> Any:
    """Return a function (old, new) -> new part of the state, rounded to ``dtype``."""
    return lambda old, new: mapped(lambda leaf: rounded(leaf, dtype), new)


def stored_in_bfloat16(s: Any, seed: Any, x: Any) -> State:
    state = s.right.init(seed, x)
    stored: State = s.thread(state, state)
    return stored


def filled_with_a_python_scalar(s: Any, seed: Any, x: Any) -> State:
    state: State = s.right.init(seed, x)
    filled = edited(state.params, "Dense_0/bias", lambda leaf: jnp.full(leaf.shape, 0.0))
    return state._replace(params=filled)


def moments_in(dtype: Any) -> Any:
    def moments(s: Any, h: Any, layer: int) -> Any:
        mean, var = s.right.moments(h.astype(dtype), layer)
        return mean.astype(jnp.float32), var.astype(jnp.float32)

    return moments


def opt_state_flattened(s: Any, grads: Tree, state: State, lr: Any) -> tuple[Tree, Tree]:
    """Update correctly, but return only the leaves of the optimizer's state."""
    structure = jax.tree_util.tree_structure(s.tx(lr).init(state.params))
    leaves = jax.tree_util.tree_leaves(state.opt_state)
    rebuilt = jax.tree_util.tree_unflatten(structure, leaves)
    params, opt_state = s.right.update(grads, state._replace(opt_state=rebuilt), lr)
    return params, tuple(jax.tree_util.tree_leaves(opt_state))


def an_axis_kept(s: Any, params: Tree, batch_stats: Tree, x: Any, y: Any) -> tuple[Any, Tree]:
    """Use the statistics without the extra axis, but return them with it."""
    loss, new = s.right.loss(params, mapped(jnp.ravel, batch_stats), x, y)
    return loss, mapped(lambda leaf: leaf[None], new)


def missing_variance_filled_in(
    s: Any, params: Tree, batch_stats: Tree, *given: Any, **named: Any
) -> tuple[Any, Tree]:
    norm = batch_stats["BatchNorm_0"]
    full = {"BatchNorm_0": {"mean": norm["mean"], "var": norm.get("var", jnp.ones(8))}}
    done: tuple[Any, Tree] = s.right.apply(params, full, *given, **named)
    return done


def last_bias_left_out(s: Any, loss: Any, grads: Tree) -> StepInfo:
    last = f"Dense_{s.layers}"
    return StepInfo(loss, {**grads, last: {"kernel": grads[last]["kernel"]}})


# Each row in as few lines as it takes:
# fmt: off

# Values that are stored or computed with too few bits.

fault = partial(enter, family="low_precision")
of_layer = partial(fault, base=HandwrittenNorm)

fault("statistics_in_bfloat16", "statistics_in_low_precision",
      "The statistics are stored in bfloat16 from the start.",
      init=stored_in_bfloat16, thread=carried(batch_stats=cast(jnp.bfloat16)),
      source="https://github.com/NVIDIA/Model-Optimizer/pull/738")
fault("statistics_pass_through_bfloat16", "statistics_in_low_precision",
      "The statistics are float32 but rounded to bfloat16: small changes are lost.",
      thread=carried(batch_stats=through("bfloat16")),
      source="https://github.com/NVIDIA/Model-Optimizer/pull/738")
fault("statistics_pass_through_half", "statistics_overflow",
      "The statistics pass through float16, where a variance above 65504 is infinite.",
      thread=carried(batch_stats=through("float16")))
of_layer("moments_in_half", "statistics_overflow",
         "The moments are computed in float16, where the square of 256 is infinite.",
         moments=moments_in(jnp.float16))
of_layer("moments_in_bfloat16", "statistics_in_low_precision",
         "The moments are computed in bfloat16, which keeps eight bits of each square.",
         moments=moments_in(jnp.bfloat16))
of_layer("only_the_variance_in_bfloat16", "statistics_in_low_precision",
         "The recorded variance is rounded to bfloat16; everything else is float32.",
         recorded=lambda s, h, batch, layer: (batch[0], rounded(batch[1], "bfloat16")),
         minimal=(2, 1))
of_layer("momentum_rounded_to_bfloat16", "statistics_in_low_precision",
         "Momentum 0.99 is held in bfloat16, where it is 0.98828125.",
         fold=lambda s, old, batch, layer: averaged(0.98828125, old, batch),
         source="https://github.com/NVIDIA/Model-Optimizer/pull/738")
fault("gradients_through_bfloat16", "low_precision",
      "Gradients are communicated in bfloat16.",
      slope=lambda s, grads, *_: mapped(lambda g: rounded(g, "bfloat16"), grads),
      tolerated=ALLOWED)
fault("gradients_through_half", "low_precision",
      "Gradients pass through float16 without a loss scale: small ones vanish, large overflow.",
      slope=lambda s, grads, *_: mapped(lambda g: rounded(g, "float16"), grads),
      tolerated="a choice of precision: its rounding and its overflow are part of the "
                "step's own arithmetic, so they are within tolerance")
fault("inputs_through_half", "low_precision",
      "Training reads its batch in float16, in which features above 65504 are infinite.",
      batch=lambda s, x, y: (rounded(x, "float16"), y))
fault("targets_through_bfloat16", "low_precision",
      "Training compares with targets that were rounded to bfloat16; evaluation does not.",
      training_error=lambda s, preds, y: s.error(preds, rounded(y, "bfloat16")), tolerated=ALLOWED)
fault("targets_as_integers", "low_precision",
      "Training truncates its targets to integers.",
      training_error=lambda s, preds, y: s.error(preds, jnp.trunc(y)))
fault("params_through_bfloat16", "low_precision",
      "Updated params are rounded to bfloat16: small updates are lost.",
      optimizer=momentum, thread=carried(params=through("bfloat16")))
fault("momentum_buffer_through_bfloat16", "low_precision",
      "The momentum buffer is rounded to bfloat16 in each step.",
      optimizer=momentum, thread=carried(opt_state=through("bfloat16")))
fault("learning_rate_through_bfloat16", "update_scaled",
      "The learning rate is rounded to bfloat16.",
      tx=lambda s, lr: s.optimizer(rounded(lr, "bfloat16")))
of_layer("eval_reads_statistics_in_bfloat16", "statistics_in_low_precision",
         "Evaluation rounds the running statistics to bfloat16 as it reads them.",
         evaluation_moments=lambda s, running, h, layer:
             (rounded(running[0], "bfloat16"), rounded(running[1], "bfloat16")))
fault("errors_added_up_in_bfloat16", "low_precision",
      "The mean squared error is computed in bfloat16 and reported in float32.",
      training_error=lambda s, preds, y:
          jnp.mean(((preds - y) ** 2).astype(jnp.bfloat16)).astype(jnp.float32),
      tolerated=ALLOWED)

# The shapes, dtypes and containers of the state.

fault = partial(enter, family="shapes")

fault("params_become_half", "parameters_change_dtype",
      "The new params are float16.",
      thread=carried(params=cast(jnp.float16)))
fault("one_param_becomes_bfloat16", "parameters_change_dtype",
      "Only the normalisation's scale becomes bfloat16.",
      thread=carried(params=lambda old, new:
          edited(new, "BatchNorm_0/scale", lambda leaf: leaf.astype(jnp.bfloat16))))
fault("optimizer_state_becomes_bfloat16", "parameters_change_dtype",
      "The momentum buffers become bfloat16.",
      optimizer=momentum, thread=carried(opt_state=cast(jnp.bfloat16)))
fault("optimizer_count_becomes_float", "parameters_change_dtype",
      "Adam's count becomes a float.",
      optimizer=adam, thread=carried(opt_state=cast(jnp.float32)),
      source="https://github.com/google/flax/issues/1550")
fault("optimizer_state_flattened", "parameters_change_dtype",
      "The optimizer's state becomes a plain tuple of its leaves.",
      optimizer=momentum, update=opt_state_flattened,
      source="https://github.com/google/flax/issues/1550")
fault("statistics_keep_their_axis", "parameters_change_dtype",
      "The statistics get the shape (1, channels), as with keepdims=True in a mean.",
      loss=an_axis_kept)
fault("statistics_become_frozen", "parameters_change_dtype",
      "The statistics are returned in a FrozenDict instead of a dict.",
      thread=carried(batch_stats=lambda old, new: core.freeze(new)))
fault("initial_bias_is_weak", "weak_type_in_the_state",
      "An initial bias is filled with a Python scalar; the step returns another type.",
      init=filled_with_a_python_scalar)
fault("statistics_gain_a_count", "parameters_change_dtype",
      "The statistics have an additional entry, the number of steps.",
      thread=carried(batch_stats=lambda old, new:
          {**new, "count": old.get("count", jnp.float32(0)) + 1}))
fault("variance_missing", "new_statistics_dropped",
      "The statistics are returned without their variances; the next step starts them from 1.",
      apply=missing_variance_filled_in,
      thread=carried(batch_stats=lambda old, new:
          {"BatchNorm_0": {"mean": new["BatchNorm_0"]["mean"]}}))
fault("gradient_leaf_missing", "wrong_gradient",
      "The reported gradient lacks the leaf of the output layer's bias.",
      report=last_bias_left_out)
fault("loss_in_bfloat16", "low_precision",
      "The loss is reported in bfloat16.",
      report=lambda s, loss, grads: StepInfo(loss.astype(jnp.bfloat16), grads), tolerated=ALLOWED)
fault("eval_loss_in_half", "low_precision",
      "Evaluation returns float16, which overflows for errors above 65504.",
      base=HandwrittenNorm,
      evaluate=lambda s, state, x, y: s.right.evaluate(state, x, y).astype(jnp.float16))
# fmt: on

# A value is multiplied by 1 + size.


def small(name: str, mistake: str, sentence: str, **row: Any) -> None:
    """Add a fault twice, with errors of 1e-3 and 1e-4."""
    for word, size in {"a_thousandth": 1e-3, "a_ten_thousandth": 1e-4}.items():
        told = f"{sentence} The factor is 1 + {size:g}."
        enter(f"{name}_by_{word}", mistake, told, family="small", size=size, **row)


def off(s: Any, value: Any) -> Any:
    return value * (1 + s.size)


def tree_off(s: Any, tree: Tree) -> Tree:
    return mapped(lambda leaf: off(s, leaf), tree)


def first_channel_off(s: Any, h: Any, batch: Any, layer: int) -> Any:
    first = jnp.arange(s.hidden) == 0
    return jnp.where(first, off(s, batch[0]), batch[0]), batch[1]


def first_row_off(s: Any, params: Tree, batch_stats: Tree, x: Any, y: Any) -> tuple[Any, Tree]:
    preds, batch_stats = s.apply(params, batch_stats, x, train=True)
    return s.error(preds, y) + s.size * (preds[0] - y[0]) ** 2 / y.shape[0], batch_stats


# Each row in as few lines as it takes:
# fmt: off
of_layer = partial(small, base=HandwrittenNorm)

of_layer("running_mean_off", "weights_do_not_sum_to_one",
         "The recorded mean of the batch is slightly wrong.",
         recorded=lambda s, h, batch, layer: (off(s, batch[0]), batch[1]))
of_layer("running_variance_off", "weights_do_not_sum_to_one",
         "The recorded variance of the batch is slightly wrong.",
         recorded=lambda s, h, batch, layer: (batch[0], off(s, batch[1])), minimal=(2, 1))
of_layer("momentum_off", "weights_do_not_sum_to_one",
         "The weight of the new value in the moving average is slightly wrong, that of the old one is right.",
         fold=lambda s, old, batch, layer: s.right.fold(old, tree_off(s, batch), layer))
of_layer("old_statistics_off", "weights_do_not_sum_to_one",
         "The weight of the old value in the moving average is slightly wrong.",
         fold=lambda s, old, batch, layer: s.right.fold(tree_off(s, old), batch, layer))
small("one_gradient_leaf_off", "wrong_gradient",
      "The gradient of the normalisation's bias is slightly wrong.",
      slope=lambda s, grads, *_: edited(grads, "BatchNorm_0/bias", partial(off, s)),
      minimal=(2, 1))
small("first_kernel_gradient_off", "wrong_gradient",
      "The gradient of the first kernel is slightly wrong.",
      slope=lambda s, grads, *_: edited(grads, "Dense_0/kernel", partial(off, s)), minimal=(2, 1))
small("reported_gradient_off", "wrong_gradient",
      "The reported gradient is slightly wrong, the one used is right.",
      report=lambda s, loss, grads: StepInfo(loss, tree_off(s, grads)))
small("reported_loss_off", "gradient_of_another_loss",
      "The reported training loss is slightly wrong.",
      report=lambda s, loss, grads: StepInfo(off(s, loss), grads))
small("eval_loss_off", "losses_differ",
      "The eval loss is slightly wrong.",
      evaluate=lambda s, state, x, y: off(s, s.right.evaluate(state, x, y)))
small("learning_rate_off", "update_scaled",
      "The learning rate of the optimizer is slightly wrong.",
      tx=lambda s, lr: s.optimizer(off(s, lr)))
small("params_grow", "decay_grows_params",
      "The updated params are scaled slightly.",
      thread=lambda s, old, new: new._replace(params=tree_off(s, new.params)))
of_layer("eval_mean_off", "modes_differ",
         "Evaluation centres by a running mean that is slightly wrong.",
         evaluation_moments=lambda s, running, h, layer: (off(s, running[0]), running[1]))
of_layer("eval_variance_off", "modes_differ",
         "Evaluation scales by a running variance that is slightly wrong.",
         evaluation_moments=lambda s, running, h, layer: (running[0], off(s, running[1])))
of_layer("eval_epsilon_off", "modes_differ",
         "Evaluation's epsilon is slightly wrong, which only a variance near it can show.",
         inverse_deviation=lambda s, var, train, layer:
             s.right.inverse_deviation(var if train else var + s.epsilon * s.size, train, layer))
small("first_row_off", "rows_treated_unequally",
      "The first row's error has a slightly larger weight than the others'.",
      loss=first_row_off)
of_layer("old_mean_leaks", "loss_reads_old_statistics",
         "A little of the old running mean is mixed into the mean that normalises in training.",
         training_moments=lambda s, batch, old, new, layer:
             (batch[0] + s.size * (old[0] - batch[0]), batch[1]))
of_layer("one_channel_off", "weights_do_not_sum_to_one",
         "The recorded mean of the first channel is slightly wrong.",
         recorded=first_channel_off)
