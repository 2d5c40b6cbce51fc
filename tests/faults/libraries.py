"""Faults of the libraries that a step uses, and of how it uses them, each with a correct twin.

Importing this module adds those of a single device to ``LOOP_FAULTS``.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bnverify
from bnverify import Parallel, State, StepInfo, Subject, reference
from tests.faults import parallel
from tests.faults.catalogue import Fault
from tests.faults.loops import FEATURES, LOOP_CONTROLS, LOOP_FAULTS, Net, groups, loop, pair
from tests.faults.steps import CanonicalStep, HandwrittenNorm, Moments, mapped

__all__ = ["LOOP_CONTROLS", "LOOP_FAULTS", "PARALLEL_RIGHT", "PARALLEL_WRONG"]

INPUTS_DIFFER = {
    "eval_at_the_batchs_own_moments_is_the_training_loss": "training changes the inputs, "
    "evaluation does not"
}
"""Declared by steps that are right in this."""


def global_norm(grads: Any) -> Any:
    """Return the length of gradients; Optax's function has another name in each release."""
    return jnp.sqrt(sum(jnp.sum(g**2) for g in jax.tree_util.tree_leaves(grads)))


# Statistics with the precision of 16 bits.

digits = pair("statistics_in_low_precision", "running_statistics_hold_float32_digits")


def narrow(value: Any, dtype: str = "bfloat16") -> Any:
    """Return a value in a dtype of 16 bits, rounded to it even where XLA keeps excess precision."""
    bits = jnp.finfo(dtype)
    return jax.lax.reduce_precision(value, bits.nexp, bits.nmant).astype(dtype)


@digits
def average_taken_in_bfloat16(wrong: bool) -> Subject:
    """The moving average is computed in bfloat16; the twin's in float32."""

    class Parts(HandwrittenNorm):
        momentum = 0.9

        def fold(self, old: Moments, batch: Moments, layer: int) -> Moments:
            if wrong:
                old, batch = tuple(map(narrow, old)), tuple(map(narrow, batch))
            mean, var = super().fold(old, batch, layer)
            if wrong:
                mean, var = narrow(mean), narrow(var)
            return mean.astype(jnp.float32), var.astype(jnp.float32)

    return Parts().subject("average_taken_in_bfloat16")


@digits
def statistics_cast_to_bfloat16(wrong: bool) -> Subject:
    """A precision policy casts the statistics to bfloat16; the twin's leaves them in float32."""

    class Parts(CanonicalStep):
        def thread(self, old: State, new: State) -> State:
            def through(leaf: Any) -> Any:
                return (narrow(leaf) if wrong else leaf).astype(jnp.float32)

            return new._replace(batch_stats=mapped(through, new.batch_stats))

    return Parts().subject("statistics_cast_to_bfloat16")


@digits
def precision_reduced_on_the_way(wrong: bool) -> Subject:
    """The new variance goes through ``lax.reduce_precision``; the twin has momentum 0.5, in float32."""

    class Parts(HandwrittenNorm):
        momentum = 0.5

        def fold(self, old: Moments, batch: Moments, layer: int) -> Moments:
            mean, var = super().fold(old, batch, layer)
            return mean, jax.lax.reduce_precision(var, 8, 7) if wrong else var

    return Parts().subject("precision_reduced_on_the_way")


# Variances below zero.

unclipped = pair("variance_below_zero", "a_constant_feature_gives_a_finite_step")


def fast_variance(h: Any, mean: Any) -> Any:
    """Return E[h^2] - E[h]^2, which may round to a negative number."""
    return jnp.mean(h**2, axis=0) - mean**2


class FastVariance(HandwrittenNorm):
    """A layer that records its fast variance clipped at 0."""

    def recorded(self, h: Any, batch: Moments, layer: int) -> Moments:
        return batch[0], jnp.maximum(batch[1], 0.0)


@unclipped
def only_the_recorded_variance_is_clipped(wrong: bool) -> Subject:
    """The recorded variance is clipped at 0, the one that normalises is not."""

    class Parts(FastVariance):
        def moments(self, h: Any, layer: int) -> Moments:
            mean = jnp.mean(h, axis=0)
            var = fast_variance(h, mean)
            return mean, var if wrong else jnp.maximum(var, 0.0)

    return Parts().subject("only_the_recorded_variance_is_clipped")


