"""One case that breaks a law, what is observed of it, and how numbers are compared."""

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
"""What was recognised, by name: numbers, strings and lists of names, as in JSON."""

Leaves = dict[str, Any]
"""Leaf path -> values in float64."""

U = 2.0**-24  # half an ulp of 1 in float32
FEW = 64 * U
"""The relative rounding error of a few float32 operations."""

LOOSE = 1e-5
"""A relative tolerance for float32 sums over rows, and losses; any mistake is much larger."""

NEEDS = (
    "step:zero_statistics",
    "step:huge_statistics",
    "step:other_statistics",
    "step:zero_lr",
    "expected_update",
)
"""What is observed for each case."""


def floats(tree: Any) -> Leaves:
    """Return the floating-point leaves of the only case in a stacked tree."""
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
    """Return whether trees agree within a few roundings of the ``operands``."""
    if actual.keys() != expected.keys():
        return False
    return all(
        equal(actual[name], expected[name], sum(np.abs(tree[name]) for tree in operands))
        for name in actual
    )


def _holds_digits(values: Any, dtype: Any, places: float) -> bool:
    """Return whether a narrower dtype represents all values, and not by chance."""
    rounded = values.astype(dtype).astype(np.float64)
    near = np.abs(values - rounded) <= places * np.abs(values)
    few = np.abs(values * 256) == np.round(np.abs(values * 256))  # narrow by chance: 0, 1, 0.5
    return bool(np.all(near | ~np.isfinite(rounded)) and np.sum(~few) >= 2)


def narrow_type(values: Any, largest: float, places: float = 0.0) -> str:
    """Return the name of a narrow dtype that represents all ``values``, or "".

    Args:
        values: the numbers.
        largest: the largest magnitude nearby; much smaller values are ignored as noise.
        places: the relative tolerance.
    """
    values = np.ravel(values)
    values = values[np.abs(values) > 1e-5 * largest]
    types = (("bfloat16", jnp.bfloat16), ("float16", np.float16))
    return next((name for name, dtype in types if _holds_digits(values, dtype, places)), "")


def largest(leaves: Leaves) -> float:
    """Return the largest magnitude in a tree; 0 if it is empty."""
    return max((float(np.max(np.abs(leaf), initial=0)) for leaf in leaves.values()), default=0.0)


def raw(tree: Any) -> dict[str, Any]:
    """Return path -> stacked leaf, for floating-point leaves."""
    paths, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {path_name(path): np.asarray(leaf) for path, leaf in paths if is_floating(leaf)}


@dataclass
class ObservedCase:
    """One case, what was observed of it, and further runs on demand.

    Attributes:
        calls: the subject's compiled functions.
        bounds: the rounding bounds of the subject.
        case: a single case, stacked.
        t: the observed transition.
    """

    calls: CompiledSubject
    bounds: RoundingBounds
    case: Case
    t: Transition

    @property
    def rows(self) -> int:
        """The batch size N."""
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
        """Return the state after an optimizer update with the step's gradient."""
        given = State(params, None, opt_state)
        return optimizer_update(self.calls, self.case, self.t.info.grads, given)

    @property
    def expected(self) -> State:
        """The state after the optimizer update with the step's gradient."""
        expected: State = self.t.facts["expected_update"]
        return expected

    @cached_property
    def twice(self) -> State:
        """The state after a second update with the same gradient."""
        return self.update(self.expected.params, self.expected.opt_state)

    @cached_property
    def fresh(self) -> State:
        """The state after an update that starts from the initial optimizer state."""
        return self.update(self.t.before.params, self.initial.opt_state)

    @cached_property
    def own(self) -> State:
        """The state before the step with the batch's own moments as statistics."""
        return own_statistics(self.t.reruns, self.t.before)

    def loss_of(self, state: State, **batch: Any) -> float:
        """Return the eval loss of a state, on the case's batch or with other x or y."""
        return float(np.ravel(self.calls.evaluate(state, self.case._replace(**batch)))[0])
