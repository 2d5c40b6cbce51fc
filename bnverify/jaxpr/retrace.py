"""Evaluate a step on one batch in float64, and compare the results of two traces or two processes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from bnverify.jaxpr.rounding import evaluate
from bnverify.jaxpr.tracing import Tracer, leaf_names, trace, traced_anew
from bnverify.lazy import jax
from bnverify.model import Outcome

SAME = 1e-9
"""Results in float64 that differ by less, relatively, differ only in the order of operations."""


def changed_by_tracing(tracer: Tracer) -> list[str]:
    """Return what ``init`` and ``step`` compute differently when they are traced a second time.

    Both traces are evaluated in float64 on one batch, so nothing is compiled.

    Args:
        tracer: the subject's tracer, with the first traces.
    """
    first = computed(tracer)
    second = computed(tracer, anew=True, state=first["init"])
    return differences(by_leaf(first), by_leaf(second), "when it is traced again")


def computed(tracer: Tracer, *, anew: bool = False, state: Any = None) -> dict[str, Any]:
    """Return what ``init`` and ``step`` compute on one small batch, evaluated in float64.

    Args:
        tracer: the subject's tracer.
        anew: whether to trace both functions again.
        state: the state that the step is given; None: the one that ``init`` makes.

    Returns:
        "init" -> a State, "step" -> an Outcome.
    """

    def program(name: str, function: Callable[..., Any], *types: Any) -> Any:
        if not anew:
            return tracer.trace(name, function, *types)
        return trace(traced_anew(function), *types)

    subject = tracer.subject
    rows, features = 2 * tracer.multiple, subject.width(2)
    case = tracer.batch(rows, features)
    rng = np.random.default_rng(0)
    x, y = (rng.normal(size=leaf.shape).astype(np.float32) for leaf in (case.x, case.y))
    init = program("init", subject.init, case.seed, tracer.init_batch(case.x))
    made = evaluate(init, np.int32(1), tracer.init_batch(x))
    types = tracer.state(rows, features), case.x, case.y, case.lr
    step = program("step", subject.step, *types)
    given = made if state is None else state
    return {"init": made, "step": Outcome(*evaluate(step, given, x, y, np.float32(0.1)))}


def by_leaf(results: Mapping[str, Any]) -> dict[str, Any]:
    """Return "init: params/..." or "step: state/..." -> array, for each leaf of some results."""
    return {
        f"{name}: {path}": leaf
        for name, tree in results.items()
        for path, leaf in zip(leaf_names(tree), jax.tree_util.tree_leaves(tree), strict=True)
    }


def differences(one: Mapping[str, Any], other: Mapping[str, Any], where: str) -> list[str]:
    """Return the differences between two results by leaf, one line each.

    Args:
        one: name of a leaf -> its array.
        other: the same for the other result.
        where: what is special about the other result: "when it is traced again".
    """
    found = [f"{leaf} exists only in the first trace" for leaf in one if leaf not in other]
    found += [f"{leaf} exists only {where}" for leaf in other if leaf not in one]
    for leaf, a in one.items():
        b = other.get(leaf)
        if b is None:
            continue
        apart = _apart(a, b) if a.shape == b.shape else None
        if apart is None:
            found.append(f"{leaf} has shape {a.shape}, and {b.shape} {where}")
        elif apart.any():
            index = tuple(int(i) for i in np.argwhere(apart)[0])
            entry = f"{leaf}[{', '.join(map(str, index))}]" if index else leaf
            found.append(f"{entry} is {a[index]:.9g}, and {b[index]:.9g} {where}")
    return found


def _apart(a: Any, b: Any) -> Any:
    """Return where two arrays differ by more than the order of operations explains."""
    if a.dtype.kind != "f" or b.dtype.kind != "f":
        return np.asarray(a != b)
    allowed = SAME * np.max(np.abs(a), initial=0.0, where=np.isfinite(a))
    return ~((np.abs(a - b) <= allowed) | (a == b) | (np.isnan(a) & np.isnan(b)))