@unclipped
def inputs_standardised_by_a_fast_variance(wrong: bool) -> Subject:
    """The step standardises its inputs by the fast variance of three copies of its batch."""

    class Parts(CanonicalStep):
        def batch(self, x: Any, y: Any) -> tuple[Any, Any]:
            views = jnp.concatenate([x] * 3)
            mean = jnp.mean(views, axis=0)
            var = fast_variance(views, mean) if wrong else jnp.var(views, axis=0)
            return (x - mean) / jnp.sqrt(var + 1e-6), y

    subject = Parts().subject("inputs_standardised_by_a_fast_variance")
    return replace(subject, exempt=INPUTS_DIFFER)


@unclipped
def clipped_behind_the_root(wrong: bool) -> Subject:
    """The square root of a negative variance is replaced, but its gradient is still NaN."""

    class Parts(FastVariance):
        def moments(self, h: Any, layer: int) -> Moments:
            mean = jnp.mean(h, axis=0)
            var = fast_variance(h, mean)
            return mean, var if wrong else jnp.where(var > 0, var, 0.0)

        def inverse_deviation(self, var: Any, train: bool, layer: int) -> Any:
            root = jnp.sqrt(var + self.epsilon)
            return 1 / jnp.where(jnp.isnan(root), self.epsilon**0.5, root)

    return Parts().subject("clipped_behind_the_root")


# Numbers that are drawn or counted during tracing.

outside = pair("drawn_outside_jax", "a_fresh_trace_gives_the_same")


@outside
def kernels_drawn_by_numpy(wrong: bool) -> Subject:
    """Initial params come from NumPy's global generator; the twin's from one with a fixed seed."""

    class Parts(CanonicalStep):
        def init(self, seed: Any, x: Any) -> State:
            state = super().init(seed, x)
            rng = np.random.default_rng(None if wrong else 0)
            params = mapped(lambda p: p + rng.normal(size=p.shape).astype(p.dtype), state.params)
            return state._replace(params=params)

    return Parts().subject("kernels_drawn_by_numpy")


@outside
def noise_drawn_by_numpy(wrong: bool) -> Subject:
    """NumPy draws the noise for the inputs while a jitted loss is traced."""
    once = np.random.default_rng(0).normal()

    def perturbed(x: Any) -> Any:
        return x * np.float32(1 + 0.1 * (np.random.default_rng().normal() if wrong else once))

    compiled = jax.jit(perturbed)

    class Parts(CanonicalStep):
        def batch(self, x: Any, y: Any) -> tuple[Any, Any]:
            return compiled(x), y

    return replace(Parts().subject("noise_drawn_by_numpy"), exempt=INPUTS_DIFFER)


@outside
def rate_counted_by_python(wrong: bool) -> Subject:
    """The learning rate shrinks each time that the step is traced."""
    calls = itertools.count(1)

    class Parts(CanonicalStep):
        def tx(self, lr: Any) -> Any:
            return self.optimizer(lr / next(calls) if wrong else lr)

    return Parts().subject("rate_counted_by_python")


# Optimizers that differ from their papers.

departing = pair("optimizer_departs_from_its_paper", "optimizer_follows_its_paper")


def with_altered(name: str, altered: Callable[..., Any], *, wrong: bool) -> Subject:
    """Return a loop with an Optax optimizer, as another release might implement it.

    Args:
        name: the name of the function in Optax.
        altered: the function that replaces it.
        wrong: whether to replace it.
    """
    function = altered if wrong else getattr(optax, name)
    with mock.patch(f"optax.{name}", function):
        made: Subject = bnverify.linen(Net(), optimizer=function, features=FEATURES)
    return made


@departing
def epsilon_under_the_root(wrong: bool) -> Subject:
    """Adam adds its epsilon to the second moment, not to its root."""
    real = optax.adam

    def altered(learning_rate: Any, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8) -> Any:
        return real(learning_rate, b1, b2, eps=0.0, eps_root=eps)

    return with_altered("adam", altered, wrong=wrong)


@departing
def decay_coupled_in_adamw(wrong: bool) -> Subject:
    """AdamW adds its decay to the gradient, as Adam with an L2 penalty would."""
    real = optax.adam

    def altered(learning_rate: Any, weight_decay: float = 1e-4) -> Any:
        return optax.chain(optax.add_decayed_weights(weight_decay), real(learning_rate))

    return with_altered("adamw", altered, wrong=wrong)


