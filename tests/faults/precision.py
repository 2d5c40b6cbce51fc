"""Faults of digits: too few bits, another shape, dtype or container, and what is off by very little."""

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

ALLOWED = (
    "a choice of precision: its rounding is part of the step's own arithmetic, and allowed for"
)


def cast(dtype: Any) -> Any:
    """Return what carries a part of the state on in another dtype."""
    return lambda old, new: mapped(lambda leaf: leaf.astype(dtype), new)


def through(dtype: str) -> Any:
    """Return what carries a part of the state on with the digits of ``dtype``, in its own dtype."""
    return lambda old, new: mapped(lambda leaf: rounded(leaf, dtype), new)


def stored_in_bfloat16(s: Any, seed: Any, x: Any) -> State:
    state = s.right.init(seed, x)
    stored: State = s.thread(state, state)
    return stored


def moments_in(dtype: Any) -> Any:
    def moments(s: Any, h: Any, layer: int) -> Any:
        mean, var = s.right.moments(h.astype(dtype), layer)
        return mean.astype(jnp.float32), var.astype(jnp.float32)

    return moments


def opt_state_flattened(s: Any, grads: Tree, state: State, lr: Any) -> tuple[Tree, Tree]:
    """Update with the state as it should be, and carry on its leaves."""
    structure = jax.tree_util.tree_structure(s.tx(lr).init(state.params))
    leaves = jax.tree_util.tree_leaves(state.opt_state)
    rebuilt = jax.tree_util.tree_unflatten(structure, leaves)
    params, opt_state = s.right.update(grads, state._replace(opt_state=rebuilt), lr)
    return params, tuple(jax.tree_util.tree_leaves(opt_state))


def an_axis_kept(s: Any, params: Tree, batch_stats: Tree, x: Any, y: Any) -> tuple[Any, Tree]:
    """Use the statistics flat, carry them on with an axis."""
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

# What is kept, or computed, with too few bits.

fault = partial(enter, family="low_precision")
of_layer = partial(fault, base=HandwrittenNorm)

fault("statistics_in_bfloat16", "statistics_in_low_precision",
      "The statistics are stored in bfloat16, from the first state on.",
      init=stored_in_bfloat16, thread=carried(batch_stats=cast(jnp.bfloat16)),
      source="https://github.com/NVIDIA/Model-Optimizer/pull/738")
fault("statistics_pass_through_bfloat16", "statistics_in_low_precision",
      "The statistics are float32 with the digits of bfloat16: small changes are lost.",
      thread=carried(batch_stats=through("bfloat16")),
      source="https://github.com/NVIDIA/Model-Optimizer/pull/738")
fault("statistics_pass_through_half", "statistics_overflow",
      "The statistics pass through float16, beyond whose 65504 a variance is infinite.",
      thread=carried(batch_stats=through("float16")))
of_layer("moments_in_half", "statistics_overflow",
         "The moments are computed in float16, where the square of 256 is infinite.",
         moments=moments_in(jnp.float16))
of_layer("moments_in_bfloat16", "statistics_in_low_precision",
         "The moments are computed in bfloat16, which keeps eight bits of each square.",
         moments=moments_in(jnp.bfloat16))
of_layer("only_the_variance_in_bfloat16", "statistics_in_low_precision",
         "The recorded variance is rounded to bfloat16; all else is float32.",
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
      tolerated="a choice of precision: its rounding, and what float16 cannot hold, are part of the "
                "step's own arithmetic, and allowed for")
fault("inputs_through_half", "low_precision",
      "Training reads its batch in float16, in which features above 65504 are infinite.",
      batch=lambda s, x, y: (rounded(x, "float16"), y))
fault("targets_through_bfloat16", "low_precision",
      "Training compares with targets that were rounded to bfloat16; evaluation does not.",
      training_error=lambda s, preds, y: s.error(preds, rounded(y, "bfloat16")), tolerated=ALLOWED)
fault("targets_as_integers", "low_precision",
      "Training cuts the decimals off its targets.",
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
      "The mean of the squared errors is taken in bfloat16, and told in float32.",
      training_error=lambda s, preds, y:
          jnp.mean(((preds - y) ** 2).astype(jnp.bfloat16)).astype(jnp.float32),
      tolerated=ALLOWED)

# The shape, the dtype or the container of what a step carries.

fault = partial(enter, family="shapes")

fault("params_become_half", "parameters_change_dtype",
      "The params that the step carries on are float16.",
      thread=carried(params=cast(jnp.float16)))
fault("one_param_becomes_bfloat16", "parameters_change_dtype",
      "The normalisation's scale, and nothing else, is carried on in bfloat16.",
      thread=carried(params=lambda old, new:
          edited(new, "BatchNorm_0/scale", lambda leaf: leaf.astype(jnp.bfloat16))))
fault("optimizer_state_becomes_bfloat16", "parameters_change_dtype",
      "The momentum buffers are carried on in bfloat16.",
      optimizer=momentum, thread=carried(opt_state=cast(jnp.bfloat16)))
