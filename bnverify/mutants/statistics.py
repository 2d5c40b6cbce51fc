"""Faults in the statistics: which moments, over what, how they are averaged."""

from __future__ import annotations

from functools import partial
from typing import Any

from bnverify.lazy import jnp
from bnverify.model import Tree
from bnverify.mutants.canonical import CanonicalStep, HandwrittenNorm, Moments
from bnverify.mutants.catalogue import mutant

fault = partial(mutant, family="statistics", blind=True)


@fault(mistake="momentum_reversed", source="https://github.com/pytorch/examples/issues/289")
class MomentumReversed(HandwrittenNorm):
    """Momentum 0.99 weighs the new value, as it would in PyTorch."""

    def fold(self, old: Moments, batch: Moments, layer: int) -> Moments:
        """Swap old and new."""
        return super().fold(batch, old, layer)


@fault(mistake="momentum_reversed", source="https://github.com/scverse/scvi-tools/pull/2309")
class MomentumOfOneHundredth(CanonicalStep):
    """PyTorch's 0.01 was passed to Flax, where the author means an old value of weight 0.99."""

    def apply(
        self, params: Tree, batch_stats: Tree, x: Any, train: bool, weights: Any = None
    ) -> tuple[Any, Tree]:
        """Run a model of momentum 0.01."""
        other = CanonicalStep(momentum=0.01)
        return other.apply(params, batch_stats, x, train, weights)


@fault(mistake="momentum_not_as_declared")
class MomentumOfNineTenths(HandwrittenNorm):
    """The layer averages with 0.9 where 0.99 is declared."""

    def fold(self, old: Moments, batch: Moments, layer: int) -> Moments:
        """Average with 0.9."""
        (mean, var), (new_mean, new_var) = old, batch
        return 0.9 * mean + 0.1 * new_mean, 0.9 * var + 0.1 * new_var


@fault(mistake="momentum_reversed")
class MomentumOfTheVarianceReversed(HandwrittenNorm):
    """The mean is averaged rightly, the variance with the weights swapped."""

    def fold(self, old: Moments, batch: Moments, layer: int) -> Moments:
        """Swap old and new in the variance."""
        return super().fold(old, batch, layer)[0], super().fold(batch, old, layer)[1]


@fault(mistake="ema_applied_twice")
class VarianceFoldedTwice(HandwrittenNorm):
    """The moving average of the variance is applied twice in one pass."""

    def fold(self, old: Moments, batch: Moments, layer: int) -> Moments:
        """Fold, and fold the variance again."""
        once = super().fold(old, batch, layer)
        return once[0], super().fold(once, batch, layer)[1]


@fault(mistake="statistics_reinitialised")
class BatchMomentsReplaceTheRunning(HandwrittenNorm):
    """There is no moving average: the running moments are those of the last batch."""

    def fold(self, old: Moments, batch: Moments, layer: int) -> Moments:
        """Forget the old ones."""
        return batch


@fault(mistake="weights_do_not_sum_to_one")
class StatisticsSummed(HandwrittenNorm):
    """Old and new are added without the old one's weight: the statistics only grow."""

    def fold(self, old: Moments, batch: Moments, layer: int) -> Moments:
        """Add a hundredth of the new to the whole of the old."""
        (mean, var), (new_mean, new_var) = old, batch
        return mean + 0.01 * new_mean, var + 0.01 * new_var


@fault(mistake="new_statistics_dropped")
class MeanNeverMoves(HandwrittenNorm):
    """Only the variance is averaged; the running mean stays as it was."""

    def fold(self, old: Moments, batch: Moments, layer: int) -> Moments:
        """Keep the old mean."""
        return old[0], super().fold(old, batch, layer)[1]


@fault(mistake="new_statistics_dropped")
class VarianceNeverMoves(HandwrittenNorm):
    """Only the mean is averaged; the running variance stays as it was."""

    def fold(self, old: Moments, batch: Moments, layer: int) -> Moments:
        """Keep the old variance."""
        return super().fold(old, batch, layer)[0], old[1]


@fault(mistake="wrong_moments")
class MeanAndVarianceSwapped(HandwrittenNorm):
    """The batch's variance moves the running mean, and its mean the running variance."""

    def recorded(self, h: Any, batch: Moments, layer: int) -> Moments:
        """Swap the two."""
        return batch[1], batch[0]


