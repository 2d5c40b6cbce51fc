"""The correct steps in parts, of which a fault replaces one.

``CanonicalStep`` uses Flax's BatchNorm in a small linen model; ``HandwrittenNorm`` has the layer itself in
parts. The steps with nnx modules and TrainStates are in ``frameworks.py``.
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

    The parts, in the order of a step: ``variables``, ``batch``, ``loss`` (of ``apply`` and
    ``training_error``), ``gradients`` (then ``slope``), ``update``, ``thread``, ``report``; then
    ``evaluate``. The class attributes below can be set by keyword for one instance.

    Attributes:
        hidden: the width of every hidden layer.
        momentum: the declared weight of the old value in the moving average.
        layers: the number of normalised layers.
        epsilon: the number added to the variance.
        bias: whether a Dense layer before a normalisation has a bias.
        fast_variance: E[h^2] - E[h]^2, as Flax does by default; else mean((h - E[h])^2).
        probed: whether the declared optimizer may be replaced by another one.
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

    # The declared optimizer, and the one that the step really uses.

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
        # Without a mask the argument is omitted: not every supported release accepts None.
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
        """Return the batch as the training step uses it."""
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
        """Return the gradient as it is reported and used."""
        return grads

    def update(self, grads: Tree, state: State, lr: Any) -> tuple[Tree, Tree]:
        """Return the new params and the optimizer's new state."""
        updates, opt_state = self.tx(lr).update(grads, state.opt_state, state.params)
        return optax.apply_updates(state.params, updates), opt_state

    def thread(self, old: State, new: State) -> State:
        """Return the state that the step returns."""
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

    # Declarations.

    def after_eval(self, state: State, x: Any, y: Any) -> State:
        """Return the state after evaluation."""
        _, batch_stats = self.apply(state.params, state.batch_stats, x, train=False)
        return state._replace(batch_stats=batch_stats)

    def layer_inputs(self, state: State, x: Any, y: Any) -> dict[str, LayerInput]:
        """Return the actual inputs of the normalisation layers in the training step."""
        x, _ = self.batch(x, y)
        return {path: LayerInput(value) for path, value in self.captured(state, x).items()}

    def captured(self, state: State, x: Any, weights: Any = None) -> dict[str, Any]:
        """Return path in batch_stats -> the input of the layer."""
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
        """Return init, one step and evaluation as one function; None if there is no such function."""
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
        """Return the predictions; rows of weight 0 are not in the statistics."""
        parts = self.parts
        for layer in range(parts.layers):
            x = nn.Dense(parts.hidden, use_bias=parts.bias, name=f"Dense_{layer}")(x)
            if not self.is_initializing():  # otherwise the capture would become a variable
                self.sow("layer_inputs", f"input_{layer}", x)
            x = parts.activate(parts.normalise(x, train, layer, weights))
        return nn.Dense(1, name=f"Dense_{parts.layers}")(x)


class HandwrittenNorm(CanonicalStep):
    """The canonical step with a normalisation written by hand, itself in parts.

    In training, ``moments`` are those of the batch, ``recorded`` those that ``fold`` averages, and
    ``training_moments`` those for ``standardise``; in evaluation, these are ``evaluation_moments``.
    """

    def normalise(self, h: Any, train: bool, layer: int, weights: Any) -> Any:
        return Norm(self, layer, name=f"BatchNorm_{layer}")(h, train)

    def moments(self, h: Any, layer: int) -> Moments:
        """Return the mean and the variance (divisor N) of the batch h (N, channels)."""
        mean = jnp.mean(h, axis=0)
        if self.fast_variance:
            return mean, jnp.maximum(jnp.mean(h**2, axis=0) - mean**2, 0.0)
        return mean, jnp.mean((h - mean) ** 2, axis=0)

    def recorded(self, h: Any, batch: Moments, layer: int) -> Moments:
        """Return the moments that the running statistics move towards."""
        return batch

    def fold(self, old: Moments, batch: Moments, layer: int) -> Moments:
        """Return the new running moments."""
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
        """Return the factor for centred values."""
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
        """Return the integer part of a seed; float32 does not represent all integers above 2^24."""
        return int(seed)

    def evaluated(self, before: State, after: State) -> State:
        return after


