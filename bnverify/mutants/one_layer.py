"""Faults in only one of several normalised layers."""

from __future__ import annotations

from functools import partial
from typing import Any

from bnverify.lazy import LazyModule, jax, jnp
from bnverify.model import State, Tree
from bnverify.mutants.canonical import CanonicalStep, HandwrittenNorm, Moments
from bnverify.mutants.catalogue import mutant
from bnverify.mutants.optimizers import DECAY, WithMaskedDecay
from bnverify.mutants.trees import by_path, edited

optax: Any = LazyModule("optax")
fault = partial(mutant, family="one_layer", blind=True)


class TwoLayers(CanonicalStep):
    """Two normalised layers of Flax."""

    layers = 2


class TwoHandwritten(HandwrittenNorm):
    """Two handwritten layers, numbers 0 and 1."""

    layers = 2


@fault(mistake="new_statistics_dropped")
class SecondLayersStatisticsDropped(TwoLayers):
    """Of two layers, only the first one's new statistics are carried on."""

    def thread(self, old: State, new: State) -> State:
        """Keep the second's old ones."""
        was = old.batch_stats["BatchNorm_1"]
        return new._replace(batch_stats={**new.batch_stats, "BatchNorm_1": was})


@fault(mistake="statistics_of_another_layer")
class LayersStatisticsSwapped(TwoLayers):
    """The two layers' new statistics are carried on under each other's names."""

    def thread(self, old: State, new: State) -> State:
        """Swap them."""
        one, other = new.batch_stats["BatchNorm_0"], new.batch_stats["BatchNorm_1"]
        return new._replace(batch_stats={"BatchNorm_0": other, "BatchNorm_1": one})


@fault(mistake="statistics_of_another_layer")
class FirstLayersStatisticsCopied(TwoLayers):
    """Both layers carry on the first one's new statistics."""

    def thread(self, old: State, new: State) -> State:
        """Copy them."""
        one = new.batch_stats["BatchNorm_0"]
        return new._replace(batch_stats={"BatchNorm_0": one, "BatchNorm_1": one})


@fault(mistake="train_step_in_eval_mode")
class SecondLayerInEvalMode(TwoLayers):
    """The second layer always uses its running statistics and never moves them."""

    def normalise(self, h: Any, train: bool, layer: int, weights: Any) -> Any:
        """Run the second layer in eval mode."""
        return super().normalise(h, train and layer == 0, layer, weights)


@fault(mistake="eval_in_train_mode")
class SecondLayerInTrainMode(TwoLayers):
    """The second layer was never switched to eval mode: evaluation moves its statistics."""

    def normalise(self, h: Any, train: bool, layer: int, weights: Any) -> Any:
        """Run the second layer in train mode."""
        return super().normalise(h, train or layer == 1, layer, weights)

    def variables(self, seed: Any, x: Any) -> Tree:
        """Initialise without a pass that could move them."""
        return TwoLayers().variables(seed, x)


@fault(mistake="momentum_reversed")
class SecondLayersMomentumReversed(TwoHandwritten):
    """The second layer's momentum weighs the new value."""

    def fold(self, old: Moments, batch: Moments, layer: int) -> Moments:
        """Swap old and new in the second layer."""
        return super().fold(*((old, batch) if layer == 0 else (batch, old)), layer)


@fault(mistake="ema_applied_twice")
class FirstLayersAverageTwice(TwoHandwritten):
    """The first layer's moving average is applied twice."""

    def fold(self, old: Moments, batch: Moments, layer: int) -> Moments:
        """Fold again in the first layer."""
        once = super().fold(old, batch, layer)
        return super().fold(once, batch, layer) if layer == 0 else once


@fault(mistake="sample_variance", minimal=(2, 1))
class MiddleLayersSampleVariance(HandwrittenNorm):
    """Of three layers, the middle one records a variance divided by N - 1."""

    layers = 3

    def recorded(self, h: Any, batch: Moments, layer: int) -> Moments:
        """Correct the middle layer's variance."""
        rows = h.shape[0]
        factor = rows / jnp.maximum(rows - 1, 1) if layer == 1 else 1.0
        return batch[0], batch[1] * factor


