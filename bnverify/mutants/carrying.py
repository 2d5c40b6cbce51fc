"""Faults in how state is carried: dropped, stale, re-initialised, or of the wrong kind.

Faults that only a save and a restore show are not here: a step alone cannot have them.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from bnverify.lazy import jnp
from bnverify.model import State, StepInfo, Tree
from bnverify.mutants.canonical import CanonicalStep
from bnverify.mutants.catalogue import mutant
from bnverify.mutants.optimizers import WithAdam, WithMomentum
from bnverify.mutants.trees import mapped

fault = partial(mutant, family="carrying", blind=True)


@fault(mistake="update_dropped", source="https://github.com/google/flax/issues/2467")
class OldStateReturned(CanonicalStep):
    """The step returns the whole state that it was given."""

    def thread(self, old: State, new: State) -> State:
        """Keep everything old."""
        return old


@fault(
    mistake="new_statistics_dropped",
    source="https://github.com/HomericIntelligence/Odyssey/issues/5532",
)
class NewStatisticsDropped(CanonicalStep):
    """The new statistics are computed and forgotten."""

    def thread(self, old: State, new: State) -> State:
        """Keep the old statistics."""
        return new._replace(batch_stats=old.batch_stats)


@fault(mistake="update_dropped", source="https://github.com/google/flax/pull/3462")
class NewVariablesFromOldParams(WithMomentum):
    """Params are the old ones in an otherwise new state."""

    def thread(self, old: State, new: State) -> State:
        """Keep the old params beside new statistics and a new optimizer state."""
        return State(old.params, new.batch_stats, new.opt_state)


@fault(mistake="statistics_reinitialised", source="https://github.com/google/flax/issues/2232")
class StatisticsReinitialised(CanonicalStep):
    """Every step starts its moving average from mean 0 and variance 1."""

    def gradients(self, state: State, x: Any, y: Any) -> tuple[tuple[Any, Tree], Tree]:
        """Forget the statistics, then differentiate."""
        fresh = self.variables(0, x)["batch_stats"]
        return super().gradients(state._replace(batch_stats=fresh), x, y)


@fault(mistake="old_optimizer_state_kept", source="https://github.com/google/flax/issues/2467")
class OldOptimizerStateKept(WithMomentum):
    """The optimizer's new state is forgotten."""

    def thread(self, old: State, new: State) -> State:
        """Keep the old optimizer state."""
        return new._replace(opt_state=old.opt_state)


@fault(mistake="old_optimizer_state_kept")
class OldAdamStateKept(WithAdam):
    """Adam's new moments and count are forgotten."""

    def thread(self, old: State, new: State) -> State:
        """Keep the old optimizer state."""
        return new._replace(opt_state=old.opt_state)


@fault(mistake="old_optimizer_state_kept", minimal=(2, 1))
class OldOptimizerStateOfKernels(WithAdam):
    """The optimizer's state of the matrices stays old, that of the vectors goes on."""

    def thread(self, old: State, new: State) -> State:
        """Keep the old buffers of two axes."""
        mixed = mapped(
            lambda now, was: was if jnp.ndim(now) == 2 else now, new.opt_state, old.opt_state
        )
        return new._replace(opt_state=mixed)


@fault(mistake="optimizer_reinitialised")
class OptimizerReinitialised(WithMomentum):
    """The optimizer's state is made anew in each step, so momentum never builds up."""

    def update(self, grads: Tree, state: State, lr: Any) -> tuple[Tree, Tree]:
        """Forget the buffers, then update."""
        fresh = self.tx(lr).init(state.params)
        return super().update(grads, state._replace(opt_state=fresh), lr)


@fault(mistake="statistics_from_another_batch", minimal=(2, 1))
class StatisticsOfTheUpdatedParams(CanonicalStep):
    """The statistics come from a second pass, made with the params after the update."""

    def step(self, state: State, x: Any, y: Any, lr: Any) -> tuple[State, StepInfo]:
        """Update, then run the model again for the statistics."""
        new, info = super().step(state, x, y, lr)
        _, batch_stats = self.apply(new.params, state.batch_stats, x, train=True)
        return new._replace(batch_stats=batch_stats), info


@fault(mistake="ema_applied_twice")
class EmaAppliedTwice(CanonicalStep):
    """A second mutable pass over the same batch moves the statistics again."""

    def step(self, state: State, x: Any, y: Any, lr: Any) -> tuple[State, StepInfo]:
        """Step, then run the model once more for its predictions."""
        new, info = super().step(state, x, y, lr)
        _, batch_stats = self.apply(state.params, new.batch_stats, x, train=True)
        return new._replace(batch_stats=batch_stats), info


@fault(mistake="params_of_another_state")
class UpdateOfInitialParams(CanonicalStep):
    """The update is added to the initial params, which the step closes over, not to its own."""

    def update(self, grads: Tree, state: State, lr: Any) -> tuple[Tree, Tree]:
        """Update the params of seed 0."""
        columns = state.params["Dense_0"]["kernel"].shape[0]
        first = self.variables(0, jnp.zeros((1, columns)))["params"]
        return super().update(grads, state._replace(params=first), lr)


@fault(mistake="hidden_state")
class CallsCountedInPython(CanonicalStep):
    """A Python counter scales the update: a compiled step keeps the count of its first trace."""

    calls = 0

    def update(self, grads: Tree, state: State, lr: Any) -> tuple[Tree, Tree]:
        """Update by a rate that falls with every call."""
        self.calls += 1
        return super().update(grads, state, lr / self.calls)


@fault(mistake="inputs_overwritten", source="https://github.com/jax-ml/jax/issues/37830")
class ParamsOverwrittenInPlace(CanonicalStep):
    """The step writes the new params into the dictionaries that its caller still holds."""

    def step(self, state: State, x: Any, y: Any, lr: Any) -> tuple[State, StepInfo]:
        """Step, then overwrite what was given: traced, these dictionaries are nobody's."""
        after, info = super().step(state, x, y, lr)
        for layer, leaves in after.params.items():
            state.params[layer].update(leaves)
        return after, info
