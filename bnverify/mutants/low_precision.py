"""Faults of float16 and bfloat16: what is kept, or computed, with too few bits."""

from __future__ import annotations

from functools import partial
from typing import Any

from bnverify.lazy import jnp
from bnverify.model import State, Tree
from bnverify.mutants.canonical import CanonicalStep, HandwrittenNorm, Moments
from bnverify.mutants.catalogue import mutant
from bnverify.mutants.loss import TrainingError
from bnverify.mutants.optimizers import WithMomentum
from bnverify.mutants.trees import mapped

fault = partial(mutant, family="low_precision", blind=True)


def rounded(value: Any, dtype: str) -> Any:
    """Return ``value`` with the digits of ``dtype``, in its own dtype."""
    return jnp.asarray(value).astype(dtype).astype(jnp.asarray(value).dtype)


@fault(
    mistake="statistics_in_low_precision",
    source="https://github.com/NVIDIA/Model-Optimizer/pull/738",
)
class StatisticsInBfloat16(CanonicalStep):
    """The statistics are stored in bfloat16, from the first state on."""

    def init(self, seed: Any, x: Any) -> State:
        """Store the initial ones."""
        state = super().init(seed, x)
        return self.thread(state, state)

    def thread(self, old: State, new: State) -> State:
        """Store the new ones."""
        stored = mapped(lambda leaf: leaf.astype(jnp.bfloat16), new.batch_stats)
        return new._replace(batch_stats=stored)


@fault(
    mistake="statistics_in_low_precision",
    source="https://github.com/NVIDIA/Model-Optimizer/pull/738",
)
class StatisticsPassThroughBfloat16(CanonicalStep):
    """The statistics are float32 with the digits of bfloat16: small changes are lost."""

    def thread(self, old: State, new: State) -> State:
        """Round them."""
        return new._replace(batch_stats=mapped(lambda a: rounded(a, "bfloat16"), new.batch_stats))


@fault(mistake="statistics_overflow")
class StatisticsPassThroughHalf(CanonicalStep):
    """The statistics pass through float16, beyond whose 65504 a variance is infinite."""

    def thread(self, old: State, new: State) -> State:
        """Round them."""
        return new._replace(batch_stats=mapped(lambda a: rounded(a, "float16"), new.batch_stats))


@fault(mistake="statistics_overflow")
class MomentsInHalf(HandwrittenNorm):
    """The moments are computed in float16, where the square of 256 is infinite."""

    def moments(self, h: Any, layer: int) -> Moments:
        """Compute in float16."""
        mean, var = super().moments(h.astype(jnp.float16), layer)
        return mean.astype(jnp.float32), var.astype(jnp.float32)


@fault(mistake="statistics_in_low_precision")
class MomentsInBfloat16(HandwrittenNorm):
    """The moments are computed in bfloat16, which keeps eight bits of each square."""

    def moments(self, h: Any, layer: int) -> Moments:
        """Compute in bfloat16."""
        mean, var = super().moments(h.astype(jnp.bfloat16), layer)
        return mean.astype(jnp.float32), var.astype(jnp.float32)


@fault(mistake="statistics_in_low_precision", minimal=(2, 1))
class OnlyTheVarianceInBfloat16(HandwrittenNorm):
    """The recorded variance is rounded to bfloat16; all else is float32."""

    def recorded(self, h: Any, batch: Moments, layer: int) -> Moments:
        """Round it."""
        return batch[0], rounded(batch[1], "bfloat16")


@fault(
    mistake="statistics_in_low_precision",
    source="https://github.com/NVIDIA/Model-Optimizer/pull/738",
)
class MomentumRoundedToBfloat16(HandwrittenNorm):
    """Momentum 0.99 is held in bfloat16, where it is 0.98828125."""

    def fold(self, old: Moments, batch: Moments, layer: int) -> Moments:
        """Fold with the rounded momentum."""
        keep = 0.98828125
        mean, var = (keep * was + (1 - keep) * now for was, now in zip(old, batch, strict=True))
        return mean, var


