"""Our own programs, compiled quickly: they run a few times, so optimising them costs more than it saves."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

from bnverify.lazy import jax

QUICK = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}
"""Options of XLA: each halves the time to compile, and the step runs at two thirds the speed.

The second came with jaxlib 0.4.36 or near it and is gone from 0.11 on.
"""


@functools.cache
def _quick() -> dict[str, Any]:
    """Return those of ``QUICK`` that the installed XLA knows."""
    tiny = jax.jit(lambda x: x).lower(0.0)
    known: dict[str, Any] = {}
    for name, value in QUICK.items():
        # What an unknown option raises differs between releases, and is no public class in most.
        with contextlib.suppress(Exception):
            tiny.compile(compiler_options={name: value})
            known[name] = value
    return known


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
            self._programs[key] = lowered.compile(
                compiler_options=None if self._optimise else _quick()
            )
        return self._programs[key](*args)