@departing
def lions_decays_swapped(wrong: bool) -> Subject:
    """Lion interpolates by b2 and averages by b1."""
    real = optax.lion

    def altered(learning_rate: Any, b1: float = 0.9, b2: float = 0.99) -> Any:
        return real(learning_rate, b2, b1, weight_decay=0.0)

    return with_altered("lion", altered, wrong=wrong)


@departing
def moments_not_corrected(wrong: bool) -> Subject:
    """RAdam does not correct its first moment for bias in the steps before its variance is tractable."""
    real = optax.radam

    def altered(learning_rate: Any, b1: float = 0.9, threshold: float = 5.0) -> Any:
        corrected = real(learning_rate, b1=b1, threshold=threshold)

        def update(grads: Any, state: Any, params: Any = None) -> Any:
            updates, state = corrected.update(grads, state, params)
            bias = 1 - b1 ** state[0].count.astype(jnp.float32)
            return mapped(lambda u: jnp.where(state[0].count < 6, u * bias, u), updates), state

        return optax.GradientTransformation(corrected.init, update)

    return with_altered("radam", altered, wrong=wrong)


# Gradients clipped by hand before an optimizer with frozen params.

by_hand = pair("frozen_gradients_scale_others", "frozen_gradients_scale_nothing")


def with_clipped(clip: Callable[[Any], Any], *, wrong: bool) -> Subject:
    """Return a loop with a frozen backbone that clips gradients before it applies them."""

    def step(state: Any, x: Any, y: Any, loss_of: Any) -> Any:
        (loss, stats), grads = jax.value_and_grad(
            lambda params: loss_of(state, params, x, y), has_aux=True
        )(state.params)
        trained = {n: g for n, g in grads.items() if not n.startswith("backbone")}
        grads = clip(grads) if wrong else {**grads, **clip(trained)}
        return state.apply_gradients(grads=grads, batch_stats=stats), loss

    made: Subject = loop(net=Net(rests=True), tx=groups, step=step)
    return made


@by_hand
def clipped_by_optax_beforehand(wrong: bool) -> Subject:
    """``optax.clip_by_global_norm`` is applied to all gradients, including the frozen backbone's."""

    def clip(grads: Any) -> Any:
        return optax.clip_by_global_norm(1.0).update(grads, optax.EmptyState())[0]

    return with_clipped(clip, wrong=wrong)


@by_hand
def clipped_by_a_norm_written_out(wrong: bool) -> Subject:
    """Gradients are multiplied by min(1, limit / norm), with the norm of all of them."""

    def clip(grads: Any) -> Any:
        return mapped(lambda g: g * jnp.minimum(1.0, 1.0 / (global_norm(grads) + 1e-6)), grads)

    return with_clipped(clip, wrong=wrong)


@by_hand
def gradients_of_length_one(wrong: bool) -> Subject:
    """Gradients are divided by the norm of all of them."""

    def clip(grads: Any) -> Any:
        return mapped(lambda g: g / (global_norm(grads) + 1e-6), grads)

    return with_clipped(clip, wrong=wrong)


# A learning rate in 16 bits.

rounded = pair("rate_loses_digits", "learning_rate_keeps_its_digits")


@rounded
def rate_injected_in_bfloat16(wrong: bool) -> Subject:
    """Hyperparameters are kept in the dtype of a bfloat16 param; the twin's in float32."""

    def tx(lr: Any) -> Any:
        dtype = jnp.bfloat16 if wrong else jnp.float32
        return optax.inject_hyperparams(optax.sgd, hyperparam_dtype=dtype)(learning_rate=lr)

    made: Subject = bnverify.linen(Net(), optimizer=tx, features=FEATURES)
    return made


@rounded
def rate_cast_to_half(wrong: bool) -> Subject:
    """The learning rate is cast to float16, like the gradients of a half-precision model."""

    def tx(lr: Any) -> Any:
        return optax.adam(narrow(jnp.asarray(lr), "float16") if wrong else lr)

    made: Subject = bnverify.linen(Net(), optimizer=tx, features=FEATURES)
    return made


