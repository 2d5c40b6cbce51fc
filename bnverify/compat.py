"""Differences between jax releases, absorbed in one place.

Each entry says which releases need it; delete it with the last of them.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import jax


def enable_x64() -> AbstractContextManager[Any]:
    """Return a context in which float64 exists.

    ``jax.enable_x64(True)`` from jax 0.8.3; before it ``jax.experimental.enable_x64()``, which
    0.9.2 removed.
    """
    switch = getattr(jax, "enable_x64", None)
    if switch is not None and callable(switch):
        context: AbstractContextManager[Any] = switch(True)
        return context
    from jax import experimental

    older: AbstractContextManager[Any] = experimental.enable_x64()
    return older
