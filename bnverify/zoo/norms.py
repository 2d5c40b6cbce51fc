"""BatchNorm with each of its options."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

import bnverify
from bnverify.zoo.perceptrons import Mlp, NnxMlp

PADDING = 3


def padded(x: Any, y: Any) -> tuple[Any, Any]:
    """Return a batch with rows of zeros at its end, and where its own rows are.

    Args:
        x: (N, D).
        y: (N,).

    Returns:
        ((x, mask), (y, mask)), all of N + PADDING rows.
    """
    mask = jnp.concatenate([jnp.ones_like(y, bool), jnp.zeros(PADDING, bool)])
    x = jnp.concatenate([x, jnp.zeros((PADDING, x.shape[1]), x.dtype)])
    y = jnp.concatenate([y, jnp.zeros(PADDING, y.dtype)])
    return (x, mask), (y, mask)


def masked_mse(outputs: Any, targets: Any) -> Any:
    """Return the mean squared error of the rows that are no padding.

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
        """Return the predictions; rows without a mask stay out of the statistics."""
        x = nn.Dense(8)(x)
        x = nn.BatchNorm(use_running_average=not train)(x, mask=mask[:, None])
        return nn.Dense(1)(nn.relu(x))


def slow_variance() -> bnverify.Subject:
    """Return BatchNorm with the variance in two passes, in linen."""
    return bnverify.linen(Mlp(fast_variance=False), name="zoo:slow_variance")


def slow_variance_nnx() -> bnverify.Subject:
    """Return the same in nnx."""
    return bnverify.nnx(_sized(fast_variance=False), name="zoo:slow_variance_nnx")


def masked() -> bnverify.Subject:
    """Return a padded batch whose padding is masked, in linen."""
    return bnverify.linen(MaskedMlp(), batch=padded, loss=masked_mse, name="zoo:masked")


def masked_nnx() -> bnverify.Subject:
    """Return the same in nnx."""
    return bnverify.nnx(NnxMlp, batch=padded, loss=masked_mse, name="zoo:masked_nnx")


def synchronised() -> bnverify.Subject:
    """Return BatchNorm with statistics shared along a mapped axis, in linen."""
    return bnverify.linen(Mlp(axis_name="batch"), axis_name="batch", name="zoo:synchronised")


def synchronised_nnx() -> bnverify.Subject:
    """Return the same in nnx."""
    make = _sized(axis_name="batch")
    return bnverify.nnx(make, axis_name="batch", name="zoo:synchronised_nnx")


def bfloat16() -> bnverify.Subject:
    """Return arithmetic in bfloat16 around float32 params and statistics, in linen."""
    return bnverify.linen(Mlp(dtype=jnp.bfloat16), name="zoo:bfloat16")


def bfloat16_nnx() -> bnverify.Subject:
    """Return the same in nnx."""
    return bnverify.nnx(_sized(dtype=jnp.bfloat16), name="zoo:bfloat16_nnx")


def float16() -> bnverify.Subject:
    """Return arithmetic in float16 around float32 params and statistics, in linen."""
    return bnverify.linen(Mlp(dtype=jnp.float16), name="zoo:float16")


def float16_nnx() -> bnverify.Subject:
    """Return the same in nnx."""
    return bnverify.nnx(_sized(dtype=jnp.float16), name="zoo:float16_nnx")


def _sized(**options: Any) -> Any:
    return lambda din, rngs: NnxMlp(din, rngs, **options)
