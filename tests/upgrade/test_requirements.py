"""What `--from` and `--to` may say, and what is understood by it."""

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
    """Commas inside a version range or extras do not separate."""
    requirement = parse(text)
    assert requirement.specifiers == specifiers


def test_the_words_have_their_meaning():
    """`installed` is this interpreter, `latest` is open."""
    assert parse("installed").python == Path(sys.executable)
    latest = parse("latest")
    assert latest == Requirement("latest", latest.directory)


def test_a_file_is_found_from_the_directory_given(tmp_path):
    """A relative path does not depend on where the process stands."""
    (tmp_path / "reqs.txt").write_text("jax==0.9.2\n")
    requirement = parse("reqs.txt", tmp_path)
    assert requirement.file == tmp_path / "reqs.txt"


def test_a_virtual_environment_is_named_by_its_directory_or_its_python(tmp_path):
    """What was altered by hand can be a side of a comparison."""
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
        ("sub", "a directory and not a virtual environment"),
        ("binary.txt", "cannot read the requirements file"),
    ],
)
def test_anything_else_is_refused(tmp_path, text, message):
    """The message says what was looked for; no option of uv can be smuggled into a list."""
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
def test_old_jax_keeps_what_is_not_named_from_being_too_new(text, caps):
    """Sets that resolve and then fail at import are ruled out, where nothing else was asked for."""
    assert parse(text).constraints() == caps


@pytest.mark.parametrize("path", sorted(PINS.glob("*.txt")), ids=lambda path: path.stem)
def test_our_own_pins_leave_nothing_open(path):
    """Each file of pins names every package by one version, jax, jaxlib, flax and optax among them."""
    requirement = parse(str(path))
    assert {"jax", "jaxlib", "flax", "optax"} <= requirement.pinned()
    assert requirement.constraints() == []


@pytest.mark.parametrize(
    "line", ["jax", "jax>=1", "-r other.txt", "--index-url=x", "-e .", "./wheel"]
)
def test_a_file_with_room_is_not_settled(tmp_path, line):
    """Another day it may mean other releases, so its meaning is not kept."""
    path = tmp_path / "reqs.txt"
    path.write_text("jax==0.9.2 # new\n\nflax==0.12.6 ; python_version > '3'\n")
    assert parse(str(path)).pinned() == {"jax", "flax"}
    path.write_text(f"jax==0.9.2\n{line}\n")
    assert parse(str(path)).pinned() == set()
