"""Faults inside the normalisation layer."""

from __future__ import annotations

from functools import partial
from typing import Any

from bnverify.lazy import jax, jnp
from bnverify.mutants.canonical import HandwrittenNorm, Moments
from bnverify.mutants.catalogue import mutant

fault = partial(mutant, family="layer", blind=True)
Affine = tuple[Any, Any]


@fault(mistake="division_by_zero_variance")
class EpsilonForgotten(HandwrittenNorm):
    """Nothing is added to the variance: a constant channel divides by zero."""

    def inverse_deviation(self, var: Any, train: bool, layer: int) -> Any:
        """Divide by the bare deviation."""
        return jax.lax.rsqrt(var)


@fault(mistake="division_by_zero_variance")
class EpsilonForgottenInTraining(HandwrittenNorm):
    """Epsilon is added in evaluation and not in training."""

    def inverse_deviation(self, var: Any, train: bool, layer: int) -> Any:
        """Divide by the bare deviation in training."""
        return jax.lax.rsqrt(var) if train else super().inverse_deviation(var, train, layer)


@fault(mistake="modes_differ")
class EpsilonOfEvaluationIsAHundredth(HandwrittenNorm):
    """Training adds 0.00001 to the variance, evaluation 0.01."""

    def inverse_deviation(self, var: Any, train: bool, layer: int) -> Any:
        """Add another epsilon in evaluation."""
        return jax.lax.rsqrt(var + (self.epsilon if train else 1e-2))


@fault(mistake="modes_differ")
class EpsilonOutsideTheRootInEvaluation(HandwrittenNorm):
    """Evaluation adds epsilon to the deviation, training to the variance."""

    def inverse_deviation(self, var: Any, train: bool, layer: int) -> Any:
        """Add epsilon after the root."""
        if train:
            return super().inverse_deviation(var, train, layer)
        return 1.0 / (jnp.sqrt(var) + self.epsilon)


@fault(mistake="loss_reads_old_statistics")
class OldRunningMomentsNormalise(HandwrittenNorm):
    """In training the old running moments normalise; the new ones are computed all the same."""

    def training_moments(self, batch: Moments, old: Moments, new: Moments, layer: int) -> Moments:
        """Use the old ones."""
        return old


@fault(
    mistake="loss_reads_old_statistics",
    source="https://github.com/patrick-kidger/equinox/pull/675",
)
class NewRunningMomentsNormalise(HandwrittenNorm):
    """In training the moving average, this batch folded in, normalises."""

    def training_moments(self, batch: Moments, old: Moments, new: Moments, layer: int) -> Moments:
        """Use the average."""
        return new


@fault(
    mistake="loss_reads_old_statistics",
    source="https://github.com/tenstorrent/tt-metal/pull/45578",
)
class MeanOverwrittenBeforeItIsUsed(HandwrittenNorm):
    """The new running mean shares its buffer with the batch's, and centres the batch."""

    def training_moments(self, batch: Moments, old: Moments, new: Moments, layer: int) -> Moments:
        """Use the running mean and the batch's variance."""
        return new[0], batch[1]


@fault(mistake="loss_reads_old_statistics", minimal=(2, 1))
class RunningVarianceNormalises(HandwrittenNorm):
    """The batch's mean centres, but the old running variance scales."""

    def training_moments(self, batch: Moments, old: Moments, new: Moments, layer: int) -> Moments:
        """Use the old variance."""
        return batch[0], old[1]


@fault(mistake="sample_variance", minimal=(2, 1))
class SampleVarianceNormalises(HandwrittenNorm):
    """The variance that normalises in training divides by N - 1, the recorded one by N."""

    def moments(self, h: Any, layer: int) -> Moments:
        """Use the sample variance."""
        mean = jnp.mean(h, axis=0)
        return mean, jnp.sum((h - mean) ** 2, axis=0) / jnp.maximum(h.shape[0] - 1, 1)

    def recorded(self, h: Any, batch: Moments, layer: int) -> Moments:
        """Record the biased one."""
        return super().moments(h, layer)


@fault(mistake="sample_variance", minimal=(2, 1))
class SampleVarianceThroughout(HandwrittenNorm):
    """Both the normalising and the recorded variance divide by N - 1."""

    def moments(self, h: Any, layer: int) -> Moments:
        """Use the sample variance."""
        mean = jnp.mean(h, axis=0)
        return mean, jnp.sum((h - mean) ** 2, axis=0) / jnp.maximum(h.shape[0] - 1, 1)


@fault(mistake="modes_differ", minimal=(2, 1))
class RootForgottenInTraining(HandwrittenNorm):
    """Training divides by the variance, evaluation by its root."""

    def inverse_deviation(self, var: Any, train: bool, layer: int) -> Any:
        """Divide by the variance."""
        return 1.0 / (var + self.epsilon) if train else super().inverse_deviation(var, train, layer)


