"""Running uv: which one, with which variables, its last words when it fails, the Pythons it finds.

uv does not see what would silently change its answer: another project's uv settings, an active
virtual environment, constraints in variables. The user's indexes, proxies, credentials and cache stay.
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
_SECONDS = 1800  # for one command of uv: half a gigabyte over a slow line
_WORDS = 2000  # characters of uv's last words that a message has room for

# Variables that would silently change what uv resolves. Indexes, proxies and caches are kept.
_HIDDEN = {
    *("VIRTUAL_ENV", "CONDA_PREFIX", "UV_PYTHON", "UV_SYSTEM_PYTHON", "UV_CONSTRAINT"),
    *("UV_OVERRIDE", "UV_EXCLUDE", "UV_TARGET", "UV_PREFIX", "UV_PROJECT", "UV_WORKING_DIRECTORY"),
    *("UV_NO_BINARY", "UV_ONLY_BINARY", "UV_PROJECT_ENVIRONMENT", "UV_ENV_FILE", "UV_ISOLATED"),
}


class UvError(Exception):
    """uv failed; the text is what it said last."""

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
    ("no space left", "free space, or let BNVERIFY_CACHE and UV_CACHE_DIR name a larger disk"),
    ("hash mismatch", "find out why the index serves other files than the hashes were made from"),
    (
        "failed to fetch|error sending request|dns error|timed? ?out|connect",
        "check that the package index can be reached; UV_OFFLINE=1 makes do with what is cached",
    ),
    (
        f"matching Python|{_ANOTHER_PYTHON}",
        "install a Python that these releases support, as `uv python install 3.12` does",
    ),
    (
        "not found in the package registry|no version of|only [^ ]+[<>=].* available",
        "check that the name and the version exist, and that the index in use has them",
    ),
    ("parse|invalid|expected", "correct the requirement; it is written as in requirements files"),
    ("incompatible|unsatisfiable|depends on", "choose releases that allow each other"),
    ("failed to build|build backend", "check that the package builds with `uv build` by itself"),
    ("", "try the requirement with `uv pip compile` by itself"),
)


def run(arguments: Sequence[str], work: Path, directory: Path | None = None) -> list[str]:
    """Run uv, and return the lines that it printed, without empty ones.

    Args:
        arguments: of uv.
        work: a directory that stands for the project, so that no other project's settings count.
        directory: to run in; by default `work`.

    Raises:
        UvError: it failed.
        UsageError: there is no uv.
    """
    options = ["--quiet", "--color=never", "--project", str(work)]
    told = execute([program(), *arguments, *options], directory or work)
    return [line for line in told.splitlines() if line.strip()]


def execute(
    command: Sequence[str], directory: Path | None = None, env: dict[str, str] | None = None
) -> str:
    """Run a command line of uv, and return what it printed.

    Raises:
        UvError: it failed, or took too long.
    """
    try:
        done = processes.run(command, env=env or variables(), cwd=directory, timeout=_SECONDS)
    except subprocess.TimeoutExpired:
        raise UvError(f"uv {command[1]} timed out after {_SECONDS} s") from None
    if done.returncode:
        raise UvError(_last_words(done.stderr))
    return done.stdout


def program() -> str:
    """Return the uv that is installed beside bnverify."""
    try:
        import uv as package

        return package.find_uv_bin()
    except (ImportError, FileNotFoundError):
        raise UsageError("uv, which makes the environments, is missing: pip install uv") from None


def variables(paths: Sequence[Path] = ()) -> dict[str, str]:
    """Return the variables for uv and what it runs: none that leads Python or uv elsewhere.

    What configures jax (JAX_PLATFORMS, XLA_FLAGS and so on) passes through.

    Args:
        paths: the whole PYTHONPATH.
    """
    env = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("PYTHON") and name not in _HIDDEN
    }
    env |= {"PYTHONNOUSERSITE": "1", "PYTHONSAFEPATH": "1", "UV_PYTHON_DOWNLOADS": "never"}
    env["PYTHONPATH"] = os.pathsep.join(map(str, paths))
    env.setdefault("JAX_PLATFORMS", "cpu")  # every claim is about the CPU
    # A version-control plug-in is asked for a version by a copy without its history.
    env.setdefault("SETUPTOOLS_SCM_PRETEND_VERSION", "0")
    return env


def _last_words(stderr: str) -> str:
    """Return what uv said from its last `error:` on, shortened in the middle."""
    words = stderr[max(stderr.rfind("error: "), 0) :].strip()
    half = _WORDS // 2
    return words if len(words) <= _WORDS else f"{words[:half]}\n[...]\n{words[-half:]}"


# The Pythons of this machine


@dataclass(frozen=True)
class Python:
    """A Python of this machine.

    Attributes:
        path: the interpreter.
        name: its version, as 3.11.7.
    """

    path: Path
    name: str

    @property
    def minor(self) -> tuple[int, ...]:
        """Its minor version, as (3, 11)."""
        return Version(self.name).release[:2]


def pythons() -> Iterator[Python]:
    """Yield one Python of each minor version: the running one, then by how near they are to it.

    The nearest first, so that both sides of an upgrade differ in as little as possible; of two
    equally near the older, because more packages support it. None is ever downloaded.
    """
    own = Python(Path(sys.executable), platform.python_version())
    yield own
    found: dict[tuple[int, ...], Python] = {}
    for told in json.loads(execute([program(), "python", "list", *_INSTALLED], env=_with_pyenv())):
        python = Python(Path(told["path"]), told["version"])
        if told["implementation"] == "cpython" and told["variant"] == "default":
            found.setdefault(python.minor, python)
    found.pop(own.minor, None)
    for minor in sorted(found, key=lambda v: (abs(v[1] - own.minor[1]), v)):
        if minor >= _OLDEST:
            yield found[minor]


_INSTALLED = ("--only-installed", "--output-format", "json")


def _with_pyenv() -> dict[str, str]:
    """Return variables with which uv finds pyenv's Pythons: its shims on PATH run only one."""
    root = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    others = os.environ.get("PATH", "").split(os.pathsep)
    places = [*sorted(map(str, root.glob("versions/3.[1-9][0-9].*/bin"))), *others]
    path = os.pathsep.join(place for place in places if Path(place) != root / "shims")
    return {**variables(), "PATH": path}
