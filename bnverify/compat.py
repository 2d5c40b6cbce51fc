"""Differences between jax releases, absorbed in one place.

Each entry says which releases need it; delete it with the last of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax

if TYPE_CHECKING:
    from contextlib import AbstractContextManager


def enable_x64() -> AbstractContextManager[Any]:
    """Return a context in which float64 exists.

    ``jax.enable_x64(True)`` from jax 0.8.3; before it ``jax.experimental.enable_x64()``, which
    0.9.2 removed.
    """
    switch: Any = getattr(jax, "enable_x64", None)
    if switch is None:
        from jax import experimental

        switch = experimental.enable_x64
    context: AbstractContextManager[Any] = switch(True)
    return context
