"""A directory of sources: which files it has, their hash, and a copy to build from."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

_NOT_SOURCES = {"__pycache__", "node_modules", "build", "dist"}
_LIMIT = 500 * 2**20  # bytes; sources are less, data sets and checkpoints are more


class TreeError(Exception):
    """A directory holds too much to be sources, or changes while it is read."""


def files(directory: Path) -> list[Path]:
    """Return the files that are the directory's sources, relative to it, in order.

    Under git, those it tracks and those it does not ignore; elsewhere all but hidden directories,
    virtual environments, byte code and build products.

    Raises:
        TreeError: they are too large together.
    """
    found = _git_files(directory)
    names = sorted(set(found if found is not None else _walk(directory)))
    size = sum((directory / name).lstat().st_size for name in names)
    if size > _LIMIT:
        message = (
            f"{directory} holds {size >> 20} MiB of files, more than sources do;"
            " let .gitignore name the data, or give the package's own directory"
        )
        raise TreeError(message)
    return names


def digest(directory: Path, names: Iterable[Path]) -> str:
    """Return a hash of the files' names and contents; a link is the name it points to."""
    total = hashlib.sha256()
    for name in names:
        path = directory / name
        content = os.readlink(path).encode() if path.is_symlink() else path.read_bytes()
        total.update(f"{name}\0{len(content)}\0{path.is_symlink()}\0".encode())
        total.update(content)
    return total.hexdigest()[:32]


def digest_any(path: Path) -> str:
    """Return a hash of a directory's sources, or of a file."""
    if path.is_dir():
        return digest(path, files(path))
    return digest(path.parent, [path.relative_to(path.parent)])


def copy(directory: Path, names: Iterable[Path], target: Path, expected: str) -> None:
    """Copy the files to a new directory, links as links.

    Raises:
        TreeError: the copy has not the expected `digest`: somebody is writing to the directory.
    """
    names = list(names)
    for name in names:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(directory / name, target / name, follow_symlinks=False)
    if digest(target, names) != expected:
        raise TreeError(f"{directory} changed while it was copied; run again")


def _git_files(directory: Path) -> list[Path] | None:
    """Return what git holds for sources; None where the directory is not under git."""
    # A git hook sets GIT_DIR and others, for another repository perhaps.
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
    # What was deleted but is still in the index, and submodules, are not files.
    return [p.relative_to(directory) for p in names if p.is_symlink() or p.is_file()] or None


def _walk(directory: Path) -> Iterator[Path]:
    for entry in sorted(directory.iterdir()):
        if entry.is_dir() and not entry.is_symlink():
            hidden = entry.name.startswith(".") or entry.name in _NOT_SOURCES
            if not hidden and not (entry / "pyvenv.cfg").exists():
                yield from (entry.relative_to(directory) / name for name in _walk(entry))
        elif entry.is_symlink() or (entry.is_file() and entry.suffix not in {".pyc", ".pyo"}):
            yield entry.relative_to(directory)
