"""The environment variables of a process that must see its own releases and nobody else's."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path


def isolated(paths: Sequence[Path] = (), extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return this process's variables without those that lead Python elsewhere.

    What configures jax (JAX_PLATFORMS, XLA_FLAGS and so on) passes through.

    Args:
        paths: the whole PYTHONPATH.
        extra: variables to set beside.
    """
    env = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("PYTHON") and name not in {"VIRTUAL_ENV", "CONDA_PREFIX"}
    }
    env["PYTHONNOUSERSITE"] = "1"
    env["PYTHONSAFEPATH"] = "1"  # from Python 3.11: the current directory is no import path
    if paths:
        env["PYTHONPATH"] = os.pathsep.join(map(str, paths))
    return env | dict(extra or {})
