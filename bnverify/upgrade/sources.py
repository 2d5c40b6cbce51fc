"""What a target is made of, as the gate must know it: where it lies, its project, its hash."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bnverify.unusable import Unusable
from bnverify.upgrade import trees

if TYPE_CHECKING:
    from collections.abc import Iterator

_PROJECT_FILES = ("pyproject.toml", "setup.py")
_OWN = Path(__file__).resolve().parents[2]  # a checkout of bnverify is no project of a user's
_MOST = 2000  # neighbours of a target's file; more are no package but somebody's home directory


@dataclass(frozen=True)
class Target:
    """A target, ready for another environment.

    Attributes:
        text: as the user wrote it.
        absolute: the same from any directory.
        project: the directory to build or import from; None where the target needs none.
        digest: a hash of the target's file and its neighbours; of a module, its project's hash
            is part of the environment's.
    """

    text: str
    absolute: str
    project: Path | None
    digest: str


def locate(target: str, project: Path | None = None) -> Target:
    """Return where a target lies.

    Args:
        target: ``package.module:name`` or ``path/file.py:name``.
        project: the user's choice; by default the nearest directory above the file, or above the
            current directory for a module, that says how to build itself.

    Raises:
        Unusable: there is no such file.
    """
    source, _, name = target.rpartition(":")
    path = Path(source)
    if source.split(".")[0] == _OWN.joinpath("bnverify").name and not path.is_file():
        return Target(target, target, project, "")
    if source.endswith(".py") or path.is_file():
        if not path.is_file():
            raise Unusable(f"no file {source}")
        path = path.resolve()
        found = project or _above(path.parent)
        return Target(target, f"{path}:{name}", found, _digest(path))
    return Target(target, target, project or _above(Path.cwd()) or Path.cwd(), "")


def _above(directory: Path) -> Path | None:
    for each in (directory, *directory.parents):
        if any((each / name).is_file() for name in _PROJECT_FILES):
            return None if each == _OWN else each
    return None


def _digest(path: Path) -> str:
    """Return a hash of a file and of what it may import from beside it."""
    home = path.parent
    names = sorted({path.relative_to(home), *(p.relative_to(home) for p in _neighbours(home))})
    if len(names) > _MOST:
        names = [path.relative_to(home)]
    text = f"{path} {trees.digest(home, names)}"
    return hashlib.sha256(text.encode()).hexdigest()


def _neighbours(directory: Path) -> Iterator[Path]:
    for entry in directory.iterdir():
        if entry.suffix == ".py" and entry.is_file():
            yield entry
        elif (entry / "__init__.py").is_file():
            yield from _neighbours(entry)
