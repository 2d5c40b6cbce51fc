"""The environments of an upgrade: what `--from` and `--to` name, resolved, created and run by uv.

    with workspace() as work:
        new = resolve(parse("jax==0.10.2"), work)
        new.run(["-c", "import jax; print(jax.__version__)"], work)

`uv pip compile` turns a requirement into exact pins for a Python that supports them. `uv run`
creates the environment of these pins or finds it in uv's cache, which is locked and never holds an
incomplete environment. bnverify itself and the user's project are added through PYTHONPATH, so
editing either needs no new environment.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import re
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote

from packaging.requirements import InvalidRequirement
from packaging.requirements import Requirement as Specifier
from packaging.utils import canonicalize_name
from packaging.version import Version

from bnverify import compile_cache
from bnverify.errors import UsageError, cause
from bnverify.upgrade import processes, sources, uv

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

OWN = ("msgspec",)
"""The dependencies of bnverify that recording needs."""

NEEDED = ("jax", "jaxlib", "flax", "optax", *OWN)
"""The packages of every environment; those that a requirement does not name are the newest."""

_UNUSED = 60 * 24 * 3600  # seconds after which an unused recording is removed from the cache
_PACKAGE = Path(__file__).parents[1]

# Building these takes minutes and compilers, so a Python without wheels for them is not used.
_WHEELS_ONLY = ("dm-tree", "jaxlib", "ml-dtypes", "numpy", "scipy", "tensorstore")

# As an override: no requirement installs bnverify, because the running one records.
_NO_BNVERIFY = 'bnverify ; python_version < "0"'

_FILE_SUFFIXES = {".txt", ".in", ".lock", ".pip", ".toml", ".cfg"}
_EXACT = re.compile(r"[A-Za-z0-9._-]+(\[[^\]]*\])?\s*(==|\s@\s)")
_LINE = re.compile(
    r"\s*([A-Za-z0-9][A-Za-z0-9._-]*)\s*(?:\[[^\]]*\]\s*)?"
    r"(?:==\s*([0-9][A-Za-z0-9.!+-]*)(?=[\s;#\\]|$))?"
)


# What --from and --to name.


@dataclass(frozen=True)
class Requirement:
    """One side of an upgrade; without python, file and specifiers, the newest releases.

    Attributes:
        text: as the user wrote it, for messages.
        directory: the base of relative paths in a file or list.
        python: the interpreter of an existing environment.
        file: a requirements file.
        specifiers: a list of requirements, such as `jax==0.10.2`.
    """

    text: str
    directory: Path
    python: Path | None = None
    file: Path | None = None
    specifiers: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """Return the requirement lines of the file or list."""
        if self.file:
            return self.file.read_text(encoding="utf-8").splitlines()
        return list(self.specifiers)

    def pinned(self) -> set[str]:
        """Return the packages that a requirements file pins if every line is a pin, else none."""
        lines = [line for line in self.lines() if line.strip() and not line.startswith("#")]
        names = _names(lines)
        exact = self.file and all(_names([line]) and None not in names.values() for line in lines)
        return set(names) if exact else set()

    def constraints(self) -> list[str]:
        """Return constraints on unnamed packages whose metadata allow versions that do not work."""
        names = _names(self.lines())
        version = names.get("jax")
        if version and "flax" not in names and Version(version) < Version("0.4.33"):
            return ["flax<0.10.4"]  # flax.nnx 0.10.4 imports AbstractMesh, which jax 0.4.32 lacks
        return []


def parse(text: str, directory: Path | None = None) -> Requirement:
    """Parse the argument of `--from` or `--to`.

    Args:
        text: `installed` for the running interpreter; `latest` for the newest releases; the path of
            a virtual environment or its interpreter; a requirements file; or a list such as
            `jax==0.9.2,flax==0.12.6`.
        directory: the base of relative paths; by default the current directory.

    Raises:
        UsageError: it is none of these.
    """
    directory = (directory or Path.cwd()).absolute()
    asked = text.strip()
    if asked == "installed":
        return Requirement(text, directory, python=Path(sys.executable))
    if asked == "latest":
        return Requirement(text, directory)
    path = directory / Path(asked).expanduser()
    if asked and path.is_dir():
        python = path / "bin" / "python"
        if (path / "pyvenv.cfg").is_file() and python.exists():
            return Requirement(text, directory, python=python)
        raise UsageError(
            f"{text!r} is a directory but not a virtual environment; give its requirements file"
        )
    if asked and path.exists() and path.name.startswith("python"):
        return Requirement(text, directory, python=path)
    if asked and path.exists():
        try:
            path.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise UsageError(f"cannot read the requirements file {path}: {cause(error)}") from None
        return Requirement(text, directory, file=path)
    looks_like_file = "@" not in asked and ("/" in asked or Path(asked).suffix in _FILE_SUFFIXES)
    specifiers = () if looks_like_file else _split(asked)
    if not specifiers:
        found = (
            f"there is no file {path}" if looks_like_file else "it is not a list of requirements"
        )
        raise UsageError(
            f"{text!r} is not an environment: {found}; give a requirements file, a list such as"
            " jax==0.9.2,flax==0.12.6, a virtual environment, installed, or latest"
        )
    return Requirement(text, directory, specifiers=specifiers)


def _split(text: str) -> tuple[str, ...]:
    """Split at commas between requirements, but not within extras or version ranges."""
    pieces = re.split(r",(?![^\[]*\])(?!\s*[<>=!~])", text)
    try:
        return tuple(str(Specifier(piece.strip())) and piece.strip() for piece in pieces)
    except InvalidRequirement:
        return ()


def _names(lines: Sequence[str]) -> dict[str, str | None]:
    """Return package -> pinned version, or None, for the lines that name a package."""
    found = (_LINE.match(line) for line in lines)
    return {canonicalize_name(match[1]): match[2] for match in found if match}


# The directory of one run.


@dataclass(frozen=True)
class Workspace:
    """The temporary files of one run, removed at its end.

    Attributes:
        path: the directory.
        kept: the directory of cached recordings.
    """

    path: Path
    kept: Path

    def write(self, name: str, lines: Sequence[str]) -> Path:
        """Write lines to a file and return its path."""
        path = self.path / name
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        return path

    @functools.cached_property
    def bnverify(self) -> Path:
        """A directory from which only the running bnverify can be imported.

        Its site-packages on PYTHONPATH would also provide its jax.
        """
        place = self.path / "bnverify"
        place.mkdir()
        (place / _PACKAGE.name).symlink_to(_PACKAGE)
        about = place / f"{_PACKAGE.name}.dist-info" / "METADATA"
        about.parent.mkdir()
        about.write_text(f"Metadata-Version: 2.1\nName: {_PACKAGE.name}\nVersion: {_version()}\n")
        return place


@contextlib.contextmanager
def workspace() -> Iterator[Workspace]:
    """Create a workspace in bnverify's cache, and remove those that killed runs left there.

    Raises:
        UsageError: the cache is not writable, or the platform is Windows.
    """
    try:
        import fcntl
    except ImportError:  # pragma: no cover -- Windows has neither flock nor killpg
        raise UsageError("environments need Linux or macOS; on Windows use WSL") from None
    root = compile_cache.cache_root().absolute() / "upgrade"
    try:
        # 0o700: anyone who can write here can run code in every process that uses the cache.
        for directory in (root, root / "work", root / "recordings"):
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        with (root / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # a new workspace must be locked before it can be seen
            _remove_unused(root)
            place = root / "work" / secrets.token_hex(8)
            place.mkdir()
            used = (place / "lock").open("w")
            fcntl.flock(used, fcntl.LOCK_EX)  # released by the system if this process dies
        with used:
            try:
                yield Workspace(place, root / "recordings")
            finally:
                shutil.rmtree(place, ignore_errors=True)
    except OSError as error:
        raise UsageError(
            f"the cache {root} cannot be used: {error}; set BNVERIFY_CACHE to a directory on a"
            " local disk with free space"
        ) from None


def _remove_unused(root: Path) -> None:
    import fcntl

    for place in (root / "work").iterdir():
        with contextlib.suppress(OSError), (place / "lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # BlockingIOError if it is in use
            shutil.rmtree(place, ignore_errors=True)
    for file in (root / "recordings").iterdir():
        with contextlib.suppress(OSError):
            if file.stat().st_mtime < time.time() - _UNUSED:
                file.unlink()


def _version() -> str:
    try:
        return importlib.metadata.version(_PACKAGE.name)
    except importlib.metadata.PackageNotFoundError:  # a checkout that is not installed
        return "0"


# From a requirement to an environment.


@dataclass(frozen=True)
class Environment:
    """A Python with exact releases, which uv creates on first use.

    Attributes:
        requirement: as the user wrote it.
        python: the interpreter; that of the environment if it already exists.
        pins: requirement lines with exact releases; None for an existing environment.
        options: uv options from a requirements file, such as its indexes.
        builds: local directories and wheels, installed without their dependencies.
        paths: directories added to PYTHONPATH.
        hashed: a requirements file with hashes that the installed files must match.
        key: a hash of everything that determines what is imported; None if it may change in place.
    """

    requirement: str
    python: Path
    pins: tuple[str, ...] | None = None
    options: tuple[str, ...] = ()
    builds: tuple[Path, ...] = ()
    paths: tuple[Path, ...] = ()
    hashed: Path | None = None
    key: str | None = None

    def run(
        self, arguments: Sequence[str], work: Workspace, timeout: float | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run the environment's Python in the workspace; return its status and output.

        It can import its own releases, bnverify and the project, but not the user's site-packages,
        nor anything on this process's PYTHONPATH or in the current directory. Variables that
        configure jax are passed on.

        Args:
            arguments: arguments of Python, such as `["-m", "bnverify", ...]`.
            work: from `workspace`.
            timeout: the limit in seconds, not counting the creation of the environment.

        Raises:
            UsageError: uv cannot create the environment.
            subprocess.TimeoutExpired: the command took longer.
        """
        try:
            layer = self._prepared(work)
        except uv.UvError as error:
            raise _unavailable(self.requirement, error) from None
        return processes.run(
            [*self._command(work), *arguments],
            env=uv.variables([work.bnverify, *layer, *self.paths]),
            cwd=work.path,
            timeout=timeout,
        )

    def _command(self, work: Workspace) -> list[str]:
        """Return the uv command that creates the environment or finds it, and runs it."""
        if self.pins is None:
            made = [f"--with={name}" for name in OWN]
        else:
            pins = work.write(f"pins-{self._name}.txt", self.pins)
            made = ["--isolated", "--with-requirements", str(pins), *self.options]
            made += [f"--no-build-package={name}" for name in _WHEELS_ONLY]
        made += ["--quiet", "--color=never", "--no-project", "--python", str(self.python)]
        return [uv.program(), "run", *made, "--", "python"]

    @property
    def _name(self) -> str:
        return hashlib.sha256(repr(self).encode()).hexdigest()[:16]

    def _prepared(self, work: Workspace) -> list[Path]:
        """Create the environment; return the directories to put before it on PYTHONPATH."""
        place = work.path / f"site-{self._name}"
        if not place.exists():
            rough = work.path / f"rough-{self._name}"
            rough.mkdir()
            install = ["pip", "install", "--no-deps", "--python", str(self.python), "--target"]
            if self.hashed:
                # `uv run` checks no hashes, but uses the checked wheels that this puts into uv's
                # cache.
                pins = work.write(f"hashed-{self._name}.txt", self.pins or ())
                hashes = ["--constraint", str(self.hashed), "--verify-hashes", "-r", str(pins)]
                uv.run([*install, str(rough / "checked"), *self.options, *hashes], work.path)
                shutil.rmtree(rough / "checked")
            if self.builds:
                uv.run([*install, str(rough), *map(str, self.builds)], work.path)
            uv.execute([*self._command(work), "-c", ""], work.path)
            rough.rename(place)
        return [place]


