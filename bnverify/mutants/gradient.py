"""Faults in how the gradient is taken."""

from __future__ import annotations

from functools import partial
from typing import Any

from bnverify.lazy import jax, jnp
from bnverify.model import State, StepInfo, Tree
from bnverify.mutants import canonical
from bnverify.mutants.canonical import CanonicalStep, HandwrittenNorm, Moments
from bnverify.mutants.catalogue import mutant
from bnverify.mutants.trees import edited, mapped

fault = partial(mutant, family="gradient", blind=True)
Gradients = tuple[tuple[Any, Tree], Tree]


@fault(mistake="gradient_of_all_variables")
class GradientOfAllVariables(CanonicalStep):
    """The gradient is taken of params and statistics, and both are told."""

    def step(self, state: State, x: Any, y: Any, lr: Any) -> tuple[State, StepInfo]:
        """Differentiate all variables; update the params."""

        def loss_fn(variables: Tree) -> tuple[Any, Tree]:
            return self.loss(variables["params"], variables["batch_stats"], x, y)

        variables = {"params": state.params, "batch_stats": state.batch_stats}
        (loss, batch_stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(variables)
        params, opt_state = self.update(grads["params"], state, lr)
        return State(params, batch_stats, opt_state), StepInfo(loss, grads)


@fault(
    mistake="mutable_forgotten",
    raises="ModifyScopeVariableError",
    source="https://github.com/google/evojax/issues/60",
)
class MutableForgotten(CanonicalStep):
    """The training pass does not declare batch_stats mutable, which Flax refuses."""

    def loss(self, params: Tree, batch_stats: Tree, x: Any, y: Any) -> tuple[Any, Tree]:
        """Apply the model without mutable."""
        variables = {"params": params, "batch_stats": batch_stats}
        out = canonical.model.Model(self).apply(variables, x, train=True)
        return self.error(out.reshape(-1), y), batch_stats


@fault(mistake="has_aux_forgotten", raises="TypeError")
class HasAuxForgotten(CanonicalStep):
    """value_and_grad is not told that the loss returns statistics too, which JAX refuses."""

    def gradients(self, state: State, x: Any, y: Any) -> Gradients:
        """Differentiate a pair."""
        result: Gradients = jax.value_and_grad(self.loss)(state.params, state.batch_stats, x, y)
        return result


@fault(mistake="wrong_gradient")
class GradientInEvalMode(CanonicalStep):
    """Loss and statistics are those of train mode, the gradient is that of eval mode."""

    def gradients(self, state: State, x: Any, y: Any) -> Gradients:
        """Differentiate another mode."""
        result = self.loss(state.params, state.batch_stats, x, y)
        other = jax.grad(lambda params: self.evaluate(state._replace(params=params), x, y)[0])
        return result, other(state.params)


@fault(mistake="wrong_gradient")
class PenaltyDifferentiatedButNotReported(CanonicalStep):
    """The gradient contains a penalty on the params that the reported loss does not."""

    def gradients(self, state: State, x: Any, y: Any) -> Gradients:
        """Add the gradient of 0.005 * |params|^2."""
        result, grads = super().gradients(state, x, y)
        return result, mapped(lambda slope, leaf: slope + 0.01 * leaf, grads, state.params)


@fault(mistake="wrong_gradient")
class AbsoluteErrorDifferentiated(CanonicalStep):
    """The squared error is reported, the absolute error is minimised."""

    def gradients(self, state: State, x: Any, y: Any) -> Gradients:
        """Differentiate the absolute error."""

        def absolute(params: Tree) -> Any:
            preds, _ = self.apply(params, state.batch_stats, x, train=True)
            return jnp.mean(jnp.abs(preds - y))

        result = self.loss(state.params, state.batch_stats, x, y)
        return result, jax.grad(absolute)(state.params)


@fault(mistake="gradient_of_another_loss")
class LossReportedAfterTheUpdate(CanonicalStep):
    """The loss that is reported is that of the params after the update."""

    def step(self, state: State, x: Any, y: Any, lr: Any) -> tuple[State, StepInfo]:
        """Step, then compute the loss once more."""
        new, info = super().step(state, x, y, lr)
        return new, info._replace(loss=self.loss(new.params, state.batch_stats, x, y)[0])


@fault(mistake="wrong_gradient", minimal=(2, 1))
class GradientOfTheSumButTheMeanReported(CanonicalStep):
    """The gradient is that of the sum over the batch, the reported loss is the mean."""

    def gradients(self, state: State, x: Any, y: Any) -> Gradients:
        """Multiply by N."""
        result, grads = super().gradients(state, x, y)
        return result, mapped(lambda slope: slope * x.shape[0], grads)


@fault(mistake="wrong_gradient")
class UpdatesReportedAsGradients(CanonicalStep):
    """What is reported as the gradient is its half, though the update uses the whole."""

    def report(self, loss: Any, grads: Tree) -> StepInfo:
        """Report half."""
        return StepInfo(loss, mapped(lambda slope: slope / 2, grads))


@fault(mistake="wrong_gradient", minimal=(2, 1))
class MomentsHeldConstant(HandwrittenNorm):
    """No gradient flows through the batch's moments."""

    def training_moments(self, batch: Moments, old: Moments, new: Moments, layer: int) -> Moments:
        """Stop both."""
        return jax.lax.stop_gradient(batch)  # type: ignore[no-any-return]


@fault(mistake="wrong_gradient", minimal=(2, 1))
class MeanHeldConstant(HandwrittenNorm):
    """No gradient flows through the batch's mean, so the bias before it seems to matter."""

    def training_moments(self, batch: Moments, old: Moments, new: Moments, layer: int) -> Moments:
        """Stop the mean."""
        return jax.lax.stop_gradient(batch[0]), batch[1]


@fault(mistake="wrong_gradient", minimal=(2, 1))
class VarianceHeldConstant(HandwrittenNorm):
    """No gradient flows through the batch's variance."""

    def training_moments(self, batch: Moments, old: Moments, new: Moments, layer: int) -> Moments:
        """Stop the variance."""
        return batch[0], jax.lax.stop_gradient(batch[1])


@fault(
    mistake="wrong_gradient",
    minimal=(2, 1),
    source="https://github.com/lightly-ai/lightly/issues/1438",
)
class BackboneFrozen(CanonicalStep):
    """The first layer's kernel gets no gradient: a freeze that was never lifted."""

    def gradients(self, state: State, x: Any, y: Any) -> Gradients:
        """Drop one gradient."""
        result, grads = super().gradients(state, x, y)
        return result, edited(grads, "Dense_0/kernel", jnp.zeros_like)


@fault(mistake="wrong_gradient", minimal=(2, 1))
class GradientsOfScaleAndBiasSwapped(CanonicalStep):
    """The normalisation's scale gets the gradient of its bias, and the other way round."""

    def gradients(self, state: State, x: Any, y: Any) -> Gradients:
        """Swap two leaves of one shape."""
        result, grads = super().gradients(state, x, y)
        norm = grads["BatchNorm_0"]
        swapped = {"scale": norm["bias"], "bias": norm["scale"]}
        return result, {**grads, "BatchNorm_0": swapped}


@fault(mistake="wrong_gradient")
class GradientPassesDeadUnits(CanonicalStep):
    """The backward pass of the activation lets gradients through where the unit is off."""

    def activate(self, a: Any) -> Any:
        """Return max(a, 0) with the derivative of a."""
        return a + jax.lax.stop_gradient(jnp.maximum(a, 0.0) - a)


@fault(mistake="wrong_gradient")
class GradientDoubledByTwoBackwardPasses(CanonicalStep):
    """Gradients of two backward passes are added up; nobody cleared the first."""

    def gradients(self, state: State, x: Any, y: Any) -> Gradients:
        """Double the gradient."""
        result, grads = super().gradients(state, x, y)
        return result, mapped(lambda slope: slope + slope, grads)


@fault(mistake="wrong_gradient", minimal=(2, 1))
class GradientOfOneRow(CanonicalStep):
    """Loss and statistics are those of the batch, the gradient of the error of its first row."""

    def gradients(self, state: State, x: Any, y: Any) -> Gradients:
        """Differentiate the first row's error."""

        def first(params: Tree) -> Any:
            preds, _ = self.apply(params, state.batch_stats, x, train=True)
            return (preds[0] - y[0]) ** 2

        result = self.loss(state.params, state.batch_stats, x, y)
        return result, jax.grad(first)(state.params)


@fault(mistake="wrong_gradient")
class GradientNormalised(CanonicalStep):
    """The gradient is scaled to length 1 before it is reported and used."""

    def gradients(self, state: State, x: Any, y: Any) -> Gradients:
        """Divide by the length."""
        result, grads = super().gradients(state, x, y)
        square = sum(jnp.sum(slope**2) for slope in jax.tree_util.tree_leaves(grads))
        return result, mapped(lambda slope: slope / jnp.sqrt(square + 1e-12), grads)


@fault(mistake="wrong_gradient")
class GradientsAboveOneCut(CanonicalStep):
    """Every entry of the gradient is cut to [-1, 1] before it is reported and used."""

    def gradients(self, state: State, x: Any, y: Any) -> Gradients:
        """Cut."""
        result, grads = super().gradients(state, x, y)
        return result, mapped(lambda slope: jnp.clip(slope, -1.0, 1.0), grads)


@fault(
    mistake="wrong_gradient",
    survives="equivalent where gradients are finite, which they are in the whole domain",
)
class NotANumberReplacedByZero(CanonicalStep):
    """Gradients that are not numbers become zero, so that a broken step goes unnoticed."""

    def gradients(self, state: State, x: Any, y: Any) -> Gradients:
        """Hide them."""
        result, grads = super().gradients(state, x, y)
        return result, mapped(jnp.nan_to_num, grads)
