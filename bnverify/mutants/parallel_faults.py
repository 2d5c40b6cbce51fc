"""Faults of steps on many devices. Each is a target: ``bnverify.mutants.parallel_faults:NAME``.

On one device each is correct: ``bnverify.check_parallel`` must see them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bnverify.lazy import LazyModule, jax, jnp
from bnverify.model import Parallel, State, StepInfo, Tree
from bnverify.mutants.beyond_one_step import Fault, enter
from bnverify.mutants.parallel_step import AXIS, AxisName, Norm, ParallelStep, one_device

nn: Any = LazyModule("flax.linen")
single: Any = LazyModule("bnverify.reference")


PARALLEL_FAULTS: dict[str, Fault] = {}

EQUAL = "pmap_equals_one_device"
UNEQUAL = "unequal_shards_equal_one_device"
JIT = "jit_with_shardings_equals_one_device"


def fault(mistake: str, expected: str = EQUAL) -> Callable[[type[Any]], type[Any]]:
    """Enter the decorated step."""

    def made(parts: type[Any], name: str) -> Parallel:
        step: Parallel = parts().parallel(f"mutant[{name}]")
        return step

    return enter(PARALLEL_FAULTS, mistake, expected, made)


def __getattr__(name: str) -> Any:
    if name in PARALLEL_FAULTS:
        return PARALLEL_FAULTS[name].make
    raise AttributeError(f"no fault of many devices is named {name!r}")


def own_moments(h: Any) -> tuple[Any, Any]:
    """Return the moments of one device's rows."""
    mean = jnp.mean(h, axis=0)
    return mean, jnp.maximum(jnp.mean(h**2, axis=0) - mean**2, 0.0)


@fault("statistics_not_synchronised")
class StatisticsNotSynchronised(AxisName):
    """BatchNorm was given no axis name: each device keeps its own shard's statistics."""

    def normalise(self, h: Any, weights: Any) -> Any:
        """Normalise by the shard."""
        return nn.BatchNorm(
            use_running_average=False, momentum=single.MOMENTUM, name="BatchNorm_0"
        )(h)


@fault("variances_averaged")
class StatisticsAveragedAfterwards(StatisticsNotSynchronised):
    """Each device normalises by its shard; the statistics are averaged over the devices later."""

    def carried(self, batch_stats: Tree) -> Tree:
        """Average means and variances alike."""
        return jax.lax.pmean(batch_stats, AXIS)


@fault("variances_averaged")
class VariancesAveraged(AxisName):
    """The layer averages the devices' variances, which leaves out the spread of their means."""

    def normalise(self, h: Any, weights: Any) -> Any:
        """Normalise by averaged moments."""
        return Norm(lambda h, weights: jax.lax.pmean(own_moments(h), AXIS), name="BatchNorm_0")(
            h, weights
        )


@fault("statistics_not_synchronised")
class StatisticsOfTheFirstDevice(StatisticsNotSynchronised):
    """The first device's statistics are sent to all the others."""

    def carried(self, batch_stats: Tree) -> Tree:
        """Take the first."""
        return jax.tree_util.tree_map(lambda leaf: jax.lax.all_gather(leaf, AXIS)[0], batch_stats)


@fault("statistics_not_synchronised")
class MeansSynchronisedVariancesNot(AxisName):
    """The layer averages the means over the devices and forgets the variances."""

    def normalise(self, h: Any, weights: Any) -> Any:
        """Normalise by a common mean and an own variance."""

        def moments(h: Any, weights: Any) -> tuple[Any, Any]:
            mean, var = own_moments(h)
            return jax.lax.pmean(mean, AXIS), var

        return Norm(moments, name="BatchNorm_0")(h, weights)


@fault("gradients_not_synchronised")
class GradientsNotSynchronised(AxisName):
    """Each device updates its params by its own gradient."""

    def whole_gradient(self, grads: Tree) -> Tree:
        """Keep the shard's."""
        return grads


@fault("gradients_summed")
class GradientsSummed(AxisName):
    """The devices' gradients are summed: the rate is four times what it says."""

    def whole_gradient(self, grads: Tree) -> Tree:
        """Sum."""
        return jax.lax.psum(grads, AXIS)


@fault("unequal_shards", UNEQUAL)
class MomentsOfUnequalShardsAveraged(ParallelStep):
    """Flax's BatchNorm with a mask and an axis name: every shard's moments weigh alike."""

    def normalise(self, h: Any, weights: Any) -> Any:
        """Normalise by the mean of the shards' masked means."""
        return nn.BatchNorm(
            use_running_average=False, momentum=single.MOMENTUM, axis_name=AXIS, name="BatchNorm_0"
        )(h, mask=weights[:, None] > 0)


@fault("unequal_shards", UNEQUAL)
class PaddingEntersTheStatistics(ParallelStep):
    """The padding of the last batch counts in the statistics."""

    def moments(self, h: Any, weights: Any) -> tuple[Any, Any]:
        """Count all rows."""
        return super().moments(h, jnp.ones_like(weights))


@fault("mean_of_means", UNEQUAL)
class MeanOfMeans(ParallelStep):
    """The loss is the mean of the devices' means, whatever number of rows each has."""

    def loss(self, errors: Any, weights: Any) -> Any:
        """Divide by the shard's own rows, then by the devices."""
        own = jnp.sum(errors * weights) / jnp.maximum(jnp.sum(weights), 1.0)
        return own / jax.lax.psum(1, AXIS)


@fault("mean_of_means", UNEQUAL)
class PaddingEntersTheLoss(ParallelStep):
    """The loss divides by all rows of the padded batch."""

    def loss(self, errors: Any, weights: Any) -> Any:
        """Divide by the slots, not by the rows."""
        return jnp.sum(errors * weights) / jax.lax.psum(jnp.float32(len(errors)), AXIS)


@fault("variances_averaged", JIT)
class StatisticsPerChunkUnderJit(ParallelStep):
    """Under jit the step cuts the batch in chunks itself and averages their new statistics."""

    def sharded_step(self) -> Any:
        """Return the single step whose statistics are the mean over four chunks."""
        plain = one_device()

        def step(state: State, x: Any, y: Any, lr: Any) -> tuple[State, StepInfo]:
            new, info = plain.step(state, x, y, lr)
            chunks = x.reshape(4, -1, x.shape[-1]), y.reshape(4, -1)
            each = jax.vmap(lambda x, y: plain.step(state, x, y, lr)[0].batch_stats)(*chunks)
            mean = jax.tree_util.tree_map(lambda leaf: jnp.mean(leaf, axis=0), each)
            return new._replace(batch_stats=mean), info

        return step