@fault(mistake="sample_variance", minimal=(2, 1))
class SampleVariance(HandwrittenNorm):
    """The running variance divides by N - 1."""

    def recorded(self, h: Any, batch: Moments, layer: int) -> Moments:
        """Correct the variance for its sample, which a batch of one must not divide by zero."""
        rows = h.shape[0]
        return batch[0], jnp.sum((h - batch[0]) ** 2, axis=0) / jnp.maximum(rows - 1, 1)


@fault(mistake="wrong_moments")
class VarianceAboutZero(HandwrittenNorm):
    """The running variance is the mean of squares: the mean was not taken off."""

    def recorded(self, h: Any, batch: Moments, layer: int) -> Moments:
        """Record E[h^2]."""
        return batch[0], jnp.mean(h**2, axis=0)


@fault(mistake="wrong_moments")
class VarianceAboutTheRunningMean(HandwrittenNorm):
    """Deviations are taken from the running mean, not from the batch's own."""

    def fold(self, old: Moments, batch: Moments, layer: int) -> Moments:
        """Add the square of the means' distance to the variance."""
        mean, var = batch
        return super().fold(old, (mean, var + (mean - old[0]) ** 2), layer)


@fault(mistake="wrong_moments", minimal=(2, 1))
class DeviationInPlaceOfVariance(HandwrittenNorm):
    """The running variance averages standard deviations."""

    def recorded(self, h: Any, batch: Moments, layer: int) -> Moments:
        """Record the square root."""
        return batch[0], jnp.sqrt(batch[1])


@fault(mistake="wrong_moments")
class DeviationsAveragedThenSquared(HandwrittenNorm):
    """Standard deviations are averaged and the average is squared."""

    def fold(self, old: Moments, batch: Moments, layer: int) -> Moments:
        """Average square roots."""
        roots = jnp.sqrt(old[1]), jnp.sqrt(batch[1])
        mean, deviation = super().fold((old[0], roots[0]), (batch[0], roots[1]), layer)
        return mean, deviation**2


@fault(mistake="wrong_moments", minimal=(2, 1))
class AbsoluteDeviation(HandwrittenNorm):
    """The running variance is the square of the mean absolute deviation."""

    def recorded(self, h: Any, batch: Moments, layer: int) -> Moments:
        """Record it."""
        return batch[0], jnp.mean(jnp.abs(h - batch[0]), axis=0) ** 2


@fault(mistake="wrong_moments")
class VarianceHeldAboveAThousandth(HandwrittenNorm):
    """A batch variance below 0.001 is recorded as 0.001."""

    def recorded(self, h: Any, batch: Moments, layer: int) -> Moments:
        """Hold it above."""
        return batch[0], jnp.maximum(batch[1], 1e-3)


@fault(mistake="wrong_moments")
class EpsilonRecordedWithTheVariance(HandwrittenNorm):
    """The recorded variance already contains epsilon, which evaluation then adds again."""

    def recorded(self, h: Any, batch: Moments, layer: int) -> Moments:
        """Record variance plus epsilon."""
        return batch[0], batch[1] + self.epsilon


@fault(mistake="statistics_over_the_wrong_axis")
class MomentsOverAllAxes(HandwrittenNorm):
    """The recorded moments are taken over rows and channels alike: all channels agree."""

    def recorded(self, h: Any, batch: Moments, layer: int) -> Moments:
        """Record one mean and one variance for all."""
        every = jnp.ones(h.shape[-1])
        return jnp.mean(h) * every, jnp.var(h) * every


@fault(mistake="statistics_over_the_wrong_axis")
class ChannelsReversed(HandwrittenNorm):
    """The recorded moments are in the wrong order of channels."""

    def recorded(self, h: Any, batch: Moments, layer: int) -> Moments:
        """Reverse the channels."""
        return batch[0][::-1], batch[1][::-1]


@fault(mistake="statistics_from_another_batch")
class StatisticsOfTheActivations(HandwrittenNorm):
    """The moments are recorded after the activation function, not before the normalisation."""

    def recorded(self, h: Any, batch: Moments, layer: int) -> Moments:
        """Record the moments of max(h, 0)."""
        return self.moments(jnp.maximum(h, 0.0), layer)


