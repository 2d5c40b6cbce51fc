"""Writing a file so that whatever interrupts it, the old one or the new one is there, whole.

Runs on Python 3.9, where recordings of old releases are made.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import socket
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


def write(path: Path, data: bytes) -> None:
    """Write beside the file, then rename; writing again clears what a killed writer left.

    Raises:
        OSError: the directory is missing or not writeable, or the disk is full.
    """
    path = path.resolve()  # a link to the file stays one
    host = re.sub(r"[^A-Za-z0-9]", "_", socket.gethostname())
    prefix = f".{path.name}.{host}-"
    for leftover in _abandoned(path.parent, prefix):
        with contextlib.suppress(OSError):
            leftover.unlink()
    temporary = path.with_name(f"{prefix}{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        # Not tempfile, whose files are 0600: this one is shared like any source file.
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def _abandoned(directory: Path, prefix: str) -> Iterator[Path]:
    """Yield what writers of the same file left that died between opening and renaming."""
    pattern = re.compile(re.escape(prefix) + r"([0-9]{1,9})-[0-9a-f]{8}\.tmp")
    for entry in directory.iterdir():
        owner = pattern.fullmatch(entry.name)
        if owner and not _alive(int(owner[1])):
            yield entry


def _alive(process: int) -> bool:
    if os.name != "posix":  # pragma: no cover -- there os.kill does not ask, it interrupts
        return True
    try:
        os.kill(process, 0)
    except OSError as error:
        return isinstance(error, PermissionError)  # it is another user's
    return True
