"""Faults in the training loss."""

from __future__ import annotations

from functools import partial
from typing import Any

from bnverify.lazy import jnp
from bnverify.model import LayerInput, State, StepInfo, Tree
from bnverify.mutants import canonical
from bnverify.mutants.canonical import CanonicalStep
from bnverify.mutants.catalogue import mutant
from bnverify.mutants.trees import mapped

fault = partial(mutant, family="loss", blind=True)


class TrainingError(CanonicalStep):
    """A step whose training error may differ from the error that evaluation reports."""

    def training_error(self, preds: Any, y: Any) -> Any:
        """Return the error that is minimised."""
        return self.error(preds, y)

    def loss(self, params: Tree, batch_stats: Tree, x: Any, y: Any) -> tuple[Any, Tree]:
        """Return the training error and the statistics."""
        preds, batch_stats = self.apply(params, batch_stats, x, train=True)
        return self.training_error(preds, y), batch_stats


@fault(mistake="broadcast_loss", minimal=(2, 1))
class BroadcastLoss(TrainingError):
    """Predictions (N, 1) minus targets (N,) make a matrix of differences of all pairs."""

    def training_error(self, preds: Any, y: Any) -> Any:
        """Forget the reshape."""
        return jnp.mean((preds[:, None] - y) ** 2)


@fault(mistake="sum_instead_of_mean", minimal=(2, 1))
class SumInsteadOfMean(TrainingError):
    """The training loss is the sum over the batch."""

    def training_error(self, preds: Any, y: Any) -> Any:
        """Add up."""
        return jnp.sum((preds - y) ** 2)


@fault(mistake="rows_treated_unequally", minimal=(2, 1))
class FirstRowCountsTwice(TrainingError):
    """The first row's error counts twice."""

    def training_error(self, preds: Any, y: Any) -> Any:
        """Count it again."""
        errors = (preds - y) ** 2
        return (jnp.sum(errors) + errors[0]) / (errors.shape[0] + 1)


@fault(
    mistake="rows_treated_unequally",
    minimal=(2, 1),
    source="https://github.com/google/flax/issues/1850",
)
class LastRowLeftOutOfTheLoss(TrainingError):
    """The last row enters the statistics and not the loss."""

    def training_error(self, preds: Any, y: Any) -> Any:
        """Weigh the last row with zero, unless it is the only one."""
        counts = jnp.arange(y.shape[0]) < jnp.maximum(y.shape[0] - 1, 1)
        return jnp.sum(counts * (preds - y) ** 2) / jnp.sum(counts)


@fault(
    mistake="rows_treated_unequally",
    minimal=(3, 1),
    source="https://github.com/huggingface/transformers/pull/18458",
)
class MeanOfUnequalShardsMeans(TrainingError):
    """The loss is the mean of the means of two shards, the first row and the others."""

    def training_error(self, preds: Any, y: Any) -> Any:
        """Average two averages of unequally many rows."""
        errors = (preds - y) ** 2
        others = (jnp.sum(errors) - errors[0]) / jnp.maximum(y.shape[0] - 1, 1)
        return jnp.where(y.shape[0] > 1, (errors[0] + others) / 2, errors[0])


@fault(mistake="targets_misaligned", minimal=(2, 1))
class TargetsReversed(TrainingError):
    """The targets are in the reverse order of the rows."""

    def training_error(self, preds: Any, y: Any) -> Any:
        """Reverse them."""
        return self.error(preds, y[::-1])


@fault(mistake="targets_misaligned", minimal=(2, 1))
class TargetsShiftedByOneRow(TrainingError):
    """Every row is compared with the target of the row before it."""

    def training_error(self, preds: Any, y: Any) -> Any:
        """Shift them."""
        return self.error(preds, jnp.roll(y, 1))


@fault(mistake="targets_ignored")
class TargetsIgnored(TrainingError):
    """The training loss compares predictions with zero."""

    def training_error(self, preds: Any, y: Any) -> Any:
        """Leave y out."""
        return jnp.mean(preds**2)


@fault(mistake="targets_ignored", minimal=(2, 1))
class TargetsReplacedByTheirMean(TrainingError):
    """The training loss compares every prediction with the mean of the targets."""

    def training_error(self, preds: Any, y: Any) -> Any:
        """Average them."""
        return self.error(preds, jnp.mean(y))


@fault(mistake="modes_differ")
class TrainingLossHalved(TrainingError):
    """The training loss has a factor 1/2 that evaluation has not."""

    def training_error(self, preds: Any, y: Any) -> Any:
        """Halve."""
        return self.error(preds, y) / 2


