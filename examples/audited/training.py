"""A user's training code: a small model with BatchNorm, its step and its evaluation."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax.training import train_state


class TrainState(train_state.TrainState):
    """Flax's TrainState with running statistics."""

    batch_stats: Any


class Model(nn.Module):
    """Two Dense layers with BatchNorm in between."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Return predictions (N, 1)."""
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(nn.Dense(8)(x)))
        return nn.Dense(1)(x)


def create(seed: int, features: int) -> TrainState:
    """Return the initial state."""
    model = Model()
    variables = model.init(jax.random.PRNGKey(seed), jnp.zeros((1, features)), train=False)
    return TrainState.create(
        apply_fn=model.apply,
        params=variables["params"],
        tx=optax.sgd(0.05, momentum=0.9),
        batch_stats=variables["batch_stats"],
    )


@jax.jit
def train_step(state: TrainState, x: jax.Array, y: jax.Array) -> tuple[TrainState, jax.Array]:
    """Take one step of gradient descent."""

    def loss_fn(params: Any) -> tuple[jax.Array, Any]:
        out, updated = state.apply_fn(
            {"params": params, "batch_stats": state.batch_stats},
            x,
            train=True,
            mutable=["batch_stats"],
        )
        return jnp.mean((out[:, 0] - y) ** 2), updated["batch_stats"]

    (loss, batch_stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    return state.apply_gradients(grads=grads, batch_stats=batch_stats), loss


@jax.jit
def evaluate(state: TrainState, x: jax.Array, y: jax.Array) -> jax.Array:
    """Return the mean squared error in eval mode."""
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    out = state.apply_fn(variables, x, train=False)
    return jnp.mean((out[:, 0] - y) ** 2)
