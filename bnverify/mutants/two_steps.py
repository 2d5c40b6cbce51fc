"""Faults that a first step from fresh state does not show: they need a second, or an older state.

None keeps anything outside the state. What the step knows of its past is what the state tells:
the statistics have left their initial values, or the optimizer has counted.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from bnverify.lazy import jax, jnp
from bnverify.model import State, Tree
from bnverify.mutants.canonical import CanonicalStep, HandwrittenNorm, Moments
from bnverify.mutants.catalogue import mutant
from bnverify.mutants.optimizers import WithAdam, WithMomentum
from bnverify.mutants.trees import mapped

fault = partial(mutant, family="two_steps", blind=True)


def fresh(state: State) -> Any:
    """Tell whether the running means are still zero."""
    leaves = jax.tree_util.tree_leaves_with_path(state.batch_stats)
    means = [leaf for path, leaf in leaves if path[-1].key == "mean"]
    return jnp.all(jnp.stack([jnp.all(mean == 0.0) for mean in means]))


def counted(opt_state: Tree) -> Any:
    """Return the number of steps that the optimizer has counted, 0 where it does not count."""
    leaves = [jnp.asarray(leaf) for leaf in jax.tree_util.tree_leaves(opt_state)]
    counts = [leaf for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.integer)]
    return counts[0] if counts else jnp.int32(0)


def either(condition: Any, one: Tree, other: Tree) -> Tree:
    """Return the tree ``one`` where ``condition`` holds, else the other."""
    return mapped(lambda a, b: jnp.where(condition, a, b), one, other)


@fault(mistake="average_not_steady")
class StatisticsOnlyMoveOnTheFirstStep(CanonicalStep):
    """The statistics move while they are as initialised, and never again."""

    def thread(self, old: State, new: State) -> State:
        """Keep statistics that have moved."""
        return new._replace(batch_stats=either(fresh(old), new.batch_stats, old.batch_stats))


@fault(mistake="average_not_steady", source="https://github.com/google/flax/issues/2232")
class FirstBatchReplacesTheInitialStatistics(HandwrittenNorm):
    """Statistics as initialised are replaced by the first batch's, not averaged with them."""

    def fold(self, old: Moments, batch: Moments, layer: int) -> Moments:
        """Replace a mean of zero and a variance of one."""
        first = jnp.all(old[0] == 0.0) & jnp.all(old[1] == 1.0)
        mean, var = super().fold(old, batch, layer)
        return jnp.where(first, batch[0], mean), jnp.where(first, batch[1], var)


@fault(mistake="loss_reads_old_statistics")
class RunningMomentsNormaliseOnceTheyHaveMoved(HandwrittenNorm):
    """The first step normalises by its batch, all later ones by the running moments."""

    def training_moments(self, batch: Moments, old: Moments, new: Moments, layer: int) -> Moments:
        """Use the old moments once they have moved."""
        first = jnp.all(old[0] == 0.0)
        return jnp.where(first, batch[0], old[0]), jnp.where(first, batch[1], old[1])


@fault(mistake="update_dropped")
class ParamsFrozenAfterTheFirstStep(CanonicalStep):
    """Params are updated while the statistics are as initialised, and never again."""

    def thread(self, old: State, new: State) -> State:
        """Keep params that have moved."""
        return new._replace(params=either(fresh(old), new.params, old.params))


@fault(mistake="update_scaled")
class RateHalvedAfterTheFirstStep(WithAdam):
    """From the optimizer's second step on, half the declared learning rate is used."""

    def update(self, grads: Tree, state: State, lr: Any) -> tuple[Tree, Tree]:
        """Halve the rate of later steps."""
        return super().update(grads, state, jnp.where(counted(state.opt_state) > 0, lr / 2, lr))


@fault(mistake="wrong_sign")
class SignFlipsOnTheThirdStep(WithAdam):
    """The third update, and no other, goes uphill."""

    def update(self, grads: Tree, state: State, lr: Any) -> tuple[Tree, Tree]:
        """Flip the rate's sign when two steps have been counted."""
        return super().update(grads, state, jnp.where(counted(state.opt_state) == 2, -lr, lr))


