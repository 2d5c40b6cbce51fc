"""Trace a step a second time, as another process would, and compare the results."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np

from bnverify.jaxpr.rounding import evaluate
from bnverify.jaxpr.tracing import leaf_names, trace
from bnverify.lazy import jax
from bnverify.model import Outcome, Subject

SAME = 1e-9
"""Results in float64 that differ by less, relatively, differ only in the order of operations."""


@contextmanager
def traced_anew() -> Iterator[None]:
    """Make JAX trace functions again that it has traced before.

    JAX caches the traces of jitted functions by configuration. The option changed here only affects
    warnings.
    """
    other = "allow" if jax.config.jax_numpy_rank_promotion == "warn" else "warn"
    with jax.numpy_rank_promotion(other), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def changed_by_tracing(subject: Subject, rows: int, features: int) -> list[str]:
    """Return the differences in the results of ``init`` and ``step`` when they are traced a second time.

    Both traces are evaluated in float64 on one batch, without compilation.

    Args:
        subject: the subject.
        rows: N of the batch.
        features: D of the batch.
    """
    rng = np.random.default_rng(0)
    x, y = (rng.normal(size=size).astype(np.float32) for size in ((rows, features), (rows,)))

    def step(state: Any, x: Any, y: Any, lr: Any) -> Outcome:
        return Outcome(*subject.step(state, x, y, lr))

    state, found = _twice("init", subject.init, np.int32(1), x)
    _, further = _twice("step", step, state, x, y, np.float32(0.1))
    return [*found, *further]


def _twice(name: str, function: Callable[..., Any], *args: Any) -> tuple[Any, list[str]]:
    """Return the result of a function, and how that of a second trace differs, one line for each leaf."""
    first = trace(partial(function), *args)
    with traced_anew():
        second = trace(partial(function), *args)
    one, other = evaluate(first, *args), evaluate(second, *args)
    leaves, others = jax.tree_util.tree_leaves(one), jax.tree_util.tree_leaves(other)
    if jax.tree_util.tree_structure(one) != jax.tree_util.tree_structure(other):
        return one, [f"{name} returns another tree structure when it is traced again"]
    found = []
    for leaf, a, b in zip(leaf_names(one), leaves, others, strict=True):
        apart = _apart(a, b) if a.shape == b.shape else None
        if apart is None:
            found.append(
                f"{name}: {leaf} has shape {a.shape}, and {b.shape} when it is traced again"
            )
        elif apart.any():
            index = tuple(int(i) for i in np.argwhere(apart)[0])
            entry = f"{leaf}[{', '.join(map(str, index))}]" if index else leaf
            values = f"{a[index]:.9g}, and {b[index]:.9g} when it is traced again"
            found.append(f"{name}: {entry} is {values}")
    return one, found


def _apart(a: Any, b: Any) -> Any:
    """Return where two arrays differ by more than the order of operations explains."""
    if a.dtype.kind != "f":
        return np.asarray(a != b)
    allowed = SAME * np.max(np.abs(a), initial=0.0, where=np.isfinite(a))
    return ~((np.abs(a - b) <= allowed) | (a == b) | (np.isnan(a) & np.isnan(b)))
