"""Pytrees as named leaves, so that a tree recorded in one environment is made again in another.

Runs wherever recordings are made: no syntax or release newer than Python 3.9 and jax 0.4.13.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from bnverify.lazy import jax
from bnverify.pytree import path_name

if TYPE_CHECKING:
    from collections.abc import Mapping


class UnlikeError(ValueError):
    """A recorded tree and the one to fill have other leaves; the message names the first."""


def named(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Return path -> leaf, in the order of flattening: ``params/Dense_0/kernel``."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    heads = [prefix] if prefix else []
    found = {"/".join([*heads, *filter(None, [path_name(path)])]): leaf for path, leaf in flat}
    if len(found) != len(flat):  # keys 1 and "1" of one dict
        raise UnlikeError(f"two leaves of {prefix or 'a tree'} have the same path")
    return found


def containers(tree: Any) -> str:
    """Return how the tree is nested, in the names of its containers: ``dict(FrozenDict(*, *))``.

    Not ``str(treedef)``, which is written differently from one jax to the next.
    """

    def describe(treedef: Any) -> str:
        node = treedef.node_data()
        if node is None:
            return "*" if treedef.num_leaves else "None"
        inner = ", ".join(describe(child) for child in treedef.children())
        return f"{node[0].__name__}({inner})"

    return describe(jax.tree_util.tree_structure(tree))


def described(tree: Any, prefix: str) -> dict[str, Any]:
    """Return what a recording's manifest says of a tree: its containers, and each leaf's type."""
    rows = []
    for path, leaf in named(tree, prefix).items():
        rows.append([path, str(np.dtype(leaf.dtype)), [int(size) for size in leaf.shape]])
    return {"containers": containers(tree), "leaves": rows}


def fill(tree: Any, values: Mapping[str, Any], prefix: str = "") -> tuple[Any, bool]:
    """Return ``tree`` with other values in its leaves, and whether their paths agreed.

    Where paths do not agree but the leaves' shapes do, one by one in order, the order decides: a
    release that renames a path is told of as such, and does not hide what else it changed.

    Args:
        tree: gives the structure and the dtypes.
        values: path -> value, in the order of flattening.
        prefix: as given to ``named``.

    Raises:
        UnlikeError: the leaves are others.
    """
    leaves, treedef = jax.tree_util.tree_flatten(tree)
    paths = list(named(tree, prefix))
    alike = set(paths) == set(values)
    chosen = [values[path] for path in paths] if alike else list(values.values())
    if len(chosen) != len(leaves):
        raise UnlikeError(f"{len(values)} leaves were recorded, and there are {len(leaves)} now")
    for path, leaf, value in zip(paths, leaves, chosen):  # noqa: B905 - strict is of Python 3.10
        if tuple(leaf.shape) != tuple(value.shape):
            raise UnlikeError(f"{path} was recorded as {value.shape} and is {leaf.shape} now")
    cast = [
        np.asarray(value).astype(leaf.dtype)
        for leaf, value in zip(leaves, chosen)  # noqa: B905 - as above; lengths were compared
    ]
    return jax.tree_util.tree_unflatten(treedef, cast), alike
