"""What the numbers of a violating case say: what a step has done in place of what it should.

A law says that something is off. A person then looks at the numbers: the update is -1 times what it
should be, the recorded variance is N / (N - 1) times the batch's. So does this module. On a few cases
of a step that breaks a law it runs the step and the evaluation some more times, with the programs that are
compiled already, and compares what came out with what known mistakes would give. What it recognises it
returns as plain data, from which ``bnverify.diagnose`` concludes the mistake.

Each reader returns what it recognised, or nothing; the first possibility that fits is told. Only steps
that break a law are read, so a clue never accuses anybody by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Any

import numpy as np

from bnverify.clues.average import average, recorded_moments
from bnverify.clues.modes import modes, row_order
from bnverify.clues.seen import NEEDS, Clues, Seen
from bnverify.clues.update import gradient, optimizer_state, update, update_of_another_trace
from bnverify.judge import RoundingBounds
from bnverify.lazy import jax
from bnverify.model import Case, Transition
from bnverify.observe import FEW_ROWS, CompiledSubject, observe
from bnverify.pytree import path_name, stack

__all__ = ["Clues", "general_cases", "read_clues", "tree_clues"]

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
GRADIENT_LAWS = frozenset({"gradients_are_gradients_of_the_loss"})

READERS: dict[Callable[[Seen], Clues], frozenset[str]] = {
    update_of_another_trace: frozenset({DOUBLING}),
    update: frozenset(),
    optimizer_state: OPTIMIZER_LAWS,
    average: frozenset(),
    recorded_moments: MOMENT_LAWS,
    row_order: frozenset({"row_order_changes_nothing"}),
    modes: MODE_LAWS,
    gradient: GRADIENT_LAWS,
}
"""Each reader -> the laws that it bears on; none: any."""


def read_clues(
    calls: CompiledSubject, bounds: RoundingBounds, cases: Iterable[Case], broken: Collection[str]
) -> Clues:
    """Return what is recognised in some cases: of each reader, in the first that tells it anything.

    What a general case leaves open, a special one would only seem to settle.

    Args:
        calls: the subject's functions.
        bounds: reads the traced step in float64; of the same subject.
        cases: single cases, the most telling first.
        broken: the names of the broken laws: what has no bearing on them is not read.
    """
    told: dict[str, Clues] = {}
    for case in cases:
        one = stack([case])
        doubled = DOUBLING in broken and case.shape[0] <= FEW_ROWS
        needs = {*NEEDS, "step:doubled_batch"} if doubled else {*NEEDS}
        seen = Seen(calls, bounds, one, observe(calls, one, needs))
        for read, laws in READERS.items():
            if told.get(read.__name__) or (laws and laws.isdisjoint(broken)):
                continue
            try:
                with np.errstate(all="ignore"):
                    told[read.__name__] = read(seen)
            except Exception:  # noqa: BLE001 - whatever a user's code raises for other inputs
                told[read.__name__] = {}
    return {name: value for found in told.values() for name, value in found.items()}


def general_cases(shape: tuple[int, int]) -> list[Case]:
    """Return cases of a shape in which nothing is special, at the first step and at a later one.

    What is wrong is told by numbers best where no feature is constant and no gradient 0, as they are in
    the smallest counterexample.
    """
    rng = np.random.default_rng(0)
    rows, features = shape
    x, y = rng.normal(0.5, 1, (rows, features)), rng.normal(0.25, 1, rows)
    return [Case.of(5, x, y, 0.125, warmup=warmup) for warmup in (0, 2)]


def tree_clues(t: Transition) -> Clues:
    """Return how the trees of a step differ in their leaves from what they should be.

    Args:
        t: a transition, of which shapes are enough.
    """
    found: Clues = {}
    if t.info.grads is not None:
        kind, leaves = _compared(t.info.grads, t.before.params)
        if kind:
            found |= {"gradient_tree": kind, "gradient_tree_leaves": leaves}
    kind, leaves = _compared(t.after.batch_stats, t.before.batch_stats)
    if kind:
        found |= {"statistics_tree": kind, "statistics_tree_leaves": leaves}
    return found


def _compared(actual: Any, expected: Any) -> tuple[str, list[str]]:
    """Return in what way a tree's leaves differ from the expected ones, and which do."""
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
