"""Modules imported at first use, so that ``bnverify --help`` and ``list`` import no jax."""

from __future__ import annotations

from importlib import import_module
from typing import Any


class LazyModule:
    """Stand in for the module ``name`` until one of its attributes is asked for."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        value = getattr(import_module(self._name), attribute)
        setattr(self, attribute, value)  # the next look-up does not come here
        return value


jax: Any = LazyModule("jax")
jnp: Any = LazyModule("jax.numpy")
