"""Faults in how the optimizer is used."""

from __future__ import annotations

from functools import partial
from typing import Any

from bnverify.lazy import LazyModule, jax, jnp
from bnverify.model import State, StepInfo, Tree
from bnverify.mutants.canonical import CanonicalStep
from bnverify.mutants.catalogue import mutant
from bnverify.mutants.optimizers import (
    DECAY,
    WithAdam,
    WithMaskedAdamW,
    WithMaskedDecay,
    WithMomentum,
)
from bnverify.mutants.trees import edited, mapped, of_normalisation

optax: Any = LazyModule("optax")
fault = partial(mutant, family="optimizer", blind=True)


@fault(mistake="optimizer_on_all_variables")
class OptimizerOnAllVariables(CanonicalStep):
    """The optimizer is initialised on params and statistics; plain SGD has no state to show it."""

    def init(self, seed: Any, x: Any) -> State:
        """Initialise the optimizer on everything."""
        variables = self.variables(seed, x)
        return State(variables["params"], variables["batch_stats"], self.tx(0.0).init(variables))

    def update(self, grads: Tree, state: State, lr: Any) -> tuple[Tree, Tree]:
        """Update everything, the statistics by a gradient of zero."""
        variables = {"params": state.params, "batch_stats": state.batch_stats}
        every = {"params": grads, "batch_stats": mapped(jnp.zeros_like, state.batch_stats)}
        updates, opt_state = self.tx(lr).update(every, state.opt_state, variables)
        return optax.apply_updates(variables, updates)["params"], opt_state


@fault(mistake="optimizer_on_all_variables")
class AdamOnAllVariables(WithAdam, OptimizerOnAllVariables):
    """Adam is initialised on params and statistics, and keeps moments of both."""


@fault(mistake="statistics_fed_to_the_optimizer")
class DecayReachesStatistics(OptimizerOnAllVariables):
    """AdamW owns all variables, so that its decay also shrinks the statistics."""

    def optimizer(self, lr: Any) -> Any:
        """Return AdamW."""
        return optax.adamw(lr, weight_decay=DECAY)

    def step(self, state: State, x: Any, y: Any, lr: Any) -> tuple[State, StepInfo]:
        """Update the new variables, statistics among them."""
        (loss, batch_stats), grads = self.gradients(state, x, y)
        variables = {"params": state.params, "batch_stats": batch_stats}
        every = {"params": grads, "batch_stats": mapped(jnp.zeros_like, batch_stats)}
        updates, opt_state = self.tx(lr).update(every, state.opt_state, variables)
        new = optax.apply_updates(variables, updates)
        return State(new["params"], new["batch_stats"], opt_state), StepInfo(loss, grads)


@fault(
    mistake="statistics_trained_as_params", source="https://github.com/intel/ipex-llm/issues/1599"
)
class StatisticsTrainedAsParams(CanonicalStep):
    """The loss runs in eval mode and its gradient trains the statistics as it trains params."""

    def step(self, state: State, x: Any, y: Any, lr: Any) -> tuple[State, StepInfo]:
        """Differentiate both trees and move both by the gradient."""

        def loss_fn(params: Tree, batch_stats: Tree) -> Any:
            preds, _ = self.apply(params, batch_stats, x, train=False)
            return self.error(preds, y)

        loss, (grads, pull) = jax.value_and_grad(loss_fn, argnums=(0, 1))(
            state.params, state.batch_stats
        )
        params, opt_state = self.update(grads, state, lr)
        batch_stats = mapped(lambda old, slope: old - lr * slope, state.batch_stats, pull)
        return State(params, batch_stats, opt_state), StepInfo(loss, grads)


@fault(mistake="statistics_fed_to_the_optimizer")
class MovingAverageScaledByLearningRate(CanonicalStep):
    """The optimizer makes the moving average: the statistics move by lr times their change."""

    def step(self, state: State, x: Any, y: Any, lr: Any) -> tuple[State, StepInfo]:
        """Give the optimizer the change of the statistics as their gradient."""
        new, info = super().step(state, x, y, lr)
        moved = mapped(lambda old, now: old + lr * (now - old), state.batch_stats, new.batch_stats)
        return new._replace(batch_stats=moved), info


@fault(mistake="update_dropped", source="https://github.com/borisdayma/dalle-mini/pull/71")
class UpdateDropped(CanonicalStep):
    """The updated params are computed and forgotten."""

    def thread(self, old: State, new: State) -> State:
        """Keep the old params."""
        return new._replace(params=old.params)


@fault(mistake="update_dropped")
class OutputBiasNeverUpdated(CanonicalStep):
    """One leaf, the bias of the last layer, stays as it was initialised."""

    def thread(self, old: State, new: State) -> State:
        """Keep the old bias."""
        bias = old.params[f"Dense_{self.layers}"]["bias"]
        params = edited(new.params, f"Dense_{self.layers}/bias", lambda _: bias)
        return new._replace(params=params)


@fault(mistake="update_scaled")
class HalfUpdate(CanonicalStep):
    """The params that are carried on are the mean of the old and the new ones."""

    def thread(self, old: State, new: State) -> State:
        """Average old and new params."""
        half = mapped(lambda was, now: (was + now) / 2, old.params, new.params)
        return new._replace(params=half)


