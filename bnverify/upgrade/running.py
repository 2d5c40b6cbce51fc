"""Running a subject case by case, as a user would, and what that costs."""

from __future__ import annotations

import time
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from bnverify.lazy import jax
from bnverify.pytree import stack
from bnverify.unusable import first_line

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

_TIMED_CALLS = 40


class Runner:
    """A function compiled as a user compiles it; called as it is where it does not trace.

    Attributes:
        eager: why it is not compiled; empty where it is.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self._jitted = jax.jit(partial(function))  # another function to jax: a cache of its own
        self.eager = ""

    def __call__(self, *args: Any) -> Any:
        """Return the function's result as a tree of NumPy arrays."""
        if not self.eager:
            try:
                return _on_host(self._jitted(*args))
            except Exception as error:  # noqa: BLE001 - whatever a user's code raises under jit
                # If it fails without jit too, that error is the one to tell.
                result = self._function(*args)
                self.eager = first_line(error)
                return _on_host(result)
        return _on_host(self._function(*args))

    def each(self, argument_lists: Iterable[tuple[Any, ...]]) -> Any:
        """Return the results of several calls, stacked."""
        return stack([self(*args) for args in argument_lists])


def _on_host(tree: Any) -> Any:
    return jax.tree_util.tree_map(np.asarray, tree)


def size(function: Callable[..., Any], *args: Any) -> dict[str, float]:
    """Return how large the compiled function is, in instructions; {} where it does not compile."""
    try:
        text = jax.jit(partial(function)).lower(*args).compile().as_text()
    except Exception:  # noqa: BLE001 - informational; what does not run is told elsewhere
        return {}
    return {"program_size": float(sum(" = " in line for line in text.splitlines()))}


def times(function: Callable[..., Any], *args: Any) -> dict[str, float]:
    """Return the seconds to compile the function, and the seconds of its fastest call."""
    started = time.perf_counter()
    try:
        program = jax.jit(partial(function)).lower(*args).compile()
        compiled = time.perf_counter() - started
        program(*args)
    except Exception:  # noqa: BLE001 - as in `size`
        return {}
    taken = []
    for _ in range(_TIMED_CALLS):
        started = time.perf_counter()
        jax.block_until_ready(program(*args))
        taken.append(time.perf_counter() - started)
    return {"compile_time": compiled, "run_time": min(taken)}
