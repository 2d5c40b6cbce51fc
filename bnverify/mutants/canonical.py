"""The canonical training step, cut into parts: a fault replaces one of them.

Nothing here is needed to verify a step; it is what the catalogue's wrong steps are made from.
"""

from __future__ import annotations

from typing import Any

from bnverify.lazy import LazyModule, jax, jnp
from bnverify.model import LayerInput, State, StepInfo, Subject, Tree

optax: Any = LazyModule("optax")
model: Any = LazyModule("bnverify.mutants.model")

Moments = tuple[Any, Any]  # mean and variance, each (channels,)


class CanonicalStep:
    """Dense -> BatchNorm -> ReLU, ``layers`` times, then Dense(1); the mean squared error.

    The parts, in the order in which a step runs them: ``variables``, ``batch``, ``loss`` (of
    ``apply`` and ``error``), ``gradients``, ``update``, ``thread``, ``report``; then ``evaluate``.
    A subclass replaces one. The class attributes below can be set by keyword for one instance.

    Attributes:
        hidden: the width of every hidden layer.
        momentum: the declared weight of the old value in the moving average.
        layers: how many normalised layers.
        epsilon: what is added to the variance.
        bias: whether the Dense before a normalisation has a bias.
        fast_variance: E[h^2] - E[h]^2, as Flax does by default; else mean((h - E[h])^2).
        probed: whether another optimizer may stand in for the declared one.
    """

    hidden: int = 8
    momentum: float | None = 0.99
    layers: int = 1
    epsilon: float = 1e-5
    bias: bool = True
    fast_variance: bool = True
    probed: bool = True

    def __init__(self, **changes: Any) -> None:
        for name, value in changes.items():
            if not hasattr(type(self), name):
                raise TypeError(f"a step has no part {name!r}")
            setattr(self, name, value)
        self._changes = changes

    # The optimizer.

    def optimizer(self, lr: Any) -> Any:
        """Return the optimizer that the author declares."""
        return optax.sgd(lr)

    def tx(self, lr: Any) -> Any:
        """Return the optimizer that the step really uses."""
        return self.optimizer(lr)

    # The model.

    def normalise(self, h: Any, train: bool, layer: int, weights: Any) -> Any:
        """Return layer number ``layer`` of normalisation, applied to h (N, hidden)."""
        return model.flax_norm(self, h, train, layer, weights)

    def activate(self, a: Any) -> Any:
        """Return the activation of a (N, hidden)."""
        return jax.nn.relu(a)

    def variables(self, seed: Any, x: Any) -> Tree:
        """Return the initial variables."""
        return model.Model(self).init(jax.random.PRNGKey(seed), x, train=False)

    def apply(
        self, params: Tree, batch_stats: Tree, x: Any, train: bool, weights: Any = None
    ) -> tuple[Any, Tree]:
        """Return the predictions (N,) and the statistics after the pass."""
        out, updated = model.Model(self).apply(
            {"params": params, "batch_stats": batch_stats},
            x,
            train=train,
            weights=weights,
            mutable=["batch_stats"],
        )
        return out.reshape(-1), updated.get("batch_stats", {})

    # The step.

    def init(self, seed: Any, x: Any) -> State:
        """Return the state before the first step."""
        variables = self.variables(seed, x)
        params = variables["params"]
        return State(params, variables.get("batch_stats", {}), self.tx(0.0).init(params))

    def batch(self, x: Any, y: Any) -> tuple[Any, Any]:
        """Return what the training step makes of its batch before it uses it."""
        return x, y

    def error(self, preds: Any, y: Any) -> Any:
        """Return the error of predictions (N,), a scalar."""
        return jnp.mean((preds - y) ** 2)

    def loss(self, params: Tree, batch_stats: Tree, x: Any, y: Any) -> tuple[Any, Tree]:
        """Return the training loss and the new statistics."""
        preds, batch_stats = self.apply(params, batch_stats, x, train=True)
        return self.error(preds, y), batch_stats

    def gradients(self, state: State, x: Any, y: Any) -> tuple[tuple[Any, Tree], Tree]:
        """Return (loss, new statistics) and the gradient."""
        result: tuple[tuple[Any, Tree], Tree] = jax.value_and_grad(self.loss, has_aux=True)(
            state.params, state.batch_stats, x, y
        )
        return result

    def update(self, grads: Tree, state: State, lr: Any) -> tuple[Tree, Tree]:
        """Return the new params and the optimizer's new state."""
        updates, opt_state = self.tx(lr).update(grads, state.opt_state, state.params)
        return optax.apply_updates(state.params, updates), opt_state

    def thread(self, old: State, new: State) -> State:
        """Return the state that is carried on."""
        return new

    def report(self, loss: Any, grads: Tree) -> StepInfo:
        """Return what the step tells besides."""
        return StepInfo(loss, grads)

    def step(self, state: State, x: Any, y: Any, lr: Any) -> tuple[State, StepInfo]:
        """Take one training step."""
        x, y = self.batch(x, y)
        (loss, batch_stats), grads = self.gradients(state, x, y)
        params, opt_state = self.update(grads, state, lr)
        new = State(params, batch_stats, opt_state)
        return self.thread(state, new), self.report(loss, grads)

    def evaluate(self, state: State, x: Any, y: Any) -> Any:
        """Return the loss in eval mode, (1,)."""
        preds, _ = self.apply(state.params, state.batch_stats, x, train=False)
        return self.error(preds, y).reshape(1)

    # What the author declares.

    def after_eval(self, state: State, x: Any, y: Any) -> State:
        """Return the state that evaluation leaves behind."""
        _, batch_stats = self.apply(state.params, state.batch_stats, x, train=False)
        return state._replace(batch_stats=batch_stats)

    def layer_inputs(self, state: State, x: Any, y: Any) -> dict[str, LayerInput]:
        """Return what each normalisation layer is really given in the training step."""
        x, _ = self.batch(x, y)
        return {path: LayerInput(value) for path, value in captured(self, state, x).items()}

    def biases_before_norm(self) -> tuple[str, ...]:
        """Return the paths of the biases that a normalisation takes away again."""
        return tuple(f"Dense_{layer}/bias" for layer in range(self.layers)) if self.bias else ()

    def solution(self) -> Any:
        """Return init, one step and evaluation as one function, where the author has one."""
        return None

    def subject(self, name: str) -> Subject:
        """Return the step as what is verified."""

        def around(optimizer: Any) -> Subject:
            changes = {**self._changes, "optimizer": optimizer}
            return type(self)(**changes).subject(f"{name}, probed")

        return Subject(
            name=name,
            init=self.init,
            step=self.step,
            evaluate=self.evaluate,
            optimizer=self.optimizer,
            momentum=self.momentum,
            layer_inputs=self.layer_inputs,
            after_eval=self.after_eval,
            with_optimizer=around if self.probed else None,
            biases_before_norm=self.biases_before_norm(),
            solution=self.solution(),
        )