@fault(mistake="update_applied_twice")
class UpdateAppliedTwice(CanonicalStep):
    """The update is added to the params twice."""

    def update(self, grads: Tree, state: State, lr: Any) -> tuple[Tree, Tree]:
        """Apply the update, and apply it again."""
        updates, opt_state = self.tx(lr).update(grads, state.opt_state, state.params)
        once = optax.apply_updates(state.params, updates)
        return optax.apply_updates(once, updates), opt_state


@fault(mistake="update_applied_twice")
class OptimizerStepsTwice(WithMomentum):
    """The optimizer is asked for two updates from one gradient, and its state advances twice."""

    def update(self, grads: Tree, state: State, lr: Any) -> tuple[Tree, Tree]:
        """Update, and update again."""
        params, opt_state = super().update(grads, state, lr)
        return super().update(grads, State(params, state.batch_stats, opt_state), lr)


@fault(mistake="wrong_sign")
class GradientAppliedAsUpdate(CanonicalStep):
    """The gradient itself is added to the params: uphill, and without the learning rate."""

    def update(self, grads: Tree, state: State, lr: Any) -> tuple[Tree, Tree]:
        """Apply the gradient."""
        _, opt_state = super().update(grads, state, lr)
        return optax.apply_updates(state.params, grads), opt_state


@fault(mistake="wrong_sign")
class UpdateSubtracted(CanonicalStep):
    """What the optimizer returns is subtracted from the params: gradient ascent."""

    def update(self, grads: Tree, state: State, lr: Any) -> tuple[Tree, Tree]:
        """Subtract the update."""
        updates, opt_state = self.tx(lr).update(grads, state.opt_state, state.params)
        return mapped(lambda param, change: param - change, state.params, updates), opt_state


@fault(mistake="learning_rate_ignored")
class LearningRateFixed(CanonicalStep):
    """The optimizer was built with a learning rate of 0.01, whatever rate the step is given."""

    def tx(self, lr: Any) -> Any:
        """Return the optimizer at 0.01."""
        return self.optimizer(0.01)


@fault(mistake="learning_rate_applied_twice")
class LearningRateAppliedTwice(CanonicalStep):
    """The updates, already scaled by the learning rate, are scaled by it again."""

    def update(self, grads: Tree, state: State, lr: Any) -> tuple[Tree, Tree]:
        """Scale the updates once more."""
        updates, opt_state = self.tx(lr).update(grads, state.opt_state, state.params)
        scaled = mapped(lambda change: lr * change, updates)
        return optax.apply_updates(state.params, scaled), opt_state


@fault(mistake="optimizer_bypassed")
class OptimizerBypassed(WithAdam):
    """Adam's state is kept up, but the params move by plain gradient descent."""

    def update(self, grads: Tree, state: State, lr: Any) -> tuple[Tree, Tree]:
        """Descend beside the optimizer."""
        _, opt_state = super().update(grads, state, lr)
        return mapped(lambda param, slope: param - lr * slope, state.params, grads), opt_state


@fault(
    mistake="decay_outside_the_learning_rate",
    source="https://github.com/google-deepmind/optax/issues/25",
)
class DecayOutsideTheLearningRate(CanonicalStep):
    """Every step shrinks the params by one percent, at a learning rate of zero too."""

    def thread(self, old: State, new: State) -> State:
        """Shrink the params."""
        return new._replace(params=mapped(lambda leaf: (1 - DECAY) * leaf, new.params))


@fault(
    mistake="decay_of_norm_parameters",
    source="https://github.com/google-deepmind/optax/issues/25",
)
class DecayOfNormParameters(WithMaskedDecay):
    """The declared decay spares scale and bias; the one in use has lost its mask."""

    def tx(self, lr: Any) -> Any:
        """Decay everything."""
        return optax.chain(optax.add_decayed_weights(DECAY), optax.sgd(lr))

    probed = False


@fault(
    mistake="decay_of_norm_parameters",
    source="https://github.com/huggingface/transformers/issues/11936",
)
class DecayMaskFlipped(WithMaskedDecay):
    """The decay's mask is the wrong way round: it decays the normalisation and nothing else."""

    def tx(self, lr: Any) -> Any:
        """Decay scale and bias of the normalisation."""
        decay = optax.add_decayed_weights(DECAY, mask=of_normalisation)
        return optax.chain(decay, optax.sgd(lr))

    probed = False


@fault(
    mistake="decay_of_norm_parameters",
    source="https://github.com/salesforce/jaxformer/issues/28",
)
class AdamwWithoutItsMask(WithMaskedAdamW):
    """AdamW is declared with decay on kernels and used with decay on every leaf."""

    def tx(self, lr: Any) -> Any:
        """Return AdamW, its decay in the state that masking would have."""
        return optax.adamw(
            lr, weight_decay=DECAY, mask=lambda params: mapped(lambda _: True, params)
        )

    probed = False


@fault(mistake="update_scaled")
class UndeclaredClipping(CanonicalStep):
    """Gradients of a global norm above 1 are scaled down, which the optimizer does not say."""

    def update(self, grads: Tree, state: State, lr: Any) -> tuple[Tree, Tree]:
        """Clip, then update."""
        square = sum(jnp.sum(leaf**2) for leaf in jax.tree_util.tree_leaves(grads))
        small = mapped(lambda leaf: leaf / jnp.sqrt(jnp.maximum(square, 1.0)), grads)
        return super().update(small, state, lr)
