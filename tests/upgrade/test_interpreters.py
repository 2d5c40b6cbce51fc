"""Finding the Pythons of a machine, those that PATH hides among them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from bnverify.upgrade import interpreters


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Return a function that puts a Python of some version somewhere on an otherwise empty machine."""
    for name, value in {
        "PATH": str(tmp_path / "bin"),
        "PYENV_ROOT": str(tmp_path / "pyenv"),
        "UV_PYTHON_INSTALL_DIR": str(tmp_path / "uv"),
    }.items():
        monkeypatch.setenv(name, value)
    interpreters.probe.cache_clear()

    def add(place: str, answer: str) -> Path:
        path = tmp_path / place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/bin/sh\n{answer}\n")
        path.chmod(0o755)
        return path

    yield add
    interpreters.probe.cache_clear()


def says(version: str, kind: str = "CPython", free_threaded: str = "false") -> str:
    numbers = version.replace(".", ", ")
    return f"echo '[\"{kind}\", [{numbers}], {free_threaded}, \"'$0'\"]'"


def found() -> list[str]:
    return [i.name for i in interpreters.found() if i != interpreters.running()]


def own(offset: int) -> str:
    return f"3.{sys.version_info.minor + offset}"


def test_the_running_interpreter_comes_first(machine):
    """Alone on the machine, it is all there is."""
    assert machine
    assert list(interpreters.found()) == [interpreters.running()]


def test_pythons_are_found_on_path_under_pyenv_and_by_uv(machine):
    """The nearest version first; of two as near, the older."""
    machine(f"bin/python{own(1)}", says(f"{own(1)}.5"))
    machine(f"bin/python{own(1)}-config", "exit 1")
    machine(f"pyenv/versions/{own(-1)}.4/bin/python", says(f"{own(-1)}.4"))
    machine(f"uv/cpython-{own(2)}.0-linux-x86_64-gnu/bin/python", says(f"{own(2)}.0"))
    assert found() == [f"{own(-1)}.4", f"{own(1)}.5", f"{own(2)}.0"]


def test_shims_are_not_run(machine, monkeypatch, tmp_path):
    """One is on PATH for every version, and all but the chosen one's fail."""
    monkeypatch.setenv("PATH", str(tmp_path / "pyenv" / "shims"))
    machine(f"pyenv/shims/python{own(1)}", f"touch {tmp_path}/was-run; exit 127")
    assert found() == []
    assert not (tmp_path / "was-run").exists()


@pytest.mark.parametrize(
    "answer",
    [
        "exit 1",
        "echo nonsense",
        "echo '[1]'",
        says(f"{own(1)}.0", kind="PyPy"),
        says(f"{own(1)}.0", free_threaded="true"),
        says("3.2.0"),
    ],
)
def test_what_does_not_answer_as_expected_is_passed_over(machine, answer):
    """Broken installations, other implementations, a version that is not the one in the name."""
    machine(f"bin/python{own(1)}", answer)
    machine(f"pyenv/versions/{own(1)}.9/bin/python", says(f"{own(1)}.9"))
    assert found() == [f"{own(1)}.9"]


def test_a_version_none_of_whose_pythons_answers_is_passed_over(machine):
    """And so is a directory that only looks like a version."""
    machine(f"bin/python{own(1)}", "exit 1")
    machine("pyenv/versions/3.x/bin/python", says(f"{own(1)}.9"))
    assert found() == []


def test_pythons_too_old_to_record_are_passed_over(machine):
    """The recording side needs 3.9."""
    machine("bin/python3.8", says("3.8.18"))
    machine("bin/python3.9", says("3.9.18"))
    assert found() == ["3.9.18"]


def test_the_running_interpreter_is_what_a_probe_says_it_is():
    """The probe tells the truth about a real Python."""
    probed = interpreters.probe(Path(sys.executable))
    assert probed is not None
    assert probed.version == interpreters.running().version
