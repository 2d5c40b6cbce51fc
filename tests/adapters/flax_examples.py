"""Training code like Flax's own examples, with small sizes.

The shapes are those of the ImageNet example (dynamic scale, ``pmean``, a penalty that is not reported),
of the guide on BatchNorm in Linen and in nnx, and of the nnx MNIST example.
https://github.com/google/flax/tree/main/examples
https://flax.readthedocs.io/en/latest/guides/training_techniques/batch_norm.html
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import nnx
from flax.training import dynamic_scale as dynamic_scale_lib
from flax.training import train_state

CLASSES = 3

# --- ImageNet ------------------------------------------------------------------------------


class Block(nn.Module):
    """A residual block whose last scale starts at zero."""

    filters: int
    conv: Any
    norm: Any

    @nn.compact
    def __call__(self, x: Any) -> Any:
        """Return (N, H, W, filters)."""
        y = nn.relu(self.norm()(self.conv(self.filters, (3, 3))(x)))
        y = self.norm(scale_init=nn.initializers.zeros_init())(self.conv(self.filters, (3, 3))(y))
        if x.shape != y.shape:
            x = self.norm(name="norm_proj")(self.conv(self.filters, (1, 1), name="conv_proj")(x))
        return nn.relu(x + y)


class ResNet(nn.Module):
    """A stem, one block, and a classifier."""

    classes: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Any, train: bool = True) -> Any:
        """Return logits, (N, classes)."""
        conv = functools.partial(nn.Conv, use_bias=False, dtype=self.dtype)
        norm = functools.partial(
            nn.BatchNorm,
            use_running_average=not train,
            momentum=0.9,
            epsilon=1e-5,
            dtype=self.dtype,
        )
        x = conv(2, (3, 3), (2, 2), padding=[(1, 1), (1, 1)], name="conv_init")(x)
        x = nn.relu(norm(name="bn_init")(x))
        x = Block(filters=3, conv=conv, norm=norm)(x)
        x = jnp.mean(x, axis=(1, 2))
        return jnp.asarray(nn.Dense(self.classes, dtype=self.dtype)(x), self.dtype)


class TrainState(train_state.TrainState):
    """A TrainState with statistics and a dynamic loss scale."""

    batch_stats: Any
    dynamic_scale: dynamic_scale_lib.DynamicScale | None


def cross_entropy_loss(logits: Any, labels: Any) -> Any:
    """Return the mean over rows."""
    one_hot = nn.one_hot(labels, num_classes=CLASSES)
    return jnp.mean(optax.softmax_cross_entropy(logits=logits, labels=one_hot))


def compute_metrics(logits: Any, labels: Any) -> Any:
    """Return metrics, averaged over devices."""
    metrics = {
        "loss": cross_entropy_loss(logits, labels),
        "accuracy": jnp.mean(jnp.argmax(logits, -1) == labels),
    }
    return jax.lax.pmean(metrics, axis_name="batch")


def create_train_state(rng: Any, learning_rate: float, *, half: bool = False) -> TrainState:
    """Return the first state; with a dynamic scale where ``half``."""
    model = ResNet(CLASSES)
    variables = jax.jit(model.init)({"params": rng}, jnp.ones((1, 4, 4, 1)))
    return TrainState.create(
        apply_fn=model.apply,
        params=variables["params"],
        tx=optax.sgd(learning_rate, momentum=0.9, nesterov=True),
        batch_stats=variables["batch_stats"],
        dynamic_scale=dynamic_scale_lib.DynamicScale() if half else None,
    )


def imagenet_step(state: TrainState, batch: Any) -> Any:
    """Perform a single training step."""

    def loss_fn(params: Any) -> Any:
        logits, new_model_state = state.apply_fn(
            {"params": params, "batch_stats": state.batch_stats},
            batch["image"],
            mutable=["batch_stats"],
        )
        loss = cross_entropy_loss(logits, batch["label"])
        matrices = [leaf for leaf in jax.tree_util.tree_leaves(params) if leaf.ndim > 1]
        penalty = 1e-4 * 0.5 * sum(jnp.sum(leaf**2) for leaf in matrices)
        return loss + penalty, (new_model_state, logits)

    scale = state.dynamic_scale
    if scale:
        grad_fn = scale.value_and_grad(loss_fn, has_aux=True, axis_name="batch")
        scale, is_finite, aux, grads = grad_fn(state.params)
    else:
        grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
        aux, grads = grad_fn(state.params)
        grads = jax.lax.pmean(grads, axis_name="batch")
    new_model_state, logits = aux[1]
    metrics = compute_metrics(logits, batch["label"])
    new = state.apply_gradients(grads=grads, batch_stats=new_model_state["batch_stats"])
    if scale:
        kept = functools.partial(jnp.where, is_finite)
        new = new.replace(
            opt_state=jax.tree_util.tree_map(kept, new.opt_state, state.opt_state),
            params=jax.tree_util.tree_map(kept, new.params, state.params),
            dynamic_scale=scale,
        )
        metrics["scale"] = scale.scale
    return new, metrics


def imagenet_eval(state: TrainState, batch: Any) -> Any:
    """Return the metrics of a batch."""
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    logits = state.apply_fn(variables, batch["image"], train=False, mutable=False)
    return compute_metrics(logits, batch["label"])


# --- The guide, Linen ----------------------------------------------------------------------


class MLP(nn.Module):
    """Dense -> BatchNorm -> relu -> Dense."""

    @nn.compact
    def __call__(self, x: Any, train: bool) -> Any:
        """Return logits, (N, CLASSES)."""
        x = nn.Dense(features=4)(x)
        x = nn.BatchNorm(use_running_average=not train)(x)
        return nn.Dense(features=CLASSES)(nn.relu(x))


class GuideState(train_state.TrainState):
    """Flax's train state with running statistics."""

    batch_stats: Any


