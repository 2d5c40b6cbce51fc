"""Directories that are made once, found complete or not at all, and shared by all processes.

    root/<shelf>/<key>/             a complete directory; complete.json tells about it
    root/building/<shelf>-<key>.*/  one in the making, or left by a process that was killed
    root/locks/<shelf>-<key>        held while one is made; the system frees it when its holder dies

A directory is made under `building` and renamed, so that its place holds it whole or not at all.
Whoever holds a lock may clear what the last holder left. No two attempts share a directory: what a
killed one started may live for a moment longer than its lock.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from bnverify.upgrade.processes import Token

_MARKER = "complete.json"
_UNUSED = 60 * 24 * 3600  # seconds after which what nobody asked for is removed
_SCRATCH = "scratch"
_POLL = 0.1  # seconds between looks at a lock that another process holds


class Store:
    """Made directories under one root."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def get(
        self, shelf: str, key: str, make: Callable[[Path], dict[str, Any]], token: Token
    ) -> tuple[Path, dict[str, Any]]:
        """Return the directory of a key, and what was told about it when it was made.

        Args:
            shelf: what kind of directory.
            key: what it is made from, as a hash.
            make: called with an empty directory to fill, if there is none for the key. Where it
                raises, nothing remains. The directory will be renamed.
            token: looked at while another process makes the same directory.

        Raises:
            CancelledError: while waiting.
            OSError: the root cannot be written, or is full.
        """
        place = self.root / shelf / key
        told = _told(place)
        if told is None:
            with self._lock(f"{shelf}-{key}", token):
                told = _told(place)  # another process may have made it meanwhile
                if told is None:
                    told = self._make(place, f"{shelf}-{key}", make)
        with contextlib.suppress(OSError):
            os.utime(place / _MARKER)  # for `sweep`
        return place, told

    @contextlib.contextmanager
    def scratch(self) -> Iterator[Path]:
        """Make an empty directory for the time being; what a killed process left, `sweep` finds."""
        name = f"{_SCRATCH}-{secrets.token_hex(8)}"
        path = self._building() / f"{name}.d"
        with self._idle(name):
            path.mkdir()
            try:
                yield path
            finally:
                _remove(path)
                self._lock_file(name).unlink(missing_ok=True)

    def sweep(self) -> None:
        """Remove what killed processes left, and what nobody asked for in sixty days."""
        old = time.time() - _UNUSED
        for rest in self._building().glob("*-*.*"):
            with self._idle(rest.stem) as idle:
                if idle:
                    _remove(rest)
                if idle and rest.stem.startswith(_SCRATCH):  # a name that nobody else waits for
                    self._lock_file(rest.stem).unlink(missing_ok=True)
        for marker in self.root.glob(f"*/*/{_MARKER}"):
            place = marker.parent
            name = f"{place.parent.name}-{place.name}"
            with self._idle(name) as idle, contextlib.suppress(OSError):
                if idle and marker.stat().st_mtime < old:
                    rest = self._building() / f"{name}.old"
                    place.rename(rest)  # at once: it is never half there
                    _remove(rest)

    def _make(
        self, place: Path, name: str, make: Callable[[Path], dict[str, Any]]
    ) -> dict[str, Any]:
        for rest in self._building().glob(f"{name}.*"):
            _remove(rest)
        _remove(place)  # without its marker: somebody's clean-up was interrupted
        rough = self._building() / f"{name}.{secrets.token_hex(4)}"
        try:
            rough.mkdir()
            told = make(rough)
            (rough / _MARKER).write_text(json.dumps(told, sort_keys=True), encoding="utf-8")
            place.parent.mkdir(exist_ok=True)
            rough.rename(place)
        except BaseException:
            _remove(rough)
            raise
        return told

    def _building(self) -> Path:
        return self._directory("building")

    def _lock_file(self, name: str) -> Path:
        return self._directory("locks") / name

    def _directory(self, name: str) -> Path:
        # 0o700: who can write here can run code in every process that uses it.
        self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = self.root / name
        path.mkdir(exist_ok=True)
        return path

    @contextlib.contextmanager
    def _lock(self, name: str, token: Token) -> Iterator[None]:
        while True:
            with self._idle(name) as idle:
                if idle:
                    yield
                    return
            token.sleep(_POLL)

    @contextlib.contextmanager
    def _idle(self, name: str) -> Iterator[bool]:
        """Take a lock if nobody holds it, and say whether; lock files stay, as deleting one races."""
        import fcntl  # not on Windows, where the gate does not run

        with self._lock_file(name).open("ab") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            yield True


def _told(place: Path) -> dict[str, Any] | None:
    try:
        told = json.loads((place / _MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return told if isinstance(told, dict) else None


def _remove(path: Path) -> None:
    if path.exists():
        shutil.rmtree(path, ignore_errors=True)
