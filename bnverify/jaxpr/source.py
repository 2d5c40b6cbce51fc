"""Where in the user's code an equation was written."""

from __future__ import annotations

import os.path
from collections.abc import Iterable
from functools import cache
from importlib.util import find_spec
from typing import Any

# Frames in these belong to nobody's model. bnverify's own are kept, but for this package: the
# reference step lives there, and so do the adapters' losses.
_LIBRARIES = ("jax", "jaxlib", "flax", "optax", "chex")


@cache
def _library_folders() -> tuple[str, ...]:
    folders = [os.path.dirname(__file__)]
    for name in _LIBRARIES:
        spec = find_spec(name)
        folders += (spec.submodule_search_locations or []) if spec else []
    return tuple(os.path.join(os.path.abspath(folder), "") for folder in folders)


def _frames(eqn: Any) -> Iterable[Any]:
    try:
        return list(eqn.source_info.traceback.frames)
    except Exception:  # source information is a courtesy: without it a path still names primitives
        return ()


def source_line(eqn: Any) -> str | None:
    """Return ``path:line (function)`` of the innermost frame outside the libraries, if known."""
    for frame in _frames(eqn):
        path = str(getattr(frame, "file_name", ""))
        if path and not path.startswith("<") and not path.startswith(_library_folders()):
            function = getattr(frame, "function_name", "?").rsplit(".", 1)[-1]
            return f"{path}:{getattr(frame, 'line_num', '?')} ({function})"
    return None
