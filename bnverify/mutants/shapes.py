"""Faults in the shape, the dtype or the container of what a step carries."""

from __future__ import annotations

from functools import partial
from typing import Any

from bnverify.lazy import LazyModule, jax, jnp
from bnverify.model import State, StepInfo, Tree
from bnverify.mutants.canonical import CanonicalStep, HandwrittenNorm
from bnverify.mutants.catalogue import mutant
from bnverify.mutants.optimizers import WithAdam, WithMomentum
from bnverify.mutants.trees import edited, mapped

core: Any = LazyModule("flax.core")
fault = partial(mutant, family="shapes", blind=True)


@fault(mistake="parameters_change_dtype")
class ParamsBecomeHalf(CanonicalStep):
    """The params that the step carries on are float16."""

    def thread(self, old: State, new: State) -> State:
        """Cast the params."""
        return new._replace(params=mapped(lambda leaf: leaf.astype(jnp.float16), new.params))


@fault(mistake="parameters_change_dtype")
class OneParamBecomesBfloat16(CanonicalStep):
    """The normalisation's scale, and nothing else, is carried on in bfloat16."""

    def thread(self, old: State, new: State) -> State:
        """Cast the scale."""
        params = edited(new.params, "BatchNorm_0/scale", lambda leaf: leaf.astype(jnp.bfloat16))
        return new._replace(params=params)


@fault(mistake="parameters_change_dtype")
class OptimizerStateBecomesBfloat16(WithMomentum):
    """The momentum buffers are carried on in bfloat16."""

    def thread(self, old: State, new: State) -> State:
        """Cast the buffers."""
        buffers = mapped(lambda leaf: leaf.astype(jnp.bfloat16), new.opt_state)
        return new._replace(opt_state=buffers)


@fault(mistake="parameters_change_dtype", source="https://github.com/google/flax/issues/1550")
class OptimizerCountBecomesFloat(WithAdam):
    """Adam's count of steps is carried on as a float."""

    def thread(self, old: State, new: State) -> State:
        """Cast every leaf."""
        floats = mapped(lambda leaf: leaf.astype(jnp.float32), new.opt_state)
        return new._replace(opt_state=floats)


@fault(mistake="parameters_change_dtype", source="https://github.com/google/flax/issues/1550")
class OptimizerStateFlattened(WithMomentum):
    """The optimizer's state comes back as a plain tuple of its leaves."""

    def update(self, grads: Tree, state: State, lr: Any) -> tuple[Tree, Tree]:
        """Update with the state as it should be, and carry on its leaves."""
        structure = jax.tree_util.tree_structure(self.tx(lr).init(state.params))
        leaves = jax.tree_util.tree_leaves(state.opt_state)
        rebuilt = jax.tree_util.tree_unflatten(structure, leaves)
        params, opt_state = super().update(grads, state._replace(opt_state=rebuilt), lr)
        return params, tuple(jax.tree_util.tree_leaves(opt_state))


@fault(mistake="parameters_change_dtype")
class StatisticsKeepTheirAxis(CanonicalStep):
    """The statistics are carried on with shape (1, channels): an axis was kept in a mean."""

    def loss(self, params: Tree, batch_stats: Tree, x: Any, y: Any) -> tuple[Any, Tree]:
        """Use them flat, carry them on with an axis."""
        loss, new = super().loss(params, mapped(jnp.ravel, batch_stats), x, y)
        return loss, mapped(lambda leaf: leaf[None], new)


@fault(mistake="parameters_change_dtype")
class StatisticsBecomeFrozen(CanonicalStep):
    """The statistics come back in another container: a FrozenDict in place of a dict."""

    def thread(self, old: State, new: State) -> State:
        """Freeze them."""
        return new._replace(batch_stats=core.freeze(new.batch_stats))


@fault(mistake="parameters_change_dtype")
class StatisticsGainACount(CanonicalStep):
    """The statistics come back with an entry more, the number of steps seen."""

    def thread(self, old: State, new: State) -> State:
        """Add the entry."""
        count = old.batch_stats.get("count", jnp.float32(0)) + 1
        return new._replace(batch_stats={**new.batch_stats, "count": count})


@fault(mistake="new_statistics_dropped")
class VarianceMissing(CanonicalStep):
    """The statistics come back without their variances; the next step starts them from 1."""

    def apply(
        self, params: Tree, batch_stats: Tree, x: Any, train: bool, weights: Any = None
    ) -> tuple[Any, Tree]:
        """Fill in what is missing."""
        norm = batch_stats["BatchNorm_0"]
        full = {"BatchNorm_0": {"mean": norm["mean"], "var": norm.get("var", jnp.ones(8))}}
        return super().apply(params, full, x, train, weights)

    def thread(self, old: State, new: State) -> State:
        """Lose the variance."""
        mean = {"mean": new.batch_stats["BatchNorm_0"]["mean"]}
        return new._replace(batch_stats={"BatchNorm_0": mean})


@fault(mistake="wrong_gradient")
class GradientLeafMissing(CanonicalStep):
    """The reported gradient lacks the leaf of the output layer's bias."""

    def report(self, loss: Any, grads: Tree) -> StepInfo:
        """Leave it out."""
        last = f"Dense_{self.layers}"
        return StepInfo(loss, {**grads, last: {"kernel": grads[last]["kernel"]}})


@fault(
    mistake="low_precision",
    tolerated="a choice of precision: its rounding is part of the step's own arithmetic, and allowed for",
)
class LossInBfloat16(CanonicalStep):
    """The loss is reported in bfloat16."""

    def report(self, loss: Any, grads: Tree) -> StepInfo:
        """Cast it."""
        return StepInfo(loss.astype(jnp.bfloat16), grads)


@fault(mistake="low_precision")
class EvalLossInHalf(HandwrittenNorm):
    """Evaluation returns float16, of which errors above 65504 leave the range."""

    def evaluate(self, state: State, x: Any, y: Any) -> Any:
        """Cast it."""
        return super().evaluate(state, x, y).astype(jnp.float16)
