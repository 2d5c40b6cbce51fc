"""The right steps, cut into parts: a fault of the catalogue replaces one of them.

``CanonicalStep`` is Flax's BatchNorm in a small linen model, ``HandwrittenNorm`` the same with the layer
itself in parts. The steps around nnx modules and TrainStates are beside their faults, in ``frameworks.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from bnverify import LayerInput, State, StepInfo, Subject

Tree = Any
Moments = tuple[Any, Any]  # mean and variance, each (channels,)
DECAY = 1e-2


class CanonicalStep:
    """Dense -> BatchNorm -> ReLU, ``layers`` times, then Dense(1); the mean squared error.

    The parts, in the order in which a step runs them: ``variables``, ``batch``, ``loss`` (of ``apply`` and
    ``training_error``), ``gradients`` (then ``slope``), ``update``, ``thread``, ``report``; then
    ``evaluate``. The class attributes below can be set by keyword for one instance.

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

    # The optimizer: the one that the author declares, and the one that the step really uses.

    def optimizer(self, lr: Any) -> Any:
        return optax.sgd(lr)

    def tx(self, lr: Any) -> Any:
        return self.optimizer(lr)

    # The model.

    def normalise(self, h: Any, train: bool, layer: int, weights: Any) -> Any:
        """Return layer number ``layer`` of normalisation, applied to h (N, hidden)."""
        norm = nn.BatchNorm(
            use_running_average=not train,
            momentum=self.momentum,  # type: ignore[arg-type] # None where there are no statistics
            epsilon=self.epsilon,
            use_fast_variance=self.fast_variance,
            name=f"BatchNorm_{layer}",
        )
        # Without a mask the argument stays away: not every supported release takes None alike.
        return norm(h) if weights is None else norm(h, mask=weights[:, None] > 0)

    def activate(self, a: Any) -> Any:
        return jax.nn.relu(a)

    def variables(self, seed: Any, x: Any) -> Tree:
        return Model(self).init(jax.random.PRNGKey(seed), x, train=False)

    def apply(
        self, params: Tree, batch_stats: Tree, x: Any, train: bool, weights: Any = None
    ) -> tuple[Any, Tree]:
        """Return the predictions (N,) and the statistics after the pass."""
        out, updated = Model(self).apply(
            {"params": params, "batch_stats": batch_stats},
            x,
            train=train,
            weights=weights,
            mutable=["batch_stats"],
        )
        return out.reshape(-1), updated.get("batch_stats", {})

    # The step.

    def init(self, seed: Any, x: Any) -> State:
        variables = self.variables(seed, x)
        params = variables["params"]
        return State(params, variables.get("batch_stats", {}), self.tx(0.0).init(params))

    def batch(self, x: Any, y: Any) -> tuple[Any, Any]:
        """Return what the training step makes of its batch before it uses it."""
        return x, y

    def error(self, preds: Any, y: Any) -> Any:
        """Return the error of predictions (N,), a scalar."""
        return jnp.mean((preds - y) ** 2)

    def training_error(self, preds: Any, y: Any) -> Any:
        return self.error(preds, y)

    def loss(self, params: Tree, batch_stats: Tree, x: Any, y: Any) -> tuple[Any, Tree]:
        """Return the training loss and the new statistics."""
        preds, batch_stats = self.apply(params, batch_stats, x, train=True)
        return self.training_error(preds, y), batch_stats

    def gradients(self, state: State, x: Any, y: Any) -> tuple[tuple[Any, Tree], Tree]:
        """Return (loss, new statistics) and the gradient."""
        result, grads = jax.value_and_grad(self.loss, has_aux=True)(
            state.params, state.batch_stats, x, y
        )
        return result, self.slope(grads, state, x)

    def slope(self, grads: Tree, state: State, x: Any) -> Tree:
        """Return what becomes of the gradient before it is reported and used."""
        return grads

    def update(self, grads: Tree, state: State, lr: Any) -> tuple[Tree, Tree]:
        """Return the new params and the optimizer's new state."""
        updates, opt_state = self.tx(lr).update(grads, state.opt_state, state.params)
        return optax.apply_updates(state.params, updates), opt_state

    def thread(self, old: State, new: State) -> State:
        """Return the state that is carried on."""
        return new

    def report(self, loss: Any, grads: Tree) -> StepInfo:
        return StepInfo(loss, grads)

    def step(self, state: State, x: Any, y: Any, lr: Any) -> tuple[State, StepInfo]:
        x, y = self.batch(x, y)
        (loss, batch_stats), grads = self.gradients(state, x, y)
        params, opt_state = self.update(grads, state, lr)
        new = State(params, batch_stats, opt_state)
        return self.thread(state, new), self.report(loss, grads)

    def evaluation_error(self, preds: Any, y: Any) -> Any:
        return self.error(preds, y).reshape(1)

    def evaluate(self, state: State, x: Any, y: Any) -> Any:
        """Return the loss in eval mode, (1,)."""
        preds, _ = self.apply(state.params, state.batch_stats, x, train=False)
        return self.evaluation_error(preds, y)

    # What the author declares.

    def after_eval(self, state: State, x: Any, y: Any) -> State:
        """Return the state that evaluation leaves behind."""
        _, batch_stats = self.apply(state.params, state.batch_stats, x, train=False)
        return state._replace(batch_stats=batch_stats)

    def layer_inputs(self, state: State, x: Any, y: Any) -> dict[str, LayerInput]:
        """Return what each normalisation layer is really given in the training step."""
        x, _ = self.batch(x, y)
        return {path: LayerInput(value) for path, value in self.captured(state, x).items()}

    def captured(self, state: State, x: Any, weights: Any = None) -> dict[str, Any]:
        """Return what each layer that keeps statistics is given, by its path in batch_stats."""
        _, seen = Model(self).apply(
            {"params": state.params, "batch_stats": state.batch_stats},
            x,
            train=True,
            weights=weights,
            mutable=["batch_stats", "layer_inputs"],
        )
        inputs = {
            f"BatchNorm_{layer}": seen["layer_inputs"][f"input_{layer}"][0]
            for layer in range(self.layers)
        }
        return {path: value for path, value in inputs.items() if path in state.batch_stats}

    def biases_before_norm(self) -> tuple[str, ...]:
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


