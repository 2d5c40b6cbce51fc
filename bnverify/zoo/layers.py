"""Running values other than BatchNorm's, lifted transformations, and layers that are called twice."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from flax import nnx
from jax import lax

from bnverify.zoo import subjects
from bnverify.zoo.perceptrons import Mlp

MOMENTUM = 0.9
WIDTH = 4

# The running mean of a metric, online normalisation, and power iteration.


class RunningMean(nn.Module):
    """Returns its input unchanged and tracks its mean, as a metric would."""

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
            # A new Variable, because writing to one in place differs between releases.
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
    """Normalises by the running values, also in training, and then folds in the batch's moments."""

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


TRACKED = "BatchNorm beside a metric's running mean."
subjects.linen("running_mean", TRACKED, Tracked())
subjects.nnx("running_mean", TRACKED, NnxTracked)
subjects.linen(
    "online_norm",
    "Two layers that normalise by their running values, as declared.",
    OnlineMlp(),
    online=True,
)
subjects.linen(
    "spectral",
    "BatchNorm and spectral normalisation, whose vectors are not averages.",
    SpectralMlp(),
)


# Modules under Flax's lifted transformations.


class Block(nn.Module):
    """Dense -> BatchNorm -> ReLU with the signature for ``nn.scan``: it returns a carry and an output.

    Attributes:
        train: whether it is in train mode; a field, because a transformed call only takes arrays.
    """

    train: bool

    @nn.compact
    def __call__(self, x: Any) -> Any:
        """Return the block of x (N, WIDTH), and None."""
        x = nn.Dense(WIDTH)(x)
        x = nn.BatchNorm(use_running_average=not self.train, momentum=0.9)(x)
        return nn.relu(x), None


class Lifted(nn.Module):
    """A Dense, the block under a transformation, a Dense: x (N, D) -> (N, 1).

    Attributes:
        transform: class of a module -> the transformed class.
    """

    transform: Any

    @nn.compact
    def __call__(self, x: Any, train: bool) -> Any:
        """Return the predictions."""
        x, _ = self.transform(Block)(train)(nn.Dense(WIDTH)(x))
        return nn.Dense(1)(x)


def scan_over_three(block: type[nn.Module]) -> Any:
    """Return three consecutive blocks, each with its own variables."""
    return nn.scan(
        block,
        variable_axes={"params": 0, "batch_stats": 0},
        split_rngs={"params": True},
        length=3,
    )


class Settling(nn.Module):
    """A layer that normalises its input twice in a loop, then an MLP: x (N, D) -> (N, 1).

    A while loop has no reverse-mode gradient, so the layer inside has no params.
    """

    @nn.compact
    def __call__(self, x: Any, train: bool) -> Any:
        """Return the predictions."""
        norm = nn.BatchNorm(
            use_running_average=not train, momentum=0.9, use_bias=False, use_scale=False
        )
        if self.is_initializing():
            x = norm(x)
        else:
            _, x = nn.while_loop(
                lambda _, carry: carry[0] < 2,
                lambda mdl, carry: (carry[0] + 1, mdl(carry[1])),
                norm,
                (0, x),
                carry_variables="batch_stats",
            )
        return nn.Dense(1)(nn.tanh(nn.Dense(WIDTH)(x)))


class Ensemble(nn.Module):
    """The mean of two MLPs under ``nn.vmap``: x (N, D) -> (N, 1)."""

    @nn.compact
    def __call__(self, x: Any, train: bool) -> Any:
        """Return the predictions."""
        members = nn.vmap(
            Mlp,
            variable_axes={"params": 0, "batch_stats": 0},
            split_rngs={"params": True},
            in_axes=(None, None),
            axis_size=2,
        )
        return members((WIDTH,))(x, train).mean(0)


class Shared(nn.Module):
    """One Dense and one BatchNorm, both used twice: x (N, D) -> (N, 1)."""

    @nn.compact
    def __call__(self, x: Any, train: bool) -> Any:
        """Return the predictions."""
        dense = nn.Dense(WIDTH)
        norm = nn.BatchNorm(use_running_average=not train, momentum=0.9)
        x = nn.Dense(WIDTH)(x)
        for _ in range(2):
            x = nn.relu(norm(dense(x)))
        return nn.Dense(1)(x)


class NnxShared(nnx.Module):
    """The same in nnx.

    Args:
        din: D.
        rngs: of the initial kernels.
    """

    def __init__(self, din: int, rngs: nnx.Rngs) -> None:
        self.first = nnx.Linear(din, WIDTH, rngs=rngs)
        self.dense = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.norm = nnx.BatchNorm(WIDTH, momentum=0.9, rngs=rngs)
        self.out = nnx.Linear(WIDTH, 1, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        """Return the predictions."""
        x = self.first(x)
        for _ in range(2):
            x = nnx.relu(self.norm(self.dense(x)))
        return self.out(x)


subjects.linen(
    "remat",
    "A block under ``nn.remat``, which recomputes activations in the backward pass.",
    Lifted(nn.remat),
)
subjects.linen(
    "scanned",
    "A scan over three layers, whose statistics have a layer axis.",
    Lifted(scan_over_three),
)
subjects.linen(
    "while_loop",
    "A layer that updates its statistics in each iteration of a while loop.",
    Settling(),
)
subjects.linen("jitted", "A block under ``nn.jit``.", Lifted(nn.jit))
subjects.linen("vmapped", "An ensemble under ``nn.vmap``.", Ensemble())
SHARED = "A layer that is used twice, with shared weights and statistics."
subjects.linen("shared", SHARED, Shared())
subjects.nnx("shared", SHARED, NnxShared)
