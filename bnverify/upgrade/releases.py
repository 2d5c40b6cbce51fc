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

_LOOK = """
import importlib, importlib.metadata, json, platform, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
found = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions()}
print(json.dumps({"python": platform.python_version(), "versions": found}))
"""


@dataclass(frozen=True)
class Releases:
    """A Python with releases installed.

    Attributes:
        python: the interpreter to run.
        version: its version, as 3.11.7.
        versions: of every distribution, by normalised name.
    """

    python: Path
    version: str
    versions: dict[str, str]


def there(requirement: Requirement, token: Token) -> Releases:
    """Return what is installed beside an interpreter that the requirement names.

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
    options = [line for line in lines if line.startswith("--")]
    pins = [line for line in lines if not line.startswith("--")]
    if project and project.builds:
        given = {_name(pin) for pin in pins}
        beside = project.dependencies(uv, [p for p in pins if not p.startswith("-")], interpreter)
        pins += [p for p in beside if not p.startswith("--") and _name(p) not in given]
    local = [_hash_of_local(pin) for pin in pins]
    parts = [_FORMAT, interpreter.name, str(interpreter.path.resolve()), sorted(pins), local]
    key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]

    def make(place: Path) -> dict[str, Any]:
        uv.venv(place / "venv", interpreter)
        python = place / "venv" / "bin" / "python"
        hashed = requirement.path if any("--hash=" in x for x in requirement.lines()) else None
        uv.install(python, [*options, *(_copied(pin, uv.work) for pin in pins)], hashes=hashed)
        looked = _look(python, uv.token)
        _compare(pins, looked.versions)
        return {"python": looked.version, "versions": looked.versions, "pins": pins}

    place, told = store.get("environments", key, make, uv.token)
    return Releases(place / "venv" / "bin" / "python", told["python"], told["versions"])


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
    return Releases(python, told["python"], dict(sorted(versions.items())))


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


def _local_path(pin: str) -> Path | None:
    match = re.search(r"file://(/[^\s#;]*)", pin)
    return Path(unquote(match[1])) if match else None


def _hash_of_local(pin: str) -> str:
    path = _local_path(pin)
    if path is None:
        return ""
    if path.is_dir():
        return trees.digest(path, trees.files(path))
    return trees.digest(path.parent, [Path(path.name)])


def _copied(pin: str, work: Path) -> str:
    """Return the pin with a local directory copied: some back ends write where they build."""
    path = _local_path(pin)
    if path is None or not path.is_dir():
        return pin
    names = trees.files(path)
    copy = work / "local" / hashlib.sha256(str(path).encode()).hexdigest()[:8] / path.name
    trees.copy(path, names, copy, trees.digest(path, names))
    return re.sub(r"(-e\s+)?(.*?)file:///[^\s#;]*", rf"\2{copy.as_uri()}", pin)