class Model(nn.Module):
    """The model of a CanonicalStep: x (N, D) -> (N, 1)."""

    parts: Any

    @nn.compact
    def __call__(self, x: Any, train: bool, weights: Any = None) -> Any:
        """Return the predictions; rows whose weight is zero stay out of the statistics."""
        parts = self.parts
        for layer in range(parts.layers):
            x = nn.Dense(parts.hidden, use_bias=parts.bias, name=f"Dense_{layer}")(x)
            if not self.is_initializing():  # or the capture would become a variable
                self.sow("layer_inputs", f"input_{layer}", x)
            x = parts.activate(parts.normalise(x, train, layer, weights))
        return nn.Dense(1, name=f"Dense_{parts.layers}")(x)


class HandwrittenNorm(CanonicalStep):
    """The canonical step around a normalisation written out by hand, itself in parts.

    In training: ``moments`` of the batch, ``recorded`` of them ``fold`` into the running ones,
    ``training_moments`` chooses those that ``standardise`` uses. In evaluation: ``evaluation_moments``.
    """

    def normalise(self, h: Any, train: bool, layer: int, weights: Any) -> Any:
        return Norm(self, layer, name=f"BatchNorm_{layer}")(h, train)

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
        return averaged(self.momentum, old, batch)

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


class Norm(nn.Module):
    """The normalisation of a HandwrittenNorm, over axis 0."""

    parts: Any
    layer: int

    @nn.compact
    def __call__(self, h: Any, train: bool) -> Any:
        """Return h normalised; in training, record its moments."""
        parts, layer, shape = self.parts, self.layer, h.shape[-1:]
        mean = self.variable("batch_stats", "mean", jnp.zeros, shape, jnp.float32)
        var = self.variable("batch_stats", "var", jnp.ones, shape, jnp.float32)
        affine = (
            self.param("scale", nn.initializers.ones, shape),
            self.param("bias", nn.initializers.zeros, shape),
        )
        running = mean.value, var.value
        if train:
            batch = parts.moments(h, layer)
            new = parts.fold(running, parts.recorded(h, batch, layer), layer)
            moments = parts.training_moments(batch, running, new, layer)
        else:
            new = parts.written_in_eval(running, h, layer)
            moments = parts.evaluation_moments(running, h, layer)
        if not self.is_initializing():
            mean.value, var.value = new
        return parts.standardise(h, moments, affine, train, layer)


