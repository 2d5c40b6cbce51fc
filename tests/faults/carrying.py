"""Faults of the optimizer and of the returned state, and faults that only a second step shows.

Faults of saving and restoring are in ``life.py``.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from bnverify import State, StepInfo
from tests.faults.catalogue import enter
from tests.faults.steps import (
    DECAY,
    CanonicalStep,
    HandwrittenNorm,
    Moments,
    Tree,
    adam,
    averaged,
    by_path,
    carried,
    edited,
    mapped,
    masked_adamw,
    masked_decay,
    momentum,
)


class AllVariablesStep(CanonicalStep):
    """The optimizer is initialised on params and statistics, and updates the params."""

    def init(self, seed: Any, x: Any) -> State:
        variables = self.variables(seed, x)
        return State(variables["params"], variables["batch_stats"], self.tx(0.0).init(variables))

    def update(self, grads: Tree, state: State, lr: Any) -> tuple[Tree, Tree]:
        """Update everything, the statistics by a gradient of zero."""
        new, opt_state = self.update_all(grads, state, state.batch_stats, lr)
        return new["params"], opt_state

    def update_all(
        self, grads: Tree, state: State, batch_stats: Tree, lr: Any
    ) -> tuple[Tree, Tree]:
        variables = {"params": state.params, "batch_stats": batch_stats}
        every = {"params": grads, "batch_stats": mapped(jnp.zeros_like, batch_stats)}
        updates, opt_state = self.tx(lr).update(every, state.opt_state, variables)
        return optax.apply_updates(variables, updates), opt_state


def new_statistics_decayed(s: Any, state: State, x: Any, y: Any, lr: Any) -> tuple[State, StepInfo]:
    (loss, batch_stats), grads = s.gradients(state, x, y)
    new, opt_state = s.update_all(grads, state, batch_stats, lr)
    return State(new["params"], new["batch_stats"], opt_state), StepInfo(loss, grads)


def statistics_descend(s: Any, state: State, x: Any, y: Any, lr: Any) -> tuple[State, StepInfo]:
    """Differentiate params and statistics in eval mode and move both by the gradient."""

    def loss_fn(params: Tree, batch_stats: Tree) -> Any:
        preds, _ = s.apply(params, batch_stats, x, train=False)
        return s.error(preds, y)

    both = jax.value_and_grad(loss_fn, argnums=(0, 1))
    loss, (grads, pull) = both(state.params, state.batch_stats)
    params, opt_state = s.update(grads, state, lr)
    moved = mapped(lambda old, slope: old - lr * slope, state.batch_stats, pull)
    return State(params, moved, opt_state), StepInfo(loss, grads)


def statistics_moved_by_the_rate(
    s: Any, state: State, x: Any, y: Any, lr: Any
) -> tuple[State, StepInfo]:
    new, info = s.right.step(state, x, y, lr)
    moved = mapped(lambda old, now: old + lr * (now - old), state.batch_stats, new.batch_stats)
    return new._replace(batch_stats=moved), info


def applied(apply: Any) -> Any:
    """Return an ``update`` whose new params are ``apply(params, updates, lr)``."""

    def update(s: Any, grads: Tree, state: State, lr: Any) -> tuple[Tree, Tree]:
        updates, opt_state = s.tx(lr).update(grads, state.opt_state, state.params)
        return apply(state.params, updates, lr), opt_state

    return update


def beside_the_optimizer(params_after: Any) -> Any:
    """Return an ``update`` whose new params are ``params_after(params, grads, lr)``."""
    return lambda s, grads, state, lr: (
        params_after(state.params, grads, lr),
        s.right.update(grads, state, lr)[1],
    )


def updated_twice(s: Any, grads: Tree, state: State, lr: Any) -> tuple[Tree, Tree]:
    params, opt_state = s.right.update(grads, state, lr)
    again: tuple[Tree, Tree] = s.right.update(
        grads, State(params, state.batch_stats, opt_state), lr
    )
    return again


def clipped(s: Any, grads: Tree, state: State, lr: Any) -> tuple[Tree, Tree]:
    square = sum(jnp.sum(leaf**2) for leaf in jax.tree_util.tree_leaves(grads))
    small = mapped(lambda leaf: leaf / jnp.sqrt(jnp.maximum(square, 1.0)), grads)
    done: tuple[Tree, Tree] = s.right.update(small, state, lr)
    return done


def of_normalisation(params: Tree) -> Tree:
    """Return a mask of ``params`` that is True for the scales and biases of normalisations."""
    return by_path(lambda path, leaf: "Norm_" in path, params)


def output_bias_kept(s: Any, old: State, new: State) -> State:
    bias = old.params[f"Dense_{s.layers}"]["bias"]
    return new._replace(params=edited(new.params, f"Dense_{s.layers}/bias", lambda _: bias))


def statistics_of_another_pass(after_the_update: bool) -> Any:
    """Return a ``step`` that returns the statistics of a second pass over its batch.

    That pass uses the new params and the old statistics, or the old params and the new statistics.
    """

    def step(s: Any, state: State, x: Any, y: Any, lr: Any) -> tuple[State, StepInfo]:
        new, info = s.right.step(state, x, y, lr)
        given = (
            (new.params, state.batch_stats) if after_the_update else (state.params, new.batch_stats)
        )
        _, batch_stats = s.apply(*given, x, train=True)
        return new._replace(batch_stats=batch_stats), info

    return step


def update_of_initial_params(s: Any, grads: Tree, state: State, lr: Any) -> tuple[Tree, Tree]:
    columns = state.params["Dense_0"]["kernel"].shape[0]
    first = s.variables(0, jnp.zeros((1, columns)))["params"]
    done: tuple[Tree, Tree] = s.right.update(grads, state._replace(params=first), lr)
    return done


def rate_falls_with_every_call(s: Any, grads: Tree, state: State, lr: Any) -> tuple[Tree, Tree]:
    s.calls += 1
    done: tuple[Tree, Tree] = s.right.update(grads, state, lr / s.calls)
    return done


def params_overwritten(s: Any, state: State, x: Any, y: Any, lr: Any) -> tuple[State, StepInfo]:
    """Step, then overwrite the arguments; under jit, these dictionaries are copies."""
    after, info = s.right.step(state, x, y, lr)
    for layer, leaves in after.params.items():
        state.params[layer].update(leaves)
    return after, info


def fresh(state: State) -> Any:
    """Return whether the running means are still zero."""
    leaves = jax.tree_util.tree_leaves_with_path(state.batch_stats)
    means = [leaf for path, leaf in leaves if path[-1].key == "mean"]
    return jnp.all(jnp.stack([jnp.all(mean == 0.0) for mean in means]))


def counted(opt_state: Tree) -> Any:
    """Return the number of steps that the optimizer has counted, 0 where it does not count."""
    leaves = [jnp.asarray(leaf) for leaf in jax.tree_util.tree_leaves(opt_state)]
    counts = [leaf for leaf in leaves if is_integer(leaf)]
    return counts[0] if counts else jnp.int32(0)


def is_integer(leaf: Any) -> bool:
    return bool(jnp.issubdtype(jnp.asarray(leaf).dtype, jnp.integer))


def either(condition: Any, one: Tree, other: Tree) -> Tree:
    """Return the tree ``one`` if ``condition`` is true, else ``other``."""
    return mapped(lambda a, b: jnp.where(condition, a, b), one, other)


def first_batch_whole(s: Any, old: Moments, batch: Moments, layer: int) -> Moments:
    first = jnp.all(old[0] == 0.0) & jnp.all(old[1] == 1.0)
    mean, var = s.right.fold(old, batch, layer)
    return jnp.where(first, batch[0], mean), jnp.where(first, batch[1], var)


def old_moments_once_they_have_moved(
    s: Any, batch: Moments, old: Moments, new: Moments, layer: int
) -> Moments:
    first = jnp.all(old[0] == 0.0)
    return jnp.where(first, batch[0], old[0]), jnp.where(first, batch[1], old[1])


def rate_by_count(rate: Any) -> Any:
    """Return an ``update`` at ``rate(steps that the optimizer has counted, lr)``."""
    return lambda s, grads, state, lr: s.right.update(
        grads, state, rate(counted(state.opt_state), lr)
    )


def cleared_every_second_step(s: Any, old: State, new: State) -> State:
    """Clear everything except the count."""
    clear = counted(new.opt_state) % 2 == 0
    cleared = mapped(
        lambda leaf: leaf if leaf.ndim == 0 else jnp.where(clear, 0.0, leaf), new.opt_state
    )
    return new._replace(opt_state=cleared)


def buffer_of_the_scale_cleared(s: Any, grads: Tree, state: State, lr: Any) -> tuple[Tree, Tree]:
    params, opt_state = s.right.update(grads, state, lr)

    def cleared(path: Any, leaf: Any) -> Any:
        names = [str(getattr(key, "key", "")) for key in path]
        return jnp.zeros_like(leaf) if names[-1:] == ["scale"] else leaf

    return params, jax.tree_util.tree_map_with_path(cleared, opt_state)


def plain_average(s: Any, old: State, new: State) -> State:
    """Replace the moving average by the plain average of all steps."""
    count = counted(new.opt_state).astype(jnp.float32)

    def average(was: Any, now: Any) -> Any:
        batch = (now - 0.99 * was) / (1 - 0.99)
        return jnp.where(count < 2, now, was + (batch - was) / count)

    return new._replace(batch_stats=mapped(average, old.batch_stats, new.batch_stats))


def statistics_once_they_are_large(s: Any, state: State, x: Any, y: Any) -> Any:
    first = s.variables(0, x)["batch_stats"]
    large = jnp.any(jnp.abs(state.batch_stats["BatchNorm_0"]["mean"]) > 0.01)
    return s.right.evaluate(
        state._replace(batch_stats=either(large, state.batch_stats, first)), x, y
    )


# Each row in as few lines as it takes:
# fmt: off

# How the optimizer is used.

fault = partial(enter, family="optimizer")

fault("optimizer_on_all_variables", "optimizer_on_all_variables",
      "The optimizer is initialised on params and statistics; plain SGD has no state to show it.",
      base=AllVariablesStep)
fault("adam_on_all_variables", "optimizer_on_all_variables",
      "Adam is initialised on params and statistics, and keeps moments of both.",
      base=AllVariablesStep, optimizer=adam)
fault("decay_reaches_statistics", "statistics_fed_to_the_optimizer",
      "AdamW owns all variables, so that its decay also shrinks the statistics.",
      base=AllVariablesStep, optimizer=lambda s, lr: optax.adamw(lr, weight_decay=DECAY),
      step=new_statistics_decayed)
fault("statistics_trained_as_params", "statistics_trained_as_params",
      "The loss runs in eval mode and its gradient trains the statistics as it trains params.",
      step=statistics_descend, source="https://github.com/intel/ipex-llm/issues/1599")
fault("moving_average_scaled_by_learning_rate", "statistics_fed_to_the_optimizer",
      "The optimizer makes the moving average: the statistics move by lr times their change.",
      step=statistics_moved_by_the_rate)
fault("update_dropped", "update_dropped",
      "The updated params are computed and dropped.",
      thread=carried(params=lambda old, new: old),
      source="https://github.com/borisdayma/dalle-mini/pull/71")
fault("output_bias_never_updated", "update_dropped",
      "One leaf, the bias of the last layer, stays as it was initialised.",
      thread=output_bias_kept)
fault("half_update", "update_scaled",
      "The step returns the mean of the old and the new params.",
      thread=carried(params=lambda old, new: mapped(lambda a, b: (a + b) / 2, old, new)))
fault("update_applied_twice", "update_applied_twice",
      "The update is added to the params twice.",
      update=applied(lambda params, updates, lr:
          optax.apply_updates(optax.apply_updates(params, updates), updates)))
fault("optimizer_steps_twice", "update_applied_twice",
      "tx.update is called twice with one gradient, so the optimizer's state advances twice.",
      optimizer=momentum, update=updated_twice)
fault("gradient_applied_as_update", "wrong_sign",
      "The gradient itself is added to the params: uphill, and without the learning rate.",
      update=beside_the_optimizer(lambda params, grads, lr: optax.apply_updates(params, grads)))
fault("update_subtracted", "wrong_sign",
      "The optimizer's updates are subtracted from the params: gradient ascent.",
      update=applied(lambda params, updates, lr: mapped(lambda p, u: p - u, params, updates)))
fault("learning_rate_fixed", "learning_rate_ignored",
      "The optimizer was built with a learning rate of 0.01, whatever rate the step is given.",
      tx=lambda s, lr: s.optimizer(0.01))
fault("learning_rate_applied_twice", "learning_rate_applied_twice",
      "The updates, already scaled by the learning rate, are scaled by it again.",
      update=applied(lambda params, updates, lr:
          optax.apply_updates(params, mapped(lambda u: lr * u, updates))))
fault("optimizer_bypassed", "optimizer_bypassed",
      "Adam's state is updated, but the params move by plain gradient descent.",
      optimizer=adam,
      update=beside_the_optimizer(lambda params, grads, lr:
          mapped(lambda p, g: p - lr * g, params, grads)))
fault("decay_outside_the_learning_rate", "decay_outside_the_learning_rate",
      "Every step shrinks the params by one percent, even at a learning rate of zero.",
      thread=carried(params=lambda old, new: mapped(lambda leaf: (1 - DECAY) * leaf, new)),
      source="https://github.com/google-deepmind/optax/issues/25")
fault("decay_added_after_the_rate", "decay_grows_params",
      "The decay comes after the learning rate in the chain, and so without the minus sign.",
      optimizer=lambda s, lr: optax.chain(optax.add_decayed_weights(DECAY), optax.sgd(lr)),
      tx=lambda s, lr: optax.chain(optax.sgd(lr), optax.add_decayed_weights(DECAY)),
      probed=False, blind=False, source="https://github.com/google-deepmind/optax/issues/364")
fault("decay_of_norm_parameters", "decay_of_norm_parameters",
      "The declared decay excludes scale and bias; the one in use has no mask.",
      optimizer=masked_decay, probed=False,
      tx=lambda s, lr: optax.chain(optax.add_decayed_weights(DECAY), optax.sgd(lr)),
      source="https://github.com/google-deepmind/optax/issues/25")
fault("decay_mask_flipped", "decay_of_norm_parameters",
      "The mask of the decay is inverted: it decays the normalisation and nothing else.",
      optimizer=masked_decay, probed=False,
      tx=lambda s, lr:
          optax.chain(optax.add_decayed_weights(DECAY, mask=of_normalisation), optax.sgd(lr)),
      source="https://github.com/huggingface/transformers/issues/11936")
fault("adamw_without_its_mask", "decay_of_norm_parameters",
      "AdamW is declared with decay on kernels and used with decay on every leaf.",
      optimizer=masked_adamw, probed=False,
      tx=lambda s, lr:
          # Its decay in the state that masking would have.
          optax.adamw(lr, weight_decay=DECAY, mask=lambda params: mapped(lambda _: True, params)),
      source="https://github.com/salesforce/jaxformer/issues/28")
fault("undeclared_clipping", "update_scaled",
      "Gradients are clipped to a global norm of 1, outside the declared optimizer.",
      update=clipped)

# How state is passed on: dropped, stale, initialised again, or in the wrong types.

fault = partial(enter, family="carrying")

fault("old_state_returned", "update_dropped",
      "The step returns the whole state that it was given.",
      thread=lambda s, old, new: old, source="https://github.com/google/flax/issues/2467")
fault("new_statistics_dropped", "new_statistics_dropped",
      "The new statistics are computed and dropped.",
      thread=carried(batch_stats=lambda old, new: old),
      source="https://github.com/HomericIntelligence/Odyssey/issues/5532")
fault("new_variables_from_old_params", "update_dropped",
      "Params are the old ones in an otherwise new state.",
      optimizer=momentum, thread=carried(params=lambda old, new: old),
      source="https://github.com/google/flax/pull/3462")
fault("statistics_reinitialised", "statistics_reinitialised",
      "Every step starts its moving average from mean 0 and variance 1.",
      gradients=lambda s, state, x, y:
          s.right.gradients(state._replace(batch_stats=s.variables(0, x)["batch_stats"]), x, y),
      source="https://github.com/google/flax/issues/2232")
fault("old_optimizer_state_kept", "old_optimizer_state_kept",
      "The optimizer's new state is dropped.",
      optimizer=momentum, thread=carried(opt_state=lambda old, new: old),
      source="https://github.com/google/flax/issues/2467")
fault("old_adam_state_kept", "old_optimizer_state_kept",
      "Adam's new moments and count are dropped.",
      optimizer=adam, thread=carried(opt_state=lambda old, new: old))
fault("old_optimizer_state_of_kernels", "old_optimizer_state_kept",
      "The optimizer state of matrices is not updated, that of vectors is.",
      optimizer=adam,
      thread=carried(opt_state=lambda old, new:
          mapped(lambda now, was: was if jnp.ndim(now) == 2 else now, new, old)),
      minimal=(2, 1))
fault("optimizer_reinitialised", "optimizer_reinitialised",
      "The optimizer is initialised again in each step, so momentum never builds up.",
      optimizer=momentum,
      update=lambda s, grads, state, lr:
          s.right.update(grads, state._replace(opt_state=s.tx(lr).init(state.params)), lr))
fault("statistics_of_the_updated_params", "statistics_from_another_batch",
      "The statistics come from a second pass, made with the params after the update.",
      step=statistics_of_another_pass(after_the_update=True), minimal=(2, 1))
fault("ema_applied_twice", "ema_applied_twice",
      "A second mutable pass over the same batch moves the statistics again.",
      step=statistics_of_another_pass(after_the_update=False))
fault("update_of_initial_params", "params_of_another_state",
      "The update is added to the initial params, which the step closes over, not to its own.",
      update=update_of_initial_params)
fault("calls_counted_in_python", "hidden_state",
      "A Python counter scales the update: a compiled step keeps the count of its first trace.",
      calls=0, update=rate_falls_with_every_call)
fault("params_overwritten_in_place", "inputs_overwritten",
      "The step writes the new params into the dictionaries that its caller still holds.",
      step=params_overwritten, source="https://github.com/jax-ml/jax/issues/37830")

# Faults that the first step does not show. None keeps anything outside the state: a later step is recognised
# by the statistics, which no longer have their initial values, or by the optimizer's count.

fault = partial(enter, family="two_steps")

fault("statistics_only_move_on_the_first_step", "average_not_steady",
      "The statistics change only while they have their initial values.",
      thread=lambda s, old, new:
          new._replace(batch_stats=either(fresh(old), new.batch_stats, old.batch_stats)))
fault("first_batch_replaces_the_initial_statistics", "average_not_steady",
      "Initial statistics are replaced by the first batch's moments, not averaged with them.",
      base=HandwrittenNorm, fold=first_batch_whole,
      source="https://github.com/google/flax/issues/2232")
fault("running_moments_normalise_once_they_have_moved", "loss_reads_old_statistics",
      "The first step normalises by its batch, all later ones by the running moments.",
      base=HandwrittenNorm, training_moments=old_moments_once_they_have_moved)
fault("params_frozen_after_the_first_step", "update_dropped",
      "Params are updated only while the statistics have their initial values.",
      thread=lambda s, old, new: new._replace(params=either(fresh(old), new.params, old.params)))
fault("rate_halved_after_the_first_step", "update_scaled",
      "From the optimizer's second step on, half the declared learning rate is used.",
      optimizer=adam, update=rate_by_count(lambda count, lr: jnp.where(count > 0, lr / 2, lr)))
fault("sign_flips_on_the_third_step", "wrong_sign",
      "The third update, and no other, goes uphill.",
      optimizer=adam, update=rate_by_count(lambda count, lr: jnp.where(count == 2, -lr, lr)))
fault("sign_flips_on_the_fifth_step", "wrong_sign",
      "The fifth update, and no other, goes uphill.",
      optimizer=adam, update=rate_by_count(lambda count, lr: jnp.where(count == 4, -lr, lr)),
      survives="outside the default domain, which observes at most the third step from fresh state")
fault("optimizer_count_stuck", "old_optimizer_state_kept",
      "Adam's count is not updated: its bias correction is always that of the first step.",
      optimizer=adam,
      thread=carried(opt_state=lambda old, new:
          mapped(lambda now, was: was if is_integer(now) else now, new, old)))
fault("momentum_cleared_every_second_step", "optimizer_reinitialised",
      "The optimizer's moments are cleared after every second step.",
      optimizer=adam, thread=cleared_every_second_step)
fault("one_momentum_buffer_cleared", "optimizer_reinitialised",
      "The momentum of the normalisation's scale is cleared in each step.",
      optimizer=momentum, update=buffer_of_the_scale_cleared, minimal=(2, 1))
fault("cumulative_average", "average_not_steady",
      "From the second step on, the statistics are the plain average of all steps' moments.",
      optimizer=adam, thread=plain_average)
fault("momentum_lost_after_the_first_step", "average_not_steady",
      "Once the statistics have moved, the momentum is 0.999.",
      base=HandwrittenNorm,
      fold=lambda s, old, batch, layer:
          averaged(jnp.where(jnp.all(old[0] == 0.0), 0.99, 0.999), old, batch),
      source="https://github.com/mlcommons/algorithmic-efficiency/pull/783")
fault("eval_of_initial_statistics_until_they_are_large", "eval_of_stale_state",
      "Evaluation uses the statistics only once the running means exceed 0.01.",
      evaluate=statistics_once_they_are_large)
