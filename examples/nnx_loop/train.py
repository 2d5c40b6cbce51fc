"""A classifier with BatchNorm in nnx: the model, steps that change it in place, a training script."""

from __future__ import annotations

import inspect
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

CLASSES = 3
# Up to flax 0.10 the optimizer holds the model; from 0.11 on, update takes it as an argument.
HOLDS_MODEL = "model" not in inspect.signature(nnx.Optimizer.update).parameters


class Classifier(nnx.Module):
    """One hidden layer with BatchNorm: x (N, D) -> logits (N, CLASSES)."""

    def __init__(self, din: int, *, rngs: nnx.Rngs) -> None:
        """Make the layers."""
        self.first = nnx.Linear(din, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, momentum=0.9, rngs=rngs)
        self.last = nnx.Linear(8, CLASSES, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        """Return the logits."""
        return self.last(nnx.relu(self.norm(self.first(x))))


def make(din: int, rngs: nnx.Rngs, lr: float = 1e-2) -> tuple[Classifier, nnx.Optimizer]:
    """Return the model and its optimizer."""
    model = Classifier(din, rngs=rngs)
    return model, nnx.Optimizer(model, optax.adam(lr), wrt=nnx.Param)


def loss_fn(model: Classifier, batch: dict[str, Any]) -> Any:
    """Return the mean cross-entropy."""
    logits = model(batch["x"])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()


@nnx.jit
def train_step(model: Classifier, optimizer: nnx.Optimizer, batch: dict[str, Any]) -> Any:
    """Update the model and the optimizer in place; return the loss before the update."""
    model.train()
    loss, grads = nnx.value_and_grad(loss_fn)(model, batch)
    if HOLDS_MODEL:
        optimizer.update(grads)
    else:
        optimizer.update(model, grads)
    return loss


@nnx.jit
def eval_step(model: Classifier, batch: dict[str, Any]) -> Any:
    """Return the loss in eval mode."""
    model.eval()
    # model.train()  # the mistake: evaluation in train mode  # noqa: ERA001
    return loss_fn(model, batch)


def main(steps: int = 200) -> None:
    """Train on a small problem and print the losses."""
    x = jax.random.normal(jax.random.key(0), (256, 4))
    batch = {"x": x, "label": jnp.argmax(x[:, :CLASSES] + x[:, 1:], axis=-1)}
    model, optimizer = make(4, nnx.Rngs(0))
    for step in range(steps + 1):
        loss = train_step(model, optimizer, batch)
        if step % 100 == 0:
            held = eval_step(model, batch)
            print(f"step {step}: training loss {loss:.4f}, in eval mode {held:.4f}")


if __name__ == "__main__":
    main()
