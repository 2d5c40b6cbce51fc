"""What a target imports from beside itself: each directory has its own module of a name."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_HOMES: dict[str, Path] = {}
"""Name of a module that was imported from beside a target -> the directory it lies in."""


@contextmanager
def importable(home: Path) -> Iterator[None]:
    """Let the modules in ``home`` be imported in this block; afterwards sys.path is as before.

    Two projects may each have a ``model.py``. What an earlier block imported from another
    directory is forgotten where ``home`` has a module of that name: Python would give the first
    project's to the second, which would be verified with the wrong model.

    Args:
        home: an absolute path.
    """
    for name in [name for name, other in _HOMES.items() if other != home and _has(home, name)]:
        del _HOMES[name]
        sys.modules.pop(name, None)
    before, known = sys.path[:], set(sys.modules)
    sys.path.insert(0, str(home))
    importlib.invalidate_caches()  # a file written a moment ago must be found
    try:
        yield
    finally:
        sys.path[:] = before
        _HOMES.update({name: home for name in set(sys.modules) - known if _lies_in(name, home)})


def _has(home: Path, name: str) -> bool:
    """Return whether ``import name`` would find its outermost package or module in ``home``."""
    outermost = name.partition(".")[0]
    return (home / f"{outermost}.py").is_file() or (home / outermost).is_dir()


def _lies_in(name: str, home: Path) -> bool:
    module = sys.modules[name]
    file = getattr(module, "__file__", None)
    places = [file] if file else list(getattr(module, "__path__", ()))  # no file: a namespace
    return _has(home, name) and any(home in Path(place).resolve().parents for place in places)
