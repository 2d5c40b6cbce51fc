"""What a side of an upgrade imports beside its releases: bnverify itself, and the user's project.

Both are directories on PYTHONPATH and not installed into the environment, so that an edit of either
makes no environment anew, with byte code to compile again for seconds. A directory holds a
copy of one package and nothing else: naming the site-packages that bnverify was installed in would
let releases of the running environment leak into the one under test. A copy needs no source tree,
no build backend and no index, and it runs on a Python that the wheel's metadata would refuse.
"""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bnverify.upgrade import trees

if TYPE_CHECKING:
    from bnverify.upgrade.interpreters import Interpreter
    from bnverify.upgrade.processes import Token
    from bnverify.upgrade.store import Store
    from bnverify.upgrade.uv import Uv

_PACKAGE = Path(__file__).parents[1]


def bnverify_itself(store: Store, token: Token) -> tuple[Path, str]:
    """Return a directory that holds a copy of the running bnverify, and the copy's hash."""
    names = trees.files(_PACKAGE)
    key = trees.digest(_PACKAGE, names)

    def make(place: Path) -> dict[str, Any]:
        trees.copy(_PACKAGE, names, place / _PACKAGE.name, key)
        # Recordings ask for the version; dependencies are the environment's own affair.
        about = place / f"{_PACKAGE.name}.dist-info" / "METADATA"
        about.parent.mkdir()
        about.write_text(f"Metadata-Version: 2.1\nName: {_PACKAGE.name}\nVersion: {_version()}\n")
        return {"version": _version()}

    return store.get("bnverify", key, make, token)[0], key


class Project:
    """The user's project: its sources now, what it depends on, and how to import it."""

    def __init__(self, directory: Path) -> None:
        """Read the sources' names and hash.

        Raises:
            TreeError: they are too large.
        """
        self.directory = directory
        self.names = trees.files(directory)
        self.key = trees.digest(directory, self.names)

    @property
    def builds(self) -> bool:
        """Whether it says how to build itself; without, it is imported from where it lies."""
        return any(Path(name) in self.names for name in ("pyproject.toml", "setup.py"))

    def places(self) -> list[Path]:
        """Return what to put on PYTHONPATH for a project that does not build."""
        return [place for place in (self.directory / "src", self.directory) if place.is_dir()]

    def dependencies(self, uv: Uv, pins: list[str], interpreter: Interpreter) -> list[str]:
        """Return pins of what the project needs beside the given ones.

        Those given override what the project asks of the same packages: they are under test, and
        the project's own bounds are what an upgrade is about to change.
        """
        copy = uv.work / "dependencies"
        trees.copy(self.directory, self.names, copy, self.key)
        source = next(
            copy / name for name in ("pyproject.toml", "setup.py") if (copy / name).exists()
        )
        return uv.compile([source], interpreter, overrides=[*pins, NO_BNVERIFY])

    def layer(self, store: Store, uv: Uv, python: Path, tag: str) -> Path:
        """Return a directory that holds the built project.

        It is built from a copy: setuptools leaves `build` and `egg-info` where it builds.

        Args:
            store: where to keep it.
            uv: what builds it.
            python: of the environment.
            tag: of the Python, for compiled extensions.
        """

        def make(place: Path) -> dict[str, Any]:
            source = uv.work / "project"
            trees.copy(self.directory, self.names, source, self.key)
            uv.install(python, [str(source)], target=place / "site")
            return {}

        return store.get("projects", f"{self.key}-{tag}", make, uv.token)[0] / "site"


NO_BNVERIFY = 'bnverify ; python_version < "0"'
"""As an override: nobody's requirement brings a bnverify, for the running one comes first anyway."""


def _version() -> str:
    try:
        return importlib.metadata.version(_PACKAGE.name)
    except importlib.metadata.PackageNotFoundError:  # run from a checkout that is not installed
        return "0"
