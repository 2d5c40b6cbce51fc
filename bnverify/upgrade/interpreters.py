"""The Pythons of this machine: each side of an upgrade runs on the one it needs.

uv finds the Pythons on PATH and those it installed. Under pyenv, PATH holds shims that fail for
every version but the chosen one, while the interpreters lie elsewhere; so bnverify looks itself.
None is ever downloaded.
"""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

OLDEST = (3, 9)  # what the recording side of bnverify runs on

_PROBE = """
import json, platform, sys, sysconfig
print(json.dumps([platform.python_implementation(), list(sys.version_info[:3]),
    bool(sysconfig.get_config_var("Py_GIL_DISABLED")), sys.executable]))
"""


@dataclass(frozen=True)
class Interpreter:
    """A Python that was run and gave its version."""

    path: Path
    version: tuple[int, int, int]

    @property
    def name(self) -> str:
        """Its version, as 3.11.7."""
        return ".".join(map(str, self.version))


def found() -> Iterator[Interpreter]:
    """Yield one interpreter of each minor version, the running one first, then by nearness.

    The nearest, for both sides of an upgrade should differ in as little as can be; the older of
    two as near, for the newest Python is the last that packages support. Each is run when its turn
    comes, not before.
    """
    own = running()
    yield own
    by_minor: dict[tuple[int, int], list[Path]] = {}
    for name, path in _places():
        version = re.match(r"(?:cpython-|python)?3\.(\d+)", name)
        if version:
            by_minor.setdefault((3, int(version[1])), []).append(path)
    by_minor.pop(own.version[:2], None)
    for minor in sorted(by_minor, key=lambda v: (abs(v[1] - own.version[1]), v)):
        if minor >= OLDEST:
            alive = (probe(path) for path in by_minor[minor])
            first = next((i for i in alive if i and i.version[:2] == minor), None)
            if first:
                yield first


def running() -> Interpreter:
    """Return the interpreter that runs this."""
    return Interpreter(Path(sys.executable), sys.version_info[:3])


@functools.cache
def probe(path: Path) -> Interpreter | None:
    """Run an interpreter and return what it is; None where it fails or JAX does not run on it.

    JAX has wheels for CPython, and for its free-threaded build only of late.
    """
    try:
        done = subprocess.run(  # noqa: S603 -- a Python of this machine
            [path, "-I", "-S", "-c", _PROBE],
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
            stdin=subprocess.DEVNULL,
        )
        kind, version, free_threaded, executable = json.loads(done.stdout)
    except (OSError, ValueError, subprocess.SubprocessError):
        return None
    if kind != "CPython" or free_threaded:
        return None
    return Interpreter(Path(executable), tuple(version))


def _places() -> Iterator[tuple[str, Path]]:
    """Yield where Pythons may lie, on PATH, under pyenv, and where uv installs them.

    The name in front holds the version that each claims to be.
    """
    home = Path.home()
    pyenv = Path(os.environ.get("PYENV_ROOT") or home / ".pyenv")
    for directory in os.environ.get("PATH", "").split(os.pathsep):
        if directory and Path(directory) != pyenv / "shims":
            for path in sorted(Path(directory).glob("python3.[0-9]*")):
                if re.fullmatch(r"python3\.\d+", path.name):
                    yield path.name, path
    data = Path(os.environ.get("XDG_DATA_HOME") or home / ".local" / "share")
    managed = Path(os.environ.get("UV_PYTHON_INSTALL_DIR") or data / "uv" / "python")
    for pattern in (pyenv / "versions" / "3.*", managed / "cpython-3.*"):
        for root in sorted(pattern.parent.glob(pattern.name), reverse=True):
            yield root.name, root / "bin" / "python"