class PaddedStep(CanonicalStep):
    """The batch is padded to a multiple of four; both the loss and BatchNorm mask the padding."""

    def padded(self, x: Any) -> tuple[Any, Any]:
        """Return x with rows of zeros, and the weights of its rows."""
        rows = x.shape[0]
        more = -rows % 4
        return jnp.pad(x, ((0, more), (0, 0))), jnp.pad(jnp.ones(rows), (0, more))

    def mask(self, weights: Any) -> Any:
        """Return BatchNorm's mask."""
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


# Replacements for ``CanonicalStep.optimizer``.


def momentum(step: CanonicalStep, lr: Any) -> Any:
    """SGD with momentum 0.9, whose state has one buffer for each param."""
    return optax.sgd(lr, momentum=0.9)


def adam(step: CanonicalStep, lr: Any) -> Any:
    """Adam, whose state has two buffers for each param and a count."""
    return optax.adam(lr)


def masked_decay(step: CanonicalStep, lr: Any) -> Any:
    """SGD with weight decay of only the kernels, as it should be."""
    return optax.chain(optax.add_decayed_weights(DECAY, mask=kernels), optax.sgd(lr))


def masked_adamw(step: CanonicalStep, lr: Any) -> Any:
    """AdamW with weight decay of only the kernels."""
    return optax.adamw(lr, weight_decay=DECAY, mask=kernels)


# Helpers for faults.


def averaged(keep: Any, old: Moments, batch: Moments) -> Moments:
    """Return the moving average of moments; ``keep`` is the weight of the old ones."""
    mean, var = (keep * was + (1 - keep) * now for was, now in zip(old, batch, strict=True))
    return mean, var


def of_two_positions(h: Any, count: Any) -> Moments:
    """Return the moments of rows that stand at two positions each, with ``count`` as the divisor."""
    positions = jnp.stack([h, h], axis=1)
    mean = jnp.sum(positions, axis=(0, 1)) / count
    return mean, jnp.sum((positions - mean) ** 2, axis=(0, 1)) / count


def carried(**parts: Callable[[Tree, Tree], Tree]) -> Callable[[Any, State, State], State]:
    """Return a ``thread`` that replaces each named part of the state by function(old part, new part)."""

    def thread(step: Any, old: State, new: State) -> State:
        changes = {
            name: part(getattr(old, name), getattr(new, name)) for name, part in parts.items()
        }
        return new._replace(**changes)

    return thread


def rounded(value: Any, dtype: str) -> Any:
    """Return ``value`` rounded to ``dtype``, in its own dtype."""
    return jnp.asarray(value).astype(dtype).astype(jnp.asarray(value).dtype)


def mapped(function: Callable[..., Any], *trees: Tree) -> Tree:
    """Apply ``function`` to the corresponding leaves of ``trees``."""
    return jax.tree_util.tree_map(function, *trees)


def edited(tree: Tree, path: str, change: Callable[[Any], Any]) -> Tree:
    """Return ``tree`` with the entry at ``path``, joined by "/", changed."""
    head, _, rest = path.partition("/")
    entry = edited(tree[head], rest, change) if rest else change(tree[head])
    return {**tree, head: entry}


def by_path(function: Callable[[str, Any], Any], tree: Tree) -> Tree:
    """Apply ``function(path, leaf)`` to every leaf of ``tree``; paths are joined by "/"."""

    def visit(keys: Any, leaf: Any) -> Any:
        return function("/".join(str(getattr(key, "key", key)) for key in keys), leaf)

    return jax.tree_util.tree_map_with_path(visit, tree)


def kernels(params: Tree) -> Tree:
    """Return a mask of ``params`` that is True for kernels."""
    return by_path(lambda path, leaf: path.endswith("kernel"), params)
