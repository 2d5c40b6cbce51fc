"""The reference step for many devices, cut into parts: a fault replaces one of them.

One device's part. Rows carry weights, 0 for padding; without padding all are 1.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from bnverify import reference as single
from bnverify.model import Parallel, State, StepInfo, Subject, Tree

AXIS = "data"


@functools.cache
def one_device() -> Subject:
    """Return the step that all of them must equal: one object, so that its runs are shared."""
    return single.momentum()


class Norm(nn.Module):
    """BatchNorm over all devices' rows that count, from the sums and the count of rows.

    Attributes:
        moments: (h, weights) -> mean and variance, each (channels,).
    """

    moments: Callable[[Any, Any], tuple[Any, Any]]

    @nn.compact
    def __call__(self, h: Any, weights: Any) -> Any:
        """Return h normalised by the batch's moments; the running ones move towards them."""
        shape = h.shape[-1:]
        mean = self.variable("batch_stats", "mean", jnp.zeros, shape, jnp.float32)
        var = self.variable("batch_stats", "var", jnp.ones, shape, jnp.float32)
        scale = self.param("scale", nn.initializers.ones, shape)
        bias = self.param("bias", nn.initializers.zeros, shape)
        now = self.moments(h, weights)
        keep = single.MOMENTUM
        mean.value, var.value = (
            keep * old + (1 - keep) * new
            for old, new in zip((mean.value, var.value), now, strict=True)
        )
        return (h - now[0]) * (jax.lax.rsqrt(now[1] + 1e-5) * scale) + bias


class Model(nn.Module):
    """The reference's model in train mode, with another normalisation under the same name.

    Attributes:
        normalise: (h, weights) -> h normalised.
    """

    normalise: Callable[[Any, Any], Any]

    @nn.compact
    def __call__(self, x: Any, weights: Any) -> Any:
        """Return the predictions (n, 1)."""
        h = nn.Dense(single.HIDDEN, name="Dense_0")(x)
        return nn.Dense(1, name="Dense_1")(nn.relu(self.normalise(h, weights)))


class ParallelStep:
    """The reference's step, one device's part of it."""

    def normalise(self, h: Any, weights: Any) -> Any:
        """Return h normalised over all devices."""
        return Norm(self.moments, name="BatchNorm_0")(h, weights)

    def moments(self, h: Any, weights: Any) -> tuple[Any, Any]:
        """Return the mean and the biased variance of the rows that count, on all devices."""
        marks = weights[:, None]
        sums = jnp.sum(h * marks, 0), jnp.sum(h**2 * marks, 0), jnp.sum(weights)
        total, squares, count = jax.lax.psum(sums, AXIS)
        mean = total / count
        return mean, jnp.maximum(squares / count - mean**2, 0.0)

    def loss(self, errors: Any, weights: Any) -> Any:
        """Return this device's part of the loss: over the devices they add up to the whole."""
        return jnp.sum(errors * weights) / jax.lax.psum(jnp.sum(weights), AXIS)

    def whole_loss(self, loss: Any) -> Any:
        """Return the loss of the whole batch."""
        return jax.lax.psum(loss, AXIS)

    def whole_gradient(self, grads: Tree) -> Tree:
        """Return the gradient of the whole batch's loss."""
        return jax.lax.psum(grads, AXIS)

    def carried(self, batch_stats: Tree) -> Tree:
        """Return the statistics that are carried on."""
        return batch_stats

    def counted_step(
        self, state: State, x: Any, y: Any, weights: Any, lr: Any
    ) -> tuple[State, StepInfo]:
        """Take one step on one shard with padding."""

        def loss_fn(params: Tree) -> tuple[Any, Tree]:
            out, updated = Model(self.normalise).apply(
                {"params": params, "batch_stats": state.batch_stats},
                x,
                weights,
                mutable=["batch_stats"],
            )
            return self.loss((out.reshape(-1) - y) ** 2, weights), updated["batch_stats"]

        (loss, batch_stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
        grads = self.whole_gradient(grads)
        updates, opt_state = optax.sgd(lr, momentum=0.9).update(
            grads, state.opt_state, state.params
        )
        params = optax.apply_updates(state.params, updates)
        new = State(params, self.carried(batch_stats), opt_state)
        return new, StepInfo(self.whole_loss(loss), grads)

    def step(self, state: State, x: Any, y: Any, lr: Any) -> tuple[State, StepInfo]:
        """Take one step on one shard whose rows all count."""
        return self.counted_step(state, x, y, jnp.ones(len(x), x.dtype), lr)

    def sharded_step(self) -> Any:
        """Return the whole step for ``jax.jit`` with a sharded batch; None: the single one."""
        return None

    def parallel(self, name: str) -> Parallel:
        """Return the step as what is verified."""
        return Parallel(
            name,
            one_device(),
            self.step,
            AXIS,
            counted_step=self.counted_step,
            sharded_step=self.sharded_step(),
        )


class AxisName(ParallelStep):
    """The same with Flax's own BatchNorm(axis_name=...) and means of means: for equal shards."""

    def normalise(self, h: Any, weights: Any) -> Any:
        """Return h normalised by Flax."""
        return nn.BatchNorm(
            use_running_average=False, momentum=single.MOMENTUM, axis_name=AXIS, name="BatchNorm_0"
        )(h)

    def loss(self, errors: Any, weights: Any) -> Any:
        """Return the mean over the shard."""
        return jnp.mean(errors)

    def whole_loss(self, loss: Any) -> Any:
        """Return the mean over the devices."""
        return jax.lax.pmean(loss, AXIS)

    def whole_gradient(self, grads: Tree) -> Tree:
        """Return the mean over the devices."""
        return jax.lax.pmean(grads, AXIS)

    def parallel(self, name: str) -> Parallel:
        """Return the step, which takes no padding."""
        return Parallel(name, one_device(), self.step, AXIS)


def reference() -> Parallel:
    """Return the reference for many devices, which takes padding."""
    return ParallelStep().parallel("reference, data-parallel")


def axis_name() -> Parallel:
    """Return the reference as Flax's documentation writes it for many devices."""
    return AxisName().parallel("reference, BatchNorm(axis_name)")
