"""Run uv: which program, with which variables, its error messages, the Pythons it finds.

uv does not see what would silently change its result: the uv settings of other projects, an active
virtual environment, constraints in variables. The user's indexes, proxies, credentials and cache
apply.
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from packaging.version import Version

from bnverify.errors import UsageError
from bnverify.upgrade import processes

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_OLDEST = (3, 11)  # the oldest Python that bnverify runs on
_SECONDS = 1800  # the limit for one uv command: half a gigabyte on a slow connection
_MAX_CHARACTERS = 2000  # of uv's error message

# Variables that would silently change what uv resolves.
_HIDDEN = {
    *("VIRTUAL_ENV", "CONDA_PREFIX", "UV_PYTHON", "UV_SYSTEM_PYTHON", "UV_CONSTRAINT"),
    *("UV_OVERRIDE", "UV_EXCLUDE", "UV_TARGET", "UV_PREFIX", "UV_PROJECT", "UV_WORKING_DIRECTORY"),
    *("UV_NO_BINARY", "UV_ONLY_BINARY", "UV_PROJECT_ENVIRONMENT", "UV_ENV_FILE", "UV_ISOLATED"),
}


class UvError(Exception):
    """uv failed; the text is the end of its error output."""

    @property
    def wants_another_python(self) -> bool:
        """Whether the requirements may resolve on another Python."""
        return bool(re.search(_ANOTHER_PYTHON, " ".join(str(self).split())))

    @property
    def fix(self) -> str:
        """What is likely to help."""
        said = " ".join(str(self).split())
        return next(fix for pattern, fix in _FIXES if re.search(pattern, said, re.IGNORECASE))


_ANOTHER_PYTHON = (
    "current Python version|no wheels with a matching Python|Requires-Python|requires? Python"
    "|does not satisfy Python"
)
_FIXES = (
    ("no space left", "free some space, or set BNVERIFY_CACHE and UV_CACHE_DIR to a larger disk"),
    ("hash mismatch", "find out why the index serves files with other hashes"),
    (
        "failed to fetch|error sending request|dns error|timed? ?out|connect",
        "check that the package index is reachable; UV_OFFLINE=1 uses only cached packages",
    ),
    (
        f"matching Python|{_ANOTHER_PYTHON}",
        "install a Python that these releases support, e.g. `uv python install 3.12`",
    ),
    (
        "not found in the package registry|no version of|only [^ ]+[<>=].* available",
        "check that the name and the version exist on the index in use",
    ),
    ("parse|invalid|expected", "correct the requirement; use the syntax of requirements files"),
    ("incompatible|unsatisfiable|depends on", "choose releases that are compatible"),
    ("failed to build|build backend", "check that the package builds with `uv build`"),
    ("", "try to resolve the requirement with `uv pip compile`"),
)


def run(arguments: Sequence[str], work: Path, directory: Path | None = None) -> list[str]:
    """Run uv and return the non-empty lines it printed.

    Args:
        arguments: uv's arguments.
        work: a directory used as the project, so that no other project's settings apply.
        directory: the working directory; by default `work`.

    Raises:
        UvError: uv failed.
        UsageError: uv is not installed.
    """
    options = ["--quiet", "--color=never", "--project", str(work)]
    printed = execute([program(), *arguments, *options], directory or work)
    return [line for line in printed.splitlines() if line.strip()]


def execute(
    command: Sequence[str], directory: Path | None = None, env: dict[str, str] | None = None
) -> str:
    """Run a uv command line and return what it printed.

    Raises:
        UvError: it failed or timed out.
    """
    try:
        done = processes.run(command, env=env or variables(), cwd=directory, timeout=_SECONDS)
    except subprocess.TimeoutExpired:
        raise UvError(f"uv {command[1]} timed out after {_SECONDS} s") from None
    if done.returncode:
        raise UvError(_error_message(done.stderr))
    return done.stdout


def program() -> str:
    """Return the path of the uv installed with bnverify."""
    try:
        import uv as package

        return package.find_uv_bin()
    except (ImportError, FileNotFoundError):
        raise UsageError("uv, which creates the environments, is missing: pip install uv") from None


def variables(paths: Sequence[Path] = ()) -> dict[str, str]:
    """Return the environment variables for uv and the commands it runs.

    Variables that redirect Python or uv are removed; those that configure jax (JAX_PLATFORMS,
    XLA_FLAGS and so on) are kept.

    Args:
        paths: the complete PYTHONPATH.
    """
    env = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("PYTHON") and name not in _HIDDEN
    }
    env |= {"PYTHONNOUSERSITE": "1", "PYTHONSAFEPATH": "1", "UV_PYTHON_DOWNLOADS": "never"}
    env["PYTHONPATH"] = os.pathsep.join(map(str, paths))
    env.setdefault("JAX_PLATFORMS", "cpu")  # recordings are of the CPU backend
    # The project is built from a copy without its git history.
    env.setdefault("SETUPTOOLS_SCM_PRETEND_VERSION", "0")
    return env


def _error_message(stderr: str) -> str:
    """Return uv's output from the last `error:` on, shortened in the middle."""
    text = stderr[max(stderr.rfind("error: "), 0) :].strip()
    half = _MAX_CHARACTERS // 2
    return text if len(text) <= _MAX_CHARACTERS else f"{text[:half]}\n[...]\n{text[-half:]}"


# The installed Pythons.


@dataclass(frozen=True)
class Python:
    """An installed Python.

    Attributes:
        path: the interpreter.
        name: its version, such as 3.11.7.
    """

    path: Path
    name: str

    @property
    def minor(self) -> tuple[int, ...]:
        """Its minor version, such as (3, 11)."""
        return Version(self.name).release[:2]


def pythons() -> Iterator[Python]:
    """Yield one Python for each minor version: the running one, then the nearest first.

    Nearest first, so that both sides of an upgrade differ as little as possible; of two equally
    near, the older, because more packages support it. None is downloaded.
    """
    own = Python(Path(sys.executable), platform.python_version())
    yield own
    found: dict[tuple[int, ...], Python] = {}
    listed = json.loads(execute([program(), "python", "list", *_INSTALLED], env=_with_pyenv()))
    for entry in listed:
        python = Python(Path(entry["path"]), entry["version"])
        if entry["implementation"] == "cpython" and entry["variant"] == "default":
            found.setdefault(python.minor, python)
    found.pop(own.minor, None)
    for minor in sorted(found, key=lambda v: (abs(v[1] - own.minor[1]), v)):
        if minor >= _OLDEST:
            yield found[minor]


_INSTALLED = ("--only-installed", "--output-format", "json")


def _with_pyenv() -> dict[str, str]:
    """Return variables with which uv finds all of pyenv's Pythons, not only the shims'."""
    root = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    others = os.environ.get("PATH", "").split(os.pathsep)
    places = [*sorted(map(str, root.glob("versions/3.[1-9][0-9].*/bin"))), *others]
    path = os.pathsep.join(place for place in places if Path(place) != root / "shims")
    return {**variables(), "PATH": path}