def guide_state(rng: Any, learning_rate: float) -> GuideState:
    """Return the first state."""
    mlp = MLP()
    variables = mlp.init(rng, jnp.ones((1, 3)), train=False)
    return GuideState.create(
        apply_fn=mlp.apply,
        params=variables["params"],
        batch_stats=variables["batch_stats"],
        tx=optax.adam(learning_rate),
    )


@jax.jit
def guide_step(state: GuideState, batch: Any) -> Any:
    """Train for a single step."""

    def loss_fn(params: Any) -> Any:
        logits, updates = state.apply_fn(
            {"params": params, "batch_stats": state.batch_stats},
            x=batch["image"],
            train=True,
            mutable=["batch_stats"],
        )
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
        return losses.mean(), (logits, updates)

    (loss, (logits, updates)), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    state = state.apply_gradients(grads=grads)
    state = state.replace(batch_stats=updates["batch_stats"])
    return state, {"loss": loss, "accuracy": jnp.mean(jnp.argmax(logits, -1) == batch["label"])}


@jax.jit
def guide_eval(state: GuideState, batch: Any) -> Any:
    """Return the state and the metrics of a batch."""
    logits = state.apply_fn(
        {"params": state.params, "batch_stats": state.batch_stats}, x=batch["image"], train=False
    )
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()
    return state, {"loss": loss, "accuracy": jnp.mean(jnp.argmax(logits, -1) == batch["label"])}


# --- The guide and MNIST, nnx --------------------------------------------------------------

HOLDS_MODEL = "model" not in inspect.signature(nnx.Optimizer.update).parameters  # to flax 0.10


class NnxMLP(nnx.Module):
    """Linear -> BatchNorm -> relu -> Linear."""

    def __init__(self, din: int, *, rngs: nnx.Rngs) -> None:
        """Make the layers for ``din`` features."""
        self.linear1 = nnx.Linear(din, 4, rngs=rngs)
        self.batchnorm = nnx.BatchNorm(4, rngs=rngs)
        self.linear2 = nnx.Linear(4, CLASSES, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        """Return logits, (N, CLASSES)."""
        return self.linear2(nnx.relu(self.batchnorm(self.linear1(x))))


class CNN(nnx.Module):
    """Two convolutions with BatchNorm and dropout, and a classifier."""

    def __init__(self, *, rngs: nnx.Rngs) -> None:
        """Make the layers for images of one channel."""
        self.conv1 = nnx.Conv(1, 2, kernel_size=(3, 3), rngs=rngs)
        self.batch_norm1 = nnx.BatchNorm(2, rngs=rngs)
        self.dropout1 = nnx.Dropout(rate=0.025, rngs=rngs)
        self.conv2 = nnx.Conv(2, 3, kernel_size=(3, 3), rngs=rngs)
        self.batch_norm2 = nnx.BatchNorm(3, rngs=rngs)
        self.avg_pool = functools.partial(nnx.avg_pool, window_shape=(2, 2), strides=(2, 2))
        self.linear = nnx.Linear(3, CLASSES, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        """Return logits, (N, CLASSES)."""
        x = self.avg_pool(nnx.relu(self.batch_norm1(self.dropout1(self.conv1(x)))))
        x = self.avg_pool(nnx.relu(self.batch_norm2(self.conv2(x))))
        return self.linear(x.reshape(x.shape[0], -1))


def loss_fn(model: Any, batch: Any) -> Any:
    """Return the mean cross-entropy and the logits."""
    logits = model(batch["image"])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
    return losses.mean(), logits


def update(model: Any, optimizer: Any, grads: Any) -> None:
    """Call the optimizer as this release of Flax requires."""
    optimizer.update(*([grads] if HOLDS_MODEL else [model, grads]))


def make_mlp(din: int, rngs: nnx.Rngs, learning_rate: float) -> Any:
    """Return the model and its optimizer."""
    model = NnxMLP(din, rngs=rngs)
    return model, nnx.Optimizer(model, optax.adam(learning_rate), wrt=nnx.Param)


@nnx.jit
def nnx_guide_step(model: NnxMLP, optimizer: nnx.Optimizer, batch: Any) -> Any:
    """Train for a single step."""
    model.train()
    (loss, _), grads = nnx.value_and_grad(loss_fn, has_aux=True)(model, batch)
    update(model, optimizer, grads)
    return loss


@nnx.jit
def nnx_guide_eval(model: NnxMLP, batch: Any) -> Any:
    """Return the loss of a batch."""
    model.eval()
    return loss_fn(model, batch)[0]


def make_cnn(rngs: nnx.Rngs, learning_rate: float = 0.005) -> Any:
    """Return the model, its optimizer and the metrics."""
    model = CNN(rngs=rngs)
    optimizer = nnx.Optimizer(model, optax.adamw(learning_rate, 0.9), wrt=nnx.Param)
    metrics = nnx.MultiMetric(accuracy=nnx.metrics.Accuracy(), loss=nnx.metrics.Average("loss"))
    return model, optimizer, metrics


@nnx.jit
def mnist_step(model: CNN, optimizer: nnx.Optimizer, metrics: nnx.MultiMetric, batch: Any) -> None:
    """Train for a single step."""
    (loss, logits), grads = nnx.value_and_grad(loss_fn, has_aux=True)(model, batch)
    metrics.update(loss=loss, logits=logits, labels=batch["label"])
    update(model, optimizer, grads)


@nnx.jit
def mnist_eval(model: CNN, metrics: nnx.MultiMetric, batch: Any) -> None:
    """Add a batch to the metrics."""
    loss, logits = loss_fn(model, batch)
    metrics.update(loss=loss, logits=logits, labels=batch["label"])
