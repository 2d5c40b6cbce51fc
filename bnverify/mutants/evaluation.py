"""Faults in evaluation."""

from __future__ import annotations

from functools import partial
from typing import Any

from bnverify.lazy import LazyModule, jnp
from bnverify.model import State
from bnverify.mutants.canonical import CanonicalStep, HandwrittenNorm, Moments
from bnverify.mutants.catalogue import mutant
from bnverify.mutants.trees import edited, mapped

optax: Any = LazyModule("optax")
fault = partial(mutant, family="evaluation", blind=True)


@fault(mistake="eval_in_train_mode", source="https://github.com/yanx27/GACNet/issues/8")
class EvalInTrainMode(CanonicalStep):
    """Evaluation runs the model with train=True and throws the statistics away."""

    def evaluate(self, state: State, x: Any, y: Any) -> Any:
        """Run in train mode."""
        return self.loss(state.params, state.batch_stats, x, y)[0].reshape(1)

    def after_eval(self, state: State, x: Any, y: Any) -> State:
        """Leave the state alone."""
        return state


@fault(mistake="eval_in_train_mode")
class EvalInTrainModeWrites(EvalInTrainMode):
    """Evaluation runs the model with train=True and keeps the statistics."""

    def after_eval(self, state: State, x: Any, y: Any) -> State:
        """Keep what the pass wrote."""
        return state._replace(batch_stats=self.loss(state.params, state.batch_stats, x, y)[1])


@fault(mistake="eval_in_train_mode")
class EvalWritesStatistics(HandwrittenNorm):
    """Evaluation reads the running statistics, and moves them by its batch."""

    def written_in_eval(self, running: Moments, h: Any, layer: int) -> Moments:
        """Fold the batch in."""
        return self.fold(running, self.moments(h, layer), layer)


@fault(mistake="eval_in_train_mode")
class EvalCentresByItsBatch(HandwrittenNorm):
    """Evaluation scales by the running variance but centres by the mean of its own batch."""

    def evaluation_moments(self, running: Moments, h: Any, layer: int) -> Moments:
        """Use the batch's mean."""
        return self.moments(h, layer)[0], running[1]


@fault(mistake="eval_in_train_mode")
class EvalScalesByItsBatch(HandwrittenNorm):
    """Evaluation centres by the running mean but scales by the variance of its own batch."""

    def evaluation_moments(self, running: Moments, h: Any, layer: int) -> Moments:
        """Use the batch's variance."""
        return running[0], self.moments(h, layer)[1]


@fault(mistake="eval_in_train_mode")
class EvalFoldsItsBatchFirst(HandwrittenNorm):
    """Evaluation normalises by the running moments with its own batch folded in."""

    def evaluation_moments(self, running: Moments, h: Any, layer: int) -> Moments:
        """Fold the batch in."""
        return self.fold(running, self.moments(h, layer), layer)


@fault(mistake="eval_of_stale_state", source="https://github.com/google/flax/pull/3982")
class EvalOfInitialParams(CanonicalStep):
    """Evaluation closes over the initial params, those of seed 0."""

    def evaluate(self, state: State, x: Any, y: Any) -> Any:
        """Evaluate other params."""
        return super().evaluate(state._replace(params=self.variables(0, x)["params"]), x, y)


@fault(mistake="eval_of_stale_state", source="https://github.com/google/flax/pull/3982")
class EvalOfInitialStatistics(CanonicalStep):
    """Evaluation closes over the initial statistics, mean 0 and variance 1."""

    def evaluate(self, state: State, x: Any, y: Any) -> Any:
        """Evaluate other statistics."""
        first = self.variables(0, x)["batch_stats"]
        return super().evaluate(state._replace(batch_stats=first), x, y)


@fault(mistake="modes_differ")
class EvalIgnoresTheRunningMean(HandwrittenNorm):
    """Evaluation scales by the running variance and does not centre."""

    def evaluation_moments(self, running: Moments, h: Any, layer: int) -> Moments:
        """Centre by zero."""
        return jnp.zeros_like(running[0]), running[1]


@fault(mistake="modes_differ")
class EvalIgnoresTheRunningVariance(HandwrittenNorm):
    """Evaluation centres by the running mean and does not scale."""

    def evaluation_moments(self, running: Moments, h: Any, layer: int) -> Moments:
        """Scale by one."""
        return running[0], jnp.ones_like(running[1])


@fault(mistake="modes_differ", minimal=(2, 1))
class EvalIgnoresTheScale(HandwrittenNorm):
    """Evaluation leaves the layer's trained scale out."""

    def standardise(
        self, h: Any, moments: Moments, affine: tuple[Any, Any], train: bool, layer: int
    ) -> Any:
        """Scale by one in evaluation."""
        scale, bias = affine
        return super().standardise(h, moments, (scale if train else 1.0, bias), train, layer)


@fault(mistake="modes_differ")
class EvalReadsTheVarianceAsDeviation(HandwrittenNorm):
    """Evaluation takes the running variance for a standard deviation."""

    def inverse_deviation(self, var: Any, train: bool, layer: int) -> Any:
        """Divide by the variance in evaluation."""
        return super().inverse_deviation(var, train, layer) if train else 1.0 / (var + self.epsilon)


@fault(mistake="modes_differ")
class EvalIgnoresTheOutputBias(CanonicalStep):
    """Evaluation leaves the bias of the output layer out."""

    def evaluate(self, state: State, x: Any, y: Any) -> Any:
        """Evaluate with a bias of zero."""
        params = edited(state.params, f"Dense_{self.layers}/bias", jnp.zeros_like)
        return super().evaluate(state._replace(params=params), x, y)


