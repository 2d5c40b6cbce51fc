"""Faults of steps around nnx modules: filters, modes, and modules that are copied or updated."""

from __future__ import annotations

from functools import partial
from typing import Any

from bnverify.lazy import LazyModule, jax, jnp
from bnverify.model import LayerInput, State, StepInfo, Tree
from bnverify.mutants.canonical import CanonicalStep
from bnverify.mutants.catalogue import mutant
from bnverify.mutants.optimizers import DECAY, WithMomentum
from bnverify.mutants.trees import edited, mapped

optax: Any = LazyModule("optax")
nnx: Any = LazyModule("flax.nnx")
nnx_model: Any = LazyModule("bnverify.mutants.nnx_model")
fault = partial(mutant, family="nnx", blind=True)


class NnxStep(CanonicalStep):
    """The canonical step around an nnx module, split into plain trees and merged again."""

    net = "Net"

    def make(self, features: Any, key: Any) -> Any:
        """Return the module."""
        made = getattr(nnx_model, self.net)
        return made(features, self.hidden, self.momentum, rngs=nnx.Rngs(key))

    def switch(self, module: Any, train: bool) -> None:
        """Put the module into its mode."""
        module.train() if train else module.eval()

    def variables(self, seed: Any, x: Any) -> Tree:
        """Return the initial variables."""
        parts = nnx_model.parts_of(self.make, x.shape[1])
        params, batch_stats, _ = parts.split(self.make(x.shape[1], jax.random.key(seed)))
        return {"params": params, "batch_stats": batch_stats}

    def apply(
        self, params: Tree, batch_stats: Tree, x: Any, train: bool, weights: Any = None
    ) -> tuple[Any, Tree]:
        """Merge, run, and split again."""
        parts = nnx_model.parts_of(self.make, x.shape[1])
        module = parts.merge(params, batch_stats, {})
        self.switch(module, train)
        preds = module(x).reshape(-1)
        return preds, parts.split(module)[1]

    def layer_inputs(self, state: State, x: Any, y: Any) -> dict[str, LayerInput]:
        """Return what the first layer gives."""
        x, _ = self.batch(x, y)
        parts = nnx_model.parts_of(self.make, x.shape[1])
        module = parts.merge(state.params, state.batch_stats, {})
        return {"norm": LayerInput(module.first(x))} if state.batch_stats else {}

    def biases_before_norm(self) -> tuple[str, ...]:
        """Return the bias of the first layer."""
        return ("first/bias",)


@fault(mistake="eval_in_train_mode", source="https://github.com/KaiyuanZh/FLIP/issues/6")
class NnxNeverSwitchedToEval(NnxStep):
    """model.eval() was forgotten: evaluation normalises by its batch and moves the statistics."""

    def switch(self, module: Any, train: bool) -> None:
        """Train always."""
        module.train()


@fault(mistake="train_step_in_eval_mode", source="https://github.com/yanx27/GACNet/issues/8")
class NnxNeverSwitchedBackToTrain(NnxStep):
    """model.train() was forgotten after an evaluation: training runs in eval mode."""

    def switch(self, module: Any, train: bool) -> None:
        """Evaluate always."""
        module.eval()


@fault(mistake="statistics_trained_as_params")
class NnxGradientWithoutAFilter(NnxStep):
    """The module is differentiated as a whole, and its statistics get gradients and descend."""

    def step(self, state: State, x: Any, y: Any, lr: Any) -> tuple[State, StepInfo]:
        """Differentiate params and statistics in eval mode, where both have gradients."""

        def loss_fn(params: Tree, batch_stats: Tree) -> Any:
            preds, _ = self.apply(params, batch_stats, x, train=False)
            return self.error(preds, y)

        both = jax.value_and_grad(loss_fn, argnums=(0, 1))
        loss, (grads, pull) = both(state.params, state.batch_stats)
        params, opt_state = self.update(grads, state, lr)
        moved = mapped(lambda leaf, slope: leaf - lr * slope, state.batch_stats, pull)
        return State(params, moved, opt_state), StepInfo(loss, grads)


