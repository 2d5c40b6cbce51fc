"""Which linen module a function goes through, seen by running it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from bnverify.adapters.calls import plain
from bnverify.subject import Subject

PLACES = 1e-5  # of agreement of two float32 losses that come from one computation


@dataclass
class Watch:
    """What was seen of one run.

    Attributes:
        modules: the outermost module of each pass, in order, bound no more.
        params: its params in that pass, where they were values and not tracers; else None.
    """

    modules: list[nn.Module] = field(default_factory=list)
    params: list[Any] = field(default_factory=list)
    _depth: int = 0

    def __call__(self, call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        """Intercept one method call; see ``flax.linen.intercept_methods``."""
        self._depth += 1
        try:
            if self._depth == 1 and not context.module.path:
                self._note(context.module)
            return call(*args, **kwargs)
        finally:
            self._depth -= 1

    def _note(self, module: Any) -> None:
        params = None if module.is_initializing() else module.variables.get("params")
        leaves = jax.tree_util.tree_leaves(params)
        concrete = bool(leaves) and not any(isinstance(leaf, jax.core.Tracer) for leaf in leaves)
        self.modules.append(module.clone(parent=None, name=None))
        self.params.append(params if concrete else None)


def watched(function: Callable[..., Any], *args: Any) -> tuple[Any, Watch]:
    """Return what ``function`` returns and what was seen of its modules."""
    watch = Watch()
    with nn.intercept_methods(watch):
        result = plain(function)(*args)
    return result, watch


def starts_like(subject: Subject, seed: int, x: Any, y: Any, result: Any, watch: Watch) -> bool:
    """Return whether a function run with the learning rate 0 starts as ``subject`` does.

    Args:
        subject: the canonical step around the module that was seen.
        seed: of the run.
        x: likewise.
        y: likewise.
        result: what the run returned.
        watch: what was seen of it. With the rate 0 the params of its last pass are the first
            ones; where no pass shows values, the loss must be that of the first params, from
            any statistics and of any reduction.
    """
    state = subject.init(np.int32(seed), x)
    seen = [params for params in watch.params if params is not None]
    if seen:
        with suppress(ValueError):  # trees that are not alike
            alike = jax.tree_util.tree_map(np.array_equal, _plain(seen[-1]), _plain(state.params))
            return all(jax.tree_util.tree_leaves(alike))
        return False
    value = np.asarray(result, np.float64)
    return value.size == 1 and any(
        abs(value.reshape(()) - each) <= PLACES * abs(each)
        for each in _losses(subject, state, x, y)
    )


def _plain(tree: Any) -> Any:
    return jax.tree_util.tree_map(np.asarray, jax.tree_util.tree_map(lambda leaf: leaf, dict(tree)))


def _losses(subject: Subject, state: Any, x: Any, y: Any) -> Iterator[float]:
    """Yield the mean and the sum of squared errors at the first params, in every mode."""
    after, info = subject.step(state, x, y, np.float32(0))
    for loss in (
        subject.evaluate(after, x, y),
        subject.evaluate(state, x, y),
        info.loss,
    ):
        mean = float(np.asarray(loss).reshape(()))
        yield mean
        yield mean * len(y)
