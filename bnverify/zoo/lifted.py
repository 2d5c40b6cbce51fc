"""Modules under Flax's lifted transformations, and modules that are called more than once."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
from flax import nnx

import bnverify
from bnverify.zoo.perceptrons import Mlp

WIDTH = 4


class Block(nn.Module):
    """Dense -> BatchNorm -> ReLU, with the form that ``nn.scan`` asks for: a carry and an output.

    Attributes:
        train: whether it trains; a field, since a transformed call takes arrays.
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
    """Return three blocks, one after the other, each with variables of its own."""
    return nn.scan(
        block,
        variable_axes={"params": 0, "batch_stats": 0},
        split_rngs={"params": True},
        length=3,
    )


class Settling(nn.Module):
    """Inputs normalised twice by one layer in a loop, then an MLP: x (N, D) -> (N, 1).

    Such a loop has no gradient backwards, so the layer inside it has no params.
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
    """The mean of two MLPs that run side by side: x (N, D) -> (N, 1)."""

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


def remat() -> bnverify.Subject:
    """Return a block whose activations are computed again in the backward pass."""
    return bnverify.linen(Lifted(nn.remat), name="zoo:remat")


def scanned() -> bnverify.Subject:
    """Return a scan over three layers, whose statistics have an axis for the layers."""
    return bnverify.linen(Lifted(scan_over_three), name="zoo:scanned")


def while_loop() -> bnverify.Subject:
    """Return a layer that writes in each turn of a while loop."""
    return bnverify.linen(Settling(), name="zoo:while_loop")


def jitted() -> bnverify.Subject:
    """Return a block under ``nn.jit``."""
    return bnverify.linen(Lifted(nn.jit), name="zoo:jitted")


def vmapped() -> bnverify.Subject:
    """Return an ensemble under ``nn.vmap``."""
    return bnverify.linen(Ensemble(), name="zoo:vmapped")


def shared() -> bnverify.Subject:
    """Return weights and statistics that are shared by two places, in linen."""
    return bnverify.linen(Shared(), name="zoo:shared")


def shared_nnx() -> bnverify.Subject:
    """Return the same in nnx."""
    return bnverify.nnx(NnxShared, name="zoo:shared_nnx")
