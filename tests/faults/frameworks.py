"""Faults of steps with nnx modules and with Flax's TrainState."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from flax.training.train_state import TrainState as FlaxTrainState

from bnverify import LayerInput, State, StepInfo
from bnverify.adapters.objects import Parts
from tests.faults.carrying import AllVariablesStep, statistics_descend
from tests.faults.catalogue import enter
from tests.faults.steps import (
    DECAY,
    CanonicalStep,
    Model,
    Tree,
    adam,
    carried,
    edited,
    mapped,
    momentum,
    rounded,
)

# Modules of nnx.


class Net(nnx.Module):
    """The canonical model in nnx: x (N, D) -> (N, 1)."""

    def __init__(self, features: Any, hidden: int, momentum: float, *, rngs: nnx.Rngs) -> None:
        self.first = nnx.Linear(features, hidden, rngs=rngs)
        self.norm: Any = nnx.BatchNorm(hidden, momentum=momentum, rngs=rngs)
        self.last = nnx.Linear(hidden, 1, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return self.last(jax.nn.relu(self.norm(self.first(x))))


class SharedNorm(Net):
    """One normalisation layer, with one pair of statistics, used twice."""

    def __call__(self, x: Any) -> Any:
        return self.last(jax.nn.relu(self.norm(self.norm(self.first(x)))))


class StatisticsInParams(nnx.Module):
    """A normalisation whose running moments are nnx.Param, changed only by the optimizer."""

    def __init__(self, features: int) -> None:
        self.mean = nnx.Param(jnp.zeros(features))
        self.var = nnx.Param(jnp.ones(features))
        self.scale = nnx.Param(jnp.ones(features))
        self.bias = nnx.Param(jnp.zeros(features))
        self.use_running_average = False

    def __call__(self, h: Any) -> Any:
        mean, var = self.mean[...], self.var[...]
        if not self.use_running_average:
            mean, var = jnp.mean(h, axis=0), jnp.var(h, axis=0)
        return (h - mean) * jax.lax.rsqrt(var + 1e-5) * self.scale[...] + self.bias[...]


class NetOfParams(Net):
    """The canonical model with statistics that are params."""

    def __init__(self, features: Any, hidden: int, momentum: float, *, rngs: nnx.Rngs) -> None:
        super().__init__(features, hidden, momentum, rngs=rngs)
        self.norm = StatisticsInParams(hidden)


class NnxStep(CanonicalStep):
    """The canonical step with an nnx module, which is split into plain trees and merged again."""

    net = Net

    def make(self, features: Any, key: Any) -> Any:
        return self.net(features, self.hidden, self.momentum, rngs=nnx.Rngs(key))  # type: ignore[arg-type] # no step of nnx is without

    def parts(self, x: Any) -> Parts:
        """Return the module split into params, statistics and the rest."""
        kinds = (nnx.Param, nnx.BatchStat, ...)
        return Parts.of(lambda: self.make(x.shape[1], jax.random.key(0)), lambda _: kinds)

    def switch(self, module: Any, train: bool) -> Any:
        """Put the module into its mode."""
        return module.train() if train else module.eval()

    def variables(self, seed: Any, x: Any) -> Tree:
        module = self.make(x.shape[1], jax.random.key(seed))
        params, batch_stats, _ = self.parts(x).split(module)
        return {"params": params, "batch_stats": batch_stats}

    def apply(
        self, params: Tree, batch_stats: Tree, x: Any, train: bool, weights: Any = None
    ) -> tuple[Any, Tree]:
        parts = self.parts(x)
        module = parts.merge(params, batch_stats, {})
        self.switch(module, train)
        preds = module(x).reshape(-1)
        return preds, parts.split(module)[1]

    def layer_inputs(self, state: State, x: Any, y: Any) -> dict[str, LayerInput]:
        x, _ = self.batch(x, y)
        module = self.parts(x).merge(state.params, state.batch_stats, {})
        return {"norm": LayerInput(module.first(x))} if state.batch_stats else {}

    def biases_before_norm(self) -> tuple[str, ...]:
        return ("first/bias",)


def optimizer_of_everything(s: Any, seed: Any, x: Any) -> State:
    """Initialise the optimizer on params and statistics in one tree, as from nnx.state."""
    variables = s.variables(seed, x)
    opt_state = s.tx(0.0).init((variables["params"], variables["batch_stats"]))
    return State(variables["params"], variables["batch_stats"], opt_state)


def everything_updated(s: Any, grads: Tree, state: State, lr: Any) -> tuple[Tree, Tree]:
    """Update params and statistics; the gradient of the statistics is 0."""
    every = grads, mapped(jnp.zeros_like, state.batch_stats)
    whole = state.params, state.batch_stats
    updates, opt_state = s.tx(lr).update(every, state.opt_state, whole)
    return optax.apply_updates(whole, updates)[0], opt_state


def clone_applied(
    s: Any, params: Tree, batch_stats: Tree, x: Any, train: bool, weights: Any = None
) -> tuple[Any, Tree]:
    """Call a clone, but split the original."""
    parts = s.parts(x)
    module = parts.merge(params, batch_stats, {})
    copied = nnx.clone(module)
    s.switch(copied, train)
    return copied(x).reshape(-1), parts.split(module)[1]


# TrainStates.


class TrainState(FlaxTrainState):
    """A TrainState with batch_stats, as in Flax's guide."""

    batch_stats: Any


