"""The nnx modules behind the nnx faults; imported when a step is made."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from bnverify.adapters.objects import Parts

FILTERS = (nnx.Param, nnx.BatchStat, ...)


class Net(nnx.Module):
    """The canonical model in nnx: x (N, D) -> (N, 1)."""

    def __init__(self, features: Any, hidden: int, momentum: float, *, rngs: nnx.Rngs) -> None:
        self.first = nnx.Linear(features, hidden, rngs=rngs)
        self.norm: Any = nnx.BatchNorm(hidden, momentum=momentum, rngs=rngs)
        self.last = nnx.Linear(hidden, 1, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        """Return the predictions."""
        return self.last(jax.nn.relu(self.norm(self.first(x))))


class SharedNorm(Net):
    """One normalisation layer, and one pair of statistics, used at two places."""

    def __call__(self, x: Any) -> Any:
        """Return the predictions."""
        return self.last(jax.nn.relu(self.norm(self.norm(self.first(x)))))


class StatisticsInParams(nnx.Module):
    """A normalisation whose running moments are nnx.Param, which only the optimizer moves."""

    def __init__(self, features: int) -> None:
        self.mean = nnx.Param(jnp.zeros(features))
        self.var = nnx.Param(jnp.ones(features))
        self.scale = nnx.Param(jnp.ones(features))
        self.bias = nnx.Param(jnp.zeros(features))
        self.use_running_average = False

    def __call__(self, h: Any) -> Any:
        """Return h normalised."""
        mean, var = self.mean[...], self.var[...]
        if not self.use_running_average:
            mean, var = jnp.mean(h, axis=0), jnp.var(h, axis=0)
        return (h - mean) * jax.lax.rsqrt(var + 1e-5) * self.scale[...] + self.bias[...]


class NetOfParams(Net):
    """The canonical model around statistics that are params."""

    def __init__(self, features: Any, hidden: int, momentum: float, *, rngs: nnx.Rngs) -> None:
        super().__init__(features, hidden, momentum, rngs=rngs)
        self.norm = StatisticsInParams(hidden)


def parts_of(make: Any, features: Any) -> Parts:
    """Return how a module splits into params, statistics and the rest."""
    return Parts.of(lambda: make(features, jax.random.key(0)), FILTERS)
