"""A regression with BatchNorm in linen: the model, the loss and a training script."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

LEARNING_RATE = 1e-2


class Regressor(nn.Module):
    """Two hidden layers with BatchNorm and dropout: x (N, D) -> predictions (N, 1)."""

    hidden: int = 8

    @nn.compact
    def __call__(self, x: Any, train: bool) -> Any:
        """Return the predictions."""
        for _ in range(2):
            x = nn.Dense(self.hidden, use_bias=False)(x)  # BatchNorm would cancel a bias
            x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)
            x = nn.relu(x)
        x = nn.Dropout(0.1, deterministic=not train)(x)
        return nn.Dense(1)(x)


def loss(predictions: Any, targets: Any) -> Any:
    """Return the mean squared error of predictions (N, 1) against targets (N,)."""
    error = predictions.squeeze(-1) - targets
    # error = predictions - targets  # the mistake: (N, 1) - (N,) is (N, N)  # noqa: ERA001
    return jnp.mean(error**2)


def main(steps: int = 200) -> None:
    """Train on a small problem and print the losses."""
    key, data, dropout = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(data, (256, 4))
    y = jnp.sin(x[:, 0]) + x[:, 1] * x[:, 2]
    model, tx = Regressor(), optax.adam(LEARNING_RATE)
    variables = model.init(key, x, train=False)
    params, batch_stats = variables["params"], variables["batch_stats"]
    opt_state = tx.init(params)

    @jax.jit
    def train_step(params: Any, batch_stats: Any, opt_state: Any, key: Any) -> Any:
        def loss_fn(params: Any) -> Any:
            out, updated = model.apply(
                {"params": params, "batch_stats": batch_stats},
                x,
                train=True,
                mutable=["batch_stats"],
                rngs={"dropout": key},
            )
            return loss(out, y), updated["batch_stats"]

        (value, batch_stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), batch_stats, opt_state, value

    for step in range(steps + 1):
        dropout, now = jax.random.split(dropout)
        params, batch_stats, opt_state, value = train_step(params, batch_stats, opt_state, now)
        if step % 100 == 0:
            print(f"step {step}: training loss {value:.4f}")


if __name__ == "__main__":
    main()
