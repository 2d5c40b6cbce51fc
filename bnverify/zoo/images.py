"""Residual networks and a vision transformer for images of 2 x 2 x 1.

He et al. 2015, https://arxiv.org/abs/1512.03385. The last scale of each block starts at zero, so that a block
starts as the identity: Goyal et al. 2017, https://arxiv.org/abs/1706.02677, section 5.1. Dosovitskiy et al. 2020,
https://arxiv.org/abs/2010.11929, with BatchNorm where the original has LayerNorm: the statistics of a token's
features are taken over rows and tokens.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import flax.linen as nn
import optax
from flax import nnx

from bnverify.adapters.batches import classes
from bnverify.zoo import subjects

SIDE = 2
CLASSES = 3


def images(x: Any, y: Any) -> tuple[Any, Any]:
    """Return images (N, SIDE, SIDE, 1) made from x (N, SIDE * SIDE), and labels from y."""
    return x.reshape(-1, SIDE, SIDE, 1), classes(y, CLASSES)


def cross_entropy(logits: Any, labels: Any) -> Any:
    """Return the mean cross-entropy of logits (N, CLASSES) against labels (N,)."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def joined(x: Any, h: Any, strides: tuple[int, int], norm: Any) -> Any:
    """Return h plus the shortcut: x, projected if its shape is not that of h.

    Args:
        x: the block's input (N, H, W, C).
        h: the output of its convolutions.
        strides: the strides of the projection.
        norm: creates a normalisation layer.
    """
    h = norm(scale_init=nn.initializers.zeros_init())(h)
    if x.shape != h.shape:
        x = nn.Conv(h.shape[-1], (1, 1), strides, use_bias=False, name="projection")(x)
        x = norm(name="projection_norm")(x)
    return nn.relu(x + h)


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions and a shortcut.

    Attributes:
        width: the number of output channels.
        stride: the stride of the first convolution and of the projection.
    """

    width: int
    stride: int = 1

    @nn.compact
    def __call__(self, x: Any, train: bool) -> Any:
        """Return the block of x (N, H, W, C)."""
        norm = partial(nn.BatchNorm, use_running_average=not train, momentum=0.9)
        strides = (self.stride, self.stride)
        h = nn.Conv(self.width, (3, 3), strides, use_bias=False)(x)
        h = nn.relu(norm()(h))
        h = nn.Conv(self.width, (3, 3), use_bias=False)(h)
        return joined(x, h, strides, norm)


class BottleneckBlock(nn.Module):
    """Convolutions of 1 x 1, 3 x 3 and 1 x 1 with fewer channels inside, and a shortcut.

    Attributes:
        width: the number of channels inside; the output has four times as many.
        stride: the stride of the 3 x 3 convolution and of the projection.
    """

    width: int
    stride: int = 1

    @nn.compact
    def __call__(self, x: Any, train: bool) -> Any:
        """Return the block of x (N, H, W, C)."""
        norm = partial(nn.BatchNorm, use_running_average=not train, momentum=0.9)
        strides = (self.stride, self.stride)
        h = nn.relu(norm()(nn.Conv(self.width, (1, 1), use_bias=False)(x)))
        h = nn.relu(norm()(nn.Conv(self.width, (3, 3), strides, use_bias=False)(h)))
        h = nn.Conv(4 * self.width, (1, 1), use_bias=False)(h)
        return joined(x, h, strides, norm)


class ResNet(nn.Module):
    """A stem, a block that halves the image, a mean over pixels, a classifier.

    Attributes:
        block: the class of the block.
        width: the width of the block.
    """

    block: Any = BasicBlock
    width: int = 3

    @nn.compact
    def __call__(self, x: Any, train: bool) -> Any:
        """Return logits (N, CLASSES) of images (N, SIDE, SIDE, 1)."""
        x = nn.Conv(2, (3, 3), use_bias=False)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))
        x = self.block(self.width, stride=2)(x, train)
        return nn.Dense(CLASSES)(x.mean((1, 2)))


class NnxBasicBlock(nnx.Module):
    """The basic block in nnx, always with a projection.

    Args:
        width: the number of input channels.
        out: the number of output channels.
        stride: the stride of the first convolution and of the projection.
        rngs: the RNG streams for the initial params.
    """

    def __init__(self, width: int, out: int, stride: int, rngs: nnx.Rngs) -> None:
        conv = partial(nnx.Conv, use_bias=False, rngs=rngs)
        norm = partial(nnx.BatchNorm, momentum=0.9, rngs=rngs)
        self.first = conv(width, out, (3, 3), strides=(stride, stride))
        self.first_norm = norm(out)
        self.second = conv(out, out, (3, 3))
        self.second_norm = norm(out, scale_init=nnx.initializers.zeros_init())
        self.projection = conv(width, out, (1, 1), strides=(stride, stride))
        self.projection_norm = norm(out)

    def __call__(self, x: Any) -> Any:
        """Return the block of x (N, H, W, C)."""
        h = nnx.relu(self.first_norm(self.first(x)))
        h = self.second_norm(self.second(h))
        return nnx.relu(self.projection_norm(self.projection(x)) + h)


class NnxResNet(nnx.Module):
    """A stem, one block that halves the image, a mean over pixels, a classifier.

    Args:
        rngs: of the initial kernels.
    """

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.stem = nnx.Conv(1, 2, (3, 3), use_bias=False, rngs=rngs)
        self.stem_norm = nnx.BatchNorm(2, momentum=0.9, rngs=rngs)
        self.block = NnxBasicBlock(2, 3, 2, rngs)
        self.out = nnx.Linear(3, CLASSES, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        """Return logits (N, CLASSES) of images (N, SIDE, SIDE, 1)."""
        x = nnx.relu(self.stem_norm(self.stem(x)))
        return self.out(self.block(x).mean((1, 2)))


# Options of all subjects here.
OPTIONS: Any = {"batch": images, "loss": cross_entropy, "features": SIDE * SIDE}

subjects.linen("resnet", "A ResNet with one basic block.", ResNet(), **OPTIONS)
subjects.linen(
    "resnet_bottleneck",
    "A ResNet with one bottleneck block.",
    ResNet(block=BottleneckBlock, width=1),
    **OPTIONS,
)
subjects.nnx("resnet", "A ResNet with one basic block in nnx.", NnxResNet, **OPTIONS)


# The transformer.

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


TRANSFORMER = "A vision transformer with BatchNorm."
subjects.linen("vit", TRANSFORMER, VisionTransformer(), **OPTIONS)
subjects.nnx("vit", TRANSFORMER, NnxVisionTransformer, **OPTIONS)
