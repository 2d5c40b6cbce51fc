"""docs/architecture.md says who may import whom; here it is held against the code."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "bnverify"
ROW = re.compile(r"^\| ([\w ]+) \| ((?:`\w+` ?)+)\|$", re.MULTILINE)


def rooms() -> dict[str, int]:
    """Return module or folder name -> the line of the table that it stands on."""
    page = (ROOT / "docs" / "architecture.md").read_text()
    rows = ROW.findall(page)
    return {
        name: rank for rank, (_, names) in enumerate(rows) for name in re.findall(r"`(\w+)`", names)
    }


def room_of(path: Path) -> str:
    """Return the name under which the table lists a file of the package."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> Iterator[str]:
    """Yield the rooms that a file imports from, wherever in it; not those for types alone."""
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
        if isinstance(node, ast.ImportFrom) and node.module == "bnverify":
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("bnverify."):
            yield (node.module or "").split(".")[1]
        elif isinstance(node, ast.Import):
            parts = [name.name.split(".") for name in node.names]
            yield from (p[1] for p in parts if p[0] == "bnverify" and len(p) > 1)


FILES = sorted(p for p in PACKAGE.rglob("*.py") if p != PACKAGE / "__init__.py")


def test_the_table_lists_every_module_once() -> None:
    """No module is without a room, no room is without its module."""
    assert {room_of(path) for path in FILES} == set(rooms())


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_imports_from_its_own_room_or_from_above(path: Path) -> None:
    """Nothing earlier in the pipeline knows anything later."""
    ranks = rooms()
    own = ranks[room_of(path)]
    later = {name for name in imports(path) if ranks.get(name, -1) > own}
    assert later == set()


@pytest.mark.parametrize("name", ["oracle.py", "upgrade/compare.py"])
def test_what_must_stay_independent_of_jax_names_none_of_it(name: str) -> None:
    """The hand derivation and the comparison share nothing with what they judge."""
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
