"""Faults of data-parallel steps. Each is a target: ``tests.faults.parallel:NAME``.

Each is correct on one device; ``bnverify.check_parallel`` must detect it. A fault replaces a part of the
correct step, which runs on one shard. Rows have weights, 0 for padding and 1 otherwise.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from bnverify import Parallel, State, StepInfo, Subject
from bnverify import reference as single
from tests.faults.catalogue import Fault, edit
from tests.faults.steps import Tree

AXIS = "data"


@functools.cache
def one_device() -> Subject:
    """Return the step that all of them must equal; it is cached, so that its runs are shared."""
    return single.momentum()


class Norm(nn.Module):
    """BatchNorm over the unmasked rows of all devices, from their sums and their number.

    Attributes:
        moments: (h, weights) -> mean and variance, each (channels,).
        recorded: (h, weights) -> the moments for the running ones; None: those that normalise.
    """

    moments: Callable[[Any, Any], tuple[Any, Any]]
    recorded: Callable[[Any, Any], tuple[Any, Any]] | None = None

    @nn.compact
    def __call__(self, h: Any, weights: Any) -> Any:
        """Return h normalised by the batch's moments, and update the running ones."""
        shape = h.shape[-1:]
        mean = self.variable("batch_stats", "mean", jnp.zeros, shape, jnp.float32)
        var = self.variable("batch_stats", "var", jnp.ones, shape, jnp.float32)
        scale = self.param("scale", nn.initializers.ones, shape)
        bias = self.param("bias", nn.initializers.zeros, shape)
        now = self.moments(h, weights)
        recorded = now if self.recorded is None else self.recorded(h, weights)
        keep = single.MOMENTUM
        mean.value, var.value = (
            keep * old + (1 - keep) * new
            for old, new in zip((mean.value, var.value), recorded, strict=True)
        )
        return (h - now[0]) * (jax.lax.rsqrt(now[1] + 1e-5) * scale) + bias


def flax_norm(**options: Any) -> nn.BatchNorm:
    """Return Flax's BatchNorm in train mode, with the name it has in the reference."""
    return nn.BatchNorm(
        use_running_average=False, momentum=single.MOMENTUM, name="BatchNorm_0", **options
    )


class Model(nn.Module):
    """The reference's model in train mode, with another normalisation of the same name.

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
    """The reference step on one shard."""

    def normalise(self, h: Any, weights: Any) -> Any:
        """Return h normalised over all devices."""
        return Norm(self.moments, name="BatchNorm_0")(h, weights)

    def moments(self, h: Any, weights: Any) -> tuple[Any, Any]:
        """Return the mean and the biased variance of the unmasked rows of all devices."""
        marks = weights[:, None]
        sums = jnp.sum(h * marks, 0), jnp.sum(h**2 * marks, 0), jnp.sum(weights)
        total, squares, count = jax.lax.psum(sums, AXIS)
        mean = total / count
        return mean, jnp.maximum(squares / count - mean**2, 0.0)

    def loss(self, errors: Any, weights: Any) -> Any:
        """Return this device's part of the loss, whose sum over the devices is the loss."""
        return jnp.sum(errors * weights) / jax.lax.psum(jnp.sum(weights), AXIS)

    def whole_loss(self, loss: Any) -> Any:
        return jax.lax.psum(loss, AXIS)

    def whole_gradient(self, grads: Tree) -> Tree:
        return jax.lax.psum(grads, AXIS)

    def moved(self, state: State, own: Tree, whole: Tree, lr: Any) -> tuple[Tree, Tree]:
        """Return the new params and optimizer state.

        Args:
            state: the old state.
            own: the gradient on this device.
            whole: the gradient of the whole loss.
            lr: the learning rate.
        """
        del own
        updates, opt_state = optax.sgd(lr, momentum=0.9).update(
            whole, state.opt_state, state.params
        )
        return optax.apply_updates(state.params, updates), opt_state

    def carried(self, batch_stats: Tree) -> Tree:
        """Return the statistics for the new state."""
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

        (loss, batch_stats), own = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
        grads = self.whole_gradient(own)
        params, opt_state = self.moved(state, own, grads, lr)
        new = State(params, self.carried(batch_stats), opt_state)
        return new, StepInfo(self.whole_loss(loss), grads)

    def step(self, state: State, x: Any, y: Any, lr: Any) -> tuple[State, StepInfo]:
        """Take one step on one shard without padding."""
        return self.counted_step(state, x, y, jnp.ones(len(x), x.dtype), lr)

    def sharded_step(self) -> Any:
        """Return the whole step for ``jax.jit`` with a sharded batch; None: the single-device step."""
        return None

    def subject(self, name: str) -> Parallel:
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
    """The same with Flax's BatchNorm(axis_name=...) and means of means, for shards of equal size."""

    def normalise(self, h: Any, weights: Any) -> Any:
        return flax_norm(axis_name=AXIS)(h)

    def loss(self, errors: Any, weights: Any) -> Any:
        return jnp.mean(errors)

    def whole_loss(self, loss: Any) -> Any:
        return jax.lax.pmean(loss, AXIS)

    def whole_gradient(self, grads: Tree) -> Tree:
        return jax.lax.pmean(grads, AXIS)

    def subject(self, name: str) -> Parallel:
        """Return the step, which does not support padding."""
        return Parallel(name, one_device(), self.step, AXIS)


