"""Our own programs, compiled quickly: they run a few times, so optimising them costs more than it saves."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from bnverify import compat, kept
from bnverify.lazy import jax

QUICK = {
    "xla_backend_optimization_level": 0,
    "xla_cpu_use_fusion_emitters": False,
    # What is to be rounded to 16 bits is: else one of two programs may do it and the other not.
    "xla_allow_excess_precision": False,
}
"""Options of XLA for what runs a few times: the first two halve the time to compile each."""

OPTIMISED = {**QUICK, "xla_backend_optimization_level": 1}
"""Options for what runs often: twice the time to compile, a fifth of it to run.

With XLA's defaults, programs of thousands of small operations in float64 take twice as long again
to compile, and run slower than with these.
"""

MOST = 120
"""Programs that a process keeps.

Each takes some 10 MB and 20 of the 65,530 memory maps that Linux allows a process: where these run
out, LLVM ends it. JAX holds on to every program, used or not, until its caches are cleared.
"""

_RECENT: OrderedDict[tuple[weakref.ref[Compiled], Any], None] = OrderedDict()
"""(owner, key) of each program since the caches were cleared, the one used last at the end."""


def quick_jit(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``jax.jit(function)`` for what runs a few times, on whatever arguments JAX takes."""
    return compat.jit(function, **QUICK)


class Compiled:
    """A function compiled for each new signature of its arguments.

    What was not used for long is compiled again when it is called again: see ``MOST``.

    Args:
        function: traces under ``jax.jit``.
        optimise: whether to spend the time: worth it for what would run for seconds.
        identity: what tells the function from every other, so that it is kept on disk; None: it
            is not.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        *,
        optimise: bool = False,
        identity: kept.Identity | None = None,
    ) -> None:
        self._function = function
        self._options = OPTIMISED if optimise else QUICK
        self._identity = identity
        self._programs: dict[Any, Any] = {}
        self._self = weakref.ref(self)

    def __call__(self, *args: Any) -> Any:
        """Return ``function(*args)``."""
        leaves, structure = jax.tree_util.tree_flatten(args)
        key = structure, tuple((leaf.shape, leaf.dtype) for leaf in leaves)
        if key not in self._programs:
            _make_room()
            self._programs[key] = self._compile(args)
            _RECENT[self._self, key] = None
        _RECENT.move_to_end((self._self, key))
        return self._programs[key](*args)

    def _compile(self, args: Any) -> Callable[..., Any]:
        options = compat.compiler_options(**self._options)
        identity = self._identity
        known = kept.program(self._function, args, identity) if identity else None
        if identity is None or known is None:
            traced: Callable[..., Any] = (
                jax.jit(self._function).lower(*args).compile(compiler_options=options)
            )
            return traced
        leaves, out = jax.tree_util.tree_leaves(args), identity.out
        program = jax.jit(known.call).lower(*leaves).compile(compiler_options=options)

        def run(*args: Any) -> Any:
            return jax.tree_util.tree_unflatten(out, program(*jax.tree_util.tree_leaves(args)))

        return run

    def forget(self, key: Any) -> None:
        """Drop one program."""
        del self._programs[key]


def _make_room() -> None:
    """Where there are too many programs, drop the half that was not used for longest."""
    if len(_RECENT) < MOST:
        return
    while len(_RECENT) > MOST // 2:
        (reference, key), _ = _RECENT.popitem(last=False)
        owner = reference()
        if owner is not None:
            owner.forget(key)
    jax.clear_caches()
