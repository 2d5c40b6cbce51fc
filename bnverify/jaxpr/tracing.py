"""Trace a function to a program whose inputs and outputs know their places in the trees."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass(frozen=True)
class Abstract:
    """An array's type without its values; a leaf of the trees that tracing gives.

    Attributes:
        shape: a tuple of ints, or of symbolic sizes.
        dtype: the dtype; a PRNG key's is an extended one.
        weak_type: whether it gives way to the other operand's dtype, as a Python scalar does.
    """

    shape: tuple[Any, ...]
    dtype: Any
    weak_type: bool = False

    @classmethod
    def of(cls, value: Any) -> Abstract:
        """Return the type of an array, of a ``jax.ShapeDtypeStruct`` or of an abstract value."""
        weak = bool(getattr(value, "weak_type", False))
        return cls(tuple(value.shape), value.dtype, weak)

    def __str__(self) -> str:
        sizes = ", ".join(str(size) for size in self.shape)
        return f"{self.dtype}[{sizes}]" + (" weak" if self.weak_type else "")


@dataclass(frozen=True)
class Program:
    """A traced function.

    Attributes:
        jaxpr: the closed jaxpr.
        args: its arguments, a tuple of trees of ``Abstract``.
        out: its result, a tree of ``Abstract``.
    """

    jaxpr: Any
    args: tuple[Any, ...]
    out: Any


def trace(function: Callable[..., Any], *args: Any) -> Program:
    """Return ``function`` traced on arguments of these types, without running or compiling it.

    Args:
        function: anything that traces under ``jax.jit``.
        *args: trees of ``Abstract``, ``jax.ShapeDtypeStruct`` or arrays. Sizes may be symbolic.
    """
    abstract = jax.tree_util.tree_map(Abstract.of, args)
    jaxpr, out = jax.make_jaxpr(function, return_shape=True)(*abstract)
    leaves = [Abstract.of(var.aval) for var in jaxpr.jaxpr.outvars]
    treedef = jax.tree_util.tree_structure(out)
    return Program(jaxpr, abstract, jax.tree_util.tree_unflatten(treedef, leaves))


def _key(entry: Any) -> str:
    for attribute in ("key", "name", "idx"):
        if hasattr(entry, attribute):
            return str(getattr(entry, attribute))
    return str(entry)


def leaf_names(tree: Any, prefix: str = "") -> list[str]:
    """Return the path of every leaf, joined by "/": ``params/Dense_0/kernel``."""
    paths = jax.tree_util.tree_flatten_with_path(tree)[0]
    heads = [prefix] if prefix else []
    return ["/".join([*heads, *(_key(entry) for entry in path)]) for path, _ in paths]