def reference() -> Parallel:
    """Return the data-parallel reference, which supports padding."""
    return ParallelStep().subject("reference, data-parallel")


def axis_name() -> Parallel:
    """Return the data-parallel reference, written as in Flax's documentation."""
    return AxisName().subject("reference, BatchNorm(axis_name)")


def two_passes() -> Parallel:
    """Return a step whose layer averages the mean first, and then the squared deviations from it."""

    class Parts(ParallelStep):
        def moments(self, h: Any, weights: Any) -> tuple[Any, Any]:
            marks = weights[:, None]
            sums = jnp.sum(h * marks, 0), jnp.sum(weights)
            total, count = jax.lax.psum(sums, AXIS)
            mean = total / count
            return mean, jax.lax.psum(jnp.sum((h - mean) ** 2 * marks, 0), AXIS) / count

    return Parts().subject("two passes")


def momentum_averaged() -> Parallel:
    """Return a step that averages the devices' updates and momentum instead of their gradients."""

    class Parts(AxisName):
        def moved(self, state: State, own: Tree, whole: Tree, lr: Any) -> tuple[Tree, Tree]:
            params, opt_state = jax.lax.pmean(super().moved(state, whole, own, lr), AXIS)
            return params, opt_state

    return Parts().subject("momentum averaged")


TWINS = ("two_passes", "momentum_averaged")
"""Right steps, which differ from some faults in one place. Each is a target, too."""

PARALLEL_FAULTS: dict[str, Fault] = {}

EQUAL = "pmap_equals_one_device"
UNEQUAL = "unequal_shards_equal_one_device"
JIT = "jit_with_shardings_equals_one_device"


def fault(
    name: str,
    mistake: str,
    sentence: str,
    base: type[ParallelStep] = AxisName,
    law: str = EQUAL,
    **parts: Any,
) -> None:
    """Add ``base`` with ``parts`` replaced, which ``law`` must detect."""
    make = edit(base, parts, f"fault[{name}]")
    PARALLEL_FAULTS[name] = Fault(name, "parallel", mistake, sentence, make, law)


def __getattr__(name: str) -> Any:
    if name in PARALLEL_FAULTS:
        return PARALLEL_FAULTS[name].make
    raise AttributeError(f"no data-parallel fault is named {name!r}")


def own_moments(h: Any) -> tuple[Any, Any]:
    """Return the moments of one device's rows."""
    mean = jnp.mean(h, axis=0)
    return mean, jnp.maximum(jnp.mean(h**2, axis=0) - mean**2, 0.0)


def by_moments(moments: Callable[[Any, Any], tuple[Any, Any]]) -> Any:
    """Return a ``normalise`` by ``moments(mean, variance)`` of the device's own moments."""
    return lambda s, h, weights: Norm(
        lambda h, weights: moments(*own_moments(h)), name="BatchNorm_0"
    )(h, weights)


def mean_of_the_shards_means(s: Any, errors: Any, weights: Any) -> Any:
    """Divide by the rows of the shard, then by the number of devices."""
    own = jnp.sum(errors * weights) / jnp.maximum(jnp.sum(weights), 1.0)
    return own / jax.lax.psum(1, AXIS)


def statistics_of_four_chunks(s: Any) -> Any:
    """Return a step for the whole batch whose statistics are the mean of those of four chunks."""
    plain = one_device()

    def step(state: State, x: Any, y: Any, lr: Any) -> tuple[State, StepInfo]:
        new, info = plain.step(state, x, y, lr)
        chunks = x.reshape(4, -1, x.shape[-1]), y.reshape(4, -1)
        each = jax.vmap(lambda x, y: plain.step(state, x, y, lr)[0].batch_stats)(*chunks)
        mean = jax.tree_util.tree_map(lambda leaf: jnp.mean(leaf, axis=0), each)
        return new._replace(batch_stats=mean), info

    return step