@fault(
    mistake="low_precision",
    tolerated="a choice of precision: its rounding is part of the step's own arithmetic, and allowed for",
)
class GradientsThroughBfloat16(CanonicalStep):
    """Gradients are communicated in bfloat16."""

    def gradients(self, state: State, x: Any, y: Any) -> tuple[tuple[Any, Tree], Tree]:
        """Round them."""
        result, grads = super().gradients(state, x, y)
        return result, mapped(lambda slope: rounded(slope, "bfloat16"), grads)


@fault(
    mistake="low_precision",
    tolerated=(
        "a choice of precision: its rounding, and what float16 cannot hold, are part of the step's "
        "own arithmetic, and allowed for"
    ),
)
class GradientsThroughHalf(CanonicalStep):
    """Gradients pass through float16 without a loss scale: small ones vanish, large overflow."""

    def gradients(self, state: State, x: Any, y: Any) -> tuple[tuple[Any, Tree], Tree]:
        """Round them."""
        result, grads = super().gradients(state, x, y)
        return result, mapped(lambda slope: rounded(slope, "float16"), grads)


@fault(mistake="low_precision")
class InputsThroughHalf(CanonicalStep):
    """Training reads its batch in float16, in which features above 65504 are infinite."""

    def batch(self, x: Any, y: Any) -> tuple[Any, Any]:
        """Round the batch."""
        return rounded(x, "float16"), y


@fault(
    mistake="low_precision",
    tolerated="a choice of precision: its rounding is part of the step's own arithmetic, and allowed for",
)
class TargetsThroughBfloat16(TrainingError):
    """Training compares with targets that were rounded to bfloat16; evaluation does not."""

    def training_error(self, preds: Any, y: Any) -> Any:
        """Round the targets."""
        return self.error(preds, rounded(y, "bfloat16"))


@fault(mistake="low_precision")
class TargetsAsIntegers(TrainingError):
    """Training cuts the decimals off its targets."""

    def training_error(self, preds: Any, y: Any) -> Any:
        """Truncate."""
        return self.error(preds, jnp.trunc(y))


@fault(mistake="low_precision")
class ParamsThroughBfloat16(WithMomentum):
    """Updated params are rounded to bfloat16: small updates are lost."""

    def thread(self, old: State, new: State) -> State:
        """Round them."""
        return new._replace(params=mapped(lambda leaf: rounded(leaf, "bfloat16"), new.params))


@fault(mistake="low_precision")
class MomentumBufferThroughBfloat16(WithMomentum):
    """The momentum buffer is rounded to bfloat16 in each step."""

    def thread(self, old: State, new: State) -> State:
        """Round it."""
        buffer = mapped(lambda leaf: rounded(leaf, "bfloat16"), new.opt_state)
        return new._replace(opt_state=buffer)


@fault(mistake="update_scaled")
class LearningRateThroughBfloat16(CanonicalStep):
    """The learning rate is rounded to bfloat16."""

    def tx(self, lr: Any) -> Any:
        """Round it."""
        return self.optimizer(rounded(lr, "bfloat16"))


@fault(mistake="statistics_in_low_precision")
class EvalReadsStatisticsInBfloat16(HandwrittenNorm):
    """Evaluation rounds the running statistics to bfloat16 as it reads them."""

    def evaluation_moments(self, running: Moments, h: Any, layer: int) -> Moments:
        """Round them."""
        return rounded(running[0], "bfloat16"), rounded(running[1], "bfloat16")


@fault(
    mistake="low_precision",
    tolerated="a choice of precision: its rounding is part of the step's own arithmetic, and allowed for",
)
class ErrorsAddedUpInBfloat16(TrainingError):
    """The mean of the squared errors is taken in bfloat16, and told in float32."""

    def training_error(self, preds: Any, y: Any) -> Any:
        """Reduce in bfloat16."""
        return jnp.mean(((preds - y) ** 2).astype(jnp.bfloat16)).astype(jnp.float32)