@fault(mistake="optimizer_on_all_variables")
class NnxOptimizerWithoutAFilter(WithMomentum, NnxStep):
    """The optimizer is made for the module's whole state, not for its nnx.Param."""

    def init(self, seed: Any, x: Any) -> State:
        """Initialise on params and statistics, merged into one tree as nnx.state gives them."""
        variables = self.variables(seed, x)
        opt_state = self.tx(0.0).init((variables["params"], variables["batch_stats"]))
        return State(variables["params"], variables["batch_stats"], opt_state)

    def update(self, grads: Tree, state: State, lr: Any) -> tuple[Tree, Tree]:
        """Update both, the statistics by a gradient of zero."""
        every = grads, mapped(jnp.zeros_like, state.batch_stats)
        whole = state.params, state.batch_stats
        updates, opt_state = self.tx(lr).update(every, state.opt_state, whole)
        return optax.apply_updates(whole, updates)[0], opt_state


@fault(
    mistake="statistics_trained_as_params", source="https://github.com/intel/ipex-llm/issues/1599"
)
class NnxStatisticsAreParams(NnxStep):
    """The running moments are nnx.Param: no filter tells them from weights."""

    net = "NetOfParams"

    def optimizer(self, lr: Any) -> Any:
        """Return SGD with weight decay."""
        return optax.chain(optax.add_decayed_weights(DECAY), optax.sgd(lr))


@fault(
    mistake="new_statistics_dropped",
    source="https://github.com/HomericIntelligence/Odyssey/issues/5532",
)
class NnxSplitBeforeThePass(NnxStep):
    """The state that is carried on was split off before the forward pass wrote into the module."""

    def loss(self, params: Tree, batch_stats: Tree, x: Any, y: Any) -> tuple[Any, Tree]:
        """Return the statistics that went in."""
        return super().loss(params, batch_stats, x, y)[0], batch_stats


@fault(mistake="new_statistics_dropped")
class NnxCloneTrained(NnxStep):
    """A clone of the module runs forward; the params come back from it, the statistics do not."""

    def apply(
        self, params: Tree, batch_stats: Tree, x: Any, train: bool, weights: Any = None
    ) -> tuple[Any, Tree]:
        """Run a clone, split the original."""
        parts = nnx_model.parts_of(self.make, x.shape[1])
        module = parts.merge(params, batch_stats, {})
        copied = nnx.clone(module)
        self.switch(copied, train)
        return copied(x).reshape(-1), parts.split(module)[1]


@fault(mistake="ema_applied_twice")
class NnxNormShared(NnxStep):
    """One BatchNorm is used at two places, and both move its only pair of statistics."""

    net = "SharedNorm"


@fault(mistake="momentum_reversed", source="https://github.com/pytorch/examples/issues/289")
class NnxMomentumReversed(NnxStep):
    """nnx.BatchNorm was given PyTorch's 0.01."""

    def make(self, features: Any, key: Any) -> Any:
        """Return the module with another momentum."""
        return nnx_model.Net(features, self.hidden, 0.01, rngs=nnx.Rngs(key))


@fault(mistake="eval_of_stale_state", source="https://github.com/google/flax/pull/3982")
class NnxEvalClosesOverTheModule(NnxStep):
    """A compiled evaluation closed over the module: it keeps evaluating the initial params."""

    def evaluate(self, state: State, x: Any, y: Any) -> Any:
        """Evaluate the params of seed 0."""
        first = self.variables(0, x)["params"]
        return super().evaluate(state._replace(params=first), x, y)


@fault(mistake="statistics_reinitialised")
class NnxModuleMadeInTheStep(NnxStep):
    """The step makes the module anew and updates it with params alone: fresh statistics."""

    def gradients(self, state: State, x: Any, y: Any) -> tuple[tuple[Any, Tree], Tree]:
        """Forget the statistics."""
        fresh = self.variables(0, x)["batch_stats"]
        return super().gradients(state._replace(batch_stats=fresh), x, y)


@fault(
    mistake="statistics_in_low_precision",
    source="https://github.com/NVIDIA/Model-Optimizer/pull/738",
)
class NnxVarianceInBfloat16(NnxStep):
    """The module was cast to bfloat16 and back: the running variance keeps eight bits."""

    def thread(self, old: State, new: State) -> State:
        """Round the variance."""

        def rounded(leaf: Any) -> Any:
            return leaf.astype(jnp.bfloat16).astype(leaf.dtype)

        return new._replace(batch_stats=edited(new.batch_stats, "norm/var", rounded))