def resolve(requirement: Requirement, work: Workspace, project: Path | None = None) -> Environment:
    """Resolve a requirement to an environment; nothing is installed yet.

    Args:
        requirement: from `parse`.
        work: from `workspace`.
        project: a directory to import from. If it has a pyproject.toml or setup.py it is built, and
            its dependencies are added; the requirement's releases override its bounds on them.

    Raises:
        UsageError: the requirement does not resolve on any available Python; includes uv's message.
    """
    try:
        return _resolve(requirement, work, project)
    except uv.UvError as error:
        raise _unavailable(requirement.text, error) from None
    except sources.TreeError as error:
        raise _unavailable(requirement.text, error) from None


def _resolve(requirement: Requirement, work: Workspace, project: Path | None) -> Environment:
    builds: list[Path] = []
    paths: list[Path] = []
    decisive: list[str] = []
    copied = None
    if project:
        if any((project / name).is_file() for name in sources.PROJECT):
            copied, digest = _copied(project, work)
            builds.append(copied)
        else:
            digest = sources.digest(project, sources.files(project))
            paths += [place for place in (project / "src", project) if place.is_dir()]
        decisive += [digest, *map(str, paths)]
    if requirement.python:
        return Environment(
            requirement.text, requirement.python, builds=tuple(builds), paths=tuple(paths)
        )
    python, lines = _pins(requirement, work)
    options = [line for line in lines if re.match("--(?!editable)", line)]
    pins = [line for line in lines if line not in options]
    if copied:
        pins += _dependencies(copied, pins, python, requirement, work)
    local = {pin: path for pin in pins if (path := _local(pin, requirement.directory))}
    for path in local.values():
        copy, digest = _copied(path, work)
        builds.append(copy)
        decisive.append(digest)
    pins = [pin for pin in pins if pin not in local]
    decisive += [python.name, str(python.path.resolve()), *sorted(pins)]
    decisive.append(sources.digest(_PACKAGE, sources.files(_PACKAGE)))
    return Environment(
        requirement=requirement.text,
        python=python.path,
        pins=tuple(pins),
        options=tuple(word for line in options for word in line.split(maxsplit=1)),
        builds=tuple(builds),
        paths=tuple(paths),
        hashed=requirement.file if any("--hash=" in x for x in requirement.lines()) else None,
        key=hashlib.sha256(json.dumps(decisive).encode()).hexdigest(),
    )


