"""The environments of an upgrade: what `--from` and `--to` name, resolved, made and run by uv.

    with workspace() as work:
        new = resolve(parse("jax==0.10.2"), work)
        new.run(["-c", "import jax; print(jax.__version__)"], work)

`uv pip compile` turns a requirement into exact pins on a Python that they support, and `uv run`
makes the environment of these pins, or finds it in uv's cache, which is locked and never holds half
an environment. bnverify itself and the user's project come in by PYTHONPATH and are not part of the
environment, so that an edit of either makes no new one.
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
"""What bnverify needs of its own dependencies to record."""

NEEDED = ("jax", "jaxlib", "flax", "optax", *OWN)
"""What every environment must hold; what a requirement does not name is resolved to its newest."""

_UNUSED = 60 * 24 * 3600  # seconds after which a kept recording that nobody used is removed
_PACKAGE = Path(__file__).parents[1]

# Packages that take minutes and compilers to build: a Python without a wheel of them will not do.
_WHEELS_ONLY = ("dm-tree", "jaxlib", "ml-dtypes", "numpy", "scipy", "tensorstore")

# As an override: nobody's requirement installs a bnverify, because the running one records.
_NO_BNVERIFY = 'bnverify ; python_version < "0"'

_FILE_SUFFIXES = {".txt", ".in", ".lock", ".pip", ".toml", ".cfg"}
_EXACT = re.compile(r"[A-Za-z0-9._-]+(\[[^\]]*\])?\s*(==|\s@\s)")
_LINE = re.compile(
    r"\s*([A-Za-z0-9][A-Za-z0-9._-]*)\s*(?:\[[^\]]*\]\s*)?"
    r"(?:==\s*([0-9][A-Za-z0-9.!+-]*)(?=[\s;#\\]|$))?"
)


# What --from and --to name


@dataclass(frozen=True)
class Requirement:
    """One side of an upgrade; without Python, file and specifiers, the newest releases.

    Attributes:
        text: as the user wrote it, for messages.
        directory: what relative paths in a file or a list are relative to.
        python: the interpreter of an environment that exists already.
        file: a requirements file.
        specifiers: of a list, as `jax==0.10.2`.
    """

    text: str
    directory: Path
    python: Path | None = None
    file: Path | None = None
    specifiers: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """Return the requirement lines, as written in the file or the list."""
        if self.file:
            return self.file.read_text(encoding="utf-8").splitlines()
        return list(self.specifiers)

    def pinned(self) -> set[str]:
        """Return the packages that a file pins, where every line pins one; else nothing."""
        lines = [line for line in self.lines() if line.strip() and not line.startswith("#")]
        names = _names(lines)
        exact = self.file and all(_names([line]) and None not in names.values() for line in lines)
        return set(names) if exact else set()

    def constraints(self) -> list[str]:
        """Return bounds on what the requirement does not name, where metadata promise too much."""
        names = _names(self.lines())
        version = names.get("jax")
        if version and "flax" not in names and Version(version) < Version("0.4.33"):
            return ["flax<0.10.4"]  # flax.nnx 0.10.4 imports AbstractMesh, which jax 0.4.32 lacks
        return []


def parse(text: str, directory: Path | None = None) -> Requirement:
    """Return the requirement that `--from` or `--to` names.

    Args:
        text: `installed` for the running interpreter; `latest` for the newest releases; a virtual
            environment's directory or its interpreter; a requirements file; or a list such as
            `jax==0.9.2,flax==0.12.6`.
        directory: what relative paths are relative to; by default the current directory.

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
            f"{text!r} is a directory and not a virtual environment; give its requirements file"
        )
    if asked and path.exists() and path.name.startswith("python"):
        return Requirement(text, directory, python=path)
    if asked and path.exists():
        try:
            path.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise UsageError(f"cannot read the requirements file {path}: {cause(error)}") from None
        return Requirement(text, directory, file=path)
    like_a_file = "@" not in asked and ("/" in asked or Path(asked).suffix in _FILE_SUFFIXES)
    specifiers = () if like_a_file else _split(asked)
    if not specifiers:
        found = f"there is no file {path}" if like_a_file else "it is not a list of requirements"
        raise UsageError(
            f"{text!r} names no environment: {found}; give a requirements file, a list such as"
            " jax==0.9.2,flax==0.12.6, a virtual environment, installed, or latest"
        )
    return Requirement(text, directory, specifiers=specifiers)


def _split(text: str) -> tuple[str, ...]:
    """Split at the commas between requirements, not those within extras or version ranges."""
    pieces = re.split(r",(?![^\[]*\])(?!\s*[<>=!~])", text)
    try:
        return tuple(str(Specifier(piece.strip())) and piece.strip() for piece in pieces)
    except InvalidRequirement:
        return ()


def _names(lines: Sequence[str]) -> dict[str, str | None]:
    """Return package -> the version it is pinned to, or None, of the lines that name one."""
    found = (_LINE.match(line) for line in lines)
    return {canonicalize_name(match[1]): match[2] for match in found if match}


# A directory for one run