class TrainStateStep(CanonicalStep):
    """The canonical step with a TrainState; a fault replaces ``advance``."""

    def train_state(self, state: State, lr: Any) -> Any:
        return TrainState(
            step=0,
            apply_fn=Model(self).apply,
            params=state.params,
            tx=self.tx(lr),
            opt_state=state.opt_state,
            batch_stats=state.batch_stats,
        )

    def advance(self, train_state: Any, grads: Tree, updates: Tree) -> Any:
        """Return the TrainState after the step; ``updates`` are those that apply returned."""
        return train_state.apply_gradients(grads=grads, batch_stats=updates["batch_stats"])

    def step(self, state: State, x: Any, y: Any, lr: Any) -> tuple[State, StepInfo]:
        train_state = self.train_state(state, lr)

        def loss_fn(params: Tree) -> tuple[Any, Tree]:
            variables = {"params": params, "batch_stats": train_state.batch_stats}
            preds, updates = train_state.apply_fn(variables, x, train=True, mutable=["batch_stats"])
            return self.error(preds.reshape(-1), y), updates

        (loss, updates), grads = jax.value_and_grad(loss_fn, has_aux=True)(train_state.params)
        new = self.advance(train_state, grads, updates)
        return State(new.params, new.batch_stats, new.opt_state), StepInfo(loss, grads)


def replaced_and_dropped(s: Any, train_state: Any, grads: Tree, updates: Tree) -> Any:
    train_state.replace(batch_stats=updates["batch_stats"])
    return train_state.apply_gradients(grads=grads)


def gradients_applied_and_dropped(s: Any, train_state: Any, grads: Tree, updates: Tree) -> Any:
    train_state.apply_gradients(grads=grads)
    return train_state.replace(batch_stats=updates["batch_stats"])


def two_fields_of_three_replaced(s: Any, train_state: Any, grads: Tree, updates: Tree) -> Any:
    new = s.right.advance(train_state, grads, updates)
    return train_state.replace(params=new.params, batch_stats=new.batch_stats)


def created_in_the_step(s: Any, state: State, lr: Any) -> Any:
    return TrainState.create(  # type: ignore[no-untyped-call] # flax's
        apply_fn=Model(s).apply,
        params=state.params,
        tx=s.tx(lr),
        batch_stats=state.batch_stats,
    )


def all_variables_as_params(s: Any, state: State, lr: Any) -> Any:
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    return s.right.train_state(state, lr).replace(params=variables)