def _pins(requirement: Requirement, work: Workspace) -> tuple[uv.Python, list[str]]:
    """Return the first Python on which the requirement resolves, and the pins there.

    For `latest`, the Python with the newest jax, flax and optax: the running Python may be too old
    for them and would silently resolve to older releases.
    """
    named = requirement.file or work.write("list.in", requirement.lines())
    compiled = [str(named), str(work.write("needed.in", NEEDED))]
    compiled += ["--constraint", str(work.write("constraints.txt", requirement.constraints()))]
    open_ended = not (requirement.file or requirement.specifiers)
    resolved: list[tuple[uv.Python, list[str]]] = []
    first_error: uv.UvError | None = None
    for python in uv.pythons():
        try:
            lines = _compile(compiled, [_NO_BNVERIFY], python, requirement, work)
        except uv.UvError as error:
            if not error.wants_another_python:
                raise
            first_error = first_error or error
            continue
        resolved.append((python, lines))
        if not open_ended:
            break
    if not resolved:
        assert first_error is not None  # the running Python is always tried
        raise first_error
    return max(resolved, key=lambda found: _newness(found[1]))  # the first if equal


def newest(
    package: str, versions: str, pythons: Sequence[uv.Python], work: Workspace
) -> str | None:
    """Return the newest release of a package in a range, on any Python; None if there is none.

    Args:
        package: its normalised name.
        versions: the range, such as `>=0.4.30,<0.5`.
        pythons: from `uv.pythons`; each may support releases that the others do not.
        work: from `workspace`.

    Raises:
        UsageError: the index cannot be queried.
    """
    asked = Requirement(package, work.path, specifiers=(f"{package}{versions}",))
    source = str(work.write("range.in", asked.lines()))
    found = []
    for python in pythons:
        try:
            found.append(_names(_compile([source], (), python, asked, work))[package])
        except uv.UvError as error:
            if not (error.wants_another_python or "unsatisfiable" in str(error)):
                raise UsageError(f"cannot list the releases of {package}: {error}") from None
    return max(filter(None, found), key=Version, default=None)


