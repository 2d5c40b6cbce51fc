"""Neighbours: a target's file imports its own, whatever another target's are called."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bnverify.neighbours import importable
from bnverify.target import load

CHECK = """
from bnverify import reference
import model
from parts.layer import WHERE

def subject():
    from dataclasses import replace
    return replace(reference.sgd(), name=f"{model.WHERE} {WHERE}")
"""


@pytest.fixture
def projects(tmp_path: Path) -> Iterator[list[Path]]:
    """Two projects whose files have the same names."""
    known = set(sys.modules)
    homes = [tmp_path / "one", tmp_path / "two"]
    for home in homes:
        (home / "parts").mkdir(parents=True)
        (home / "check.py").write_text(CHECK)
        (home / "model.py").write_text(f"WHERE = {home.name!r}\n")
        (home / "parts" / "layer.py").write_text(f"WHERE = {home.name!r}\n")
    yield homes
    for name in {"model", "parts", "parts.layer"} - known:
        sys.modules.pop(name, None)


@pytest.mark.parametrize("package", [True, False], ids=["package", "namespace"])
def test_each_project_has_its_own(projects: list[Path], package: bool) -> None:
    """The second is not verified with the first one's model, nor the first with the second's."""
    for home in projects if package else ():
        (home / "parts" / "__init__.py").write_text("")
    for home in [*projects, *projects]:
        made: Any = load(f"{home / 'check.py'}:subject")
        assert made.name == f"{home.name} {home.name}"


def test_modules_of_other_names_stay(projects: list[Path]) -> None:
    """Only what would be taken for another is forgotten; what a program had imported, never."""
    one, two = projects
    (one / "alone.py").write_text("")
    (one / "json.py").write_text("")
    (two / "json.py").write_text("")
    import json

    with importable(one):
        import alone  # type: ignore[import-not-found] # written a moment ago
    with importable(two):
        assert sys.modules["alone"] is alone
        assert sys.modules["json"] is json
    del sys.modules["alone"]


def test_the_path_is_restored_after_an_error(tmp_path: Path) -> None:
    """Whatever happens in the block, sys.path is as before."""
    before = sys.path[:]
    with contextlib.suppress(KeyError), importable(tmp_path):
        assert sys.path[0] == str(tmp_path)
        raise KeyError
    assert sys.path == before
