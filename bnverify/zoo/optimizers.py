"""The MLP around other optimizers than plain SGD."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import optax

import bnverify
from bnverify.zoo.perceptrons import Mlp


def kernels(params: Any) -> Any:
    """Return which of ``params`` are kernels, a tree of bools: what a decay is meant for."""
    return jax.tree_util.tree_map(lambda leaf: leaf.ndim > 1, params)


def momentum() -> bnverify.Subject:
    """Return SGD with momentum."""
    return around("momentum", lambda lr: optax.sgd(lr, momentum=0.9))


def nesterov() -> bnverify.Subject:
    """Return SGD with Nesterov's momentum."""
    return around("nesterov", lambda lr: optax.sgd(lr, momentum=0.9, nesterov=True))


def adam() -> bnverify.Subject:
    """Return Adam."""
    return around("adam", optax.adam)


def adamw() -> bnverify.Subject:
    """Return AdamW, decaying the kernels alone."""
    return around("adamw", lambda lr: optax.adamw(lr, weight_decay=1e-2, mask=kernels))


def lion() -> bnverify.Subject:
    """Return Lion, whose update is a sign."""
    return around("lion", optax.lion)


def rmsprop() -> bnverify.Subject:
    """Return RMSprop."""
    return around("rmsprop", optax.rmsprop)


def adafactor() -> bnverify.Subject:
    """Return Adafactor, its second moments factored even for kernels as small as these."""
    return around("adafactor", lambda lr: optax.adafactor(lr, min_dim_size_to_factor=2))


def masked_decay() -> bnverify.Subject:
    """Return SGD with a decay that a mask keeps to the kernels."""
    return around(
        "masked_decay",
        lambda lr: optax.chain(
            optax.masked(optax.add_decayed_weights(1e-2), kernels), optax.sgd(lr)
        ),
    )


def multi_transform() -> bnverify.Subject:
    """Return Adam for the kernels and SGD for all else."""
    return around(
        "multi_transform",
        lambda lr: optax.multi_transform({True: optax.adam(lr), False: optax.sgd(lr)}, kernels),
    )


def multi_steps() -> bnverify.Subject:
    """Return SGD that gathers the gradients of two steps."""
    return around(
        "multi_steps",
        lambda lr: optax.MultiSteps(optax.sgd(lr), 2).gradient_transformation(),
    )


def clipped() -> bnverify.Subject:
    """Return SGD on gradients clipped to a global norm of 1."""
    return around("clipped", lambda lr: optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(lr)))


def injected() -> bnverify.Subject:
    """Return SGD that keeps its learning rate in its state."""
    return around("injected", lambda lr: optax.inject_hyperparams(optax.sgd)(learning_rate=lr))


def around(name: str, optimizer: Callable[[Any], Any]) -> bnverify.Subject:
    """Return the MLP around an optimizer."""
    return bnverify.linen(Mlp(), optimizer=optimizer, name=f"zoo:{name}")
