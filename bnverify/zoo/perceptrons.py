"""Multilayer perceptrons: the model of every introduction, and the control without statistics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
from flax import nnx

import bnverify


class Mlp(nn.Module):
    """Dense -> BatchNorm -> ReLU for each width, then Dense(1): x (N, D) -> (N, 1).

    Attributes:
        widths: of the hidden layers.
        axis_name: over which BatchNorm synchronises; None: not at all.
        fast_variance: whether BatchNorm takes E[h^2] - E[h]^2.
        dtype: of the arithmetic; None: that of the input.
    """

    widths: Sequence[int] = (8,)
    axis_name: str | None = None
    fast_variance: bool = True
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Any, train: bool) -> Any:
        """Return the predictions."""
        for width in self.widths:
            x = nn.Dense(width, dtype=self.dtype)(x)
            x = nn.BatchNorm(
                use_running_average=not train,
                axis_name=self.axis_name,
                use_fast_variance=self.fast_variance,
                dtype=self.dtype,
            )(x)
            x = nn.relu(x)
        return nn.Dense(1, dtype=self.dtype)(x)


class NnxMlp(nnx.Module):
    """Linear -> BatchNorm -> ReLU -> Linear(1) in nnx: x (N, D) -> (N, 1).

    Args:
        din: D.
        rngs: of the initial kernels.
        axis_name: see ``Mlp``.
        fast_variance: likewise.
        dtype: likewise.
    """

    def __init__(
        self,
        din: int,
        rngs: nnx.Rngs,
        axis_name: str | None = None,
        fast_variance: bool = True,
        dtype: Any = None,
    ) -> None:
        self.hidden = nnx.Linear(din, 8, dtype=dtype, rngs=rngs)
        self.norm = nnx.BatchNorm(
            8, axis_name=axis_name, use_fast_variance=fast_variance, dtype=dtype, rngs=rngs
        )
        self.out = nnx.Linear(8, 1, dtype=dtype, rngs=rngs)

    def __call__(self, x: Any, mask: Any = None) -> Any:
        """Return the predictions; rows without a mask, (N,), stay out of the statistics."""
        columns = None if mask is None else mask[:, None]
        return self.out(nnx.relu(self.norm(self.hidden(x), mask=columns)))


class LayerNormMlp(nn.Module):
    """Dense -> LayerNorm -> ReLU -> Dense(1), which trains and evaluates alike."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        """Return the predictions, (N, 1)."""
        return nn.Dense(1)(nn.relu(nn.LayerNorm()(nn.Dense(8)(x))))


class NnxLayerNormMlp(nnx.Module):
    """The same in nnx.

    Args:
        din: D.
        rngs: of the initial kernels.
    """

    def __init__(self, din: int, rngs: nnx.Rngs) -> None:
        self.hidden = nnx.Linear(din, 8, rngs=rngs)
        self.norm = nnx.LayerNorm(8, rngs=rngs)
        self.out = nnx.Linear(8, 1, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        """Return the predictions, (N, 1)."""
        return self.out(nnx.relu(self.norm(self.hidden(x))))


def mlp() -> bnverify.Subject:
    """Return two hidden layers in linen."""
    return bnverify.linen(Mlp(widths=(8, 4)), name="zoo:mlp")


def mlp_nnx() -> bnverify.Subject:
    """Return one hidden layer in nnx."""
    return bnverify.nnx(NnxMlp, name="zoo:mlp_nnx")


def mlp_without_statistics() -> bnverify.Subject:
    """Return the control in linen: no law of statistics may have anything to say of it."""
    return bnverify.linen(LayerNormMlp(), name="zoo:mlp_without_statistics")


def mlp_without_statistics_nnx() -> bnverify.Subject:
    """Return the control in nnx."""
    return bnverify.nnx(NnxLayerNormMlp, name="zoo:mlp_without_statistics_nnx")
