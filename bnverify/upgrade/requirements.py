"""What `--from` and `--to` name: a requirements file, a list, `installed`, `latest`, or a Python."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from bnverify.unusable import cause

NEEDED = ("jax", "jaxlib", "flax", "optax")
"""What every environment must hold; what a requirement does not name comes at its newest."""

# Sets that resolve and then fail at import or first use, for their metadata promise too much. Each
# row was installed and run: a jax below the version takes these of what is not named beside it.
_CAPS = (
    ((0, 4, 26), ("numpy<2", "scipy<1.13")),  # jax 0.4.25 calls what numpy 2 dropped
    ((0, 4, 33), ("flax<0.10.4",)),  # flax.nnx 0.10.4 imports AbstractMesh, not in jax 0.4.31
)

_NAME = r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?"
_CLAUSE = r"\s*(?:===?|!=|~=|<=?|>=?)\s*[A-Za-z0-9.*+!_-]+\s*"
_SPECIFIER = re.compile(
    rf"\s*({_NAME})\s*(?:\[[A-Za-z0-9._,\s-]*\])?(?:{_CLAUSE}(?:,{_CLAUSE})*|\s*@\s*[^\s,;]+)?\s*"
)
_PINNED = re.compile(r"\s*([A-Za-z0-9._-]+)\s*==\s*([0-9][0-9A-Za-z.]*)\s*(?:[;#\\ ].*)?")
_LINE_NAME = re.compile(rf"\s*({_NAME})(?![A-Za-z0-9._-])")
_FILE_SUFFIXES = {".txt", ".in", ".lock", ".pip", ".toml", ".cfg"}

Kind = Literal["file", "list", "latest", "python"]


class EnvironmentUnavailableError(Exception):
    """An environment cannot be had: for which requirement, why, and the likely mend."""


@dataclass(frozen=True)
class Requirement:
    """One side of an upgrade.

    Attributes:
        text: as the user wrote it, for messages.
        kind: file, list, latest, or python: an interpreter that is there already.
        path: the requirements file, or the interpreter.
        specifiers: of a list, as `jax==0.10.2`.
        directory: where relative paths start that stand in a file or a list, as for pip.
    """

    text: str
    kind: Kind
    directory: Path
    path: Path | None = None
    specifiers: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """Return the requirement lines, as written in the file or the list."""
        if self.kind == "file":
            assert self.path is not None
            return self.path.read_text(encoding="utf-8").splitlines()
        return list(self.specifiers)

    def pinned(self) -> set[str]:
        """Return the names that a file pins to one version; empty where it leaves room to differ.

        An option, a range, a bare name, a directory or another file leaves room.
        """
        written = [line for line in self.lines() if line.strip() and not line.startswith("#")]
        exact = self.kind == "file" and all(_PINNED.fullmatch(line) for line in written)
        return set(_names(written)[1]) if exact else set()

    def constraints(self) -> list[str]:
        """Return what keeps the packages that the requirement does not name from being too new.

        jax takes no jaxlib newer than itself, which its metadata do not say before 0.4.26.
        """
        named, pins = _names(self.lines())
        version = pins.get("jax")
        if version is None:
            return []
        caps = [f"jaxlib<={version}"]
        for below, extra in _CAPS:
            if release(version) < below:
                caps += extra
        return [cap for cap in caps if re.split("[<=]", cap)[0] not in named]


def parse(text: str, directory: Path | None = None) -> Requirement:
    """Return the requirement that `--from` or `--to` names.

    Args:
        text: `installed` for the running interpreter; `latest` for the newest releases; a virtual
            environment's directory or its interpreter; a requirements file; or a list as
            `jax==0.9.2,flax==0.12.6`.
        directory: where relative paths start; by default the current directory.

    Raises:
        EnvironmentUnavailableError: it is none of these.
    """
    directory = (directory or Path.cwd()).absolute()
    stripped = text.strip()
    if stripped == "installed":
        return Requirement(text, "python", directory, Path(sys.executable))
    if stripped == "latest":
        return Requirement(text, "latest", directory)
    path = directory / Path(stripped).expanduser()
    if stripped and path.exists():
        return _existing(text, directory, path)
    specifiers = _split(stripped)
    like_a_file = "@" not in stripped and (
        "/" in stripped or Path(stripped).suffix in _FILE_SUFFIXES
    )
    if specifiers and not like_a_file:
        return Requirement(text, "list", directory, specifiers=specifiers)
    found = f"there is no file {path}" if like_a_file else "it is no list of requirements"
    message = (
        f"{text!r} names no environment: {found}; give a requirements file, a list such as"
        " jax==0.9.2,flax==0.12.6, a virtual environment, installed, or latest"
    )
    raise EnvironmentUnavailableError(message)


def release(version: str) -> tuple[int, ...]:
    """Return the numbers at the start of a version, which order releases: 0.12.0.1 is (0, 12, 0, 1)."""
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, match[0].split("."))) if match else ()


def normal(name: str) -> str:
    """Return the one spelling of a distribution's name."""
    return re.sub(r"[-_.]+", "-", name).lower()


def _existing(text: str, directory: Path, path: Path) -> Requirement:
    if path.is_dir():
        python = path / "bin" / "python"
        if (path / "pyvenv.cfg").is_file() and python.exists():
            return Requirement(text, "python", directory, python)
        message = f"{text!r} is a directory and no virtual environment; give its requirements file"
        raise EnvironmentUnavailableError(message)
    if path.name.startswith("python"):
        return Requirement(text, "python", directory, path)
    try:
        path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        message = f"cannot read the requirements file {path}: {cause(error)}"
        raise EnvironmentUnavailableError(message) from None
    return Requirement(text, "file", directory, path.absolute())


def _split(text: str) -> tuple[str, ...]:
    """Split at the commas between requirements, not those within extras or version ranges."""
    pieces = re.split(r",(?![^\[]*\])(?!\s*[<>=!~])", text)
    if all(_SPECIFIER.fullmatch(piece) for piece in pieces):
        return tuple(piece.strip() for piece in pieces)
    return ()


def _names(lines: list[str]) -> tuple[set[str], dict[str, str]]:
    """Return the names in requirement lines, and the versions of those that are pinned."""
    named, pins = set(), {}
    for line in lines:
        name = _LINE_NAME.match(line)
        if name:
            named.add(normal(name[1]))
        pin = _PINNED.fullmatch(line)
        if pin:
            pins[normal(pin[1])] = pin[2]
    return named, pins
