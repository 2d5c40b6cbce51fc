"""Faults of steps around flax.training's TrainState, as users write them."""

from __future__ import annotations

from functools import partial
from typing import Any

from bnverify.lazy import LazyModule, jax, jnp
from bnverify.model import State, StepInfo, Tree
from bnverify.mutants import canonical
from bnverify.mutants.canonical import CanonicalStep
from bnverify.mutants.catalogue import mutant
from bnverify.mutants.optimizers import WithAdam, WithMomentum

train_state_model: Any = LazyModule("bnverify.mutants.train_state_model")
fault = partial(mutant, family="train_state", blind=True)


class TrainStateStep(CanonicalStep):
    """The canonical step around a TrainState with batch_stats; a fault replaces ``advance``."""

    def train_state(self, state: State, lr: Any) -> Any:
        """Return the state as a TrainState."""
        return train_state_model.TrainStateWithStatistics(
            step=0,
            apply_fn=canonical.model.Model(self).apply,
            params=state.params,
            tx=self.tx(lr),
            opt_state=state.opt_state,
            batch_stats=state.batch_stats,
        )

    def advance(self, train_state: Any, grads: Tree, updates: Tree) -> Any:
        """Return the TrainState after the step; ``updates`` is what apply gave besides."""
        return train_state.apply_gradients(grads=grads, batch_stats=updates["batch_stats"])

    def step(self, state: State, x: Any, y: Any, lr: Any) -> tuple[State, StepInfo]:
        """Take one step on the TrainState."""
        train_state = self.train_state(state, lr)

        def loss_fn(params: Tree) -> tuple[Any, Tree]:
            variables = {"params": params, "batch_stats": train_state.batch_stats}
            preds, updates = train_state.apply_fn(variables, x, train=True, mutable=["batch_stats"])
            return self.error(preds.reshape(-1), y), updates

        (loss, updates), grads = jax.value_and_grad(loss_fn, has_aux=True)(train_state.params)
        new = self.advance(train_state, grads, updates)
        return State(new.params, new.batch_stats, new.opt_state), StepInfo(loss, grads)


@fault(mistake="new_statistics_dropped", source="https://github.com/borisdayma/dalle-mini/pull/71")
class TrainStateReplaceIgnored(TrainStateStep):
    """state.replace(batch_stats=...) is called and its result is not used."""

    def advance(self, train_state: Any, grads: Tree, updates: Tree) -> Any:
        """Drop what replace returns."""
        train_state.replace(batch_stats=updates["batch_stats"])
        return train_state.apply_gradients(grads=grads)


@fault(mistake="update_dropped", source="https://github.com/google/flax/issues/2467")
class TrainStateGradientsIgnored(TrainStateStep):
    """apply_gradients is called and its result is not used."""

    def advance(self, train_state: Any, grads: Tree, updates: Tree) -> Any:
        """Drop what apply_gradients returns."""
        train_state.apply_gradients(grads=grads)
        return train_state.replace(batch_stats=updates["batch_stats"])


@fault(mistake="update_applied_twice")
class TrainStateGradientsAppliedTwice(TrainStateStep):
    """apply_gradients is called a second time to hand the statistics over."""

    def advance(self, train_state: Any, grads: Tree, updates: Tree) -> Any:
        """Apply again."""
        return super().advance(train_state.apply_gradients(grads=grads), grads, updates)


@fault(mistake="statistics_nested", source="https://github.com/google/flax/issues/2232")
class TrainStateUpdatesNested(TrainStateStep):
    """batch_stats becomes the whole of what apply returned, one level too deep."""

    def advance(self, train_state: Any, grads: Tree, updates: Tree) -> Any:
        """Forget to take the collection out."""
        return train_state.apply_gradients(grads=grads, batch_stats=updates)


@fault(mistake="optimizer_reinitialised")
class TrainStateCreatedInTheStep(WithMomentum, TrainStateStep):
    """The step calls TrainState.create, which initialises the optimizer again."""

    def train_state(self, state: State, lr: Any) -> Any:
        """Create it."""
        return train_state_model.TrainStateWithStatistics.create(
            apply_fn=canonical.model.Model(self).apply,
            params=state.params,
            tx=self.tx(lr),
            batch_stats=state.batch_stats,
        )


@fault(mistake="old_optimizer_state_kept")
class TrainStateParamsReplacedByHand(WithAdam, TrainStateStep):
    """Only params and batch_stats are replaced; the optimizer's new state is left behind."""

    def advance(self, train_state: Any, grads: Tree, updates: Tree) -> Any:
        """Replace two fields of three."""
        new = super().advance(train_state, grads, updates)
        return train_state.replace(params=new.params, batch_stats=new.batch_stats)


@fault(mistake="learning_rate_ignored")
class TrainStateKeepsItsFirstOptimizer(TrainStateStep):
    """The TrainState was created with an optimizer at 0.01, which the given rate never reaches."""

    def tx(self, lr: Any) -> Any:
        """Return the first optimizer."""
        return self.optimizer(0.01)


@fault(mistake="eval_of_stale_state", source="https://github.com/google/flax/pull/3982")
class TrainStateEvalOfTheCreatedState(TrainStateStep):
    """Evaluation takes params from the step's state and statistics from the created one."""

    def evaluate(self, state: State, x: Any, y: Any) -> Any:
        """Evaluate with the first statistics."""
        first = self.variables(0, x)["batch_stats"]
        return super().evaluate(state._replace(batch_stats=first), x, y)


@fault(mistake="optimizer_on_all_variables")
class TrainStateCreatedWithVariables(WithMomentum, TrainStateStep):
    """TrainState.create was given all variables as params, so the optimizer owns all of them."""

    def init(self, seed: Any, x: Any) -> State:
        """Initialise the optimizer on everything."""
        variables = self.variables(seed, x)
        opt_state = self.tx(0.0).init(variables)
        return State(variables["params"], variables["batch_stats"], opt_state)

    def train_state(self, state: State, lr: Any) -> Any:
        """Put all variables where params belong."""
        made = super().train_state(state, lr)
        return made.replace(params={"params": state.params, "batch_stats": state.batch_stats})

    def step(self, state: State, x: Any, y: Any, lr: Any) -> tuple[State, StepInfo]:
        """Differentiate all variables; overwrite the statistics, whose gradient is zero."""
        train_state = self.train_state(state, lr)

        def loss_fn(variables: Tree) -> tuple[Any, Tree]:
            return self.loss(variables["params"], variables["batch_stats"], x, y)

        (loss, batch_stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(train_state.params)
        new = train_state.apply_gradients(grads=grads)
        return (
            State(new.params["params"], batch_stats, new.opt_state),
            StepInfo(loss, grads["params"]),
        )


@fault(mistake="statistics_from_another_batch")
class TrainStateMetricsPassKept(TrainStateStep):
    """A second pass for metrics, on centred inputs, leaves its statistics in the state."""

    def step(self, state: State, x: Any, y: Any, lr: Any) -> tuple[State, StepInfo]:
        """Step, and keep the statistics of another pass."""
        new, info = super().step(state, x, y, lr)
        centred = x - jnp.mean(x)
        _, batch_stats = self.apply(state.params, state.batch_stats, centred, train=True)
        return new._replace(batch_stats=batch_stats), info
