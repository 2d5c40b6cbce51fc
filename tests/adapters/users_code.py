"""Training code as people publish it, shared by the tests of loops."""

from __future__ import annotations

from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax.training import train_state


class Model(nn.Module):
    """Dense -> BatchNorm -> tanh -> Dense."""

    out: int = 1

    @nn.compact
    def __call__(self, x: Any, train: bool) -> Any:
        """Return (N, out)."""
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(nn.Dense(3)(x))
        return nn.Dense(self.out)(jnp.tanh(x))


class TrainState(train_state.TrainState):
    """Flax's train state with running statistics."""

    batch_stats: Any


def mse(out: Any, y: Any) -> Any:
    """Return the mean squared error of (N, 1) against (N,)."""
    return jnp.mean((out[:, 0] - y) ** 2)


def variables(rng: Any, *, model: nn.Module | None = None, width: int = 3) -> Any:
    """Return a model's initial variables."""
    return (model or Model()).init(rng, jnp.ones((1, width)), train=False)


def create(rng: Any, lr: float, *, model: nn.Module | None = None, width: int = 3) -> TrainState:
    """Return a train state around plain SGD."""
    made = variables(rng, model=model, width=width)
    return TrainState.create(apply_fn=(model or Model()).apply, tx=optax.sgd(lr), **made)


def run(state: Any, params: Any, stats: Any, x: Any) -> tuple[Any, Any]:
    """Return the outputs of a training pass, and the new statistics."""
    given = {"params": params, "batch_stats": stats}
    out, new = state.apply_fn(given, x, train=True, mutable=["batch_stats"])
    return out, new["batch_stats"]


def loss_fn(state: TrainState, batch: Any) -> Any:
    """Return the training loss, a function of params, with the new statistics."""

    def loss(params: Any) -> Any:
        out, stats = run(state, params, state.batch_stats, batch["image"])
        return mse(out, batch["label"]), stats

    return loss


def train_step(state: TrainState, batch: Any) -> Any:
    """Take one step."""
    (loss, stats), grads = jax.value_and_grad(loss_fn(state, batch), has_aux=True)(state.params)
    return state.apply_gradients(grads=grads, batch_stats=stats), {"loss": loss}


def predicted(state: TrainState, x: Any) -> Any:
    """Return the outputs in eval mode."""
    return state.apply_fn(
        {"params": state.params, "batch_stats": state.batch_stats}, x, train=False
    )


def eval_step(state: TrainState, batch: Any) -> Any:
    """Return the loss in eval mode."""
    return {"loss": mse(predicted(state, batch["image"]), batch["label"])}


@flax.struct.dataclass
class Own:
    """A user-defined state with params and statistics in one field."""

    step: int
    variables: Any
    opt_state: Any


TX = optax.adam(1e-3)


def create_own(rng: Any) -> Own:
    """Return a user-defined state."""
    made = variables(rng)
    return Own(0, made, TX.init(made["params"]))


def own_step(state: Own, batch: Any) -> Any:
    """Take one step on a user-defined state, with a global optimizer."""

    def loss(params: Any) -> Any:
        given = {**state.variables, "params": params}
        out, new = Model().apply(given, batch["image"], train=True, mutable=["batch_stats"])
        return mse(out, batch["label"]), new

    params = state.variables["params"]
    (value, new), grads = jax.value_and_grad(loss, has_aux=True)(params)
    updates, opt_state = TX.update(grads, state.opt_state, params)
    params = optax.apply_updates(params, updates)
    state = state.replace(step=state.step + 1, variables={"params": params, **new})  # type: ignore[attr-defined]
    return state.replace(opt_state=opt_state), {"loss": value}


def own_eval(state: Own, batch: Any) -> Any:
    """Return the loss in eval mode."""
    return {
        "loss": mse(Model().apply(state.variables, batch["image"], train=False), batch["label"])
    }