@fault(mistake="modes_differ")
class MeanNotSubtractedInTraining(HandwrittenNorm):
    """Training scales without centring."""

    def training_moments(self, batch: Moments, old: Moments, new: Moments, layer: int) -> Moments:
        """Centre by zero."""
        return jnp.zeros_like(batch[0]), batch[1]


@fault(mistake="modes_differ", minimal=(2, 1))
class BiasBeforeScale(HandwrittenNorm):
    """In training the bias is added before the scale is applied."""

    def standardise(self, h: Any, moments: Moments, affine: Affine, train: bool, layer: int) -> Any:
        """Scale the bias too."""
        scale, bias = affine
        return super().standardise(
            h, moments, (scale, bias * scale if train else bias), train, layer
        )


@fault(
    mistake="wrong_gradient",
    tolerated="equivalent to a layer made without a scale: the unused leaf has no gradient and stays",
    minimal=(2, 1),
)
class ScaleIgnored(HandwrittenNorm):
    """The layer has a scale and never uses it."""

    def standardise(self, h: Any, moments: Moments, affine: Affine, train: bool, layer: int) -> Any:
        """Leave the scale out."""
        return super().standardise(h, moments, (1.0, affine[1]), train, layer)


@fault(mistake="statistics_over_the_wrong_axis")
class MomentsOverRowsAndChannels(HandwrittenNorm):
    """In training one mean and one variance normalise all channels; the recorded ones are right."""

    def training_moments(self, batch: Moments, old: Moments, new: Moments, layer: int) -> Moments:
        """Pool the channels: their mean variance, and the variance of their means."""
        mean, var = batch
        return mean.mean() * jnp.ones_like(mean), (var.mean() + mean.var()) * jnp.ones_like(var)


@fault(mistake="statistics_over_the_wrong_axis")
class RowsNormalisedInTraining(HandwrittenNorm):
    """Training normalises each row over its channels, as LayerNorm would."""

    def standardise(self, h: Any, moments: Moments, affine: Affine, train: bool, layer: int) -> Any:
        """Swap the axes in training."""
        if train:
            moments = h.mean(axis=1, keepdims=True), h.var(axis=1, keepdims=True)
        return super().standardise(h, moments, affine, train, layer)


@fault(mistake="modes_differ")
class LastChannelNotNormalised(HandwrittenNorm):
    """In training the last channel is neither centred nor scaled."""

    def training_moments(self, batch: Moments, old: Moments, new: Moments, layer: int) -> Moments:
        """Give the last channel mean 0 and variance 1."""
        last = jnp.arange(self.hidden) == self.hidden - 1
        return jnp.where(last, 0.0, batch[0]), jnp.where(last, 1.0, batch[1])


@fault(mistake="rows_treated_unequally", minimal=(2, 1))
class MomentsOfTheFirstRows(HandwrittenNorm):
    """Only the first half of the batch makes the moments that normalise and are recorded."""

    def moments(self, h: Any, layer: int) -> Moments:
        """Leave the second half out."""
        return super().moments(h[: (h.shape[0] + 1) // 2], layer)


@fault(mistake="rows_treated_unequally", minimal=(2, 1))
class MomentsWeighTheFirstRowDouble(HandwrittenNorm):
    """The first row enters the moments twice."""

    def moments(self, h: Any, layer: int) -> Moments:
        """Prepend it."""
        return super().moments(jnp.concatenate([h[:1], h]), layer)


@fault(
    mistake="variance_turns_negative",
    minimal=(2, 1),
    source="https://github.com/google/flax/issues/1491",
)
class CancellationUnclipped(HandwrittenNorm):
    """E[h^2] - E[h]^2 is not held above zero: rounding makes it negative, the root not a number."""

    def moments(self, h: Any, layer: int) -> Moments:
        """Do not clip."""
        mean = jnp.mean(h, axis=0)
        return mean, jnp.mean(h**2, axis=0) - mean**2


@fault(mistake="modes_differ", minimal=(2, 1))
class NormalisedTwice(HandwrittenNorm):
    """In training the layer's output is normalised once more, by its own moments."""

    def standardise(self, h: Any, moments: Moments, affine: Affine, train: bool, layer: int) -> Any:
        """Normalise again."""
        out = super().standardise(h, moments, affine, train, layer)
        if train:
            out = super().standardise(out, self.moments(out, layer), affine, train, layer)
        return out


@fault(mistake="rows_treated_unequally", source="https://github.com/FluxML/Flux.jl/issues/1992")
class EachRowWithoutItself(HandwrittenNorm):
    """Every row is centred by the mean of the other rows."""

    def standardise(self, h: Any, moments: Moments, affine: Affine, train: bool, layer: int) -> Any:
        """Leave a row out of its own mean."""
        if train:
            rows = h.shape[0]
            others = (rows * moments[0] - h) / jnp.maximum(rows - 1, 1)
            moments = others, moments[1]
        return super().standardise(h, moments, affine, train, layer)