def momentum_of_the_shard(
    s: Any, state: State, own: Tree, whole: Tree, lr: Any
) -> tuple[Tree, Tree]:
    """Return params moved by the averaged update, and the optimizer state of one device."""
    updates, opt_state = optax.sgd(lr, momentum=0.9).update(own, state.opt_state, state.params)
    return optax.apply_updates(state.params, jax.lax.pmean(updates, AXIS)), opt_state


def alone(s: Any, h: Any, weights: Any) -> Any:
    """Return h normalised by the shard's own moments."""
    return flax_norm()(h)


# Each row in as few lines as it takes:
# fmt: off

fault("statistics_not_synchronised", "statistics_not_synchronised",
      "BatchNorm has no axis name: each device keeps the statistics of its own shard.",
      normalise=alone)
fault("statistics_averaged_afterwards", "moments_used_before_averaged",
      "Each device normalises by its shard's moments; only the statistics are averaged later.",
      normalise=alone, carried=lambda s, batch_stats: jax.lax.pmean(batch_stats, AXIS))
fault("variances_averaged", "variances_averaged",
      "The layer averages the devices' variances, without the spread of their means.",
      normalise=by_moments(lambda mean, var: jax.lax.pmean((mean, var), AXIS)))
fault("statistics_of_the_first_device", "statistics_not_synchronised",
      "The first device's statistics are sent to all the others.",
      normalise=alone,
      carried=lambda s, batch_stats:
          jax.tree_util.tree_map(lambda leaf: jax.lax.all_gather(leaf, AXIS)[0], batch_stats))
fault("means_synchronised_variances_not", "statistics_not_synchronised",
      "The layer averages the means over the devices, but not the variances.",
      normalise=by_moments(lambda mean, var: (jax.lax.pmean(mean, AXIS), var)))
fault("pooled_moments_recorded_only", "moments_used_before_averaged",
      "The layer records the moments of all devices, but normalises by those of its shard.",
      ParallelStep,
      normalise=lambda s, h, weights:
          Norm(lambda h, weights: own_moments(h), s.moments, name="BatchNorm_0")(h, weights))
fault("statistics_shared_in_pairs", "statistics_not_synchronised",
      "BatchNorm's axis_index_groups pair the devices, so each pair has statistics of its own.",
      normalise=lambda s, h, weights:
          flax_norm(axis_name=AXIS, axis_index_groups=[[0, 1], [2, 3]])(h))
fault("each_device_keeps_its_momentum", "gradients_not_synchronised",
      "Updates are averaged over the devices, but each device's momentum is of its own gradients.",
      moved=momentum_of_the_shard)
fault("gradients_not_synchronised", "gradients_not_synchronised",
      "Each device updates its params by its own gradient.",
      whole_gradient=lambda s, grads: grads)
fault("gradients_summed", "gradients_summed",
      "The devices' gradients are summed: the effective learning rate is four times the declared one.",
      whole_gradient=lambda s, grads: jax.lax.psum(grads, AXIS))
fault("moments_of_unequal_shards_averaged", "unequal_shards",
      "Flax's BatchNorm with a mask and an axis name gives every shard's moments the same weight.",
      ParallelStep, UNEQUAL,
      normalise=lambda s, h, weights: flax_norm(axis_name=AXIS)(h, mask=weights[:, None] > 0))
fault("padding_enters_the_statistics", "unequal_shards",
      "The padding of the last batch counts in the statistics.",
      ParallelStep, UNEQUAL,
      moments=lambda s, h, weights: s.right.moments(h, jnp.ones_like(weights)))
fault("mean_of_means", "mean_of_means",
      "The loss is the mean of the devices' means, even if they have different numbers of rows.",
      ParallelStep, UNEQUAL, loss=mean_of_the_shards_means)
fault("padding_enters_the_loss", "mean_of_means",
      "The loss divides by all rows of the padded batch.",
      ParallelStep, UNEQUAL,
      loss=lambda s, errors, weights:
          # Padding rows count as well.
          jnp.sum(errors * weights) / jax.lax.psum(jnp.float32(len(errors)), AXIS))
fault("statistics_per_chunk_under_jit", "variances_averaged",
      "Under jit, the step splits the batch into chunks and averages their new statistics.",
      ParallelStep, JIT, sharded_step=statistics_of_four_chunks)
