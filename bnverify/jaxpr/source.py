"""Where in the user's code an equation was written."""

from __future__ import annotations

import contextlib
import os
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

# Frames in these belong to nobody's model. bnverify's own are kept, but for this package and what
# watches a step: the reference step lives there, and so do the adapters' losses.
_LIBRARIES = ("jax", "jaxlib", "flax", "optax", "chex")
_WATCHING = ("adapters/watch.py", "adapters/traced.py")


@cache
def _library_folders() -> tuple[str, ...]:
    here = Path(__file__).parent
    folders = [str(here)]
    for name in _LIBRARIES:
        spec = find_spec(name)
        folders += (spec.submodule_search_locations or []) if spec else []
    watching = (str(here.parent / name) for name in _WATCHING)
    return (*(f"{folder}{os.sep}" for folder in folders), *watching, contextlib.__file__)


def _user_frames(eqn: Any) -> list[str]:
    """Return ``path:line (function)`` of every frame outside the libraries, innermost first."""
    try:
        frames = list(eqn.source_info.traceback.frames)
        named = [(frame.file_name, frame.line_num, frame.function_name) for frame in frames]
    except (AttributeError, TypeError):  # no public promise: without it paths name primitives only
        return []
    return [
        f"{path}:{line} ({function.rsplit('.', 1)[-1]})"
        for path, line, function in named
        if not path.startswith(("<", *_library_folders()))
    ]


def source_line(equations: Sequence[Any]) -> str | None:
    """Return ``path:line (function)`` of the user's code behind an equation, if known.

    Args:
        equations: the equation, after the calls around it, outermost first. A function under
            ``jax.jit`` is traced once and its program reused, with the lines of its first use.
            So an inner line counts only where its frames end in those of the call; else the
            call's own line stands.
    """
    around: list[str] = []
    for eqn in equations:
        frames = _user_frames(eqn)
        if frames and frames[len(frames) - len(around) :] == around:
            around = frames
    return around[0] if around else None
