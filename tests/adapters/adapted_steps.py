"""Shared by the tests of adapters: a batch, a compiled step, a small nnx model."""

from typing import Any

import jax
import numpy as np
from flax import nnx as flax_nnx

from bnverify.model import Case, State, Subject

CASE = Case.of(
    3, np.linspace(-2, 2, 15, dtype=np.float32).reshape(5, 3) ** 3, [1.0, -2.0, 0.5, 3.0, 0.0], 0.1
)


def one_step(subject: Subject, case: Case = CASE) -> tuple[State, State, Any]:
    """Return the state before and after a compiled step, and its info."""
    before = jax.jit(subject.init)(case.seed, case.x)
    after, info = jax.jit(subject.step)(before, case.x, case.y, case.lr)
    return before, after, info


class NnxModel(flax_nnx.Module):
    """Linear -> BatchNorm -> ReLU -> Linear(1), as the reference."""

    def __init__(self, din: int, rngs: Any) -> None:
        self.first = flax_nnx.Linear(din, 8, rngs=rngs)
        self.norm = flax_nnx.BatchNorm(8, rngs=rngs)
        self.last = flax_nnx.Linear(8, 1, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return self.last(flax_nnx.relu(self.norm(self.first(x))))
