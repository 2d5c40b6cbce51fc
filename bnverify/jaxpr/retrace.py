"""Trace a step a second time, as another process would, and compare the results."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np

from bnverify.jaxpr.rounding import evaluate
from bnverify.jaxpr.tracing import Tracer, leaf_names, trace
from bnverify.lazy import jax
from bnverify.model import Outcome

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


def changed_by_tracing(tracer: Tracer, rows: int, features: int) -> list[str]:
    """Return what ``init`` and ``step`` compute differently when they are traced a second time.

    Both traces are evaluated in float64 on one batch, so nothing is compiled.

    Args:
        tracer: the subject's tracer, with the first traces.
        rows: N of the batch.
        features: D of the batch.
    """
    subject, case = tracer.subject, tracer.batch(rows, features)
    rng = np.random.default_rng(0)
    x, y = (rng.normal(size=leaf.shape).astype(np.float32) for leaf in (case.x, case.y))
    start = case.seed, tracer.init_batch(case.x)
    state, found = _twice(tracer, "init", subject.init, start, (np.int32(1), tracer.init_batch(x)))
    types = tracer.state(rows, features), case.x, case.y, case.lr
    given = state, x, y, np.float32(0.1)
    _, further = _twice(tracer, "step", subject.step, types, given)
    return [*found, *further]


def _twice(
    tracer: Tracer, name: str, function: Callable[..., Any], types: Any, args: Any
) -> tuple[Any, list[str]]:
    """Return the result of a function, and the leaves in which that of a second trace differs."""
    first = tracer.trace(name, function, *types)
    with traced_anew():
        second = trace(partial(function), *types)
    one, other = evaluate(first, *args), evaluate(second, *args)
    if name == "step":
        one, other = Outcome(*one), Outcome(*other)
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
