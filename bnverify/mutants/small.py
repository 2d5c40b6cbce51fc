"""Faults of one part in a thousand and of one in ten thousand."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

from bnverify.lazy import jnp
from bnverify.model import State, StepInfo, Tree
from bnverify.mutants.canonical import CanonicalStep, HandwrittenNorm, Moments
from bnverify.mutants.catalogue import mutant
from bnverify.mutants.trees import edited, mapped

fault = partial(mutant, family="small", blind=True)

SIZES = {"AThousandth": 1e-3, "ATenThousandth": 1e-4}


class SmallFault:
    """Something is off by the factor 1 + ``size``."""

    size: float = 0.0

    def off(self, value: Any) -> Any:
        """Return ``value``, off."""
        return value * (1 + self.size)


Parts = TypeVar("Parts", bound=type[CanonicalStep])


def small(
    *, mistake: str, minimal: tuple[int, int] = (1, 1), survives: str = ""
) -> Callable[[Parts], Parts]:
    """Enter the decorated step twice: off by 1e-3 and by 1e-4."""

    def enter(parts: Parts) -> Parts:
        for word, size in SIZES.items():
            sentence = f"{parts.__doc__} The factor is 1 + {size:g}."
            made = type(f"{parts.__name__}By{word}", (parts,), {"size": size, "__doc__": sentence})
            fault(mistake=mistake, minimal=minimal, survives=survives)(made)
        return parts

    return enter


@small(mistake="weights_do_not_sum_to_one")
class RunningMeanOff(SmallFault, HandwrittenNorm):
    """The batch's mean is a little off where it is recorded."""

    def recorded(self, h: Any, batch: Moments, layer: int) -> Moments:
        """Scale the mean."""
        return self.off(batch[0]), batch[1]


@small(mistake="weights_do_not_sum_to_one", minimal=(2, 1))
class RunningVarianceOff(SmallFault, HandwrittenNorm):
    """The batch's variance is a little off where it is recorded."""

    def recorded(self, h: Any, batch: Moments, layer: int) -> Moments:
        """Scale the variance."""
        return batch[0], self.off(batch[1])


@small(mistake="weights_do_not_sum_to_one")
class MomentumOff(SmallFault, HandwrittenNorm):
    """The new value's weight in the moving average is a little off, the old one's is not."""

    def fold(self, old: Moments, batch: Moments, layer: int) -> Moments:
        """Scale what is added."""
        return super().fold(old, (self.off(batch[0]), self.off(batch[1])), layer)


@small(mistake="weights_do_not_sum_to_one")
class OldStatisticsOff(SmallFault, HandwrittenNorm):
    """The old value's weight in the moving average is a little off."""

    def fold(self, old: Moments, batch: Moments, layer: int) -> Moments:
        """Scale the old."""
        return super().fold((self.off(old[0]), self.off(old[1])), batch, layer)


@small(mistake="wrong_gradient", minimal=(2, 1))
class OneGradientLeafOff(SmallFault, CanonicalStep):
    """The gradient of the normalisation's bias is a little off."""

    def gradients(self, state: State, x: Any, y: Any) -> tuple[tuple[Any, Tree], Tree]:
        """Scale one leaf."""
        result, grads = super().gradients(state, x, y)
        return result, edited(grads, "BatchNorm_0/bias", self.off)


@small(mistake="wrong_gradient", minimal=(2, 1))
class FirstKernelGradientOff(SmallFault, CanonicalStep):
    """The gradient of the first kernel is a little off."""

    def gradients(self, state: State, x: Any, y: Any) -> tuple[tuple[Any, Tree], Tree]:
        """Scale one leaf."""
        result, grads = super().gradients(state, x, y)
        return result, edited(grads, "Dense_0/kernel", self.off)


@small(mistake="wrong_gradient")
class ReportedGradientOff(SmallFault, CanonicalStep):
    """The gradient is a little off where it is reported, not where it is used."""

    def report(self, loss: Any, grads: Tree) -> StepInfo:
        """Scale what is told."""
        return StepInfo(loss, mapped(self.off, grads))


@small(mistake="gradient_of_another_loss")
class ReportedLossOff(SmallFault, CanonicalStep):
    """The training loss is a little off where it is reported."""

    def report(self, loss: Any, grads: Tree) -> StepInfo:
        """Scale what is told."""
        return StepInfo(self.off(loss), grads)


@small(mistake="modes_differ")
class EvalLossOff(SmallFault, CanonicalStep):
    """The evaluation loss is a little off."""

    def evaluate(self, state: State, x: Any, y: Any) -> Any:
        """Scale it."""
        return self.off(super().evaluate(state, x, y))


@small(mistake="update_scaled")
class LearningRateOff(SmallFault, CanonicalStep):
    """The learning rate of the optimizer is a little off."""

    def tx(self, lr: Any) -> Any:
        """Scale the rate."""
        return self.optimizer(self.off(lr))


@small(mistake="decay_outside_the_learning_rate")
class ParamsGrow(SmallFault, CanonicalStep):
    """The new params are a little longer than the updated ones."""

    def thread(self, old: State, new: State) -> State:
        """Scale them."""
        return new._replace(params=mapped(self.off, new.params))


@small(mistake="modes_differ")
class EvalMeanOff(SmallFault, HandwrittenNorm):
    """Evaluation centres by a running mean that is a little off."""

    def evaluation_moments(self, running: Moments, h: Any, layer: int) -> Moments:
        """Scale the mean."""
        return self.off(running[0]), running[1]


@small(mistake="modes_differ")
class EvalVarianceOff(SmallFault, HandwrittenNorm):
    """Evaluation scales by a running variance that is a little off."""

    def evaluation_moments(self, running: Moments, h: Any, layer: int) -> Moments:
        """Scale the variance."""
        return running[0], self.off(running[1])


@small(mistake="modes_differ")
class EvalEpsilonOff(SmallFault, HandwrittenNorm):
    """Evaluation's epsilon is a little off, which only a variance near it can show."""

    def inverse_deviation(self, var: Any, train: bool, layer: int) -> Any:
        """Scale epsilon in evaluation."""
        if not train:
            var = var + self.epsilon * self.size
        return super().inverse_deviation(var, train, layer)


@small(mistake="rows_treated_unequally")
class FirstRowOff(SmallFault, CanonicalStep):
    """The first row's error counts a little more than the others'."""

    def loss(self, params: Tree, batch_stats: Tree, x: Any, y: Any) -> tuple[Any, Tree]:
        """Add a little of it."""
        preds, batch_stats = self.apply(params, batch_stats, x, train=True)
        return self.error(preds, y) + self.size * (preds[0] - y[0]) ** 2 / y.shape[0], batch_stats


@small(mistake="loss_reads_old_statistics")
class OldMeanLeaks(SmallFault, HandwrittenNorm):
    """A little of the old running mean is mixed into the mean that normalises in training."""

    def training_moments(self, batch: Moments, old: Moments, new: Moments, layer: int) -> Moments:
        """Mix them."""
        return batch[0] + self.size * (old[0] - batch[0]), batch[1]


@small(mistake="weights_do_not_sum_to_one")
class OneChannelOff(SmallFault, HandwrittenNorm):
    """The first channel's mean, and no other, is a little off where it is recorded."""

    def recorded(self, h: Any, batch: Moments, layer: int) -> Moments:
        """Scale one channel."""
        first = jnp.arange(self.hidden) == 0
        return jnp.where(first, self.off(batch[0]), batch[0]), batch[1]