@fault(mistake="statistics_in_low_precision")
class SecondLayersStatisticsRounded(TwoHandwritten):
    """The second layer's statistics are rounded to bfloat16 in each step."""

    def fold(self, old: Moments, batch: Moments, layer: int) -> Moments:
        """Round the second layer's."""
        mean, var = super().fold(old, batch, layer)
        if layer == 1:
            mean, var = (leaf.astype(jnp.bfloat16).astype(jnp.float32) for leaf in (mean, var))
        return mean, var


@fault(mistake="wrong_gradient", minimal=(2, 1))
class SecondBiasGradientOff(TwoLayers):
    """The gradient of the second layer's bias is off by a thousandth."""

    def gradients(self, state: State, x: Any, y: Any) -> tuple[tuple[Any, Tree], Tree]:
        """Scale one leaf."""
        result, grads = super().gradients(state, x, y)
        return result, edited(grads, "BatchNorm_1/bias", lambda slope: slope * 1.001)


@fault(mistake="wrong_gradient", minimal=(2, 1))
class SecondLayersMomentsHeldConstant(TwoHandwritten):
    """No gradient flows through the second layer's moments."""

    def training_moments(self, batch: Moments, old: Moments, new: Moments, layer: int) -> Moments:
        """Stop the second layer's."""
        mean, var = jax.lax.stop_gradient(batch) if layer == 1 else batch
        return mean, var


@fault(mistake="loss_reads_old_statistics", minimal=(2, 1))
class SecondLayerUsesOldMoments(TwoHandwritten):
    """In training the second layer is normalised by its old running moments."""

    def training_moments(self, batch: Moments, old: Moments, new: Moments, layer: int) -> Moments:
        """Use the second layer's old moments."""
        return old if layer == 1 else batch


@fault(mistake="modes_differ")
class SecondLayerEvaluatedWithTheFirstOnesStatistics(TwoLayers):
    """Evaluation gives both layers the first one's statistics."""

    def evaluate(self, state: State, x: Any, y: Any) -> Any:
        """Copy the first one's."""
        one = state.batch_stats["BatchNorm_0"]
        copied = {"BatchNorm_0": one, "BatchNorm_1": one}
        return super().evaluate(state._replace(batch_stats=copied), x, y)


@fault(
    mistake="decay_of_norm_parameters",
    source="https://github.com/google-deepmind/optax/issues/25",
)
class DecayReachesTheSecondScale(WithMaskedDecay):
    """The mask of the decay misses one leaf, the second layer's scale."""

    layers = 2
    probed = False

    def tx(self, lr: Any) -> Any:
        """Decay the kernels and one scale."""

        def mask(params: Tree) -> Tree:
            return by_path(
                lambda path, leaf: path.endswith("kernel") or path == "BatchNorm_1/scale", params
            )

        return optax.chain(optax.add_decayed_weights(DECAY, mask=mask), optax.sgd(lr))


@fault(mistake="statistics_of_another_layer")
class SecondLayerRecordsTheFirstOnesInput(TwoHandwritten):
    """Both layers record the moments of what the first one was given."""

    seen: Moments | None = None

    def recorded(self, h: Any, batch: Moments, layer: int) -> Moments:
        """Remember the first layer's moments, for this pass alone."""
        if layer == 0:
            self.seen = batch
        first, self.seen = self.seen, self.seen if layer == 0 else None
        return batch if first is None else first


@fault(
    mistake="update_dropped",
    source="https://github.com/lightly-ai/lightly/issues/1438",
    minimal=(2, 1),
)
class SecondLayersParamsNotUpdated(TwoLayers):
    """Scale and bias of the second layer stay as they were."""

    def thread(self, old: State, new: State) -> State:
        """Keep them."""
        params = {**new.params, "BatchNorm_1": old.params["BatchNorm_1"]}
        return new._replace(params=params)
