"""Functions of pytrees and their leaves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from bnverify.lazy import jax, jnp
from bnverify.model import Tree

T = TypeVar("T")
"""A pytree of arrays, such as a case, a state or an outcome."""


def is_floating(leaf: Any) -> bool:
    """Return whether a leaf holds floating-point numbers; integers such as counters are not averaged."""
    return bool(jnp.issubdtype(leaf.dtype, jnp.floating))


def is_key(leaf: Any) -> bool:
    """Return whether a leaf is a typed PRNG key, which NumPy cannot hold."""
    dtype = getattr(leaf, "dtype", None)
    return dtype is not None and bool(jnp.issubdtype(dtype, jax.dtypes.prng_key))


def key_name(key: Any) -> str:
    """Return one step of a pytree path as a string: a dict key, an attribute or an index."""
    return str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key))))


def path_name(path: Any) -> str:
    """Return a pytree path as "outer/inner", whether of dict keys, attributes or indices."""
    return "/".join(map(key_name, path))


def by_path(tree: Tree) -> dict[str, Any]:
    """Return the leaves of a tree by their paths, as ``path_name`` gives them, in order."""
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def form(tree: Tree) -> Any:
    """Return a tree's structure and the shapes of its leaves; trees of one form can be compared."""
    leaves, structure = jax.tree_util.tree_flatten(tree)
    return structure, [leaf.shape for leaf in leaves]


def signature(tree: Tree) -> Any:
    """Return a tree's form and the dtypes of its leaves; a compiled program needs the same signature."""
    return form(tree), [leaf.dtype for leaf in jax.tree_util.tree_leaves(tree)]


def stack(trees: Sequence[T]) -> T:
    """Stack trees of one form: the leaves of the result have a leading stack axis."""
    stacked: T = jax.tree_util.tree_map(lambda *leaves: np.stack(leaves), *trees)
    return stacked


def take(tree: T, index: int | npt.NDArray[np.intp]) -> T:
    """Return the tree at an index of stacked trees, or the stack of those at several indices."""
    taken: T = jax.tree_util.tree_map(lambda leaf: np.asarray(leaf)[index], tree)
    return taken
