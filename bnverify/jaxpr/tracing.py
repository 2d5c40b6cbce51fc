"""Trace a function to a jaxpr together with the pytrees of its arguments and result."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import jax
import jax.extend.core
import numpy as np

from bnverify.model import Case
from bnverify.pytree import key_name

if TYPE_CHECKING:
    from collections.abc import Callable


SPLITS = (1, 2, 3, 4, 6, 8, 12, 24)
"""The numbers of parts that a step may split its batch into, in the order in which they are tried."""


@dataclass(frozen=True)
class Abstract:
    """Shape and dtype of an array: the leaf type of traced pytrees.

    Attributes:
        shape: a tuple of ints or symbolic sizes.
        dtype: the dtype; PRNG keys have an extended dtype.
        weak_type: whether the other operand's dtype wins in promotion, as for Python scalars.
    """

    shape: tuple[Any, ...]
    dtype: Any
    weak_type: bool = False

    @classmethod
    def of(cls, value: Any) -> Abstract:
        """Return the shape and dtype of an array, ``jax.ShapeDtypeStruct`` or abstract value."""
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
        args: its arguments, a tuple of pytrees of ``Abstract``.
        out: its result, a pytree of ``Abstract``.
    """

    jaxpr: Any
    args: tuple[Any, ...]
    out: Any


_TRACES = itertools.count()


def unused_axis() -> str:
    """Return a name for a mapped axis that no other has."""
    return f"bnverify {next(_TRACES)}"


def traced_anew(function: Callable[..., Any], axis: str | None = None) -> Callable[..., Any]:
    """Return ``function`` such that the functions that it compiles are traced again on every call.

    JAX keeps the program of an inner ``jax.jit`` for each shape, so what is observed or replaced while
    it is traced would be missed the second time. Its key contains the names of the mapped axes: within
    an axis of another name, over which nothing is mapped, the program is the same but a new one.

    Args:
        function: any; its results have no mapped axis.
        axis: the name of the axis. With the same name, programs are not traced again; None: a new name
            for every call.
    """

    def anew(*args: Any) -> Any:
        def with_nothing_mapped(_: Any) -> Any:
            return function(*args)

        once: Callable[[Any], Any] = jax.vmap(
            with_nothing_mapped,
            in_axes=None,
            out_axes=None,
            axis_size=1,
            axis_name=axis or unused_axis(),
        )
        return once(0)

    return anew


def trace(function: Callable[..., Any], *args: Any) -> Program:
    """Trace ``function`` without running or compiling it.

    Args:
        function: anything that traces under ``jax.jit``.
        *args: pytrees of ``Abstract``, ``jax.ShapeDtypeStruct`` or arrays. Sizes may be symbolic.
    """
    abstract = jax.tree_util.tree_map(Abstract.of, args)
    jaxpr, out = jax.make_jaxpr(function, return_shape=True)(*abstract)
    leaves = [Abstract.of(var.aval) for var in jaxpr.jaxpr.outvars]
    treedef = jax.tree_util.tree_structure(out)
    return Program(jaxpr, abstract, jax.tree_util.tree_unflatten(treedef, leaves))


class TreeFunction:
    """A traced program as a function on pytrees; it does not call the traced Python code."""

    def __init__(self, program: Program) -> None:
        self._run = jax.extend.core.jaxpr_as_fun(program.jaxpr)
        self._structure = jax.tree_util.tree_structure(program.out)

    def __call__(self, *args: Any) -> Any:
        """Call the program with pytrees shaped like ``Program.args``."""
        out = self._run(*jax.tree_util.tree_leaves(args))
        return jax.tree_util.tree_unflatten(self._structure, out)

    def flat(self, *leaves: Any) -> list[Any]:
        """Call the program with the flat list of argument leaves; return the result's leaves."""
        return list(self._run(*leaves))


class Tracer:
    """Traces a subject's functions once for each signature of their arguments.

    Proofs, compilation and rounding bounds all use the same traces.

    Args:
        subject: see ``bnverify.model.Subject``.
        multiple: the number of which every N is a multiple, if it is known.

    Attributes:
        subject: as given.
        init_is_free: whether ``init`` is proved independent of the batch and its size, so that one
            batch size for each D is enough.
    """

    def __init__(self, subject: Any, multiple: int | None = None) -> None:
        self.subject = subject
        self.init_is_free = False
        self._multiple = multiple
        self._programs: dict[Any, Program] = {}
        self._rows_of_init: dict[int, int] = {}

    @cached_property
    def multiple(self) -> int:
        """The number of which every N is a multiple, because the step splits its batch; 1 if it doesn't.

        Where the subject does not say, it is the first of ``SPLITS`` rows that ``step`` can be traced at.
        """
        known = self._multiple or self.subject.rows
        if known is not None:
            return int(known)
        width = self.subject.width(1)
        for rows in SPLITS:
            try:
                state, batch = self.state(rows, width), self.batch(rows, width)
                self.trace("step", self.subject.step, state, batch.x, batch.y, batch.lr)
            except Exception:  # noqa: BLE001, S112 - whatever a user's code raises when traced
                continue
            return rows
        return 1

    def trace(self, name: str, function: Callable[..., Any], *args: Any) -> Program:
        """Return ``function`` traced on these argument types, from the cache where possible.

        Args:
            name: the cache key of ``function``.
            function: anything that traces under ``jax.jit``.
            *args: pytrees of ``Abstract`` or arrays, without a case axis.
        """
        abstract = jax.tree_util.tree_map(Abstract.of, args)
        leaves, structure = jax.tree_util.tree_flatten(abstract)
        key = name, structure, tuple(leaves)
        if key not in self._programs:
            self._programs[key] = trace(function, *abstract)
        return self._programs[key]

    @staticmethod
    def batch(rows: Any, features: Any) -> Case:
        """Return an abstract case with these sizes, which may be symbolic."""
        single, whole = np.dtype(np.float32), np.dtype(np.int32)
        x, y = Abstract((rows, features), single), Abstract((rows,), single)
        return Case(Abstract((), whole), x, y, Abstract((), single), Abstract((), whole))

    def state(self, rows: int, features: int) -> Any:
        """Return the abstract state that ``init`` makes for these sizes, without weak types."""
        case = self.batch(rows, features)
        made = self.trace("init", self.subject.init, case.seed, self.init_batch(case.x)).out
        return jax.tree_util.tree_map(lambda leaf: Abstract(leaf.shape, leaf.dtype), made)

    def init_batch(self, x: Any) -> Any:
        """Return the batch to call ``init`` with, given ``x`` of shape (..., N, D).

        This is ``x`` unless ``init_is_free``; then a batch of zeros with one fixed N for each D.
        """
        *stack, rows, features = x.shape
        if not self.init_is_free:
            return x
        rows = self._rows_of_init.setdefault(features, rows)
        if isinstance(x, Abstract):
            return Abstract((rows, features), x.dtype)
        return np.zeros((*stack, rows, features), x.dtype)


def leaf_names(tree: Any, prefix: str = "") -> list[str]:
    """Return each leaf's path joined by "/", e.g. ``params/Dense_0/kernel``."""
    paths = jax.tree_util.tree_flatten_with_path(tree)[0]
    heads = [prefix] if prefix else []
    return ["/".join([*heads, *map(key_name, path)]) for path, _ in paths]
