"""A tiny package index: wheels made on the spot in a directory that uv searches."""

from __future__ import annotations

import zipfile
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


def wheel(
    directory: Path, name: str, version: str, *lines: str, code: str = "", python: str = "py3"
) -> Path:
    """Make a wheel with one module, and return its path.

    Args:
        directory: where to put it.
        name: the name of the distribution and the module.
        version: the version of the distribution, and the module's `version`.
        lines: lines of metadata, such as `Requires-Dist: jax>=1`.
        code: the rest of the module.
        python: the Python tag; py312 means 3.12 and newer.
    """
    about = f"{name}-{version}.dist-info"
    metadata = "\n".join([f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}", *lines, ""])
    parts = {
        f"{name}.py": f"version = {version!r}\n{code}\n",
        f"{about}/METADATA": metadata,
        f"{about}/WHEEL": f"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: {python}-none-any\n",
    }
    parts[f"{about}/RECORD"] = "".join(f"{part},,\n" for part in [*parts, f"{about}/RECORD"])
    path = directory / f"{name}-{version}-{python}-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for part, text in parts.items():
            archive.writestr(part, text)
    return path


BACKEND = """
import zipfile
from pathlib import Path

def build_wheel(directory, settings=None, metadata=None):
    Path("build").mkdir()  # setuptools also writes into the source directory
    lines = Path("METADATA").read_text()
    name = "mymodel-0.3-py3-none-any.whl"
    with zipfile.ZipFile(Path(directory) / name, "w") as archive:
        archive.write("src/mymodel.py", "mymodel.py")
        archive.writestr("mymodel-0.3.dist-info/METADATA", lines)
        archive.writestr("mymodel-0.3.dist-info/WHEEL",
            "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n")
        archive.writestr("mymodel-0.3.dist-info/RECORD", "")
    return name

build_editable = build_wheel
"""


def project(directory: Path, *dependencies: str, code: str = "import jax\n") -> Path:
    """Make a project `mymodel` that builds without other packages, and return its directory."""
    (directory / "src").mkdir(parents=True, exist_ok=True)
    (directory / "src" / "mymodel.py").write_text(code)
    (directory / "backend.py").write_text(BACKEND)
    requires = "".join(f"Requires-Dist: {dependency}\n" for dependency in dependencies)
    (directory / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: mymodel\nVersion: 0.3\n{requires}"
    )
    (directory / "pyproject.toml").write_text(
        '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
        f'[project]\nname = "mymodel"\nversion = "0.3"\ndependencies = {list(dependencies)}\n'
    )
    return directory
