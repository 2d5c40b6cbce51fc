"""The files of a target: its location, its project, which files are sources, their hash."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bnverify.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

PROJECT = ("pyproject.toml", "setup.py")
"""The files that make a directory a buildable project."""

_OWN = Path(__file__).resolve().parents[2]  # a checkout of bnverify is not a user's project
_NOT_SOURCES = {"__pycache__", "node_modules", "build", "dist"}
_LIMIT = 500 * 2**20  # bytes; sources are smaller, data sets and checkpoints larger
_MAX_FILES = 2000  # next to a target; more suggest a home directory rather than a package


class TreeError(Exception):
    """A directory is too large to consist of sources."""


@dataclass(frozen=True)
class Target:
    """A target, located for use in another environment.

    Attributes:
        text: as the user wrote it.
        absolute: the same, independent of the working directory.
        project: the directory to build or import from; None if none is needed.
        digest: a hash of the target's file and the Python files next to it; "" for a module, whose
            hash is that of the project.
    """

    text: str
    absolute: str
    project: Path | None
    digest: str


def locate(target: str, project: Path | None = None) -> Target:
    """Locate a target.

    Args:
        target: `package.module:name` or `path/file.py:name`.
        project: the user's choice; by default the nearest buildable directory above the file or,
            for a module, above the working directory.

    Raises:
        UsageError: there is no such file.
    """
    source, _, name = target.rpartition(":")
    path = Path(source)
    if source.split(".")[0] == "bnverify" and not path.is_file():
        return Target(target, target, project, "")
    if not source.endswith(".py") and not path.is_file():
        return Target(target, target, project or _project_above(Path.cwd()) or Path.cwd(), "")
    if not path.is_file():
        raise UsageError(f"there is no file {source}")
    path = path.resolve()
    beside = sorted({path, *_modules(path.parent)})
    names = [each.relative_to(path.parent) for each in beside]
    hashed = digest(path.parent, names if len(names) <= _MAX_FILES else [Path(path.name)])
    project = project or _project_above(path.parent)
    return Target(target, f"{path}:{name}", project, f"{path} {hashed}")


def _project_above(directory: Path) -> Path | None:
    for each in (directory, *directory.parents):
        if any((each / name).is_file() for name in PROJECT):
            return None if each == _OWN else each
    return None


def _modules(directory: Path) -> Iterator[Path]:
    """Yield the files that can be imported from a directory: modules, and modules of packages."""
    for entry in directory.iterdir():
        if entry.suffix == ".py" and entry.is_file():
            yield entry
        elif (entry / "__init__.py").is_file():
            yield from _modules(entry)


def files(directory: Path) -> list[Path]:
    """Return the source files of a directory, relative to it, sorted.

    In a git repository: files that are tracked or not ignored. Elsewhere: all files except in
    hidden directories and virtual environments, byte code and build products.

    Raises:
        TreeError: their total size exceeds the limit.
    """
    found = _git_files(directory)
    names = sorted(set(found if found is not None else _walk(directory)))
    size = sum((directory / name).lstat().st_size for name in names)
    if size > _LIMIT:
        raise TreeError(
            f"{directory} holds {size >> 20} MiB of files, above the limit of {_LIMIT >> 20} MiB for"
            " sources; list the data in .gitignore, or give the package's own directory"
        )
    return names


def digest(directory: Path, names: Iterable[Path]) -> str:
    """Return a hash of the files' names and contents; of a symlink, its target's name."""
    total = hashlib.sha256()
    for name in names:
        path = directory / name
        content = os.readlink(path).encode() if path.is_symlink() else path.read_bytes()
        total.update(f"{name}\0{len(content)}\0{path.is_symlink()}\0".encode())
        total.update(content)
    return total.hexdigest()[:32]


def copy(directory: Path, names: Iterable[Path], place: Path) -> None:
    """Copy files to a new directory, keeping symlinks."""
    for name in names:
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(directory / name, place / name, follow_symlinks=False)


def _git_files(directory: Path) -> list[Path] | None:
    """Return the files that git does not ignore, or None outside a repository."""
    # In a git hook, GIT_DIR and other variables may refer to another repository.
    env = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    listing = ["ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        done = subprocess.run(  # noqa: S603 -- a fixed command
            ["git", "-C", os.fspath(directory), *listing],  # noqa: S607 -- whichever git is there
            capture_output=True,
            check=True,
            timeout=60,
            env=env,
            stdin=subprocess.DEVNULL,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    names = [directory / os.fsdecode(name) for name in done.stdout.split(b"\0") if name]
    # Skip files deleted but still in the index, and submodules.
    return [p.relative_to(directory) for p in names if p.is_symlink() or p.is_file()] or None


def _walk(directory: Path) -> Iterator[Path]:
    for entry in sorted(directory.iterdir()):
        if entry.is_dir() and not entry.is_symlink():
            hidden = entry.name.startswith(".") or entry.name in _NOT_SOURCES
            if not hidden and not (entry / "pyvenv.cfg").exists():
                yield from (entry.relative_to(directory) / name for name in _walk(entry))
        elif entry.is_symlink() or (entry.is_file() and entry.suffix not in {".pyc", ".pyo"}):
            yield entry.relative_to(directory)
