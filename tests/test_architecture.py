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


def rows() -> dict[str, int]:
    """Return the name of a module or folder -> the row of the table that it stands in."""
    page = (ROOT / "docs" / "architecture.md").read_text()
    found = [re.findall(r"`(\w+)`", names) for _, names in ROW.findall(page)]
    assert len(found) == 6
    return {name: rank for rank, names in enumerate(found) for name in names}


def listed(path: Path) -> str:
    """Return the name under which the table lists a file of the package."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> Iterator[str]:
    """Yield the modules and folders that a file imports from, wherever in it; not those for types alone."""
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
    """No module is without a row, and no row names a module that is gone."""
    assert {listed(path) for path in FILES} == set(rows())


def test_modules_import_from_their_own_row_or_from_above() -> None:
    """Nothing earlier in the pipeline knows anything later."""
    ranks = rows()
    later = {
        (str(path.relative_to(PACKAGE)), name)
        for path in FILES
        for name in imports(path)
        if ranks.get(name, -1) > ranks[listed(path)]
    }
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
