"""The releases that a requirement names: installed, seen to import, and what was asked for."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from bnverify.upgrade import processes, trees
from bnverify.upgrade.isolation import isolated
from bnverify.upgrade.requirements import EnvironmentUnavailableError, normal
from bnverify.upgrade.resolution import resolve

if TYPE_CHECKING:
    from bnverify.upgrade.layers import Project
    from bnverify.upgrade.processes import Token
    from bnverify.upgrade.requirements import Requirement
    from bnverify.upgrade.store import Store
    from bnverify.upgrade.uv import Uv

_FORMAT = 1  # raise it when the same pins shall make another environment
_IMPORTED = ("jax", "flax", "optax")
_IMPORT_SECONDS = 300  # for the first import, which compiles byte code: 3 to 10 s where it is idle

_NAMED = re.compile(r"[A-Za-z0-9._-]+(\[[^\]]*\])?\s*(==|\s@\s)")

_LOOK = """
import hashlib, importlib, importlib.metadata, json, os, platform, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
found = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions()}
state = hashlib.sha256()
known = set(getattr(sys, "stdlib_module_names", ()))  # from Python 3.10
for name in sorted({name.partition(".")[0] for name in sys.modules} - known):
    for root in sorted(getattr(sys.modules.get(name), "__path__", ())):
        for directory, inner, files in os.walk(root):
            inner.sort()
            for file in sorted(f for f in files if f.endswith((".py", ".so"))):
                at = os.stat(os.path.join(directory, file))
                state.update(f"{directory}/{file}:{at.st_size}:{at.st_mtime_ns};".encode())
found = {"python": platform.python_version(), "versions": found, "state": state.hexdigest()}
print(json.dumps(found))
"""


@dataclass(frozen=True)
class Releases:
    """A Python with releases installed.

    Attributes:
        python: the interpreter to run.
        version: its version, as 3.11.7.
        versions: of every distribution, by normalised name.
        key: a hash of what is installed.
    """

    python: Path
    version: str
    versions: dict[str, str]
    key: str


def there(requirement: Requirement, token: Token) -> Releases:
    """Return what is installed beside an interpreter that the requirement names.

    Its key holds the size and time of every source file that jax, flax and optax bring: what is
    installed there may be edited, and goes by the same version.

    Raises:
        EnvironmentUnavailableError: jax, flax and optax do not import there.
    """
    assert requirement.path is not None
    return _look(requirement.path.absolute(), token)


def install(requirement: Requirement, project: Project | None, store: Store, uv: Uv) -> Releases:
    """Return an environment with the requirement's releases, from the cache or made now.

    Args:
        requirement: a file, a list or latest.
        project: whose dependencies to add.
        store: the cache.
        uv: what resolves and installs.

    Raises:
        UvError: the requirement does not resolve on any Python found, or does not install.
        EnvironmentUnavailableError: it installs but does not import, or is not what was asked for.
    """
    interpreter, lines = resolve(requirement, store, uv)
    options = [line for line in lines if re.match("--(?!editable)", line)]
    pins = [line for line in lines if line not in options]
    if project and project.builds:
        named = {_name(pin): pin for pin in pins if _NAMED.match(pin)}
        beside = project.dependencies(uv, list(named.values()), interpreter)
        pins += [pin for pin in beside if not pin.startswith("--") and _name(pin) not in named]
    local = {pin: path for pin in pins if (path := _local(pin, requirement.directory))}
    hashes = [trees.digest_any(path) for path in local.values()]
    key = _hash([_FORMAT, interpreter.name, str(interpreter.path.resolve()), sorted(pins), hashes])

    def make(place: Path) -> dict[str, Any]:
        uv.venv(place / "venv", interpreter)
        python = place / "venv" / "bin" / "python"
        hashed = requirement.path if any("--hash=" in x for x in requirement.lines()) else None
        wanted = [_copied(local[pin], uv.work) if pin in local else pin for pin in pins]
        uv.install(python, [*options, *wanted], hashes=hashed)
        looked = _look(python, uv.token)
        _compare(pins, looked.versions)
        return {"python": looked.version, "versions": looked.versions, "pins": pins}

    place, told = store.get("environments", key, make, uv.token)
    return Releases(place / "venv" / "bin" / "python", told["python"], told["versions"], key)


def _look(python: Path, token: Token) -> Releases:
    command = [str(python), "-I", "-c", _LOOK, *_IMPORTED]
    try:
        done = processes.run(command, env=isolated(), timeout=_IMPORT_SECONDS, token=token)
    except subprocess.TimeoutExpired:
        message = f"importing {', '.join(_IMPORTED)} takes longer than {_IMPORT_SECONDS} s"
        raise EnvironmentUnavailableError(message) from None
    try:
        told = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        frames = [line for line in done.stderr.strip().splitlines() if "<frozen" not in line]
        words = "\n".join(frames[-3:])
        message = (
            f"jax, flax and optax do not import:\n{words}\nLikely mend: pin them, numpy and scipy"
            " to releases of the same months; some sets resolve and do not work"
        )
        raise EnvironmentUnavailableError(message) from None
    versions = {normal(name): version for name, version in told["versions"].items() if name}
    versions = dict(sorted(versions.items()))
    key = _hash([told["python"], versions, told["state"]])
    return Releases(python, told["python"], versions, key)


def _compare(pins: list[str], versions: dict[str, str]) -> None:
    """Refuse an environment that does not hold what was asked for, whatever the reason."""
    for pin in pins:
        name, _, version = re.split("[;\\ ]", pin)[0].partition("==")
        if version and versions.get(normal(name)) != version:
            got = versions.get(normal(name), "nothing")
            message = f"{pin} was asked for and {got} was installed"
            raise EnvironmentUnavailableError(message)


# Requirements that are files: their content counts, not their name


def _name(pin: str) -> str:
    return normal(re.split(r"[\[=@ ;]", pin, maxsplit=1)[0])


def _local(pin: str, directory: Path) -> Path | None:
    """Return the file or directory that a pin names, where it names one."""
    target = re.sub(r"^(-e|--editable)[\s=]+|^[A-Za-z0-9._-]+(\[[^\]]*\])?\s+@\s+", "", pin)
    target = re.split(r"\s|#|\[", target, maxsplit=1)[0]
    if target.startswith("file://"):
        return Path(unquote(target.removeprefix("file://")))
    if _NAMED.match(target) or "://" in target:
        return None
    return directory / target


def _copied(path: Path, work: Path) -> str:
    """Return what to install in the place of a path: of a directory, a copy.

    Some back ends write where they build.
    """
    if not path.is_dir():
        return path.as_uri()
    names = trees.files(path)
    copy = work / "local" / _hash(str(path)) / path.name
    trees.copy(path, names, copy, trees.digest(path, names))
    return copy.as_uri()


def _hash(decisive: object) -> str:
    return hashlib.sha256(json.dumps(decisive).encode()).hexdigest()[:32]
