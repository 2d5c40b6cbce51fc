"""The zoo: model families as subjects, and as living examples of what the adapters take.

Each name is a function without arguments that makes a Subject, so each can be checked as it
stands: ``bnverify check bnverify.zoo:resnet``. A family is a module of its own; none is imported
before one of its names is used.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_FAMILIES = {
    "perceptrons": ("mlp", "mlp_nnx", "mlp_without_statistics", "mlp_without_statistics_nnx"),
    "norms": (
        "slow_variance",
        "slow_variance_nnx",
        "masked",
        "masked_nnx",
        "synchronised",
        "synchronised_nnx",
        "bfloat16",
        "bfloat16_nnx",
        "float16",
        "float16_nnx",
    ),
    "running": ("running_mean", "running_mean_nnx", "online_norm", "spectral"),
    "residual": ("resnet", "resnet_bottleneck", "resnet_nnx"),
    "transformers": ("vit", "vit_nnx"),
    "lifted": ("remat", "scanned", "while_loop", "jitted", "vmapped", "shared", "shared_nnx"),
    "optimizers": (
        "momentum",
        "nesterov",
        "adam",
        "adamw",
        "lion",
        "rmsprop",
        "adafactor",
        "masked_decay",
        "multi_transform",
        "multi_steps",
        "clipped",
        "injected",
    ),
    "averaging": ("averaged_params",),
}

HOME = {name: family for family, names in _FAMILIES.items() for name in names}
"""The name of each subject -> the module that it lives in."""

__all__ = sorted(HOME)  # noqa: PLE0605 - the table above is the one list of names


def __getattr__(name: str) -> Any:
    if name not in HOME:
        raise AttributeError(f"module 'bnverify.zoo' has no attribute {name!r}")
    return getattr(import_module(f"bnverify.zoo.{HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *HOME])