class EvaluationError(CanonicalStep):
    """A step whose evaluation may report another error than training minimises."""

    def evaluation_error(self, preds: Any, y: Any) -> Any:
        """Return what is reported."""
        return self.error(preds, y).reshape(1)

    def evaluate(self, state: State, x: Any, y: Any) -> Any:
        """Return the error in eval mode."""
        preds, _ = self.apply(state.params, state.batch_stats, x, train=False)
        return self.evaluation_error(preds, y)


@fault(mistake="broadcast_loss", minimal=(2, 1))
class EvalBroadcasts(EvaluationError):
    """Evaluation subtracts targets (N,) from predictions (N, 1)."""

    def evaluation_error(self, preds: Any, y: Any) -> Any:
        """Forget the reshape."""
        return jnp.mean((preds[:, None] - y) ** 2).reshape(1)


@fault(mistake="sum_instead_of_mean", minimal=(2, 1))
class EvalSums(EvaluationError):
    """Evaluation reports the sum over the batch."""

    def evaluation_error(self, preds: Any, y: Any) -> Any:
        """Add up."""
        return jnp.sum((preds - y) ** 2).reshape(1)


@fault(mistake="loss_not_reduced", minimal=(2, 1))
class EvalLossNotReduced(EvaluationError):
    """Evaluation returns one error for each row."""

    def evaluation_error(self, preds: Any, y: Any) -> Any:
        """Forget the mean."""
        return (preds - y) ** 2


@fault(
    mistake="rows_treated_unequally",
    minimal=(2, 1),
    source="https://github.com/huggingface/transformers/pull/17863",
)
class EvalDropsTheLastRow(EvaluationError):
    """Evaluation leaves the last row out, unless it is the only one."""

    def evaluation_error(self, preds: Any, y: Any) -> Any:
        """Weigh it with zero."""
        counts = jnp.arange(y.shape[0]) < jnp.maximum(y.shape[0] - 1, 1)
        return (jnp.sum(counts * (preds - y) ** 2) / jnp.sum(counts)).reshape(1)


@fault(mistake="modes_differ")
class EvalReportsTheRoot(EvaluationError):
    """Evaluation reports the root of the mean squared error."""

    def evaluation_error(self, preds: Any, y: Any) -> Any:
        """Take the root."""
        return jnp.sqrt(self.error(preds, y)).reshape(1)


@fault(mistake="targets_misaligned", minimal=(2, 1))
class EvalReversesTheTargets(EvaluationError):
    """Evaluation compares predictions with the targets in reverse order."""

    def evaluation_error(self, preds: Any, y: Any) -> Any:
        """Reverse them."""
        return self.error(preds, y[::-1]).reshape(1)


@fault(mistake="eval_in_train_mode")
class EvalStandardisesItsBatch(CanonicalStep):
    """Evaluation, unlike training, first takes the mean of its batch off the features."""

    def evaluate(self, state: State, x: Any, y: Any) -> Any:
        """Centre the batch."""
        return super().evaluate(state, x - jnp.mean(x, axis=0), y)


@fault(mistake="modes_differ", source="https://github.com/FlyreelAI/sesemi/issues/36")
class EvalOfAveragedParamsWithOtherStatistics(CanonicalStep):
    """Evaluation averages the params with the initial ones and uses the statistics as they are."""

    def evaluate(self, state: State, x: Any, y: Any) -> Any:
        """Average the params."""
        first = self.variables(0, x)["params"]
        mean = mapped(lambda one, other: 0.9 * one + 0.1 * other, state.params, first)
        return super().evaluate(state._replace(params=mean), x, y)


class WithSolution(CanonicalStep):
    """A step with the one-call function: initialise, step, evaluate."""

    def solution(self) -> Any:
        """Return the function."""

        def solve(seed: Any, x: Any, y: Any, lr: Any) -> Any:
            x, y = jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.float32)
            before = self.init(self.truncated(seed), x)
            after, _ = self.step(before, x, y, jnp.float32(lr))
            return self.evaluate(self.evaluated(before, after), x, y)

        return solve

    def truncated(self, seed: Any) -> Any:
        """Return the integer that a real seed stands for; float32 holds none beyond 2^24."""
        return int(seed)

    def evaluated(self, before: State, after: State) -> State:
        """Return the state that is evaluated."""
        return after


@fault(mistake="eval_of_stale_state", source="https://github.com/google/flax/pull/3982")
class SolutionEvaluatesTheOldState(WithSolution):
    """The one-call function evaluates the state from before its step."""

    def evaluated(self, before: State, after: State) -> State:
        """Return the old state."""
        return before


@fault(mistake="eval_of_stale_state")
class SolutionEvaluatesOldStatistics(WithSolution):
    """The one-call function evaluates new params with the statistics from before its step."""

    def evaluated(self, before: State, after: State) -> State:
        """Return the new state with old statistics."""
        return after._replace(batch_stats=before.batch_stats)


@fault(mistake="eval_of_stale_state")
class SolutionEvaluatesOldParams(WithSolution):
    """The one-call function evaluates old params with the statistics from after its step."""

    def evaluated(self, before: State, after: State) -> State:
        """Return the new state with old params."""
        return after._replace(params=before.params)


@fault(mistake="seed_not_truncated")
class SolutionRoundsItsSeed(WithSolution):
    """The one-call function rounds its seed to the nearest integer."""

    def truncated(self, seed: Any) -> Any:
        """Round."""
        return jnp.round(jnp.asarray(seed)).astype(jnp.int32)


@fault(mistake="seed_not_truncated")
class SolutionHoldsItsSeedInFloat32(WithSolution):
    """The one-call function makes a JAX array of its seed, float32: no odd one beyond 2^24 is held."""

    def truncated(self, seed: Any) -> Any:
        """Truncate what float32 holds."""
        return jnp.asarray(seed, jnp.float32).astype(jnp.int32)
