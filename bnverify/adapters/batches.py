"""From a case's x (N, D) and y (N,) to the batch that a model takes, and from outputs to a loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def rows(x: Any, y: Any) -> tuple[Any, Any]:
    """Return the case's own arrays: x (N, D) for the model, y (N,) for the loss."""
    return x, y


def classes(y: Any, count: int) -> Any:
    """Return integer labels made from real targets: floor(y) modulo ``count``, (N,) int32.

    Targets that differ by 1 give different labels, so a law that changes y changes the labels.
    """
    return jnp.floor(y).astype(jnp.int32) % count


def mse(outputs: Any, targets: Any) -> Any:
    """Return the mean squared error, a scalar, of (N, 1) or (N,) outputs against (N,) targets.

    Raises:
        ValueError: there is not one output for each target.
    """
    # Sizes are compared, since (N, 1) - (N,) would broadcast to (N, N) without a word.
    predictions = outputs.reshape(-1)
    if predictions.shape != targets.shape:
        raise ValueError(
            f"mse takes one output for each target: got outputs {outputs.shape}, targets "
            f"{targets.shape}; pass loss= for a model that gives anything else"
        )
    return jnp.mean((predictions - targets) ** 2)


def under_axis(axis_name: str | None, function: Callable[[Any], Any], inputs: Any) -> Any:
    """Return ``function(inputs)``, run as the only shard of a mapped axis where one is named."""
    if axis_name is None:
        return function(inputs)
    one = jax.tree_util.tree_map(lambda leaf: leaf[None], inputs)
    out = jax.vmap(function, axis_name=axis_name)(one)
    return jax.tree_util.tree_map(lambda leaf: leaf[0], out)


def image_and_label(x: Any, y: Any) -> dict[str, Any]:
    """Return the batch that Flax's own examples take: {"image": x, "label": y}."""
    return {"image": x, "label": y}
