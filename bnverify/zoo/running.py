"""Running values that are not BatchNorm's: a metric's mean, online normalisation, power iteration."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from flax import nnx
from jax import lax

import bnverify

MOMENTUM = 0.9


class RunningMean(nn.Module):
    """Tracks the mean of what it is given, as a metric would; hands it on as it is."""

    momentum: float = MOMENTUM

    @nn.compact
    def __call__(self, value: Any, train: bool) -> Any:
        """Return ``value``; fold its mean into the running one in training."""
        mean = self.variable("batch_stats", "mean", jnp.zeros, (), jnp.float32)
        if train and not self.is_initializing():
            mean.value = self.momentum * mean.value + (1 - self.momentum) * jnp.mean(value)
        return value


class Tracked(nn.Module):
    """An MLP with BatchNorm whose mean activation is tracked: x (N, D) -> (N, 1)."""

    @nn.compact
    def __call__(self, x: Any, train: bool) -> Any:
        """Return the predictions."""
        x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=MOMENTUM)(nn.Dense(8)(x)))
        return nn.Dense(1)(RunningMean()(x, train))


class NnxRunningMean(nnx.Module):
    """The same metric in nnx."""

    def __init__(self) -> None:
        self.mean = nnx.BatchStat(jnp.zeros((), jnp.float32))

    def __call__(self, value: Any, *, train: bool) -> Any:
        """Return ``value``; fold its mean into the running one in training."""
        if train:
            # Made anew: how a Variable is written in place changes from release to release.
            self.mean = nnx.BatchStat(MOMENTUM * self.mean + (1 - MOMENTUM) * jnp.mean(value))
        return value


class NnxTracked(nnx.Module):
    """The same MLP in nnx.

    Args:
        din: D.
        rngs: of the initial kernels.
    """

    def __init__(self, din: int, rngs: nnx.Rngs) -> None:
        self.hidden = nnx.Linear(din, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, momentum=MOMENTUM, rngs=rngs)
        self.track = NnxRunningMean()
        self.out = nnx.Linear(8, 1, rngs=rngs)

    def __call__(self, x: Any, train: bool) -> Any:
        """Return the predictions."""
        x = nnx.relu(self.norm(self.hidden(x), use_running_average=not train))
        return self.out(self.track(x, train=train))


class OnlineNorm(nn.Module):
    """Normalises by the running values, in training too; then folds the batch's moments in."""

    @nn.compact
    def __call__(self, x: Any, train: bool) -> Any:
        """Return ``x`` (N, C) normalised over rows."""
        shape = x.shape[-1:]
        mean = self.variable("batch_stats", "mean", jnp.zeros, shape, jnp.float32)
        var = self.variable("batch_stats", "var", jnp.ones, shape, jnp.float32)
        out = (x - mean.value) * lax.rsqrt(var.value + 1e-5)
        if train and not self.is_initializing():
            mean.value = MOMENTUM * mean.value + (1 - MOMENTUM) * jnp.mean(x, 0)
            var.value = MOMENTUM * var.value + (1 - MOMENTUM) * jnp.var(x, 0)
        return out


class OnlineMlp(nn.Module):
    """Dense -> OnlineNorm -> ReLU, twice, then Dense(1): x (N, D) -> (N, 1)."""

    @nn.compact
    def __call__(self, x: Any, train: bool) -> Any:
        """Return the predictions."""
        for width in (8, 4):
            x = nn.relu(OnlineNorm()(nn.Dense(width)(x), train))
        return nn.Dense(1)(x)


class SpectralMlp(nn.Module):
    """An MLP with BatchNorm whose last kernel is divided by its largest singular value."""

    @nn.compact
    def __call__(self, x: Any, train: bool) -> Any:
        """Return the predictions, (N, 1)."""
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(nn.Dense(8)(x)))
        return nn.SpectralNorm(nn.Dense(1))(x, update_stats=train)


def running_mean() -> bnverify.Subject:
    """Return BatchNorm beside a metric's running mean, in linen."""
    return bnverify.linen(Tracked(), name="zoo:running_mean")


def running_mean_nnx() -> bnverify.Subject:
    """Return the same in nnx."""
    return bnverify.nnx(NnxTracked, name="zoo:running_mean_nnx")


def online_norm() -> bnverify.Subject:
    """Return two layers that normalise by their running values, as they say of themselves."""
    return bnverify.linen(OnlineMlp(), online=True, name="zoo:online_norm")


def spectral() -> bnverify.Subject:
    """Return BatchNorm and spectral normalisation, whose vectors are no averages."""
    return bnverify.linen(SpectralMlp(), name="zoo:spectral")
