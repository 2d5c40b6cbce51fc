"""An image classifier with Flax's TrainState: the model, the steps and a training script."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax.training import train_state

SIZE = 4  # images are SIZE x SIZE x 1
CLASSES = 3


class Net(nn.Module):
    """A convolution with BatchNorm, then a linear layer."""

    @nn.compact
    def __call__(self, x: Any, train: bool) -> Any:
        """Return logits (N, CLASSES) for images (N, SIZE, SIZE, 1)."""
        x = nn.Conv(8, (3, 3), use_bias=False)(x)
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)
        x = nn.relu(x).mean((1, 2))
        return nn.Dense(CLASSES)(x)


class TrainState(train_state.TrainState):
    """Flax's TrainState with running statistics."""

    batch_stats: Any


def create(rng: Any, lr: float = 1e-2) -> TrainState:
    """Return the initial state."""
    model = Net()
    variables = model.init(rng, jnp.ones((1, SIZE, SIZE, 1)), train=False)
    return TrainState.create(
        apply_fn=model.apply,
        params=variables["params"],
        batch_stats=variables["batch_stats"],
        tx=optax.sgd(lr, momentum=0.9),
    )


def cross_entropy(logits: Any, labels: Any) -> Any:
    """Return the mean cross-entropy."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


@jax.jit
def train_step(state: TrainState, batch: dict[str, Any]) -> tuple[TrainState, dict[str, Any]]:
    """Return the new state and the metrics of the batch."""

    def loss_fn(params: Any) -> Any:
        logits, updates = state.apply_fn(
            {"params": params, "batch_stats": state.batch_stats},
            batch["image"],
            train=True,
            mutable=["batch_stats"],
        )
        return cross_entropy(logits, batch["label"]), (logits, updates)

    (loss, (logits, updates)), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    state = state.apply_gradients(grads=grads)
    state = state.replace(batch_stats=updates["batch_stats"])
    # state.replace(batch_stats=updates["batch_stats"])  # the mistake: no new state  # noqa: ERA001
    return state, {"loss": loss, "accuracy": jnp.mean(logits.argmax(-1) == batch["label"])}


@jax.jit
def eval_step(state: TrainState, batch: dict[str, Any]) -> dict[str, Any]:
    """Return the metrics in eval mode."""
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    logits = state.apply_fn(variables, batch["image"], train=False)
    return {"loss": cross_entropy(logits, batch["label"])}


def main(steps: int = 200) -> None:
    """Train on a small problem and print the losses."""
    image = jax.random.normal(jax.random.key(0), (256, SIZE, SIZE, 1))
    batch = {"image": image, "label": (image.mean((1, 2, 3)) > 0).astype(jnp.int32)}
    state = create(jax.random.key(1))
    for step in range(steps + 1):
        state, metrics = train_step(state, batch)
        if step % 100 == 0:
            held = eval_step(state, batch)
            print(f"step {step}: loss {metrics['loss']:.4f}, in eval mode {held['loss']:.4f}")


if __name__ == "__main__":
    main()
