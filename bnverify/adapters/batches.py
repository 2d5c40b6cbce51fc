"""Making a model's batch from x (N, D) and y (N,), and a loss from its outputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def rows(x: Any, y: Any) -> tuple[Any, Any]:
    """Return (x, y) unchanged: inputs (N, D) and targets (N,)."""
    return x, y


def classes(y: Any, count: int) -> Any:
    """Return integer labels for real targets: floor(y) modulo ``count``, (N,) int32.

    Targets that differ by 1 have different labels, so laws that change y also change the labels.
    """
    return jnp.floor(y).astype(jnp.int32) % count


def mse(outputs: Any, targets: Any) -> Any:
    """Return the mean squared error, a scalar, of outputs (N, 1) or (N,) against targets (N,).

    Raises:
        ValueError: there is not one output for each target.
    """
    # Shapes are checked because (N, 1) - (N,) would silently broadcast to (N, N).
    predictions = outputs.reshape(-1)
    if predictions.shape != targets.shape:
        raise ValueError(
            f"mse needs one output for each target: got outputs {outputs.shape}, targets "
            f"{targets.shape}; pass loss= for a model with other outputs"
        )
    return jnp.mean((predictions - targets) ** 2)


def under_axis(axis_name: str | None, function: Callable[[Any], Any], inputs: Any) -> Any:
    """Return ``function(inputs)``, run as the only shard of a mapped axis if ``axis_name`` is given."""
    if axis_name is None:
        return function(inputs)
    one = jax.tree_util.tree_map(lambda leaf: leaf[None], inputs)
    out = jax.vmap(function, axis_name=axis_name)(one)
    return jax.tree_util.tree_map(lambda leaf: leaf[0], out)


def image_and_label(x: Any, y: Any) -> dict[str, Any]:
    """Return the batch of Flax's own examples: {"image": x, "label": y}."""
    return {"image": x, "label": y}
