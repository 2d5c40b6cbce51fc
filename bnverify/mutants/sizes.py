"""Faults that only some sizes of the batch or of its rows show."""

from __future__ import annotations

from functools import partial
from typing import Any

from bnverify.lazy import jnp
from bnverify.model import State, Tree
from bnverify.mutants.canonical import CanonicalStep, HandwrittenNorm, Moments
from bnverify.mutants.catalogue import mutant
from bnverify.mutants.loss import TrainingError
from bnverify.mutants.trees import edited

fault = partial(mutant, family="sizes", blind=True)


@fault(
    mistake="rows_treated_unequally",
    minimal=(2, 1),
    source="https://github.com/google/flax/issues/1850",
)
class LastRowDropped(CanonicalStep):
    """Training drops the last row of every batch of more than one."""

    def batch(self, x: Any, y: Any) -> tuple[Any, Any]:
        """Drop it."""
        return (x[:-1], y[:-1]) if x.shape[0] > 1 else (x, y)


@fault(mistake="rows_treated_unequally", minimal=(3, 1))
class OddRowDropped(CanonicalStep):
    """Training takes rows in pairs and drops the last one of an odd number."""

    def batch(self, x: Any, y: Any) -> tuple[Any, Any]:
        """Keep an even number, or the only one."""
        even = max(x.shape[0] // 2 * 2, 1)
        return x[:even], y[:even]


@fault(
    mistake="rows_treated_unequally",
    minimal=(5, 1),
    source="https://github.com/huggingface/transformers/pull/17863",
)
class RemainderOfFourDropped(CanonicalStep):
    """Training drops what does not fill a multiple of four rows, where there are more than four."""

    def batch(self, x: Any, y: Any) -> tuple[Any, Any]:
        """Keep a multiple of four."""
        rows = x.shape[0]
        kept = rows // 4 * 4 if rows > 4 else rows
        return x[:kept], y[:kept]


@fault(mistake="rows_treated_unequally", minimal=(9, 1))
class RowsBeyondEightLeftOutOfTheLoss(TrainingError):
    """Rows after the eighth enter the statistics and not the loss."""

    def training_error(self, preds: Any, y: Any) -> Any:
        """Keep the first eight."""
        return self.error(preds[:8], y[:8])


@fault(mistake="rows_treated_unequally", minimal=(17, 1))
class RowsBeyondSixteenLeftOutOfTheMoments(HandwrittenNorm):
    """Rows after the sixteenth enter neither mean nor variance."""

    def moments(self, h: Any, layer: int) -> Moments:
        """Keep the first sixteen."""
        return super().moments(h[:16], layer)


@fault(mistake="statistics_of_part_of_the_batch", minimal=(33, 1))
class RowsBeyondThirtyTwoNotRecorded(HandwrittenNorm):
    """The recorded moments are those of the first thirty-two rows."""

    def recorded(self, h: Any, batch: Moments, layer: int) -> Moments:
        """Keep the first thirty-two."""
        return self.moments(h[:32], layer)


@fault(mistake="rows_treated_unequally", minimal=(64, 1))
class SixtyFourRowsOverflowACounter(TrainingError):
    """The loss counts its rows modulo 64: a full batch divides by one."""

    def training_error(self, preds: Any, y: Any) -> Any:
        """Divide by the remainder, or by one."""
        return jnp.sum((preds - y) ** 2) / jnp.maximum(y.shape[0] % 64, 1)


@fault(
    mistake="rows_treated_unequally",
    minimal=(65, 1),
    survives="outside the default domain, whose batches have at most 64 rows",
)
class RowsBeyondSixtyFourLeftOut(CanonicalStep):
    """Training drops the rows after the sixty-fourth."""

    def batch(self, x: Any, y: Any) -> tuple[Any, Any]:
        """Keep the first sixty-four."""
        return x[:64], y[:64]


@fault(mistake="train_step_in_eval_mode", source="https://github.com/FluxML/Flux.jl/issues/1992")
class BatchOfOneInEvalMode(CanonicalStep):
    """A batch of one row is trained in eval mode: its variance of zero looked like an error."""

    def loss(self, params: Tree, batch_stats: Tree, x: Any, y: Any) -> tuple[Any, Tree]:
        """Choose the mode by the number of rows."""
        preds, batch_stats = self.apply(params, batch_stats, x, train=x.shape[0] > 1)
        return self.error(preds, y), batch_stats


@fault(mistake="new_statistics_dropped", source="https://github.com/FluxML/Flux.jl/issues/1992")
class BatchOfOneNotRecorded(HandwrittenNorm):
    """A batch of one row leaves the statistics as they are."""

    rows = 0

    def recorded(self, h: Any, batch: Moments, layer: int) -> Moments:
        """Remember how many rows there are."""
        self.rows = h.shape[0]
        return batch

    def fold(self, old: Moments, batch: Moments, layer: int) -> Moments:
        """Keep the old ones where there is one row."""
        return old if self.rows == 1 else super().fold(old, batch, layer)


@fault(mistake="wrong_moments")
class BatchOfOneHasVarianceOne(HandwrittenNorm):
    """The recorded variance of a single row is 1, so that nothing divides by zero."""

    def recorded(self, h: Any, batch: Moments, layer: int) -> Moments:
        """Replace the variance of one row."""
        return (batch[0], jnp.ones_like(batch[1])) if h.shape[0] == 1 else batch


@fault(mistake="wrong_gradient", minimal=(2, 2))
class LastFeatureNotTrained(CanonicalStep):
    """Of more than one feature, the last one's weights get no gradient."""

    def gradients(self, state: State, x: Any, y: Any) -> tuple[tuple[Any, Tree], Tree]:
        """Drop the last row of the first kernel's gradient."""
        result, grads = super().gradients(state, x, y)
        if x.shape[1] == 1:
            return result, grads
        return result, edited(grads, "Dense_0/kernel", lambda slope: slope.at[-1].set(0.0))


@fault(mistake="modes_differ", minimal=(1, 2))
class LastFeatureOnlyEvaluated(CanonicalStep):
    """Of more than one feature, training leaves the last out and evaluation does not."""

    def batch(self, x: Any, y: Any) -> tuple[Any, Any]:
        """Zero the last feature."""
        return (jnp.asarray(x).at[:, -1].set(0.0) if x.shape[1] > 1 else x), y


@fault(mistake="rows_treated_unequally", minimal=(2, 2))
class SquareBatchTransposed(CanonicalStep):
    """Training transposes a batch of as many rows as features: both layouts were accepted."""

    def batch(self, x: Any, y: Any) -> tuple[Any, Any]:
        """Transpose what could be either."""
        return (x.T if x.shape[0] == x.shape[1] else x), y


@fault(mistake="update_dropped", minimal=(2, 9))
class FeaturesBeyondEightNotTrained(CanonicalStep):
    """Weights of the features after the eighth are not updated."""

    def thread(self, old: State, new: State) -> State:
        """Keep the old weights of those features."""
        was = old.params["Dense_0"]["kernel"]
        params = edited(
            new.params, "Dense_0/kernel", lambda now: jnp.asarray(was).at[:8].set(now[:8])
        )
        return new._replace(params=params)


@fault(
    mistake="variances_averaged",
    minimal=(4, 1),
    source="https://github.com/tensorflow/tpu/issues/321",
)
class FourShardsWhereTheyFit(HandwrittenNorm):
    """Of a batch that fits into four shards, the recorded variance is the mean of theirs."""

    def recorded(self, h: Any, batch: Moments, layer: int) -> Moments:
        """Average the shards' variances."""
        if h.shape[0] % 4:
            return batch
        return batch[0], h.reshape(4, h.shape[0] // 4, h.shape[1]).var(axis=1).mean(axis=0)