def captured(parts: CanonicalStep, state: State, x: Any, weights: Any = None) -> dict[str, Any]:
    """Return what each layer that keeps statistics is given, by its path in batch_stats."""
    _, seen = model.Model(parts).apply(
        {"params": state.params, "batch_stats": state.batch_stats},
        x,
        train=True,
        weights=weights,
        mutable=["batch_stats", "layer_inputs"],
    )
    inputs = {
        f"BatchNorm_{layer}": seen["layer_inputs"][f"input_{layer}"][0]
        for layer in range(parts.layers)
    }
    return {path: value for path, value in inputs.items() if path in state.batch_stats}


class HandwrittenNorm(CanonicalStep):
    """The canonical step around a normalisation written out by hand, itself in parts.

    In training: ``moments`` of the batch, ``recorded`` of them ``fold`` into the running ones,
    ``training_moments`` chooses those that ``standardise`` uses. In evaluation:
    ``evaluation_moments``.
    """

    def normalise(self, h: Any, train: bool, layer: int, weights: Any) -> Any:
        """Return the handwritten layer applied to h."""
        return model.Norm(self, layer, name=f"BatchNorm_{layer}")(h, train)

    def moments(self, h: Any, layer: int) -> Moments:
        """Return mean and variance of the batch h (N, channels), the divisor N."""
        mean = jnp.mean(h, axis=0)
        if self.fast_variance:
            return mean, jnp.maximum(jnp.mean(h**2, axis=0) - mean**2, 0.0)
        return mean, jnp.mean((h - mean) ** 2, axis=0)

    def recorded(self, h: Any, batch: Moments, layer: int) -> Moments:
        """Return the moments that the running statistics move towards."""
        return batch

    def fold(self, old: Moments, batch: Moments, layer: int) -> Moments:
        """Return the running moments after the batch's."""
        keep: Any = self.momentum
        mean, var = (keep * was + (1 - keep) * now for was, now in zip(old, batch, strict=True))
        return mean, var

    def training_moments(self, batch: Moments, old: Moments, new: Moments, layer: int) -> Moments:
        """Return the moments that normalise in training."""
        return batch

    def evaluation_moments(self, running: Moments, h: Any, layer: int) -> Moments:
        """Return the moments that normalise in evaluation."""
        return running

    def written_in_eval(self, running: Moments, h: Any, layer: int) -> Moments:
        """Return the running moments after an evaluation."""
        return running

    def inverse_deviation(self, var: Any, train: bool, layer: int) -> Any:
        """Return what a centred value is multiplied with."""
        return jax.lax.rsqrt(var + self.epsilon)

    def standardise(
        self, h: Any, moments: Moments, affine: tuple[Any, Any], train: bool, layer: int
    ) -> Any:
        """Return (h - mean) / sqrt(var + epsilon) * scale + bias, (N, channels)."""
        (mean, var), (scale, bias) = moments, affine
        return (h - mean) * (self.inverse_deviation(var, train, layer) * scale) + bias
