"""Running uv: resolving, making an environment, installing; and its last words when it cannot.

uv is asked with the surroundings shut out that would change the answer in silence: a project's own
uv settings (an empty directory stands for the project), a virtual environment that is active,
constraints in the environment. The user's indexes, proxies, credentials and cache stay.
"""

from __future__ import annotations

import importlib
import os
import re
import shutil
import subprocess
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bnverify.upgrade import processes
from bnverify.upgrade.requirements import EnvironmentUnavailableError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bnverify.upgrade.interpreters import Interpreter
    from bnverify.upgrade.processes import Token

# Packages that take minutes and compilers to build: where a Python has no wheel of one, that Python
# is the wrong one.
_WHEELS_ONLY = ("dm-tree", "jaxlib", "ml-dtypes", "numpy", "scipy", "tensorstore")
_HIDDEN = {
    *("VIRTUAL_ENV", "CONDA_PREFIX", "PYTHONPATH", "PYTHONHOME", "UV_PYTHON", "UV_SYSTEM_PYTHON"),
    *("UV_CONSTRAINT", "UV_OVERRIDE", "UV_EXCLUDE", "UV_TARGET", "UV_PREFIX", "UV_PROJECT"),
    *("UV_WORKING_DIRECTORY", "UV_NO_BINARY", "UV_ONLY_BINARY", "UV_PROJECT_ENVIRONMENT"),
}
_FINDING = threading.Lock()
_WORDS = 2000  # characters of uv's last words that a message has room for


class UvError(Exception):
    """uv failed; the text is what it said last."""

    @property
    def wants_another_python(self) -> bool:
        """Whether another Python may do."""
        said = re.sub(r"\s+", " ", str(self))
        return bool(
            re.search(
                r"current Python version|no wheels with a matching Python|Requires-Python", said
            )
            or re.search(r"requires? Python|does not satisfy Python", said)
        )

    @property
    def mend(self) -> str:
        """What is likely to help."""
        said = re.sub(r"\s+", " ", str(self))
        for pattern, mend in _MENDS:
            if re.search(pattern, said, re.IGNORECASE):
                return mend
        return "try the requirement with `uv pip compile` by itself, and mend it there"


_MENDS = (
    (r"no space left", "free space, or let BNVERIFY_CACHE and UV_CACHE_DIR name a larger disk"),
    (
        r"hash mismatch",
        "what the index serves is not what the file's hashes were made from: find out why",
    ),
    (
        r"failed to fetch|error sending request|dns error|timed? ?out|connect",
        (
            "see whether the package index can be reached, and which one uv is set to use; with"
            " UV_OFFLINE=1 it makes do with what it has cached"
        ),
    ),
    (
        r"matching Python|current Python version|requires? Python|Requires-Python",
        "install a Python that these releases support, as `uv python install 3.12` does",
    ),
    (
        r"not found in the package registry|no version of|only [^ ]+[<>=].* available",
        "see whether the name and the version exist, and whether the index in use has them",
    ),
    (
        r"parse|invalid|expected",
        "correct the requirement; it is written as in pip's requirements files",
    ),
    (
        r"incompatible|unsatisfiable|depends on",
        "choose releases that allow each other, of the same months, say",
    ),
    (r"failed to build|build backend", "see whether the package builds with `uv build` by itself"),
)


@dataclass(frozen=True)
class Uv:
    """uv, run for one piece of work.

    Attributes:
        work: a directory for this work alone.
        directory: where relative paths in requirements start.
        token: to be given up by.
        timeout: seconds for one command.
    """

    work: Path
    directory: Path
    token: Token
    timeout: float

    def compile(
        self,
        sources: Sequence[Path],
        interpreter: Interpreter,
        *,
        constraints: Sequence[str] = (),
        overrides: Sequence[str] = (),
    ) -> list[str]:
        """Return the exact pins that requirements resolve to on a Python, one `name==version` each.

        Lines that begin with a dash are options of the files (an index, say), for `install`.

        Args:
            sources: requirements files, or a pyproject.toml for its dependencies.
            interpreter: the Python that decides which releases and wheels will do.
            constraints: bounds on what is named elsewhere.
            overrides: stand in the place of whatever anything asks of these packages.

        Raises:
            UvError: they do not resolve there.
        """
        options = [f"--only-binary={name}" for name in _WHEELS_ONLY]
        options += ["--constraint", str(self.write("constraints.txt", constraints))]
        options += ["--override", str(self.write("overrides.txt", overrides))]
        output = self._run(
            *("pip", "compile", "--python", str(interpreter.path), *options),
            *("--no-header", "--no-annotate", "--emit-index-url", "--emit-find-links"),
            *map(str, sources),
        )
        return [line for line in output.splitlines() if line.strip()]

    def venv(self, place: Path, interpreter: Interpreter) -> None:
        """Make an empty virtual environment that may be moved."""
        self._run("venv", "--relocatable", "--python", str(interpreter.path), str(place))

    def install(
        self,
        python: Path,
        lines: Sequence[str],
        *,
        target: Path | None = None,
        hashes: Path | None = None,
    ) -> None:
        """Install exactly these requirements and nothing they depend on.

        Args:
            python: whose environment to install into.
            lines: what `compile` returned, or a directory to build.
            target: a directory to install into instead.
            hashes: a requirements file; what it gives hashes for must match them.
        """
        options = ["--link-mode=hardlink", "--no-deps", "--python", str(python)]
        options += ["--target", str(target)] if target else []
        options += ["--constraint", str(hashes), "--verify-hashes"] if hashes else []
        self._run("pip", "install", *options, "-r", str(self.write("install.txt", lines)))

    def write(self, name: str, lines: Sequence[str]) -> Path:
        """Write requirement lines to a file, and return it."""
        path = self.work / name
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        return path

    def _run(self, *arguments: str) -> str:
        try:
            done = processes.run(
                [_program(), *arguments, "--quiet", "--color=never", "--project", str(self.work)],
                env=_environment(),
                cwd=self.directory,
                timeout=self.timeout,
                token=self.token,
            )
        except subprocess.TimeoutExpired:
            message = f"uv {' '.join(arguments[:2])} timed out after {self.timeout:.0f} s"
            raise UvError(message) from None
        if done.returncode:
            raise UvError(_last_words(done.stderr))
        return done.stdout


def _program() -> str:
    """Return the uv to run: the one installed beside bnverify, or the one on PATH."""
    try:
        with _FINDING:  # sysconfig, which it asks, fills its table under the eyes of other threads
            beside: str = importlib.import_module("uv").find_uv_bin()
    except (ImportError, OSError):  # no package of that name, or its program is gone
        found = shutil.which("uv")
        if not found:
            message = "uv, which makes the environments, is missing: pip install 'bnverify[gate]'"
            raise EnvironmentUnavailableError(message) from None
        return found
    return beside


def _environment() -> dict[str, str]:
    env = {name: value for name, value in os.environ.items() if name not in _HIDDEN}
    env["UV_PYTHON_DOWNLOADS"] = "never"
    # A version-control plug-in asked for a version by a copy without its history.
    env.setdefault("SETUPTOOLS_SCM_PRETEND_VERSION", "0")
    return env


def _last_words(stderr: str) -> str:
    """Return what uv said from its last `error:` on, without the frames of a build."""
    start = stderr.rfind("error: ")
    words = stderr[max(start, 0) :].strip()
    return (
        words if len(words) <= _WORDS else f"{words[: _WORDS // 2]}\n[...]\n{words[-_WORDS // 2 :]}"
    )