class WithSolution(CanonicalStep):
    """A step with the one-call function: initialise, step, evaluate."""

    def solution(self) -> Any:
        def solve(seed: Any, x: Any, y: Any, lr: Any) -> Any:
            x, y = jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.float32)
            before = self.init(self.truncated(seed), x)
            after, _ = self.step(before, x, y, jnp.float32(lr))
            return self.evaluate(self.evaluated(before, after), x, y)

        return solve

    def truncated(self, seed: Any) -> Any:
        """Return the integer that a real seed stands for; float32 holds none beyond 2^24."""
        return int(seed)

    def evaluated(self, before: State, after: State) -> State:
        return after


class PaddedStep(CanonicalStep):
    """The batch is padded to a multiple of four; the loss and BatchNorm both mask the padding."""

    def padded(self, x: Any) -> tuple[Any, Any]:
        """Return x with rows of zeros, and the weights of its rows."""
        rows = x.shape[0]
        more = -rows % 4
        return jnp.pad(x, ((0, more), (0, 0))), jnp.pad(jnp.ones(rows), (0, more))

    def mask(self, weights: Any) -> Any:
        """Return the mask that BatchNorm is given."""
        return weights

    def loss(self, params: Tree, batch_stats: Tree, x: Any, y: Any) -> tuple[Any, Tree]:
        x, weights = self.padded(x)
        preds, new = self.apply(params, batch_stats, x, True, self.mask(weights))
        errors = weights * (preds - jnp.pad(y, (0, -y.shape[0] % 4))) ** 2
        return jnp.sum(errors) / jnp.sum(weights), new

    def layer_inputs(self, state: State, x: Any, y: Any) -> dict[str, LayerInput]:
        x, weights = self.padded(x)
        given = self.captured(state, x, self.mask(weights))
        return {path: LayerInput(value, weights[:, None]) for path, value in given.items()}


# Optimizers, each to stand in for ``CanonicalStep.optimizer``.


def momentum(step: CanonicalStep, lr: Any) -> Any:
    """SGD with momentum 0.9: its state has one buffer like the params."""
    return optax.sgd(lr, momentum=0.9)


def adam(step: CanonicalStep, lr: Any) -> Any:
    """Adam: two buffers and a count."""
    return optax.adam(lr)


def masked_decay(step: CanonicalStep, lr: Any) -> Any:
    """SGD with weight decay on the kernels alone, as it should be."""
    return optax.chain(optax.add_decayed_weights(DECAY, mask=kernels), optax.sgd(lr))


def masked_adamw(step: CanonicalStep, lr: Any) -> Any:
    """AdamW, its decay on the kernels alone."""
    return optax.adamw(lr, weight_decay=DECAY, mask=kernels)


# What rows of the catalogue are written with.


def averaged(keep: Any, old: Moments, batch: Moments) -> Moments:
    """Return the moving average of moments in which the old ones weigh ``keep``."""
    mean, var = (keep * was + (1 - keep) * now for was, now in zip(old, batch, strict=True))
    return mean, var


def carried(**parts: Callable[[Tree, Tree], Tree]) -> Callable[[Any, State, State], State]:
    """Return a ``thread``: each named part of the state is a function of the old and the new one."""

    def thread(step: Any, old: State, new: State) -> State:
        changes = {
            name: part(getattr(old, name), getattr(new, name)) for name, part in parts.items()
        }
        return new._replace(**changes)

    return thread


def rounded(value: Any, dtype: str) -> Any:
    """Return ``value`` with the digits of ``dtype``, in its own dtype."""
    return jnp.asarray(value).astype(dtype).astype(jnp.asarray(value).dtype)


def mapped(function: Callable[..., Any], *trees: Tree) -> Tree:
    """Return ``function`` of the corresponding leaves of ``trees``."""
    return jax.tree_util.tree_map(function, *trees)


def edited(tree: Tree, path: str, change: Callable[[Any], Any]) -> Tree:
    """Return ``tree`` with the entry at ``path``, joined by "/", changed."""
    head, _, rest = path.partition("/")
    entry = edited(tree[head], rest, change) if rest else change(tree[head])
    return {**tree, head: entry}


def by_path(function: Callable[[str, Any], Any], tree: Tree) -> Tree:
    """Return ``function(path, leaf)`` of every leaf of ``tree``, paths joined by "/"."""

    def visit(keys: Any, leaf: Any) -> Any:
        return function("/".join(str(getattr(key, "key", key)) for key in keys), leaf)

    return jax.tree_util.tree_map_with_path(visit, tree)


def kernels(params: Tree) -> Tree:
    """Return a mask of ``params`` that is true for the kernels alone."""
    return by_path(lambda path, leaf: path.endswith("kernel"), params)