def all_variables_stepped(s: Any, state: State, x: Any, y: Any, lr: Any) -> tuple[State, StepInfo]:
    """Differentiate all variables; overwrite the statistics, whose gradient is zero."""
    train_state = s.train_state(state, lr)

    def loss_fn(variables: Tree) -> tuple[Any, Tree]:
        loss: tuple[Any, Tree] = s.loss(variables["params"], variables["batch_stats"], x, y)
        return loss

    (loss, batch_stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(train_state.params)
    new = train_state.apply_gradients(grads=grads)
    after = State(new.params["params"], batch_stats, new.opt_state)
    return after, StepInfo(loss, grads["params"])


def statistics_of_centred_inputs(
    s: Any, state: State, x: Any, y: Any, lr: Any
) -> tuple[State, StepInfo]:
    new, info = s.right.step(state, x, y, lr)
    centred = x - jnp.mean(x)
    _, batch_stats = s.apply(state.params, state.batch_stats, centred, train=True)
    return new._replace(batch_stats=batch_stats), info


# Each row in as few lines as it takes:
# fmt: off

# Filters, modes, and modules that are copied or updated.

fault = partial(enter, family="nnx", base=NnxStep)

fault("nnx_never_switched_to_eval", "eval_in_train_mode",
      "model.eval() is missing: evaluation normalises by its batch and moves the statistics.",
      switch=lambda s, module, train: module.train(),
      source="https://github.com/KaiyuanZh/FLIP/issues/6")
fault("nnx_never_switched_back_to_train", "train_step_in_eval_mode",
      "model.train() is missing after an evaluation: training runs in eval mode.",
      switch=lambda s, module, train: module.eval(),
      source="https://github.com/yanx27/GACNet/issues/8")
fault("nnx_gradient_without_a_filter", "statistics_trained_as_params",
      "The whole module is differentiated, so its statistics are updated by gradient descent.",
      step=statistics_descend)
fault("nnx_optimizer_without_a_filter", "optimizer_on_all_variables",
      "The optimizer is created for the module's whole state, not for its nnx.Param.",
      optimizer=momentum, init=optimizer_of_everything, update=everything_updated)
fault("nnx_statistics_are_params", "statistics_trained_as_params",
      "The running moments are nnx.Param, so no filter separates them from the weights.",
      net=NetOfParams,
      optimizer=lambda s, lr: optax.chain(optax.add_decayed_weights(DECAY), optax.sgd(lr)),
      source="https://github.com/intel/ipex-llm/issues/1599")
fault("nnx_split_before_the_pass", "new_statistics_dropped",
      "The returned state was split off before the forward pass updated the module.",
      loss=lambda s, params, batch_stats, x, y:
          (s.right.loss(params, batch_stats, x, y)[0], batch_stats),
      source="https://github.com/HomericIntelligence/Odyssey/issues/5532")
fault("nnx_clone_trained", "new_statistics_dropped",
      "A clone of the module is called, and only its params are returned, not its statistics.",
      apply=clone_applied)
fault("nnx_norm_shared", "ema_applied_twice",
      "One BatchNorm is used twice, and both calls update its only pair of statistics.",
      net=SharedNorm)
fault("nnx_momentum_reversed", "momentum_reversed",
      "nnx.BatchNorm has PyTorch's momentum 0.01.",
      make=lambda s, features, key: Net(features, s.hidden, 0.01, rngs=nnx.Rngs(key)),
      source="https://github.com/pytorch/examples/issues/289")
fault("nnx_eval_closes_over_the_module", "eval_of_stale_state",
      "A jitted evaluation closes over the module, so it always uses the initial params.",
      evaluate=lambda s, state, x, y:
          s.right.evaluate(state._replace(params=s.variables(0, x)["params"]), x, y),
      source="https://github.com/google/flax/pull/3982")
fault("nnx_module_made_in_the_step", "statistics_reinitialised",
      "The step creates a new module and updates only its params, so the statistics are new.",
      gradients=lambda s, state, x, y:
          s.right.gradients(state._replace(batch_stats=s.variables(0, x)["batch_stats"]), x, y))
fault("nnx_variance_in_bfloat16", "statistics_in_low_precision",
      "The module is cast to bfloat16 and back, so the running variance has eight bits.",
      thread=carried(batch_stats=lambda old, new:
          edited(new, "norm/var", lambda leaf: rounded(leaf, "bfloat16"))),
      source="https://github.com/NVIDIA/Model-Optimizer/pull/738")

# TrainStates that are replaced, created or read wrongly.

fault = partial(enter, family="train_state", base=TrainStateStep)

fault("train_state_replace_ignored", "new_statistics_dropped",
      "state.replace(batch_stats=...) is called and its result is not used.",
      advance=replaced_and_dropped, source="https://github.com/borisdayma/dalle-mini/pull/71")
fault("train_state_gradients_ignored", "update_dropped",
      "apply_gradients is called and its result is not used.",
      advance=gradients_applied_and_dropped, source="https://github.com/google/flax/issues/2467")
fault("train_state_gradients_applied_twice", "update_applied_twice",
      "apply_gradients is called a second time to pass the statistics.",
      advance=lambda s, train_state, grads, updates:
          s.right.advance(train_state.apply_gradients(grads=grads), grads, updates))
fault("train_state_updates_nested", "statistics_nested",
      "batch_stats becomes the whole of what apply returned, one level too deep.",
      advance=lambda s, train_state, grads, updates:
          train_state.apply_gradients(grads=grads, batch_stats=updates),
      source="https://github.com/google/flax/issues/2232")
fault("train_state_created_in_the_step", "optimizer_reinitialised",
      "The step calls TrainState.create, which initialises the optimizer again.",
      optimizer=momentum, train_state=created_in_the_step)
fault("train_state_params_replaced_by_hand", "old_optimizer_state_kept",
      "Only params and batch_stats are replaced; the optimizer's new state is dropped.",
      optimizer=adam, advance=two_fields_of_three_replaced)
fault("train_state_keeps_its_first_optimizer", "learning_rate_ignored",
      "The TrainState's optimizer has a learning rate of 0.01, whatever rate the step is given.",
      tx=lambda s, lr: s.optimizer(0.01))
fault("train_state_eval_of_the_created_state", "eval_of_stale_state",
      "Evaluation uses the params of the new state and the statistics of the initial one.",
      evaluate=lambda s, state, x, y:
          s.right.evaluate(state._replace(batch_stats=s.variables(0, x)["batch_stats"]), x, y),
      source="https://github.com/google/flax/pull/3982")
fault("train_state_created_with_variables", "optimizer_on_all_variables",
      "TrainState.create was given all variables as params, so the optimizer owns all of them.",
      optimizer=momentum, init=AllVariablesStep.init, train_state=all_variables_as_params,
      step=all_variables_stepped)
fault("train_state_metrics_pass_kept", "statistics_from_another_batch",
      "The state has the statistics of a second pass for metrics, on centred inputs.",
      step=statistics_of_centred_inputs)