def _compile(
    arguments: Sequence[str],
    overrides: Sequence[str],
    python: uv.Python,
    requirement: Requirement,
    work: Workspace,
) -> list[str]:
    """Return the exact pins that requirements resolve to on a Python, and the options among them.

    If a file pins everything, the result cannot change, so uv's cache is tried before the network.
    """
    command = ["pip", "compile", "--no-header", "--no-annotate", "--python", str(python.path)]
    command += ["--emit-index-url", "--emit-find-links", *arguments]
    command += ["--override", str(work.write("overrides.txt", overrides))]
    command += [f"--only-binary={name}" for name in _WHEELS_ONLY]
    pinned = requirement.pinned()
    if pinned:
        with contextlib.suppress(uv.UvError):
            lines = uv.run([*command, "--offline"], work.path, requirement.directory)
            if set(_names(lines)) <= {*pinned, *OWN}:
                return lines
    return uv.run(command, work.path, requirement.directory)


def _dependencies(
    project: Path, pins: list[str], python: uv.Python, requirement: Requirement, work: Workspace
) -> list[str]:
    """Return pins for the project's dependencies that are not pinned already.

    The given pins override the project's own bounds, because they are what is tested.
    """
    source = next(path for name in sources.PROJECT if (path := project / name).exists())
    named = {_name(pin): pin for pin in pins if _EXACT.match(pin)}
    found = _compile([str(source)], [*named.values(), _NO_BNVERIFY], python, requirement, work)
    return [pin for pin in found if not pin.startswith("--") and _name(pin) not in named]