@dataclass(frozen=True)
class Workspace:
    """The files of one run of bnverify, removed when it ends.

    Attributes:
        path: the directory.
        kept: where recordings are kept from run to run.
    """

    path: Path
    kept: Path

    def write(self, name: str, lines: Sequence[str]) -> Path:
        """Write lines to a file, and return its path."""
        path = self.path / name
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        return path

    @functools.cached_property
    def bnverify(self) -> Path:
        """A directory to import the running bnverify from, and nothing else.

        Its site-packages on PYTHONPATH would bring its jax along.
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
    """Make a workspace in bnverify's cache; remove what killed runs left there.

    Raises:
        UsageError: the cache cannot be written, or this is Windows.
    """
    try:
        import fcntl
    except ImportError:  # pragma: no cover -- Windows has neither flock nor killpg
        raise UsageError("environments are made on Linux and macOS; on Windows use WSL") from None
    root = compile_cache.cache_root().absolute() / "upgrade"
    try:
        # 0o700: who can write here can run code in every process that uses it.
        for directory in (root, root / "work", root / "recordings"):
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        with (root / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # nobody may remove a workspace before it is locked
            _remove_what_nobody_uses(root)
            place = root / "work" / secrets.token_hex(8)
            place.mkdir()
            used = (place / "lock").open("w")
            fcntl.flock(used, fcntl.LOCK_EX)  # the system unlocks it when its holder dies
        with used:
            try:
                yield Workspace(place, root / "recordings")
            finally:
                shutil.rmtree(place, ignore_errors=True)
    except OSError as error:
        raise UsageError(
            f"the cache {root} cannot be used: {error}; let BNVERIFY_CACHE name a directory on a"
            " local disk with room"
        ) from None


def _remove_what_nobody_uses(root: Path) -> None:
    import fcntl

    for place in (root / "work").iterdir():
        with contextlib.suppress(OSError), (place / "lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # BlockingIOError where it is in use
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


# From a requirement to an environment


@dataclass(frozen=True)
class Environment:
    """A Python with exact releases, which uv makes where it is first used.

    Attributes:
        requirement: as the user wrote it.
        python: the interpreter; of an environment that exists already, that environment's.
        pins: requirement lines that name exact releases; None of an existing environment.
        options: command-line options for uv that a requirements file holds: its indexes.
        builds: directories and wheels of this machine, to install without their dependencies.
        paths: directories to import from as they lie.
        hashed: a requirements file with hashes that what is installed must match.
        key: a hash of everything that decides what is imported; None where it may change in place.
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
        """Run the environment's Python in the workspace; return its status and what it printed.

        It sees its own releases, bnverify and the project; not the user's site-packages, nor this
        process's PYTHONPATH or current directory. What configures jax passes through.

        Args:
            arguments: of Python, as `["-m", "bnverify", ...]`.
            work: made by `workspace`.
            timeout: seconds for the command, once the environment is there.

        Raises:
            UsageError: uv cannot make the environment.
            subprocess.TimeoutExpired: the command ran for longer.
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
        """Return the command that makes the environment, or finds it in uv's cache, and runs it."""
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
        """Make the environment, and return the directories to import from before it."""
        place = work.path / f"site-{self._name}"
        if not place.exists():
            rough = work.path / f"rough-{self._name}"
            rough.mkdir()
            install = ["pip", "install", "--no-deps", "--python", str(self.python), "--target"]
            if self.hashed:
                # `uv run` checks no hashes; it takes the wheels that this leaves in uv's cache.
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
    """Return the environment that a requirement asks for; nothing is installed yet.

    Args:
        requirement: from `parse`.
        work: made by `workspace`.
        project: a directory with a pyproject.toml or setup.py, to build and import from; its
            dependencies are added, the requirement's releases overriding its own bounds on them.
            Any other directory is imported from as it lies.

    Raises:
        UsageError: it does not resolve on any Python that was found, in the resolver's words.
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

    `latest` is the newest jax, flax and optax of any Python found: the running one may be too old
    for them, and would resolve to older releases without a word.
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
    return max(resolved, key=lambda found: _newness(found[1]))  # the first of equals


def newest(
    package: str, versions: str, pythons: Sequence[uv.Python], work: Workspace
) -> str | None:
    """Return the newest release of a package in a range, on any Python; None where there is none.

    Args:
        package: its normalised name.
        versions: the range, as `>=0.4.30,<0.5`.
        pythons: from `uv.pythons`; each may know releases that the others do not.
        work: made by `workspace`.

    Raises:
        UsageError: the index cannot be asked.
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

    A file that pins everything means the same every day, so that uv's cache may answer alone.
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
    """Return pins of what the project needs besides the given ones.

    These override what the project asks of the same packages: they are under test, and the
    project's own bounds are what an upgrade is about to change.
    """
    source = next(path for name in sources.PROJECT if (path := project / name).exists())
    named = {_name(pin): pin for pin in pins if _EXACT.match(pin)}
    found = _compile([str(source)], [*named.values(), _NO_BNVERIFY], python, requirement, work)
    return [pin for pin in found if not pin.startswith("--") and _name(pin) not in named]


# Requirement lines that name a file or a directory of this machine: their content counts


def _local(pin: str, directory: Path) -> Path | None:
    """Return the file or directory that a pin names, where it names one."""
    target = re.sub(r"^(-e|--editable)[\s=]+|^[A-Za-z0-9._-]+(\[[^\]]*\])?\s+@\s+", "", pin)
    target = re.split(r"\s|#|\[", target, maxsplit=1)[0]
    if target.startswith("file://"):
        return Path(unquote(target.removeprefix("file://")))
    return None if _EXACT.match(target) or "://" in target else directory / target


def _copied(path: Path, work: Workspace) -> tuple[Path, str]:
    """Return a new copy of a file or of a directory's sources, and its hash.

    A copy, because some back ends write where they build, and so that the hash is that of the build.
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
    return UsageError(f"cannot make the environment {requirement}: {said}")