@fault(mistake="statistics_from_another_batch")
class StatisticsOfTheInitialParams(CanonicalStep):
    """The statistics come from a model with the params of seed 0, which the step closes over."""

    def loss(self, params: Tree, batch_stats: Tree, x: Any, y: Any) -> tuple[Any, Tree]:
        """Take the statistics of another model's pass."""
        loss, _ = super().loss(params, batch_stats, x, y)
        first = self.variables(0, x)["params"]
        return loss, self.apply(first, batch_stats, x, train=True)[1]


@fault(
    mistake="statistics_of_part_of_the_batch",
    minimal=(2, 1),
    source="https://github.com/google/flax/issues/877",
)
class StatisticsOfTheFirstShard(HandwrittenNorm):
    """Of a batch in two halves, only the first half's moments are recorded."""

    def recorded(self, h: Any, batch: Moments, layer: int) -> Moments:
        """Record the first half, the larger one."""
        return self.moments(h[: (h.shape[0] + 1) // 2], layer)


@fault(
    mistake="variances_averaged",
    minimal=(2, 1),
    source="https://github.com/tensorflow/tpu/issues/321",
)
class VariancesAveragedOverShards(HandwrittenNorm):
    """The recorded variance is the mean of two shards' own variances: the means' spread is lost."""

    def recorded(self, h: Any, batch: Moments, layer: int) -> Moments:
        """Average the variances of even and odd rows, weighed by their number."""
        parity = (jnp.arange(h.shape[0]) % 2)[:, None] == jnp.array([0, 1])  # (N, 2)
        share = jnp.mean(parity, axis=0)
        total = jnp.maximum(jnp.sum(parity, axis=0), 1)
        means = (parity.T @ h) / total[:, None]
        squares = ((h[:, None, :] - means) ** 2 * parity[:, :, None]).sum(axis=0)
        return batch[0], share @ (squares / total[:, None])


@fault(
    mistake="statistics_from_another_batch",
    source="https://github.com/andreped/GradientAccumulator/issues/6",
)
class StatisticsOfTheBatchReversedInSign(CanonicalStep):
    """The statistics come from a pass over -x, an augmentation that the gradient does not see."""

    def loss(self, params: Tree, batch_stats: Tree, x: Any, y: Any) -> tuple[Any, Tree]:
        """Take the statistics of another batch."""
        loss, _ = super().loss(params, batch_stats, x, y)
        return loss, self.apply(params, batch_stats, -x, train=True)[1]


@fault(mistake="weights_do_not_sum_to_one")
class MeanDebiased(HandwrittenNorm):
    """The running mean is carried on divided by 1 - momentum, as Adam corrects its first step."""

    def fold(self, old: Moments, batch: Moments, layer: int) -> Moments:
        """Correct what should only be corrected where it is read."""
        mean, var = super().fold(old, batch, layer)
        return mean / (1 - 0.99), var


@fault(mistake="train_step_in_eval_mode", source="https://github.com/KaiyuanZh/FLIP/issues/6")
class TrainStepInEvalMode(CanonicalStep):
    """The training loss runs the model with train=False: the statistics never move."""

    def loss(self, params: Tree, batch_stats: Tree, x: Any, y: Any) -> tuple[Any, Tree]:
        """Run in eval mode."""
        preds, batch_stats = self.apply(params, batch_stats, x, train=False)
        return self.error(preds, y), batch_stats


@fault(
    mistake="loss_reads_old_statistics",
    source="https://github.com/mlcommons/algorithmic-efficiency/pull/798",
)
class StatisticsMoveButEvalModeNormalises(CanonicalStep):
    """The statistics are updated by a pass of their own; the loss itself runs in eval mode."""

    def loss(self, params: Tree, batch_stats: Tree, x: Any, y: Any) -> tuple[Any, Tree]:
        """Take the loss of one mode and the statistics of the other."""
        preds, _ = self.apply(params, batch_stats, x, train=False)
        _, updated = self.apply(params, batch_stats, x, train=True)
        return self.error(preds, y), updated


@fault(mistake="new_statistics_dropped")
class OneChannelLeftOut(HandwrittenNorm):
    """The last channel's statistics keep their old values."""

    def fold(self, old: Moments, batch: Moments, layer: int) -> Moments:
        """Fold all channels but the last."""
        last = jnp.arange(self.hidden) == self.hidden - 1
        new = super().fold(old, batch, layer)
        return jnp.where(last, old[0], new[0]), jnp.where(last, old[1], new[1])
