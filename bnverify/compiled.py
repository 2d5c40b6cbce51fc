"""Our own programs, compiled quickly: they run a few times, so optimising them costs more than it saves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bnverify import compat
from bnverify.lazy import jax

QUICK = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}
"""Options of XLA: each halves the time to compile, and the step runs at two thirds the speed."""


class Compiled:
    """A function compiled for each new signature of its arguments.

    Args:
        function: traces under ``jax.jit``.
        optimise: whether to spend the time: worth it from some hundred calls on.
    """

    def __init__(self, function: Callable[..., Any], *, optimise: bool = False) -> None:
        self._jitted = jax.jit(function)
        self._optimise = optimise
        self._programs: dict[Any, Any] = {}

    def __call__(self, *args: Any) -> Any:
        """Return ``function(*args)``."""
        leaves, structure = jax.tree_util.tree_flatten(args)
        key = structure, tuple((leaf.shape, str(leaf.dtype)) for leaf in leaves)
        if key not in self._programs:
            lowered = self._jitted.lower(*args)
            options = None if self._optimise else compat.compiler_options(**QUICK)
            self._programs[key] = lowered.compile(compiler_options=options)
        return self._programs[key](*args)
