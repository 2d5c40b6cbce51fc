"""A vision transformer with BatchNorm where the original has LayerNorm, at toy size.

Dosovitskiy et al. 2020, https://arxiv.org/abs/2010.11929. The statistics of a token's features
are taken over rows and tokens.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import flax.linen as nn
from flax import nnx

import bnverify
from bnverify.zoo.residual import CLASSES, SIDE, classifier, cross_entropy, images

PATCH = 1
TOKENS = (SIDE // PATCH) ** 2
WIDTH = 4
HEADS = 2


class Block(nn.Module):
    """Attention over tokens, then an MLP, each normalised before and added to its input."""

    @nn.compact
    def __call__(self, x: Any, train: bool) -> Any:
        """Return the block of x (N, TOKENS, WIDTH)."""
        norm = partial(nn.BatchNorm, use_running_average=not train, momentum=0.9)
        x = x + nn.MultiHeadDotProductAttention(num_heads=HEADS)(norm()(x))
        return x + nn.Dense(WIDTH)(nn.gelu(nn.Dense(2 * WIDTH)(norm()(x))))


class VisionTransformer(nn.Module):
    """Patches, positions, one block, a mean over tokens, a classifier."""

    @nn.compact
    def __call__(self, x: Any, train: bool) -> Any:
        """Return logits (N, CLASSES) of images (N, SIDE, SIDE, 1)."""
        x = nn.Conv(WIDTH, (PATCH, PATCH), (PATCH, PATCH), padding="VALID")(x)
        x = x.reshape(-1, TOKENS, WIDTH)
        x = x + self.param("positions", nn.initializers.normal(0.02), (1, TOKENS, WIDTH))
        x = Block()(x, train)
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)
        return nn.Dense(CLASSES)(x.mean(1))


class NnxBlock(nnx.Module):
    """The same block in nnx.

    Args:
        rngs: of the initial kernels.
    """

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.before = nnx.BatchNorm(WIDTH, momentum=0.9, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(HEADS, WIDTH, decode=False, rngs=rngs)
        self.between = nnx.BatchNorm(WIDTH, momentum=0.9, rngs=rngs)
        self.up = nnx.Linear(WIDTH, 2 * WIDTH, rngs=rngs)
        self.down = nnx.Linear(2 * WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        """Return the block of x (N, TOKENS, WIDTH)."""
        x = x + self.attention(self.before(x))
        return x + self.down(nnx.gelu(self.up(self.between(x))))


class NnxVisionTransformer(nnx.Module):
    """The same transformer in nnx.

    Args:
        rngs: of the initial kernels.
    """

    def __init__(self, rngs: nnx.Rngs) -> None:
        stride = (PATCH, PATCH)
        self.patches = nnx.Conv(1, WIDTH, stride, strides=stride, padding="VALID", rngs=rngs)
        self.positions = nnx.Param(nnx.initializers.normal(0.02)(rngs(), (1, TOKENS, WIDTH)))
        self.block = NnxBlock(rngs)
        self.norm = nnx.BatchNorm(WIDTH, momentum=0.9, rngs=rngs)
        self.out = nnx.Linear(WIDTH, CLASSES, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        """Return logits (N, CLASSES) of images (N, SIDE, SIDE, 1)."""
        x = self.patches(x).reshape(-1, TOKENS, WIDTH) + self.positions
        return self.out(self.norm(self.block(x)).mean(1))


def vit() -> bnverify.Subject:
    """Return the transformer in linen."""
    return classifier(VisionTransformer(), "zoo:vit")


def vit_nnx() -> bnverify.Subject:
    """Return the transformer in nnx."""
    return bnverify.nnx(
        NnxVisionTransformer,
        batch=images,
        loss=cross_entropy,
        features=SIDE * SIDE,
        name="zoo:vit_nnx",
    )
