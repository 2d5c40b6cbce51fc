"""Small edits of nested dictionaries of arrays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bnverify.lazy import jax
from bnverify.model import Tree


def edited(tree: Tree, path: str, change: Callable[[Any], Any]) -> Tree:
    """Return ``tree`` with the entry at ``path``, joined by "/", changed."""
    head, _, rest = path.partition("/")
    entry = edited(tree[head], rest, change) if rest else change(tree[head])
    return {**tree, head: entry}


def entry(tree: Tree, path: str) -> Any:
    """Return the entry of ``tree`` at ``path``, joined by "/"."""
    for key in path.split("/"):
        tree = tree[key]
    return tree


def by_path(function: Callable[[str, Any], Any], tree: Tree) -> Tree:
    """Return ``function(path, leaf)`` of every leaf of ``tree``, paths joined by "/"."""

    def visit(keys: Any, leaf: Any) -> Any:
        return function("/".join(str(getattr(key, "key", key)) for key in keys), leaf)

    return jax.tree_util.tree_map_with_path(visit, tree)


def mapped(function: Callable[..., Any], *trees: Tree) -> Tree:
    """Return ``function`` of the corresponding leaves of ``trees``."""
    return jax.tree_util.tree_map(function, *trees)


def kernels(params: Tree) -> Tree:
    """Return a mask of ``params`` that is true for the kernels alone."""
    return by_path(lambda path, leaf: path.endswith("kernel"), params)


def of_normalisation(params: Tree) -> Tree:
    """Return a mask of ``params`` that is true for the scales and biases of normalisations."""
    return by_path(lambda path, leaf: "Norm_" in path, params)
