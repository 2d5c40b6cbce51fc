"""The models that benchmarks/compatibility.py compares between releases: one linen, one nnx."""

from __future__ import annotations

from typing import Any

import bnverify


def linen() -> bnverify.Subject:
    """Return a linen model: Dense, BatchNorm with its defaults, ReLU, Dense."""
    import flax.linen as nn

    from bnverify.adapters.canonical import linen as adapt

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x: Any, train: bool) -> Any:
            x = nn.Dense(8)(x)
            x = nn.BatchNorm(use_running_average=not train)(x)
            return nn.Dense(1)(nn.relu(x))

    return adapt(Model())


def nnx() -> bnverify.Subject:
    """Return an nnx model: Linear, BatchNorm with its defaults, ReLU, Linear."""
    from flax import nnx as nn

    from bnverify.adapters.canonical import nnx as adapt

    class Model(nn.Module):  # type: ignore[misc] # flax before 0.10 has no types for it
        def __init__(self, rngs: Any) -> None:
            self.first = nn.Linear(3, 8, rngs=rngs)
            self.norm = nn.BatchNorm(8, rngs=rngs)
            self.last = nn.Linear(8, 1, rngs=rngs)

        def __call__(self, x: Any) -> Any:
            return self.last(nn.relu(self.norm(self.first(x))))

    return adapt(Model, features=3)