fault("optimizer_count_becomes_float", "parameters_change_dtype",
      "Adam's count of steps is carried on as a float.",
      optimizer=adam, thread=carried(opt_state=cast(jnp.float32)),
      source="https://github.com/google/flax/issues/1550")
fault("optimizer_state_flattened", "parameters_change_dtype",
      "The optimizer's state comes back as a plain tuple of its leaves.",
      optimizer=momentum, update=opt_state_flattened,
      source="https://github.com/google/flax/issues/1550")
fault("statistics_keep_their_axis", "parameters_change_dtype",
      "The statistics are carried on with shape (1, channels): an axis was kept in a mean.",
      loss=an_axis_kept)
fault("statistics_become_frozen", "parameters_change_dtype",
      "The statistics come back in another container: a FrozenDict in place of a dict.",
      thread=carried(batch_stats=lambda old, new: core.freeze(new)))
fault("statistics_gain_a_count", "parameters_change_dtype",
      "The statistics come back with an entry more, the number of steps seen.",
      thread=carried(batch_stats=lambda old, new:
          {**new, "count": old.get("count", jnp.float32(0)) + 1}))
fault("variance_missing", "new_statistics_dropped",
      "The statistics come back without their variances; the next step starts them from 1.",
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
      "Evaluation returns float16, of which errors above 65504 leave the range.",
      base=HandwrittenNorm,
      evaluate=lambda s, state, x, y: s.right.evaluate(state, x, y).astype(jnp.float16))
# fmt: on

# Something is off by the factor 1 + size.


def small(name: str, mistake: str, sentence: str, **row: Any) -> None:
    """Enter a row twice: off by 1e-3 and by 1e-4."""
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
         "The batch's mean is a little off where it is recorded.",
         recorded=lambda s, h, batch, layer: (off(s, batch[0]), batch[1]))
of_layer("running_variance_off", "weights_do_not_sum_to_one",
         "The batch's variance is a little off where it is recorded.",
         recorded=lambda s, h, batch, layer: (batch[0], off(s, batch[1])), minimal=(2, 1))
of_layer("momentum_off", "weights_do_not_sum_to_one",
         "The new value's weight in the moving average is a little off, the old one's is not.",
         fold=lambda s, old, batch, layer: s.right.fold(old, tree_off(s, batch), layer))
of_layer("old_statistics_off", "weights_do_not_sum_to_one",
         "The old value's weight in the moving average is a little off.",
         fold=lambda s, old, batch, layer: s.right.fold(tree_off(s, old), batch, layer))
small("one_gradient_leaf_off", "wrong_gradient",
      "The gradient of the normalisation's bias is a little off.",
      slope=lambda s, grads, *_: edited(grads, "BatchNorm_0/bias", partial(off, s)),
      minimal=(2, 1))
small("first_kernel_gradient_off", "wrong_gradient",
      "The gradient of the first kernel is a little off.",
      slope=lambda s, grads, *_: edited(grads, "Dense_0/kernel", partial(off, s)), minimal=(2, 1))
small("reported_gradient_off", "wrong_gradient",
      "The gradient is a little off where it is reported, not where it is used.",
      report=lambda s, loss, grads: StepInfo(loss, tree_off(s, grads)))
small("reported_loss_off", "gradient_of_another_loss",
      "The training loss is a little off where it is reported.",
      report=lambda s, loss, grads: StepInfo(off(s, loss), grads))
small("eval_loss_off", "modes_differ",
      "The evaluation loss is a little off.",
      evaluate=lambda s, state, x, y: off(s, s.right.evaluate(state, x, y)))
small("learning_rate_off", "update_scaled",
      "The learning rate of the optimizer is a little off.",
      tx=lambda s, lr: s.optimizer(off(s, lr)))
small("params_grow", "decay_outside_the_learning_rate",
      "The new params are a little longer than the updated ones.",
      thread=lambda s, old, new: new._replace(params=tree_off(s, new.params)))
of_layer("eval_mean_off", "modes_differ",
         "Evaluation centres by a running mean that is a little off.",
         evaluation_moments=lambda s, running, h, layer: (off(s, running[0]), running[1]))
of_layer("eval_variance_off", "modes_differ",
         "Evaluation scales by a running variance that is a little off.",
         evaluation_moments=lambda s, running, h, layer: (running[0], off(s, running[1])))
of_layer("eval_epsilon_off", "modes_differ",
         "Evaluation's epsilon is a little off, which only a variance near it can show.",
         inverse_deviation=lambda s, var, train, layer:
             s.right.inverse_deviation(var if train else var + s.epsilon * s.size, train, layer))
small("first_row_off", "rows_treated_unequally",
      "The first row's error counts a little more than the others'.",
      loss=first_row_off)
of_layer("old_mean_leaks", "loss_reads_old_statistics",
         "A little of the old running mean is mixed into the mean that normalises in training.",
         training_moments=lambda s, batch, old, new, layer:
             (batch[0] + s.size * (old[0] - batch[0]), batch[1]))
of_layer("one_channel_off", "weights_do_not_sum_to_one",
         "The first channel's mean, and no other, is a little off where it is recorded.",
         recorded=first_channel_off)
