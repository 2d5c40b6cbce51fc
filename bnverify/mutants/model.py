"""The linen modules behind the canonical step; the only module here that loads flax."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp


class Model(nn.Module):
    """The model of a :class:`bnverify.mutants.canonical.CanonicalStep`: x (N, D) -> (N, 1)."""

    parts: Any

    @nn.compact
    def __call__(self, x: Any, train: bool, weights: Any = None) -> Any:
        """Return the predictions; rows whose weight is zero stay out of the statistics."""
        parts = self.parts
        for layer in range(parts.layers):
            x = nn.Dense(parts.hidden, use_bias=parts.bias, name=f"Dense_{layer}")(x)
            if not self.is_initializing():  # or the capture would become a variable
                self.sow("layer_inputs", f"input_{layer}", x)
            x = parts.activate(parts.normalise(x, train, layer, weights))
        return nn.Dense(1, name=f"Dense_{parts.layers}")(x)


class Norm(nn.Module):
    """A normalisation over axis 0, every part of it replaceable."""

    parts: Any
    layer: int

    @nn.compact
    def __call__(self, h: Any, train: bool) -> Any:
        """Return h normalised; in training, record its moments."""
        parts, layer, shape = self.parts, self.layer, h.shape[-1:]
        mean = self.variable("batch_stats", "mean", jnp.zeros, shape, jnp.float32)
        var = self.variable("batch_stats", "var", jnp.ones, shape, jnp.float32)
        affine = (
            self.param("scale", nn.initializers.ones, shape),
            self.param("bias", nn.initializers.zeros, shape),
        )
        running = mean.value, var.value
        if train:
            batch = parts.moments(h, layer)
            new = parts.fold(running, parts.recorded(h, batch, layer), layer)
            moments = parts.training_moments(batch, running, new, layer)
        else:
            new = parts.written_in_eval(running, h, layer)
            moments = parts.evaluation_moments(running, h, layer)
        if not self.is_initializing():
            mean.value, var.value = new
        return parts.standardise(h, moments, affine, train, layer)


def flax_norm(parts: Any, h: Any, train: bool, layer: int, weights: Any) -> Any:
    """Return Flax's own BatchNorm with the settings of ``parts``, applied to h (N, channels)."""
    norm = nn.BatchNorm(
        use_running_average=not train,
        momentum=parts.momentum,
        epsilon=parts.epsilon,
        use_fast_variance=parts.fast_variance,
        name=f"BatchNorm_{layer}",
    )
    # Without a mask the argument stays away: not every supported release takes None alike.
    return norm(h) if weights is None else norm(h, mask=weights[:, None] > 0)


def flax_layer_norm(parts: Any, h: Any, layer: int) -> Any:
    """Return Flax's LayerNorm, which keeps no statistics, applied to h."""
    return nn.LayerNorm(epsilon=parts.epsilon, name=f"LayerNorm_{layer}")(h)
