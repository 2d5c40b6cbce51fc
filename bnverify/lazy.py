"""Modules imported at first use, so that ``bnverify --help`` and ``list`` import no jax."""

from __future__ import annotations

from importlib import import_module
from typing import Any


class LazyModule:
    """A stand-in for the module ``name``, which is imported when an attribute is first used."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        value = getattr(import_module(self._name), attribute)
        setattr(self, attribute, value)  # later look-ups do not call __getattr__
        return value


jax: Any = LazyModule("jax")
jnp: Any = LazyModule("jax.numpy")