@fault(
    mistake="wrong_sign",
    survives="outside the default domain, which observes at most the third step from fresh state",
)
class SignFlipsOnTheFifthStep(WithAdam):
    """The fifth update, and no other, goes uphill."""

    def update(self, grads: Tree, state: State, lr: Any) -> tuple[Tree, Tree]:
        """Flip the rate's sign when four steps have been counted."""
        return super().update(grads, state, jnp.where(counted(state.opt_state) == 4, -lr, lr))


@fault(mistake="old_optimizer_state_kept")
class OptimizerCountStuck(WithAdam):
    """Adam's count of steps stays as it was, so its bias correction is always the first one's."""

    def thread(self, old: State, new: State) -> State:
        """Keep integers."""

        def stuck(now: Any, was: Any) -> Any:
            return was if jnp.issubdtype(jnp.asarray(now).dtype, jnp.integer) else now

        return new._replace(opt_state=mapped(stuck, new.opt_state, old.opt_state))


@fault(mistake="optimizer_reinitialised")
class MomentumClearedEverySecondStep(WithAdam):
    """The optimizer's moments are cleared after every second step."""

    def thread(self, old: State, new: State) -> State:
        """Clear all but the count."""
        clear = counted(new.opt_state) % 2 == 0

        def cleared(leaf: Any) -> Any:
            return leaf if leaf.ndim == 0 else jnp.where(clear, 0.0, leaf)

        return new._replace(opt_state=mapped(cleared, new.opt_state))


@fault(mistake="optimizer_reinitialised", minimal=(2, 1))
class OneMomentumBufferCleared(WithMomentum):
    """The momentum of the normalisation's scale is cleared in each step."""

    def update(self, grads: Tree, state: State, lr: Any) -> tuple[Tree, Tree]:
        """Clear buffers of (hidden,) that belong to the scale."""
        params, opt_state = super().update(grads, state, lr)

        def cleared(path: Any, leaf: Any) -> Any:
            names = [str(getattr(key, "key", "")) for key in path]
            return jnp.zeros_like(leaf) if names[-1:] == ["scale"] else leaf

        return params, jax.tree_util.tree_map_with_path(cleared, opt_state)


@fault(mistake="average_not_steady")
class CumulativeAverage(WithAdam):
    """From the second step on, the statistics are the plain average of all steps' moments."""

    def thread(self, old: State, new: State) -> State:
        """Undo the moving average and weigh the new by one over the count."""
        count = counted(new.opt_state).astype(jnp.float32)

        def averaged(was: Any, now: Any) -> Any:
            batch = (now - 0.99 * was) / (1 - 0.99)
            return jnp.where(count < 2, now, was + (batch - was) / count)

        return new._replace(batch_stats=mapped(averaged, old.batch_stats, new.batch_stats))


@fault(
    mistake="average_not_steady",
    source="https://github.com/mlcommons/algorithmic-efficiency/pull/783",
)
class MomentumLostAfterTheFirstStep(HandwrittenNorm):
    """The backup of momentum is overwritten: once the statistics have moved, it is 0.999."""

    def fold(self, old: Moments, batch: Moments, layer: int) -> Moments:
        """Weigh new values with a thousandth once the mean has moved."""
        first = jnp.all(old[0] == 0.0)
        keep = jnp.where(first, 0.99, 0.999)
        mean, var = (keep * was + (1 - keep) * now for was, now in zip(old, batch, strict=True))
        return mean, var


@fault(mistake="eval_of_stale_state")
class EvalOfInitialStatisticsUntilTheyAreLarge(CanonicalStep):
    """Evaluation uses statistics only where the running means exceed 0.01: a warm-up."""

    def evaluate(self, state: State, x: Any, y: Any) -> Any:
        """Choose the statistics by their size."""
        first = self.variables(0, x)["batch_stats"]
        large = jnp.any(jnp.abs(state.batch_stats["BatchNorm_0"]["mean"]) > 0.01)
        chosen = either(large, state.batch_stats, first)
        return super().evaluate(state._replace(batch_stats=chosen), x, y)
