"""What `--from` and `--to` accept, and how it is parsed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from bnverify.errors import UsageError
from bnverify.upgrade.environments import Requirement, parse

PINS = Path(__file__).parents[2] / "pins"


@pytest.mark.parametrize(
    ("text", "specifiers"),
    [
        ("jax==0.9.2", ("jax==0.9.2",)),
        ("jax==0.9.2,flax==0.12.6", ("jax==0.9.2", "flax==0.12.6")),
        (" jax == 0.9.2 , flax ", ("jax == 0.9.2", "flax")),
        ("jax>=0.4,<0.5,flax", ("jax>=0.4,<0.5", "flax")),
        ("orbax[a,b]~=1.0,jax", ("orbax[a,b]~=1.0", "jax")),
        ("flax @ https://host/flax.whl", ("flax @ https://host/flax.whl",)),
        ("jax==0.10.*", ("jax==0.10.*",)),
    ],
)
def test_a_list_is_split_between_requirements(text, specifiers):
    """Commas within version ranges or extras do not separate."""
    requirement = parse(text)
    assert requirement.specifiers == specifiers


def test_installed_and_latest():
    """`installed` is this interpreter, `latest` has no pins."""
    assert parse("installed").python == Path(sys.executable)
    latest = parse("latest")
    assert latest == Requirement("latest", latest.directory)


def test_a_relative_path_starts_from_the_given_directory(tmp_path):
    """It does not depend on the process's working directory."""
    (tmp_path / "reqs.txt").write_text("jax==0.9.2\n")
    requirement = parse("reqs.txt", tmp_path)
    assert requirement.file == tmp_path / "reqs.txt"


def test_a_virtual_environment_is_named_by_its_directory_or_interpreter(tmp_path):
    """A manually altered environment can be a side of a comparison."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").touch()
    (tmp_path / "pyvenv.cfg").touch()
    for text in (str(tmp_path), str(tmp_path / "bin" / "python")):
        assert parse(text).python == tmp_path / "bin" / "python"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not a list of requirements"),
        ("jax==", "not a list of requirements"),
        ("jax 0.9", "not a list of requirements"),
        ("jax==0.9.2,", "not a list of requirements"),
        ("--index-url=x", "not a list of requirements"),
        ("-r secrets", "not a list of requirements"),
        ("jax\n--index-url=x", "not a list of requirements"),
        ("absent.txt", "there is no file"),
        ("some/where", "there is no file"),
        ("sub", "a directory but not a virtual environment"),
        ("binary.txt", "cannot read the requirements file"),
    ],
)
def test_anything_else_is_rejected(tmp_path, text, message):
    """The message says what was expected; options for uv cannot be smuggled into a list."""
    (tmp_path / "sub").mkdir()
    (tmp_path / "binary.txt").write_bytes(b"\xff")
    with pytest.raises(UsageError, match=message):
        parse(text, tmp_path)


@pytest.mark.parametrize(
    ("text", "caps"),
    [
        ("jax==0.4.30", ["flax<0.10.4"]),
        ("jax==0.4.32,optax", ["flax<0.10.4"]),
        ("jax==0.4.33", []),
        ("jax==0.4.30,flax==0.8.5", []),
        ("jax>=0.4.30", []),
        ("flax==0.12.6", []),
        ("latest", []),
    ],
)
def test_with_old_jax_unnamed_packages_are_not_too_new(text, caps):
    """Sets that resolve but cannot be imported are excluded, unless they are requested."""
    assert parse(text).constraints() == caps


@pytest.mark.parametrize("path", sorted(PINS.glob("*.txt")), ids=lambda path: path.stem)
def test_our_own_pin_files_are_complete(path):
    """Each pins every package to one version, including jax, jaxlib, flax and optax."""
    requirement = parse(str(path))
    assert {"jax", "jaxlib", "flax", "optax"} <= requirement.pinned()
    assert requirement.constraints() == []


@pytest.mark.parametrize(
    "line", ["jax", "jax>=1", "-r other.txt", "--index-url=x", "-e .", "./wheel"]
)
def test_a_file_with_unpinned_lines_is_not_pinned(tmp_path, line):
    """It may resolve to other releases later, so its resolution is not cached."""
    path = tmp_path / "reqs.txt"
    path.write_text("jax==0.9.2 # new\n\nflax==0.12.6 ; python_version > '3'\n")
    assert parse(str(path)).pinned() == {"jax", "flax"}
    path.write_text(f"jax==0.9.2\n{line}\n")
    assert parse(str(path)).pinned() == set()
