"""An exponential moving average of the params, kept in the train state beside them.

Evaluation reads the average, with the running statistics of the params that are trained: what
most repositories do, and what is right only as long as both move slowly.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax.training import train_state

import bnverify
from bnverify.zoo.perceptrons import Mlp


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


def averaged_params() -> bnverify.Subject:
    """Return the loop, as it is."""
    return bnverify.train_state(create, train_step, eval_step, name="zoo:averaged_params")
