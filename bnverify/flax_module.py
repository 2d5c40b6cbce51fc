"""Detecting a bare Flax module where a training step is needed."""

from __future__ import annotations

import inspect
import sys
from typing import Any


def kind(value: Any) -> str | None:
    """Return "linen" or "nnx" for a Flax module or a class of such; None for anything else."""
    for name in ("linen", "nnx"):
        flax = sys.modules.get(f"flax.{name}")  # if it is not imported, nothing is a module of it
        if flax is not None and issubclass(_class(value), flax.Module):
            return name
    return None


def wrapped(module: Any) -> str:
    """Return the code that makes a Subject of a Flax module or module class."""
    name = _class(module).__name__
    if kind(module) == "nnx":
        return f"bnverify.nnx({name})"
    try:
        inspect.signature(_class(module)).bind()
    except TypeError:
        return f"bnverify.linen({name}(...))"
    return f"bnverify.linen({name}())"


def advice(value: Any) -> str:
    """Return "; " and how to make a Subject of a Flax module; "" for anything else."""
    if kind(value) is None:
        return ""
    return f"; to check a training step with a Flax module, write subject = {wrapped(value)}"


def _class(value: Any) -> type[Any]:
    return value if isinstance(value, type) else type(value)