@fault(mistake="modes_differ")
class TrainingLossIsHuber(TrainingError):
    """Training minimises the Huber loss; evaluation reports the squared error."""

    def training_error(self, preds: Any, y: Any) -> Any:
        """Grow linearly beyond 10."""
        off = jnp.abs(preds - y)
        return jnp.mean(jnp.where(off <= 10.0, off**2, 20.0 * off - 100.0))


@fault(mistake="loss_not_reduced")
class LossHasOneAxis(CanonicalStep):
    """The reported loss has shape (1,) where a scalar is meant."""

    def report(self, loss: Any, grads: Tree) -> StepInfo:
        """Reshape the loss."""
        return StepInfo(loss.reshape(1), grads)


@fault(mistake="loss_reads_old_statistics")
class PenaltyOnTheRunningVariance(CanonicalStep):
    """The training loss contains a hundredth of the mean of the old running variance."""

    def loss(self, params: Tree, batch_stats: Tree, x: Any, y: Any) -> tuple[Any, Tree]:
        """Add it."""
        loss, new = super().loss(params, batch_stats, x, y)
        return loss + 0.01 * jnp.mean(batch_stats["BatchNorm_0"]["var"]), new


@fault(mistake="loss_reads_old_statistics")
class PenaltyOnTheNewStatistics(CanonicalStep):
    """The training loss contains the square of the new running mean, gradient included."""

    def loss(self, params: Tree, batch_stats: Tree, x: Any, y: Any) -> tuple[Any, Tree]:
        """Add it."""
        loss, new = super().loss(params, batch_stats, x, y)
        return loss + jnp.mean(new["BatchNorm_0"]["mean"] ** 2), new


@fault(
    mistake="rows_treated_unequally",
    source="https://github.com/pytorch/pytorch/issues/70529",
)
class PaddingEntersStatistics(CanonicalStep):
    """The batch is padded to a multiple of four; the loss masks the padding, BatchNorm does not."""

    def padded(self, x: Any) -> tuple[Any, Any]:
        """Return x with rows of zeros, and the weights of its rows."""
        rows = x.shape[0]
        more = -rows % 4
        return jnp.pad(x, ((0, more), (0, 0))), jnp.pad(jnp.ones(rows), (0, more))

    def mask(self, weights: Any) -> Any:
        """Return the mask that BatchNorm is given."""
        return None

    def loss(self, params: Tree, batch_stats: Tree, x: Any, y: Any) -> tuple[Any, Tree]:
        """Pad, and average over the real rows."""
        x, weights = self.padded(x)
        preds, new = self.apply(params, batch_stats, x, True, self.mask(weights))
        errors = weights * (preds - jnp.pad(y, (0, -y.shape[0] % 4))) ** 2
        return jnp.sum(errors) / jnp.sum(weights), new

    def layer_inputs(self, state: State, x: Any, y: Any) -> dict[str, LayerInput]:
        """Return the padded input and which rows are real."""
        x, weights = self.padded(x)
        given = canonical.captured(self, state, x, self.mask(weights))
        return {path: LayerInput(value, weights[:, None]) for path, value in given.items()}


@fault(mistake="rows_treated_unequally")
class PaddingEntersTheMean(PaddingEntersStatistics):
    """Padding is masked in BatchNorm, but the loss divides by the number of padded rows."""

    def mask(self, weights: Any) -> Any:
        """Mask BatchNorm."""
        return weights

    def loss(self, params: Tree, batch_stats: Tree, x: Any, y: Any) -> tuple[Any, Tree]:
        """Divide by more rows than there are."""
        loss, new = super().loss(params, batch_stats, x, y)
        return loss * (y.shape[0] / (y.shape[0] + -y.shape[0] % 4)), new


@fault(
    mistake="statistics_of_part_of_the_batch",
    minimal=(2, 1),
    source="https://github.com/marin-community/marin/pull/8360",
)
class LastMicroBatchKept(CanonicalStep):
    """Gradients of two micro-batches are averaged, but only the last one's statistics are kept."""

    def gradients(self, state: State, x: Any, y: Any) -> tuple[tuple[Any, Tree], Tree]:
        """Take two gradients and the second's statistics."""
        half = x.shape[0] // 2
        if half == 0:
            return super().gradients(state, x, y)
        (first, _), slopes = super().gradients(state, x[:half], y[:half])
        (second, new), others = super().gradients(state, x[half:], y[half:])
        mean = mapped(lambda one, other: (one + other) / 2, slopes, others)
        return ((first + second) / 2, new), mean
