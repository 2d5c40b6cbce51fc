"""Recognise known mistakes in the numbers of a case that violates a law.

A person who debugs a violation looks at the numbers: the update is -1 times the expected one, the
recorded variance is N / (N - 1) times the batch's. This package does the same: on a few cases of a
step that breaks a law it runs the step and the evaluation again with modified inputs, using the
compiled functions, and compares the results with those of known mistakes. It returns what it
recognises as plain data, from which ``bnverify.diagnose`` derives the mistake.

Each reader returns the first possibility that fits, or nothing. Only steps that break a law are
read, so a clue alone never reports anything.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import numpy as np

from bnverify.clues.average import average, recorded_moments
from bnverify.clues.modes import modes, row_order, rows_of_evaluation
from bnverify.clues.nonfinite import first_nonfinite
from bnverify.clues.observed import NEEDS, Clues, ObservedCase
from bnverify.clues.update import gradient, optimizer_state, update, update_of_another_trace
from bnverify.judge import RoundingBounds
from bnverify.lazy import jax
from bnverify.model import Case, Transition
from bnverify.observe import FEW_ROWS, CompiledSubject, observe
from bnverify.pytree import path_name, stack

__all__ = ["Clues", "flow_clues", "general_cases", "read_clues", "tree_clues"]

OPTIMIZER_LAWS = frozenset({"params_follow_the_optimizer", "optimizer_state_follows_the_optimizer"})
DOUBLING = "doubling_the_batch_changes_nothing"
MOMENT_LAWS = frozenset({"batch_moments_are_the_layers_own", "momentum_is_as_declared", DOUBLING})
MODE_LAWS = frozenset(
    {
        "eval_at_the_batchs_own_moments_is_the_training_loss",
        "eval_rows_are_independent",
        "eval_loss_equals_the_hand_derivation",
        "training_loss_equals_the_hand_derivation",
        "targets_belong_to_their_rows",
    }
)
FINITE_LAWS = frozenset({"eval_loss_is_finite", "a_constant_feature_gives_a_finite_step"})
GRADIENT_LAWS = frozenset({"gradients_are_gradients_of_the_loss"})

READERS: dict[Callable[[ObservedCase], Clues], frozenset[str]] = {
    update_of_another_trace: frozenset({DOUBLING}),
    update: frozenset(),
    optimizer_state: OPTIMIZER_LAWS,
    average: frozenset(),
    recorded_moments: MOMENT_LAWS,
    row_order: frozenset({"row_order_changes_nothing"}),
    modes: MODE_LAWS,
    gradient: GRADIENT_LAWS,
    rows_of_evaluation: frozenset({"eval_rows_are_independent"}),
    first_nonfinite: FINITE_LAWS,
}
"""Reader -> the laws that it is relevant to; empty: all laws."""


def read_clues(
    calls: CompiledSubject, bounds: RoundingBounds, cases: Iterable[Case], broken: Collection[str]
) -> Clues:
    """Return what each reader recognises, in the first case in which it recognises anything.

    Cases are in order of generality, because a special case could suggest more than is true.

    Args:
        calls: the subject's compiled functions.
        bounds: the rounding bounds of the same subject.
        cases: single cases, the most general first.
        broken: the names of the broken laws; readers that are not relevant to them are skipped.
    """
    recognised: dict[str, Clues] = {}
    for case in cases:
        one = stack([case])
        doubled = DOUBLING in broken and case.shape[0] <= FEW_ROWS
        needs = {*NEEDS, "step:doubled_batch"} if doubled else {*NEEDS}
        observed = ObservedCase(calls, bounds, one, observe(calls, one, needs))
        for read, laws in READERS.items():
            if recognised.get(read.__name__) or (laws and laws.isdisjoint(broken)):
                continue
            try:
                with np.errstate(all="ignore"):
                    recognised[read.__name__] = read(observed)
            except Exception:  # noqa: BLE001 - user code may raise anything for modified inputs
                recognised[read.__name__] = {}
    return {name: value for found in recognised.values() for name, value in found.items()}


def general_cases(shape: tuple[int, int]) -> list[Case]:
    """Return random cases of a shape, at the first step and at a later one.

    A smallest counterexample often has constant features or gradients of 0, which fit many
    mistakes; a random case does not.
    """
    rng = np.random.default_rng(0)
    rows, features = shape
    x, y = rng.normal(0.5, 1, (rows, features)), rng.normal(0.25, 1, rows)
    return [Case.of(5, x, y, 0.125, warmup=warmup) for warmup in (0, 2)]


def tree_clues(t: Transition) -> Clues:
    """Return how the leaves of a step's result differ from those expected.

    Args:
        t: a transition; only its tree structures matter.
    """
    found: Clues = {}
    if t.info.grads is not None:
        kind, leaves = _compared(t.info.grads, t.before.params)
        if kind:
            found |= {"gradient_tree": kind, "gradient_tree_leaves": leaves}
    kind, leaves = _compared(t.after.batch_stats, t.before.batch_stats)
    if kind:
        found |= {"statistics_tree": kind, "statistics_tree_leaves": leaves}
    weak = _weak_types_lost(*(state._replace(extra=None) for state in (t.before, t.after)))
    return {**found, "only_weak_types": weak} if weak else found


def flow_clues(leaves: Mapping[str, Collection[str]]) -> Clues:
    """Return what the trace shows: variables that cannot affect the eval loss, statistics that mix.

    A statistic mixes if its new value depends on the old value of another one of its layer, although the
    training loss depends on no old statistic.

    Args:
        leaves: output leaf -> the input leaves that may affect it.
    """
    if "eval_loss" not in leaves:
        return {}
    found: Clues = {}
    averages = {n: sources for n, sources in leaves.items() if n.startswith("batch_stats/")}
    if not any(source in averages for source in leaves.get("loss", ())):
        for name, sources in averages.items():
            layer = name.rpartition("/")[0]
            others = [s for s in sources if s != name and s.rpartition("/")[0] == layer]
            if others and name in sources:
                found |= {"mixed": name, "mixed_with": min(others)}
    trained = [name for name in leaves.get("loss", ()) if name.startswith("params/")]
    recorded = [
        name
        for name, sources in leaves.items()
        if name.startswith("batch_stats/") and "x" in sources
    ]
    unread = sorted({*trained, *recorded} - {*leaves["eval_loss"]})
    return {**found, "unread": unread} if unread else found


def _weak_types_lost(before: Any, after: Any) -> list[str]:
    """Return the leaves that lose a weak type; none if the two states differ in anything else."""
    if jax.tree_util.tree_structure(before) != jax.tree_util.tree_structure(after):
        return []
    old, _ = jax.tree_util.tree_flatten_with_path(before)
    new = jax.tree_util.tree_leaves(after)
    if any((a.shape, a.dtype) != (b.shape, b.dtype) for (_, a), b in zip(old, new, strict=True)):
        return []
    weak = [getattr(leaf, "weak_type", False) for leaf in new]
    pairs = zip(old, weak, strict=True)
    return [path_name(path) for (path, leaf), now in pairs if leaf.weak_type and not now]


def _compared(actual: Any, expected: Any) -> tuple[str, list[str]]:
    """Return how a tree's leaves differ from the expected ones ("" if they do not), and which."""
    one, other = (
        [path_name(path) for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0]]
        for tree in (actual, expected)
    )
    missing, added = [n for n in other if n not in one], [n for n in one if n not in other]
    nested = [a for a in added if any(a.endswith("/" + name) for name in missing)]
    if len(nested) < len(missing):
        return "fewer leaves", missing
    more = [name for name in added if name not in nested]
    return ("more leaves", more) if more else ("nested" if nested else "", nested)
