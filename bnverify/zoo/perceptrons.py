"""Multilayer perceptrons with the options of BatchNorm and with many optimizers."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import nnx
from flax.training import train_state

import bnverify
from bnverify.zoo import subjects


class Mlp(nn.Module):
    """Dense -> BatchNorm -> ReLU for each width, then Dense(1): x (N, D) -> (N, 1).

    Attributes:
        widths: the widths of the hidden layers.
        axis_name: the mapped axis over which BatchNorm synchronises; None: it does not.
        fast_variance: whether BatchNorm computes E[h^2] - E[h]^2.
        dtype: the dtype of the computation; None: that of the input.
    """

    widths: Sequence[int] = (8,)
    axis_name: str | None = None
    fast_variance: bool = True
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Any, train: bool) -> Any:
        """Return the predictions."""
        for width in self.widths:
            x = nn.Dense(width, dtype=self.dtype)(x)
            x = nn.BatchNorm(
                use_running_average=not train,
                axis_name=self.axis_name,
                use_fast_variance=self.fast_variance,
                dtype=self.dtype,
            )(x)
            x = nn.relu(x)
        return nn.Dense(1, dtype=self.dtype)(x)


class NnxMlp(nnx.Module):
    """Linear -> BatchNorm -> ReLU -> Linear(1) in nnx: x (N, D) -> (N, 1).

    Args:
        din: D.
        rngs: of the initial kernels.
        axis_name: see ``Mlp``.
        fast_variance: see ``Mlp``.
        dtype: see ``Mlp``.
    """

    def __init__(
        self,
        din: int,
        rngs: nnx.Rngs,
        axis_name: str | None = None,
        fast_variance: bool = True,
        dtype: Any = None,
    ) -> None:
        self.hidden = nnx.Linear(din, 8, dtype=dtype, rngs=rngs)
        self.norm = nnx.BatchNorm(
            8, axis_name=axis_name, use_fast_variance=fast_variance, dtype=dtype, rngs=rngs
        )
        self.out = nnx.Linear(8, 1, dtype=dtype, rngs=rngs)

    def __call__(self, x: Any, mask: Any = None) -> Any:
        """Return the predictions; rows where ``mask``, (N,), is False are not in the statistics."""
        columns = None if mask is None else mask[:, None]
        return self.out(nnx.relu(self.norm(self.hidden(x), mask=columns)))


class LayerNormMlp(nn.Module):
    """Dense -> LayerNorm -> ReLU -> Dense(1), the same in training and evaluation."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        """Return the predictions, (N, 1)."""
        return nn.Dense(1)(nn.relu(nn.LayerNorm()(nn.Dense(8)(x))))


class NnxLayerNormMlp(nnx.Module):
    """The same in nnx.

    Args:
        din: D.
        rngs: of the initial kernels.
    """

    def __init__(self, din: int, rngs: nnx.Rngs) -> None:
        self.hidden = nnx.Linear(din, 8, rngs=rngs)
        self.norm = nnx.LayerNorm(8, rngs=rngs)
        self.out = nnx.Linear(8, 1, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        """Return the predictions, (N, 1)."""
        return self.out(nnx.relu(self.norm(self.hidden(x))))


subjects.linen("mlp", "Two hidden layers.", Mlp(widths=(8, 4)))
subjects.nnx("mlp", "One hidden layer.", NnxMlp)
CONTROL = "An MLP with LayerNorm, to which no law about statistics applies."
subjects.linen("mlp_without_statistics", CONTROL, LayerNormMlp())
subjects.nnx("mlp_without_statistics", CONTROL, NnxLayerNormMlp)


# The options of BatchNorm.

PADDING = 3


def padded(x: Any, y: Any) -> tuple[Any, Any]:
    """Return a batch padded with rows of zeros, and the mask of its own rows.

    Args:
        x: (N, D).
        y: (N,).

    Returns:
        ((x, mask), (y, mask)), each with N + PADDING rows.
    """
    mask = jnp.concatenate([jnp.ones_like(y, bool), jnp.zeros(PADDING, bool)])
    x = jnp.concatenate([x, jnp.zeros((PADDING, x.shape[1]), x.dtype)])
    y = jnp.concatenate([y, jnp.zeros(PADDING, y.dtype)])
    return (x, mask), (y, mask)


def masked_mse(outputs: Any, targets: Any) -> Any:
    """Return the mean squared error of the unmasked rows.

    Args:
        outputs: (N, 1).
        targets: (y, mask), both (N,).
    """
    y, mask = targets
    return jnp.mean((outputs[:, 0] - y) ** 2, where=mask)


class MaskedMlp(nn.Module):
    """An MLP for padded batches: x (N, D), mask (N,) -> (N, 1)."""

    @nn.compact
    def __call__(self, x: Any, mask: Any, train: bool) -> Any:
        """Return the predictions; rows where ``mask`` is False are not in the statistics."""
        x = nn.Dense(8)(x)
        x = nn.BatchNorm(use_running_average=not train)(x, mask=mask[:, None])
        return nn.Dense(1)(nn.relu(x))


def with_option(
    name: str, sentence: str, adapter: dict[str, Any] | None = None, **option: Any
) -> None:
    """Add the MLP whose BatchNorm has an option, in linen and in nnx."""
    subjects.linen(name, sentence, Mlp(**option), **(adapter or {}))
    subjects.nnx(name, sentence, lambda din, rngs: NnxMlp(din, rngs, **option), **(adapter or {}))


with_option("slow_variance", "The variance in two passes.", fast_variance=False)
with_option(
    "synchronised",
    "Statistics shared along a mapped axis.",
    adapter={"axis_name": "batch"},
    axis_name="batch",
)
with_option(
    "bfloat16", "Computation in bfloat16 with float32 params and statistics.", dtype=jnp.bfloat16
)
with_option(
    "float16", "Computation in float16 with float32 params and statistics.", dtype=jnp.float16
)
MASKED = "A padded batch whose padding is masked."
subjects.linen("masked", MASKED, MaskedMlp(), batch=padded, loss=masked_mse)
subjects.nnx("masked", MASKED, NnxMlp, batch=padded, loss=masked_mse)


# Optimizers other than plain SGD.


def kernels(params: Any) -> Any:
    """Return a tree of bools: whether each param is a kernel, for weight decay."""
    return jax.tree_util.tree_map(lambda leaf: leaf.ndim > 1, params)


def around(name: str, sentence: str, optimizer: Any) -> None:
    """Add the MLP with an optimizer, a function of the learning rate."""
    subjects.linen(name, sentence, Mlp(), optimizer=optimizer)


around("momentum", "SGD with momentum.", lambda lr: optax.sgd(lr, momentum=0.9))
around(
    "nesterov",
    "SGD with Nesterov's momentum.",
    lambda lr: optax.sgd(lr, momentum=0.9, nesterov=True),
)
around("adam", "Adam.", optax.adam)
around(
    "adamw",
    "AdamW that decays only the kernels.",
    lambda lr: optax.adamw(lr, weight_decay=1e-2, mask=kernels),
)
around("lion", "Lion, whose update is a sign.", optax.lion)
around("rmsprop", "RMSprop.", optax.rmsprop)
around(
    "adafactor",
    "Adafactor with factored second moments even for small kernels.",
    lambda lr: optax.adafactor(lr, min_dim_size_to_factor=2),
)
around(
    "masked_decay",
    "SGD with weight decay masked to the kernels.",
    lambda lr: optax.chain(optax.masked(optax.add_decayed_weights(1e-2), kernels), optax.sgd(lr)),
)
around(
    "multi_transform",
    "Adam for the kernels and SGD for everything else.",
    lambda lr: optax.multi_transform({True: optax.adam(lr), False: optax.sgd(lr)}, kernels),
)
around(
    "multi_steps",
    "SGD with gradient accumulation over two steps.",
    lambda lr: optax.MultiSteps(optax.sgd(lr), 2).gradient_transformation(),
)
around(
    "clipped",
    "SGD on gradients clipped to a global norm of 1.",
    lambda lr: optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(lr)),
)
around(
    "injected",
    "SGD with its learning rate in the state, by optax.inject_hyperparams.",
    lambda lr: optax.inject_hyperparams(optax.sgd)(learning_rate=lr),
)


# An exponential moving average of the params in the train state. Evaluation uses the average with the running
# statistics of the trained params, as most repositories do; this is right only while both change slowly.


class TrainState(train_state.TrainState):
    """Flax's train state with the running statistics and the averaged params."""

    batch_stats: Any
    averaged: Any