# Requirement lines that name a local file or directory: their content is part of the key.


def _local(pin: str, directory: Path) -> Path | None:
    """Return the local file or directory that a pin names, or None."""
    target = re.sub(r"^(-e|--editable)[\s=]+|^[A-Za-z0-9._-]+(\[[^\]]*\])?\s+@\s+", "", pin)
    target = re.split(r"\s|#|\[", target, maxsplit=1)[0]
    if target.startswith("file://"):
        return Path(unquote(target.removeprefix("file://")))
    return None if _EXACT.match(target) or "://" in target else directory / target


def _copied(path: Path, work: Workspace) -> tuple[Path, str]:
    """Copy a file or a directory's sources; return the copy and its hash.

    Some build back ends write into the source directory, and the hash must be that of what is
    built.
    """
    place = Path(tempfile.mkdtemp(prefix="copy-", dir=work.path)) / path.name
    if not path.is_dir():
        shutil.copy(path, place)
        return place, sources.digest(place.parent, [Path(place.name)])
    names = sources.files(path)
    sources.copy(path, names, place)
    return place, sources.digest(place, names)


def _name(pin: str) -> str:
    return canonicalize_name(re.split(r"[\[=@ ;]", pin, maxsplit=1)[0])


def _newness(pins: list[str]) -> list[Version]:
    versions = _names(pins)
    return [Version(versions.get(name) or "0") for name in ("jax", "flax", "optax")]


def _unavailable(requirement: str, error: uv.UvError | sources.TreeError) -> UsageError:
    said = f"uv says\n{error}\nLikely fix: {error.fix}" if isinstance(error, uv.UvError) else error
    return UsageError(f"cannot create the environment {requirement}: {said}")
