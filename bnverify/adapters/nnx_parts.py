"""An nnx object split into plain trees of arrays, and made again from them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from bnverify.adapters.nnx_compat import is_key, variable_path

Tree = Any


@dataclass(frozen=True)
class Part:
    """One State of a split object, as a template.

    Attributes:
        treedef: of the State.
        paths: of its leaves, in order.
        impls: of its leaves: the implementation of a typed PRNG key; None for a plain array.
    """

    treedef: Any
    paths: tuple[tuple[str, ...], ...]
    impls: tuple[Any, ...]

    @classmethod
    def of(cls, state: Any) -> Part:
        """Return the template of a State whose leaves are arrays or tracers."""
        leaves, treedef = jax.tree_util.tree_flatten_with_path(state)
        return cls(
            treedef,
            tuple(variable_path(path) for path, _ in leaves),
            tuple(jax.random.key_impl(leaf) if is_key(leaf) else None for _, leaf in leaves),
        )

    def state(self, tree: Tree) -> Any:
        """Return the State with the values of a tree that ``tree`` gave."""
        leaves = [
            _at(tree, path)
            if impl is None
            else jax.random.wrap_key_data(_at(tree, path), impl=impl)
            for path, impl in zip(self.paths, self.impls, strict=True)
        ]
        # Variables made here belong to the trace that is running, so nnx lets them be written.
        return jax.tree_util.tree_unflatten(self.treedef, leaves)

    def tree(self, state: Any) -> Tree:
        """Return the values of a State as nested dicts of arrays, this template's leaves only.

        What a pass adds (``sow``) is a report of that pass, not a state to carry on.

        Raises:
            KeyError: the State lacks a leaf.
        """
        leaves = jax.tree_util.tree_flatten_with_path(state)[0]
        found = {variable_path(path): leaf for path, leaf in leaves}
        tree: dict[str, Any] = {}
        for path in self.paths:
            leaf, inner = found[path], tree
            for name in path[:-1]:
                inner = inner.setdefault(name, {})
            inner[path[-1]] = jax.random.key_data(leaf) if is_key(leaf) else leaf
        return tree


def _at(tree: Tree, path: tuple[str, ...]) -> Any:
    for name in path:
        tree = tree[name]
    # A Variable that holds a NumPy array is written in place: the caller's own would change.
    return jnp.asarray(tree)


@dataclass(frozen=True)
class Parts:
    """An nnx object's graph, and its variables in several parts.

    Attributes:
        graphdef: the object without its variables.
        filters: which variables each part has; the last is ``...``, the rest.
        parts: one for each filter.
    """

    graphdef: Any
    filters: tuple[Any, ...]
    parts: tuple[Part, ...]

    @classmethod
    def of_object(cls, node: Any, filters: Sequence[Any]) -> Parts:
        """Return the parts of an object whose variables may be tracers."""
        graphdef, *states = nnx.split(node, *filters)
        return cls(graphdef, tuple(filters), tuple(Part.of(state) for state in states))

    @classmethod
    def of(cls, make: Callable[[], Any], filters: Sequence[Any]) -> Parts:
        """Return the parts of what ``make`` makes, traced for shapes only."""
        found: list[Parts] = []

        def build() -> None:
            found.append(cls.of_object(make(), filters))

        jax.eval_shape(build)
        return found[0]

    def split(self, node: Any) -> tuple[Tree, ...]:
        """Return the values of ``node``, a tree for each part."""
        _, *states = nnx.split(node, *self.filters)
        return tuple(part.tree(state) for part, state in zip(self.parts, states, strict=True))

    def merge(self, *trees: Tree) -> Any:
        """Return the object with these values, as ``split`` gave them."""
        states = (part.state(tree) for part, tree in zip(self.parts, trees, strict=True))
        return nnx.merge(self.graphdef, *states)