@rounded
def schedule_computed_in_bfloat16(wrong: bool) -> Subject:
    """A schedule multiplies the learning rate by a factor in bfloat16."""

    def tx(lr: Any) -> Any:
        def schedule(count: Any) -> Any:
            dtype = jnp.bfloat16 if wrong else jnp.float32
            decay = jnp.asarray(0.99, dtype) ** count
            return (jnp.asarray(lr).astype(dtype) * decay).astype(jnp.float32)

        return optax.sgd(schedule)

    made: Subject = bnverify.linen(Net(), optimizer=tx, features=FEATURES)
    return made


# Several devices. Each is a target: ``tests.faults.libraries:NAME``.

LIMIT = 0.1


def clipped(grads: Any) -> Any:
    """Return gradients clipped to the norm ``LIMIT``."""
    return mapped(lambda g: g * jnp.minimum(1.0, LIMIT / (global_norm(grads) + 1e-12)), grads)


def entries_clipped(grads: Any) -> Any:
    """Return gradients whose entries are clipped."""
    return mapped(lambda g: jnp.clip(g, -LIMIT / 4, LIMIT / 4), grads)


def of_length_one(grads: Any) -> Any:
    """Return gradients divided by their norm."""
    return mapped(lambda g: g / (global_norm(grads) + 1e-12), grads)


def averaged(grads: Any) -> Any:
    """Return the average of the devices' gradients."""
    return jax.lax.pmean(grads, parallel.AXIS)


def data_parallel(
    name: str, whole_gradient: Callable[[Any], Any], clipped: Callable[[Any], Any] = clipped
) -> Parallel:
    """Return a data-parallel step that clips, with the single-device step that does so.

    Args:
        name: its name.
        whole_gradient: the gradient of a shard -> what the optimizer is given.
        clipped: the gradient of the whole batch -> the same on one device.
    """

    def step(state: State, x: Any, y: Any, lr: Any) -> tuple[State, StepInfo]:
        differentiated = jax.value_and_grad(reference.loss_fn, has_aux=True)
        (loss, stats), grads = differentiated(state.params, state.batch_stats, x, y)
        grads, tx = clipped(grads), optax.sgd(lr, momentum=0.9)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return State(params, stats, opt_state), StepInfo(loss, grads)

    parts = parallel.AxisName()
    parts.whole_gradient = whole_gradient  # type: ignore[method-assign,assignment] # of one object
    return Parallel(name, replace(reference.momentum(), step=step), parts.step, parallel.AXIS)


def clipped_before_averaging() -> Parallel:
    """Each device clips its own gradient; the clipped ones are averaged."""
    return data_parallel("before", lambda grads: averaged(clipped(grads)))


def clipped_after_averaging() -> Parallel:
    """The devices' gradients are averaged, and the average is clipped."""
    return data_parallel("after", lambda grads: clipped(averaged(grads)))


def entries_clipped_before_averaging() -> Parallel:
    """Each device clips the entries of its gradient, which are then averaged."""
    return data_parallel("entries", lambda g: averaged(entries_clipped(g)), entries_clipped)


def entries_clipped_after_averaging() -> Parallel:
    """The entries of the averaged gradient are clipped."""
    return data_parallel("entries after", lambda g: entries_clipped(averaged(g)), entries_clipped)


def scaled_by_its_own_length() -> Parallel:
    """Each device divides its gradient by its norm, and the results are averaged."""
    return data_parallel("length", lambda g: averaged(of_length_one(g)), of_length_one)


def summed_then_divided() -> Parallel:
    """The devices' gradients are summed, divided by the number of devices, and clipped."""

    def whole(grads: Any) -> Any:
        total = jax.lax.psum(grads, parallel.AXIS)
        return clipped(mapped(lambda g: g / jax.lax.psum(1, parallel.AXIS), total))

    return data_parallel("summed", whole)


PARALLEL_LAW = "pmap_equals_one_device"
PARALLEL_WRONG: dict[str, Fault] = {
    make.__name__: Fault(
        make.__name__,
        "parallel",
        "clipped_before_averaged",
        str(make.__doc__),
        make,
        PARALLEL_LAW,
    )
    for make in (
        clipped_before_averaging,
        entries_clipped_before_averaging,
        scaled_by_its_own_length,
    )
}
PARALLEL_RIGHT = (
    "clipped_after_averaging",
    "entries_clipped_after_averaging",
    "summed_then_divided",
)
