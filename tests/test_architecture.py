"""The code follows the imports and calls described in docs/architecture.md."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from types import FrameType

import pytest

from bnverify.cli import main

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "bnverify"
HOP = re.compile(r"^\d+\. `([\w/]+\.py):(\w+)`", re.MULTILINE)
ROW = re.compile(r"^\| ([\w ]+) \| ((?:`\w+` ?)+)\|$", re.MULTILINE)


def rows() -> dict[str, int]:
    """Return name of a module or folder -> its row in the table."""
    page = (ROOT / "docs" / "architecture.md").read_text()
    found = [re.findall(r"`(\w+)`", names) for _, names in ROW.findall(page)]
    assert len(found) == 6
    return {name: rank for rank, names in enumerate(found) for name in names}


def listed(path: Path) -> str:
    """Return the name under which the table lists a file of the package."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> Iterator[str]:
    """Yield the modules of the package that a file imports anywhere, except only for type checking."""
    tree = ast.parse(path.read_text())
    for_types = {
        child
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for child in ast.walk(node)
    }
    for node in ast.walk(tree):
        if node in for_types:
            continue
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "bnverify":
            for name in node.names:
                yield next(
                    filter(MODULES.__contains__, (f"{node.module}.{name.name}", node.module))
                )
        elif isinstance(node, ast.Import):
            yield from (name.name for name in node.names if name.name in MODULES)


def module(path: Path) -> str:
    """Return the dotted name of a file of the package."""
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = sorted(p for p in PACKAGE.rglob("*.py") if p != PACKAGE / "__init__.py")
MODULES = {"bnverify", *map(module, FILES)}


def test_the_table_lists_every_module_once() -> None:
    """Every module has a row, and every name in a row is a module."""
    assert {listed(path) for path in FILES} == set(rows())


def test_modules_import_from_their_own_row_or_from_above() -> None:
    """No module imports from a later row."""
    ranks = rows()
    later = {
        (str(path.relative_to(PACKAGE)), name)
        for path in FILES
        for name in imports(path)
        if ranks.get(name.partition(".")[2].partition(".")[0], -1) > ranks[listed(path)]
    }
    assert later == set()


def test_there_are_no_circular_imports() -> None:
    """Neither at import time nor inside functions, nor within a package."""
    graph = {module(path): set(imports(path)) - {"bnverify"} for path in FILES}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))


def test_a_check_calls_the_files_of_the_page_in_order() -> None:
    """In a real check the functions are first called in this order, and no file calls an earlier one."""
    page = (ROOT / "docs" / "architecture.md").read_text()
    hops = [(file, function) for file, function in HOP.findall(page)]
    places = {file: place for place, (file, _) in enumerate(hops)}
    assert len(places) == len(hops) <= 12
    entered: dict[tuple[str, str], None] = {}
    back: set[tuple[str, str]] = set()

    def named(frame: FrameType | None) -> tuple[str, str] | None:
        if frame is None or not frame.f_code.co_filename.startswith(f"{PACKAGE}/"):
            return None
        return frame.f_code.co_filename.removeprefix(f"{PACKAGE}/"), frame.f_code.co_name

    def follow(frame: FrameType, event: str, _: object) -> None:
        callee = named(frame) if event == "call" else None
        if callee is None or callee[0] not in places:
            return
        entered.setdefault(callee)
        caller = named(frame.f_back)
        if caller is not None and places.get(caller[0], -1) > places[callee[0]]:
            back.add((":".join(caller), ":".join(callee)))

    law = hops[-3][1]
    sys.setprofile(follow)
    try:
        status = main(["check", "-q", "--profile", "quick", "--select", law])
    finally:
        sys.setprofile(None)
    assert status == 0
    assert back == set()
    assert [each for each in entered if each in hops] == hops


@pytest.mark.parametrize("name", ["oracle.py", "upgrade/compare.py"])
def test_independent_modules_do_not_import_jax(name: str) -> None:
    """The hand derivation and the comparison do not import JAX, Flax or Optax, which they judge."""
    tree = ast.parse((PACKAGE / name).read_text())
    named = {
        alias.name.split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for alias in node.names
    } | {
        (node.module or "").split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
    }
    assert not named & {"jax", "flax", "optax"}
