"""Laws of checkpoints: saving, restoring, copying or evaluating a state does not change training.

They are judged by running histories of steps, evaluations, copies and checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from bnverify.laws.arithmetic import (
    UNTRIGGERED,
    measurable,
    momentum,
    residual,
    smallest,
    unit,
    wide,
)
from bnverify.laws.law import beyond_one_step
from bnverify.laws.mismatch import Mismatch, watching
from bnverify.lazy import jax
from bnverify.model import Case, State
from bnverify.pytree import form, is_floating, path_name
from bnverify.reruns import RERUNS

ANOTHER_PROCESS = "another_process_computes_the_same"

FLAX_SAVING = "Flax, saving and loading checkpoints: flax.serialization"

beyond_one_step(
    "life",
    "a_checkpoint_keeps_every_value",
    "Saving and restoring a state keeps every value bit-identical.",
    mistakes=("checkpoint_drops_statistics", "checkpoint_drops_optimizer_state"),
    source=FLAX_SAVING,
)
beyond_one_step(
    "life",
    "a_checkpoint_keeps_types_and_containers",
    "A restored state has the same containers, shapes and dtypes as the saved one.",
    mistakes=("restored_in_other_types",),
    source="https://github.com/google/flax/issues/1550",
)
beyond_one_step(
    "life",
    "a_copy_keeps_everything",
    "Copying a state, or jax.device_put of it, keeps its values, dtypes, weak types and containers.",
    mistakes=("restored_in_other_types",),
    source="JAX, pytrees: unflattening is the inverse of flattening",
)
beyond_one_step(
    "life",
    "a_restored_run_continues_to_the_bit",
    "A run restored from a checkpoint continues bit-identically to one that was not interrupted.",
    mistakes=("restored_in_other_types", "hidden_state"),
    source=FLAX_SAVING,
)
beyond_one_step(
    "life",
    "a_resumed_process_continues_to_the_bit",
    "A run continues bit-identically when the step is traced again, as in a new process.",
    mistakes=("hidden_state",),
    source="JAX, pure functions: state that is not an argument is lost with the process",
)
beyond_one_step(
    "life",
    ANOTHER_PROCESS,
    "In another process, init and the step compute the same as in this one.",
    mistakes=("differs_between_processes", "drawn_outside_jax", "hidden_state"),
    source="Python, object.__hash__: https://docs.python.org/3/reference/datamodel.html#object.__hash__",
    derivation="With the profiles ci and nightly, other processes load the target with other hash seeds, and "
    "trace init and the step. Their traces and those of this process are evaluated in float64 on one batch, "
    "so that only a different order of operations is allowed for: 1e-9 of a leaf's largest entry.",
)
beyond_one_step(
    "life",
    "evaluation_between_steps_changes_nothing",
    "Evaluating between two steps leaves the state bit-identical.",
    mistakes=("eval_in_train_mode",),
    source="Ioffe & Szegedy 2015, algorithm 2: inference only reads the statistics",
)
beyond_one_step(
    "life",
    "statistics_fold_each_batch_once",
    "After any history, batch_stats is the moving average of its batches, each counted once.",
    mistakes=("ema_applied_twice", "statistics_reinitialised", "new_statistics_dropped"),
    source="Ioffe & Szegedy 2015, algorithm 1; the bound is derived in bnverify/laws/life.py",
)

# What the running statistics must be after a history of steps, found without knowing the model.
#
# From zero statistics a step writes (1 - m) b, from huge ones S it writes m S + (1 - m) b. So m and
# every b of a history are measured beside it, and after k steps the statistics must be
#
#     m^k s_0 + sum over i of m^(k - i) (1 - m) b_i.
#
# In float64, p_i = m p_(i-1) + (1 - m) b_i. Each step may err by 8 u (|m p_(i-1)| + |(1 - m) b_i|),
# as in ``batch_stats_change_only_by_ema``, and passes m times its error on: e_i = m e_(i-1) + that.

Step = Callable[[State, Case], State]
Wide = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Statistic:
    """The history of one running statistic; every array is stacked for one case, (1, ...).

    Attributes:
        momentum: the measured weight of the old value, elementwise.
        expected: what the statistic must be.
        allowed: how far it may be from that.
        before: what it had to be before the last step.
        own: what the last batch adds, (1 - m) b.
    """

    momentum: Wide
    expected: Wide
    allowed: Wide
    before: Wide
    own: Wide

    def after(self, zero: Any) -> Statistic:
        """Return the history after one more step, which makes ``zero`` of a statistic of 0."""
        own, kept = wide(zero), self.momentum * self.expected
        step = 8 * unit(zero) * (np.abs(kept) + np.abs(own)) + smallest(zero)
        allowed = np.abs(self.momentum) * self.allowed + step
        return replace(self, expected=kept + own, allowed=allowed, before=self.expected, own=own)

    def suspects(self) -> dict[str, Wide]:
        """Return mistake -> what this statistic would be now if the last step had made it."""
        m = self.momentum
        return {
            "ema_applied_twice": m * self.expected + self.own,
            "new_statistics_dropped": self.before,
            "statistics_reinitialised": self.own / (1 - m),
        }


@dataclass(frozen=True)
class EmaHistory:
    """The history of all floating-point statistics since they were first seen.

    Attributes:
        statistics: by path in ``batch_stats``; None until the first step, empty after one that
            changed which statistics there are.
    """

    statistics: dict[str, Statistic] | None = None

    def after(self, state: State, case: Case, step: Step) -> EmaHistory:
        """Return the history after one more step.

        Args:
            state: the state before the step.
            case: the step's batch.
            step: the step, on whatever state and batch it is run.
        """
        now = _statistics(state)
        zeros = _statistics(step(*RERUNS["zero_statistics"](state, case)))
        if self.statistics == {} or form(zeros) != form(now):
            return EmaHistory({})
        known = self.statistics
        with np.errstate(all="ignore"):  # what overflows is not compared
            if known is None:
                highs = _statistics(step(*RERUNS["huge_statistics"](state, case)))
                known = {path: _begun(now[path], zeros[path], highs[path]) for path in now}
            return EmaHistory({path: known[path].after(zero) for path, zero in zeros.items()})

    def error(self, state: State) -> tuple[float, Mismatch | None]:
        """Return how far the statistics of ``state`` are from what they must be.

        Returns:
            The worst error in units of the error allowed, below 0 where there is nothing to compare;
            and its entry, where it is beyond 1.
        """
        beside = self._beside(state)
        worst = UNTRIGGERED
        with (
            np.errstate(all="ignore"),  # what is not finite is settled by the masks
            watching({"batch_stats": {path: value for path, _, value in beside}}) as seen,
        ):
            for _, must, value in beside:
                worst = max(worst, float(residual(value, must.expected, must.allowed)[0]))
        return worst, seen.worst

    def suspect(self, state: State) -> str:
        """Return the mistake in the last step that explains the statistics of ``state``, or ""."""
        explained: dict[str, float] = {}
        with np.errstate(all="ignore"):
            for _, must, value in self._beside(state):
                off = np.max(np.abs(wide(value) - must.expected))
                for name, suspected in must.suspects().items():
                    left = np.max(np.abs(wide(value) - suspected)) - off / 64
                    unexplained = np.inf if np.isnan(left) else float(left)
                    explained[name] = max(explained.get(name, 0.0), unexplained)
        name = min(explained, key=lambda each: explained[each])
        return name if explained[name] <= 0 else ""

    def _beside(self, state: State) -> list[tuple[str, Statistic, Any]]:
        now, known = _statistics(state), self.statistics or {}
        if {path: value.shape for path, value in now.items()} != {
            path: must.expected.shape for path, must in known.items()
        }:
            return []  # a law of structure says so
        return [(path, must, now[path]) for path, must in known.items()]


def _statistics(state: State) -> dict[str, Any]:
    leaves = jax.tree_util.tree_flatten_with_path(state.batch_stats)[0]
    return {path_name(path): np.asarray(leaf)[None] for path, leaf in leaves if is_floating(leaf)}


def _begun(now: Any, zero: Any, high: Any) -> Statistic:
    start = wide(now)
    allowed = np.where(measurable(zero), 0.0, np.inf)
    return Statistic(momentum(zero, high), start, allowed, start, start)
