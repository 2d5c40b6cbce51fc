"""Batches that a loop processes in parts, as gradient accumulation does: which rows reach the statistics.

The graph of a loop does not tell its iterations apart, so the traced step is evaluated: with a random batch,
and with the same batch after a change to one part of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bnverify.adapters.programs import RATE, Layers, Programs, listed
from bnverify.adapters.traced import labels_in_loops
from bnverify.jaxpr.rounding import evaluate, evaluate_stacked
from bnverify.jaxpr.tracing import trace
from bnverify.model import Part, State


def parts(programs: Programs, layers: Layers) -> Iterator[Part]:
    """Yield rows of the first and of the last part, if they affect the new params.

    Nothing is yielded if no part affects the new statistics, which other laws report, or if the step
    cannot be evaluated.
    """
    inside = labels_in_loops(programs.step)
    split = {
        path: rows
        for path, rows in layers.parts().items()
        if not inside.isdisjoint(layers.training(path))
    }
    if not split:
        return
    total = programs.x.shape[0]
    try:
        groups = _groups(total, min(split.values()))
        after = _evaluated(programs, list(groups.values()))
    except Exception:  # noqa: BLE001 - whatever a user's code raises
        return
    trains, reaches = _changed(after.params), _changed(after.batch_stats)
    if reaches.any():
        for rows, trained, reached in zip(groups, trains, reaches, strict=True):
            if trained:
                yield Part(listed(split), rows, bool(reached))


def _groups(total: int, size: int) -> dict[str, Any]:
    """Return words -> the indices of the first and of the last part: of adjacent rows, or strided."""
    every = total // size
    places = np.arange(total)
    return {
        f"the first {size} of {total} rows": places[:size],
        f"the last {size} of {total} rows": places[-size:],
        f"the first of every {every} rows": places[::every],
        f"the last of every {every} rows": places[every - 1 :: every],
    }


def _evaluated(programs: Programs, groups: list[Any]) -> State:
    """Return the new state (1 + G, ...): for a random batch, then with other rows in each group."""
    subject, rng = programs.subject, np.random.default_rng(0)
    x, y, others = (
        rng.normal(size=leaf.shape).astype(np.float32)
        for leaf in (programs.x, programs.y, programs.x)
    )
    start = np.int32(0), x
    state = evaluate(trace(subject.init, *start), *start)
    xs = np.stack([x] * (1 + len(groups)))
    for place, rows in enumerate(groups, 1):
        xs[place, rows] = others[rows]
    state, y, rate = jax.tree_util.tree_map(
        lambda leaf: np.broadcast_to(leaf, (len(xs), *np.shape(leaf))),
        (state, y, np.float32(RATE)),
    )
    program = trace(subject.step, programs.state, programs.x, programs.y, np.float32(RATE))
    after: State = evaluate_stacked(program, state, xs, y, rate)[0]
    return after


def _changed(tree: Any) -> Any:
    """Return, for each case but the first, whether a floating-point leaf differs from the first's."""
    leaves = [
        leaf for leaf in jax.tree_util.tree_leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.floating)
    ]
    differ = [np.any(leaf[1:] != leaf[:1], axis=tuple(range(1, leaf.ndim))) for leaf in leaves]
    return np.any(np.stack(differ), axis=0) if differ else np.zeros(0, bool)
