"""Trace a function to a program whose inputs and outputs know their places in the trees."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import jax.extend.core
import numpy as np

from bnverify.model import Case

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


class TreeFunction:
    """A traced program as a function of the trees that it was traced on; it runs no user code."""

    def __init__(self, program: Program) -> None:
        self._run = jax.extend.core.jaxpr_as_fun(program.jaxpr)
        self._structure = jax.tree_util.tree_structure(program.out)

    def __call__(self, *args: Any) -> Any:
        """Return the program's result."""
        out = self._run(*jax.tree_util.tree_leaves(args))
        return jax.tree_util.tree_unflatten(self._structure, out)

    def flat(self, *leaves: Any) -> list[Any]:
        """Return the leaves of the program's result, for the leaves of its arguments."""
        return list(self._run(*leaves))


class Tracer:
    """A subject's functions, each traced once for each signature of its arguments.

    What is proved, compiled and read for rounding are the same traces.

    Args:
        subject: see ``bnverify.model.Subject``.

    Attributes:
        subject: as given.
        init_is_free: whether ``init`` is proved to depend on neither the batch nor its size: then it
            is traced at one size for each D.
    """

    def __init__(self, subject: Any) -> None:
        self.subject = subject
        self.init_is_free = False
        self._programs: dict[Any, Program] = {}
        self._rows_of_init: dict[int, int] = {}

    def trace(self, name: str, function: Callable[..., Any], *args: Any) -> Program:
        """Return ``function`` traced on arguments of these types; see :func:`trace`.

        Args:
            name: tells functions apart.
            function: anything that traces under ``jax.jit``.
            *args: trees of ``Abstract`` or arrays, of single cases.
        """
        abstract = jax.tree_util.tree_map(Abstract.of, args)
        leaves, structure = jax.tree_util.tree_flatten(abstract)
        key = name, structure, tuple(leaves)
        if key not in self._programs:
            self._programs[key] = trace(function, *abstract)
        return self._programs[key]

    @staticmethod
    def batch(rows: Any, features: Any) -> Case:
        """Return the types of a case of one shape; sizes may be symbolic."""
        single, whole = np.dtype(np.float32), np.dtype(np.int32)
        x, y = Abstract((rows, features), single), Abstract((rows,), single)
        return Case(Abstract((), whole), x, y, Abstract((), single), Abstract((), whole))

    def state(self, rows: int, features: int) -> Any:
        """Return the types of the state that ``init`` makes at one shape, none of them weak."""
        case = self.batch(rows, features)
        made = self.trace("init", self.subject.init, case.seed, self.init_batch(case.x)).out
        return jax.tree_util.tree_map(lambda leaf: Abstract(leaf.shape, leaf.dtype), made)

    def init_batch(self, x: Any) -> Any:
        """Return the batch that ``init`` is called with for one like ``x``, (..., N, D).

        It is ``x`` itself unless ``init_is_free``: then one of always the same N for each D.
        """
        *stack, rows, features = x.shape
        if not self.init_is_free:
            return x
        rows = self._rows_of_init.setdefault(features, rows)
        if isinstance(x, Abstract):
            return Abstract((rows, features), x.dtype)
        return np.zeros((*stack, rows, features), x.dtype)


def as_function(program: Program) -> TreeFunction:
    """Return a traced program as a function again."""
    return TreeFunction(program)


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
