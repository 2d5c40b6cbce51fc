"""Trees of nested dicts, taken apart by path and put together again."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Any

from flax.traverse_util import flatten_dict, unflatten_dict

Tree = Any


def partition(tree: Tree, patterns: Iterable[str]) -> tuple[Tree, Tree]:
    """Return the tree without and with the leaves whose path matches one of ``patterns``.

    Args:
        tree: nested dicts.
        patterns: as ``fnmatch`` takes them, of paths joined by "/".
    """
    wanted = tuple(patterns)
    if not wanted:
        return tree, {}
    # Keys stay tuples: the names of nn.SpectralNorm's variables hold a "/" themselves.
    flat = flatten_dict(tree)
    inside = {path for path in flat if any(fnmatchcase("/".join(path), each) for each in wanted)}
    without = {path: leaf for path, leaf in flat.items() if path not in inside}
    return unflatten_dict(without), unflatten_dict({path: flat[path] for path in sorted(inside)})


def union(first: Tree, second: Tree) -> Tree:
    """Return one tree with the leaves of two that share none."""
    if not second:
        return first
    return unflatten_dict(flatten_dict(first) | flatten_dict(second))