def create(rng: Any, inputs: Any, lr: float = 1e-2) -> Any:
    """Return the state before the first step."""
    model = Mlp()
    variables = model.init(rng, inputs, train=False)
    return TrainState.create(  # type: ignore[no-untyped-call]
        apply_fn=model.apply,
        params=variables["params"],
        batch_stats=variables["batch_stats"],
        averaged=variables["params"],
        tx=optax.adam(lr),
    )


def train_step(state: Any, batch: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Return the next state, and the loss of this batch."""

    def loss_fn(params: Any) -> Any:
        out, updates = state.apply_fn(
            {"params": params, "batch_stats": state.batch_stats},
            batch["image"],
            train=True,
            mutable=["batch_stats"],
        )
        return jnp.mean((out[:, 0] - batch["label"]) ** 2), updates["batch_stats"]

    (loss, batch_stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    state = state.apply_gradients(grads=grads, batch_stats=batch_stats)
    averaged = optax.incremental_update(state.params, state.averaged, 0.01)
    return state.replace(averaged=averaged), {"loss": loss}


def eval_step(state: Any, batch: dict[str, Any]) -> dict[str, Any]:
    """Return the loss of the averaged params."""
    variables = {"params": state.averaged, "batch_stats": state.batch_stats}
    out = state.apply_fn(variables, batch["image"], train=False)
    return {"loss": jnp.mean((out[:, 0] - batch["label"]) ** 2)}


subjects.enter(
    "averaged_params",
    "A loop that evaluates an average of its params.",
    partial(bnverify.train_state, create, train_step, eval_step),
)
