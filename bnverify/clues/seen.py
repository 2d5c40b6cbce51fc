"""One case that breaks a law, what is observed of it, and how its numbers are compared."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from bnverify.judge import RoundingBounds
from bnverify.lazy import jax, jnp
from bnverify.model import Case, State, Transition
from bnverify.observe import CompiledSubject, optimizer_update
from bnverify.pytree import is_floating, path_name
from bnverify.reruns import own_statistics

Clues = dict[str, Any]
"""What was recognised, by name: numbers, texts and lists of names, as JSON holds them."""

Leaves = dict[str, Any]
"""Path of a leaf -> its values in float64."""

U = 2.0**-24
FEW = 64 * U
"""The roundings of a handful of float32 operations, relative to their operands."""

LOOSE = 1e-5
"""Relative: what a float32 sum of some rows, or a loss, may be off by, far below any mistake's size."""

NEEDS = (
    "step:zero_statistics",
    "step:huge_statistics",
    "step:other_statistics",
    "step:zero_lr",
    "expected_update",
)
"""What is observed of each case."""


def floats(tree: Any) -> Leaves:
    """Return the floating-point leaves of the only case of a stacked tree."""
    paths, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {
        path_name(path): np.asarray(leaf)[0].astype(np.float64)
        for path, leaf in paths
        if is_floating(leaf)
    }


def equal(actual: Any, expected: Any, scale: Any, places: float = FEW) -> bool:
    """Return whether two arrays agree within ``places`` of ``scale``."""
    return bool(np.all(np.abs(actual - expected) <= places * np.abs(scale) + 1e-37))


def all_equal(actual: Leaves, expected: Leaves, *operands: Leaves) -> bool:
    """Return whether trees agree within a few roundings of what they were computed from."""
    if actual.keys() != expected.keys():
        return False
    return all(
        equal(actual[name], expected[name], sum(np.abs(tree[name]) for tree in operands))
        for name in actual
    )


def _holds_digits(values: Any, dtype: Any, places: float) -> bool:
    """Return whether values that float32 would spread are all ones that a narrower type holds."""
    rounded = values.astype(dtype).astype(np.float64)
    near = np.abs(values - rounded) <= places * np.abs(values)
    few = np.abs(values * 256) == np.round(np.abs(values * 256))  # held by chance: 0, 1, 0.5
    return bool(np.all(near | ~np.isfinite(rounded)) and np.sum(~few) >= 2)


def narrow_type(values: Any, largest: float, places: float = 0.0) -> str:
    """Return the name of the narrow type that holds all ``values``, or nothing.

    Args:
        values: which ones.
        largest: the largest magnitude around: what is small beside it is noise, of few digits.
        places: how far they may be off, relative to themselves.
    """
    values = np.ravel(values)
    values = values[np.abs(values) > 1e-5 * largest]
    types = (("bfloat16", jnp.bfloat16), ("float16", np.float16))
    return next((name for name, dtype in types if _holds_digits(values, dtype, places)), "")


def largest(leaves: Leaves) -> float:
    """Return the largest magnitude in a tree; 0 where it is empty."""
    return max((float(np.max(np.abs(leaf), initial=0)) for leaf in leaves.values()), default=0.0)


def raw(tree: Any) -> dict[str, Any]:
    """Return path -> the stacked leaf, of the floating-point ones."""
    paths, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {path_name(path): np.asarray(leaf) for path, leaf in paths if is_floating(leaf)}


@dataclass
class Seen:
    """One case, what was observed of it, and how to ask for more.

    Attributes:
        calls: the subject's functions.
        bounds: reads the traced step.
        case: stacked, a single one.
        t: the observed transition.
    """

    calls: CompiledSubject
    bounds: RoundingBounds
    case: Case
    t: Transition

    @property
    def rows(self) -> int:
        """N."""
        return self.case.shape[0]

    @property
    def rate(self) -> float:
        """The learning rate."""
        return float(self.case.lr[0])

    @cached_property
    def initial(self) -> State:
        """The state before the first step."""
        return self.calls.init(self.case)

    def update(self, params: Any, opt_state: Any) -> State:
        """Return the params and the optimizer's state after its update by the step's gradient."""
        given = State(params, None, opt_state)
        return optimizer_update(self.calls, self.case, self.t.info.grads, given)

    @property
    def expected(self) -> State:
        """What the optimizer makes of the step's gradient."""
        expected: State = self.t.facts["expected_update"]
        return expected

    @cached_property
    def twice(self) -> State:
        """What it makes of it when it is asked a second time."""
        return self.update(self.expected.params, self.expected.opt_state)

    @cached_property
    def fresh(self) -> State:
        """What it makes of it in its initial state."""
        return self.update(self.t.before.params, self.initial.opt_state)

    @cached_property
    def own(self) -> State:
        """The state before the step, with the batch's own moments as its statistics."""
        return own_statistics(self.t.reruns, self.t.before)

    def loss_of(self, state: State, **batch: Any) -> float:
        """Return the eval loss of a state, on the case's batch or another one."""
        return float(np.ravel(self.calls.evaluate(state, self.case._replace(**batch)))[0])
