"""Run a subject on one case, or on thousands of stacked ones, with the re-runs that laws ask for.

The subject's functions are compiled once for each shape, and called again for every re-run.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial
from typing import Any

import numpy as np

from bnverify.case import Case
from bnverify.compiled import Compiled
from bnverify.lazy import jax, jnp
from bnverify.pytree import form, signature
from bnverify.reruns import EVALS, FIRST, LATER_RERUNS, RERUNS, nudged_inputs, shift, shift_biases
from bnverify.subject import State, Subject, Tree
from bnverify.transition import Outcome, Transition
from bnverify.unusable import first_line

FEW_ROWS = 8
"""Up to so many rows each row is evaluated alone; a law about rows needs no more."""


class Calls:
    """The functions of a subject, made ready to be called on NumPy trees.

    Args:
        subject: whose functions.
        how: "jit": compiled, as a user would; "eager": operation by operation; "stacked":
            compiled under ``jax.vmap``, every leaf with a leading stack axis.
        optimise: see ``bnverify.compiled.Compiled``; for stacked calls only.

    Attributes:
        subject: as given.
        refused: name of a fact that could not be observed -> what was raised.
    """

    def __init__(self, subject: Subject, how: str = "jit", *, optimise: bool = False) -> None:
        self.subject = subject
        self.refused: dict[str, str] = {}
        self._how = how
        self._optimise = optimise
        self._ready: dict[str, Callable[..., Any]] = {}

    def call(self, name: str, function: Callable[..., Any], *args: Any) -> Any:
        """Return ``function(*args)`` as a tree of NumPy arrays; ``name`` tells functions apart."""
        if name not in self._ready:
            if self._how == "stacked":
                program: Any = Compiled(jax.vmap(function), optimise=self._optimise)
            else:
                program = jax.jit(function) if self._how == "jit" else function
            self._ready[name] = program
        return jax.tree_util.tree_map(np.asarray, self._ready[name](*args))

    def init(self, case: Case) -> State:
        """Return the state before the first step."""
        state: State = self.call("init", self.subject.init, case.seed, case.x)
        return state

    def step(self, state: State, case: Case) -> Outcome:
        """Return the outcome of one step."""
        return Outcome(*self.call("step", self.subject.step, state, case.x, case.y, case.lr))

    def evaluate(self, state: State, case: Case) -> Any:
        """Return the eval loss, (1,)."""
        return self.call("evaluate", self.subject.evaluate, state, case.x, case.y)

    def warm(self, state: State, case: Case) -> State:
        """Return the state after ``case.warmup`` steps on the same batch."""
        for done in range(int(np.max(case.warmup))):
            after = self.step(state, case).state
            if signature(after) != signature(state):
                return state  # a law of structure says so
            going = np.asarray(case.warmup) > done
            state = jax.tree_util.tree_map(
                lambda new, old, going=going: np.where(_over(going, new), new, old), after, state
            )
        return state


def _over(mask: Any, leaf: Any) -> Any:
    return mask.reshape(mask.shape + (1,) * (leaf.ndim - mask.ndim))


def observe(calls: Calls, case: Case, needs: Collection[str]) -> Transition:
    """Run one step of a subject on ``case`` and the re-runs named in ``needs``.

    Args:
        calls: the subject's functions.
        case: the input; with a leading axis on every leaf where the calls are stacked.
        needs: names that laws declare: "step:NAME" of ``RERUNS`` or ``LATER_RERUNS`` or
            "step:shifted_bias", "eval:NAME" of ``EVALS`` or "eval:rows", or a fact:
            "expected_update" (what the subject's optimizer makes of its gradients, and in
            "nudged_updates" of gradients and of a state moved by a few roundings),
            "layer_inputs", "after_eval". Others are left to the caller.

    Returns:
        The transition, without rounding: ``exact`` and ``noise`` are None. Where the step changes
        the structure or the shapes of its state, nothing is run from what re-runs gave.
    """
    wanted = set(needs).union(*(FIRST.get(need, ()) for need in needs))
    before = calls.warm(calls.init(case), case)
    actual = calls.step(before, case)
    seen = {
        name: calls.step(*make(before, case))
        for name, make in RERUNS.items()
        if f"step:{name}" in wanted
    }
    if "step:shifted_bias" in wanted:
        shifted = shift_biases(calls.subject, before, shift(case))
        seen["shifted_bias"] = calls.step(shifted, case)
    # They go on from what a step gave.
    if form(actual.state.batch_stats) != form(before.batch_stats):
        wanted -= set(FIRST)
    if form(actual.state) != form(before):
        wanted -= {"step:second_step"}
    for name, make_later in LATER_RERUNS.items():
        if f"step:{name}" in wanted:
            seen[name] = calls.step(*make_later(seen, before, case))
    losses = {
        name: calls.evaluate(*make_eval(seen, before, actual.state, case))
        for name, make_eval in EVALS.items()
        if f"eval:{name}" in wanted
    }
    eval_loss = calls.evaluate(actual.state, case)
    single = np.shape(eval_loss) == (*np.shape(case.seed), 1)
    if "eval:rows" in wanted and case.shape[0] <= FEW_ROWS and single:
        losses["rows"] = _row_losses(calls, actual.state, case)
    return Transition(
        case=case,
        before=before,
        after=actual.state,
        info=actual.info,
        eval_loss=eval_loss,
        reruns=seen,
        evals=losses,
        facts=_facts(calls, case, before, actual, wanted),
    )


def _row_losses(calls: Calls, state: State, case: Case) -> Any:
    """Return the eval loss of each row, (N, 1), from batches of N copies of it."""
    rows = []
    for i in range(case.shape[0]):
        x = np.broadcast_to(case.x[..., i : i + 1, :], case.x.shape)
        y = np.broadcast_to(case.y[..., i : i + 1], case.y.shape)
        rows.append(calls.evaluate(state, case._replace(x=x, y=y)))
    return np.stack(rows, axis=-2)


def _facts(
    calls: Calls, case: Case, before: State, actual: Outcome, wanted: Collection[str]
) -> dict[str, Any]:
    subject = calls.subject

    def expected_update(lr: Any, grads: Tree, before: State) -> State:
        assert subject.optimizer is not None
        tx = subject.optimizer(lr)
        # Without leaves the step's state may still have other containers: only the update counts.
        has_state = jax.tree_util.tree_leaves(before.opt_state)
        state = before.opt_state if has_state else tx.init(before.params)
        updates, opt_state = tx.update(grads, state, before.params)
        params = jax.tree_util.tree_map(jnp.add, before.params, updates)
        return State(params, None, opt_state)

    facts: dict[str, Any] = {}
    if "expected_update" in wanted and subject.optimizer is not None:
        update = partial(calls.call, "expected_update", expected_update, case.lr)
        grads = actual.info.grads
        # An optimizer that takes no such gradients or state has no update to follow.
        try:
            expected = update(grads, before)
            nudged = [update(*given) for given in nudged_inputs(grads, before)]
            facts |= {"expected_update": expected, "nudged_updates": nudged}
        except Exception as error:  # noqa: BLE001 - whatever a user's optimizer raises
            calls.refused["expected_update"] = f"the optimizer raised {first_line(error)}"
    if "layer_inputs" in wanted and subject.layer_inputs is not None:
        inputs = subject.layer_inputs
        facts["layer_inputs"] = calls.call("layer_inputs", inputs, before, case.x, case.y)
    if "after_eval" in wanted and subject.after_eval is not None:
        after_eval = subject.after_eval
        facts["after_eval"] = calls.call("after_eval", after_eval, actual.state, case.x, case.y)
    return facts
