"""Run a subject on stacked cases, with the re-runs that laws ask for.

A subject's functions are traced once for each signature of their arguments. What is compiled is the
traced program under ``jax.vmap``, once for each shape, and every re-run, evaluation and later step calls
it again. The same traces are what proofs and rounding are read from.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np

from bnverify import compat
from bnverify.case import Case
from bnverify.errors import first_line
from bnverify.jaxpr.tracing import Abstract, Program, Tracer, as_function
from bnverify.lazy import jax, jnp
from bnverify.pytree import form, signature, stack, take
from bnverify.reruns import (
    EVALS,
    FIRST,
    LATER_RERUNS,
    RERUNS,
    nudged_inputs,
    other_padding,
    shaken,
    shift,
    shift_biases,
)
from bnverify.subject import State, Subject, Tree
from bnverify.transition import Outcome, Transition

How: TypeAlias = Literal["vmap", "jit", "eager"]

FEW_ROWS = 8
"""Up to so many rows each row is evaluated alone; a law about rows needs no more."""

QUICK = {
    "xla_backend_optimization_level": 0,
    "xla_cpu_use_fusion_emitters": False,
    # What is to be rounded to 16 bits is: else one of two programs may do it and the other not.
    "xla_allow_excess_precision": False,
}
"""XLA's options for what runs a few times: the first two halve the time to compile."""

COMPILERS = 2
"""Programs compiled at the same time; XLA keeps little more than one core busy with one."""

ROW_WEIGHTS = frozenset({"eval:rows", "step:other_padding", "eval:other_padding"})
"""What needs the weights of rows, where a subject declares them."""

VOLUME = frozenset(
    [f"step:{name}" for name in (*RERUNS, *LATER_RERUNS, "shifted_bias", "other_padding")]
    + [f"eval:{name}" for name in (*EVALS, "rows", "other_padding")]
    + ["expected_update", "after_eval"]
)
"""What laws can ask of any run."""

SINGLE = frozenset({"again", "eager", "stacked", "solution"})
"""What laws can ask of a run one case at a time: comparisons with other ways of running."""


class Again(NamedTuple):
    """A second run of the same input; every leaf is stacked, (K, ...)."""

    before: Any
    state: Any
    info: Any
    eval_loss: Any


class Uncompiled(NamedTuple):
    """An uncompiled run, and its inputs before and after it; every leaf is stacked, (K, ...).

    Only there does a step hold the caller's own arrays and containers, not tracers.
    """

    state: Any
    info: Any
    eval_loss: Any
    inputs_before: Any
    inputs_after: Any


class Solution(NamedTuple):
    """The one-call function at a whole seed and at one with a fraction, each (K, ...)."""

    whole: Any
    fractional: Any


class CompiledSubject:
    """A subject's functions, ready to be called on stacks of cases.

    Args:
        subject: whose functions.
        how: "vmap": compiled under ``jax.vmap``; "jit": compiled, and called for one case after the
            other, as a user would; "eager": called for one case after the other, uncompiled.
        tracer: shared with whatever else reads the subject's traces.
        block: from the shape (N, D) of a case to how many cases a call of a vectorised program
            takes; longer stacks are called in blocks, shorter ones filled up.

    Attributes:
        subject: as given.
        tracer: as given.
        refused: name of a fact that could not be observed -> what was raised.
    """

    def __init__(
        self,
        subject: Subject,
        how: How = "vmap",
        *,
        tracer: Tracer | None = None,
        block: Callable[[tuple[int, int]], int] | None = None,
    ) -> None:
        self.subject = subject
        self.tracer = tracer or Tracer(subject)
        self.refused: dict[str, str] = {}
        self._how = how
        self._block = block
        self._programs: dict[Any, Future[Callable[..., Any]]] = {}
        self._compilers = ThreadPoolExecutor(COMPILERS)

    def prepare(self, shapes: Iterable[tuple[int, int]]) -> None:
        """Begin to compile ``init``, ``step`` and ``evaluate`` for shapes (N, D), all at once."""
        for rows, features in shapes:
            case, state = self.tracer.batch(rows, features), self.tracer.state(rows, features)
            size = self._block((rows, features)) if self._block else 1
            calls = {
                "init": (case.seed, self.tracer.init_batch(case.x)),
                "step": (state, case.x, case.y, case.lr),
                "evaluate": (state, case.x, case.y),
            }
            for name, args in calls.items():
                self._program(name, getattr(self.subject, name), args, size)

    def call(
        self, name: str, function: Callable[..., Any], shape: tuple[int, int], *args: Any
    ) -> Any:
        """Return ``function`` of each of some cases, as a stacked tree of NumPy arrays.

        Args:
            name: tells functions apart.
            function: of single cases.
            shape: (N, D) of the cases.
            *args: stacked trees.
        """
        leaves = jax.tree_util.tree_leaves(args)
        cases = len(leaves[0])
        if self._how == "eager":
            given = (jax.tree_util.tree_map(jnp.asarray, take(args, i)) for i in range(cases))
            return stack([_host(function(*each)) for each in given])
        single = jax.tree_util.tree_map(lambda leaf: Abstract(leaf.shape[1:], leaf.dtype), args)
        if self._how == "jit":
            program = self._program(name, function, single, None)
            given = ([leaf[i] for leaf in leaves] for i in range(cases))
            return stack([_host(program(*each)) for each in given])
        size = self._block(shape) if self._block else cases
        program = self._program(name, function, single, size)
        parts = []
        for start in range(0, cases, size):
            places = np.minimum(np.arange(start, start + size), cases - 1)
            parts.append(_host(program(*(leaf[places] for leaf in leaves))))
        if len(parts) == 1 and cases == size:
            return parts[0]
        return jax.tree_util.tree_map(lambda *part: np.concatenate(part)[:cases], *parts)

    def single(self, name: str, function: Callable[..., Any], *args: Any) -> Any:
        """Return ``function`` of one case, compiled, as a tree of JAX arrays.

        What was compiled for ``call`` with "jit" serves here, too.

        Args:
            name: tells functions apart.
            function: of single cases.
            *args: trees of arrays or numbers, which reach the function as JAX arrays.
        """
        given = jax.tree_util.tree_map(_on_device, args)
        types = jax.tree_util.tree_map(Abstract.of, given)
        program = self._program(name, function, types, None)
        return program(*jax.tree_util.tree_leaves(given))

    def _program(
        self, name: str, function: Callable[..., Any], single: Any, size: int | None
    ) -> Callable[..., Any]:
        """Return the compiled program of a function for arguments like ``single``, on flat leaves.

        Args:
            name: tells functions apart.
            function: of single cases.
            single: its arguments, trees of ``Abstract``.
            size: how many cases are stacked; None: the program takes a single one.
        """
        types, structure = jax.tree_util.tree_flatten(single)
        key = name, structure, tuple(types), size
        if key not in self._programs:
            traced = self.tracer.trace(name, function, *single)
            self._programs[key] = self._compilers.submit(_compiled, _lowered(traced, size))
        return _Later(self._programs[key])

    def init(self, case: Case) -> State:
        """Return the states before the first step."""
        x = self.tracer.init_batch(case.x)
        state: State = self.call("init", self.subject.init, case.shape, case.seed, x)
        return state

    def step(self, state: State, case: Case) -> Outcome:
        """Return the outcomes of one step."""
        given = state, case.x, case.y, case.lr
        return Outcome(*self.call("step", self.subject.step, case.shape, *given))

    def evaluate(self, state: State, case: Case) -> Any:
        """Return the eval losses, (K, 1)."""
        given = state, case.x, case.y
        return self.call("evaluate", self.subject.evaluate, case.shape, *given)

    def outcome(self, state: State, case: Case) -> Outcome:
        """Return the outcomes of one step, evaluated."""
        outcome = self.step(state, case)
        return outcome._replace(eval_loss=self.evaluate(outcome.state, case))

    def warm(self, state: State, case: Case) -> State:
        """Return the states after ``case.warmup`` steps on the same batch.

        Where gradients are accumulated over several steps, the next one is then one that updates.
        """
        every = self.subject.updates_every
        warmup = case.warmup if every == 1 else np.maximum(case.warmup * every - 1, 0)
        for done in range(int(np.max(warmup))):
            after = self.step(state, case).state
            if signature(after) != signature(state):
                return state  # a law of structure says so
            going = warmup > done
            state = jax.tree_util.tree_map(
                lambda new, old, going=going: np.where(_over(going, new), new, old), after, state
            )
        return state


class _Later:
    """A program that is still being compiled."""

    def __init__(self, program: Future[Callable[..., Any]]) -> None:
        self._program = program

    def __call__(self, *leaves: Any) -> Any:
        return self._program.result()(*leaves)


def _lowered(traced: Program, size: int | None) -> tuple[Any, Any]:
    """Return a traced program, lowered for ``size`` stacked cases, and the structure of its result."""
    function = as_function(traced)
    flat = jax.tree_util.tree_leaves(traced.args)
    lead = () if size is None else (size,)
    types = [Abstract((*lead, *leaf.shape), leaf.dtype, leaf.weak_type) for leaf in flat]
    mapped = function.flat if size is None else jax.vmap(function.flat, axis_size=size)
    return jax.jit(mapped).lower(*types), jax.tree_util.tree_structure(traced.out)


def _compiled(lowered: tuple[Any, Any]) -> Callable[..., Any]:
    stage, structure = lowered
    program = compat.compiled(stage, QUICK)
    return lambda *leaves: jax.tree_util.tree_unflatten(structure, program(*leaves))


def _on_device(leaf: Any) -> Any:
    return leaf if isinstance(leaf, jax.Array) else jnp.asarray(leaf)


def _host(tree: Tree) -> Any:
    return jax.tree_util.tree_map(np.asarray, tree)


def _over(mask: Any, leaf: Any) -> Any:
    return mask.reshape(mask.shape + (1,) * (leaf.ndim - mask.ndim))


def observe(calls: CompiledSubject, case: Case, needs: Collection[str]) -> Transition:
    """Run one step of a subject on stacked cases and the re-runs named in ``needs``.

    Args:
        calls: the subject's functions.
        case: the cases, every leaf with a leading axis.
        needs: names that laws declare, of ``VOLUME``: "step:NAME" of ``RERUNS`` or ``LATER_RERUNS``
            or "step:shifted_bias", "eval:NAME" of ``EVALS`` or "eval:rows", "other_padding" of
            either where rows have weights, or a fact:
            "expected_update" (what the subject's optimizer makes of its gradients, and in
            "nudged_updates" of gradients and of a state moved by a few roundings, in
            "shaken_update" of gradients moved far), "after_eval".
            Others are left to the caller.

    Returns:
        The transition, without rounding: ``exact`` and ``noise`` are None. Where the step changes
        the structure or the shapes of its state, nothing is run from what re-runs gave.
    """
    wanted = set(needs).union(*(FIRST.get(need, ()) for need in needs))
    if calls.subject.row_weights is None:
        wanted -= {"step:other_padding", "eval:other_padding"}
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
    if "step:other_padding" in wanted:
        seen["other_padding"] = calls.step(before, other_padding(case, _weights(calls, case)))
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
    if "eval:other_padding" in wanted:
        padded = other_padding(case, _weights(calls, case))
        losses["other_padding"] = calls.evaluate(actual.state, padded)
    if "eval:rows" in wanted and case.shape[0] <= FEW_ROWS and eval_loss[0].size == 1:
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


def _row_losses(calls: CompiledSubject, state: State, case: Case) -> Any:
    """Return the eval loss of each row, (K, N, 1), from batches of N copies of it."""
    rows = []
    for i in range(case.shape[0]):
        x = np.broadcast_to(case.x[..., i : i + 1, :], case.x.shape)
        y = np.broadcast_to(case.y[..., i : i + 1], case.y.shape)
        rows.append(calls.evaluate(state, case._replace(x=x, y=y)).reshape(len(x), 1))
    return np.stack(rows, axis=-2)


def _weights(calls: CompiledSubject, case: Case) -> Any:
    """Return how much each row counts, (K, N)."""
    assert calls.subject.row_weights is not None
    return calls.call("row_weights", calls.subject.row_weights, case.shape, case.x, case.y)


def optimizer_update(calls: CompiledSubject, case: Case, grads: Tree, before: State) -> State:
    """Return what the subject's optimizer makes of some gradients, in the states ``before``.

    Args:
        calls: the subject's functions; its optimizer is known.
        case: stacked cases, of which the learning rates count.
        grads: stacked, likewise.
        before: of which the params and the optimizer's state count.
    """
    optimizer = calls.subject.optimizer
    assert optimizer is not None

    def expected_update(lr: Any, grads: Tree, before: State) -> State:
        tx = optimizer(lr)
        # Without leaves the step's state may still have other containers: only the update counts.
        has_state = jax.tree_util.tree_leaves(before.opt_state)
        state = before.opt_state if has_state else tx.init(before.params)
        updates, opt_state = tx.update(grads, state, before.params)
        params = jax.tree_util.tree_map(jnp.add, before.params, updates)
        return State(params, None, opt_state)

    updated: State = calls.call(
        "expected_update", expected_update, case.shape, case.lr, grads, before
    )
    return updated


def _facts(
    calls: CompiledSubject, case: Case, before: State, actual: Outcome, wanted: Collection[str]
) -> dict[str, Any]:
    subject, shape = calls.subject, case.shape
    facts: dict[str, Any] = {}
    if subject.row_weights is not None and not ROW_WEIGHTS.isdisjoint(wanted):
        facts["row_weights"] = _weights(calls, case)
    if "expected_update" in wanted and subject.optimizer is not None:
        update = partial(optimizer_update, calls, case)
        grads, given = actual.info.grads, State(before.params, None, before.opt_state)
        # An optimizer that takes no such gradients or state has no update to follow.
        try:
            expected = update(grads, given)
            nudged = [update(*changed) for changed in nudged_inputs(grads, given)]
            facts |= {"expected_update": expected, "nudged_updates": nudged}
            facts["shaken_update"] = update(shaken(grads), given)
        except Exception as error:  # noqa: BLE001 - whatever a user's optimizer raises
            calls.refused["expected_update"] = f"the optimizer raised {first_line(error)}"
    if "after_eval" in wanted and subject.after_eval is not None:
        evaluated = actual.state, case.x, case.y
        facts["after_eval"] = calls.call("after_eval", subject.after_eval, shape, *evaluated)
    return facts


def observe_singly(
    single: CompiledSubject,
    case: Case,
    needs: Collection[str],
    *,
    batched: CompiledSubject | None = None,
) -> Transition:
    """Run one step on each of some stacked cases by itself, and the ways of running named in ``needs``.

    Args:
        single: the subject's functions, called for one case after the other.
        case: the cases.
        needs: as for ``observe``, and of ``SINGLE``: "again", the same run once more; "eager", an
            uncompiled run; "stacked", the run by ``batched``; "solution", the subject's one-call
            function.
        batched: the functions under ``jax.vmap``; None: "stacked" is not observed.
    """
    t = observe(single, case, needs)
    facts = dict(t.facts)
    if "again" in needs:
        before = single.warm(single.init(case), case)
        facts["again"] = Again(before, *single.outcome(t.before, case))
    if "eager" in needs:
        facts["eager"] = _uncompiled(single.subject, t.before, case)
    if "stacked" in needs and batched is not None:
        facts["stacked"] = batched.outcome(t.before, case)
    if "solution" in needs and single.subject.solution is not None:
        facts["solution"] = _solution(single.subject.solution, case)
    return t._replace(facts=facts)


def _uncompiled(subject: Subject, before: State, case: Case) -> Uncompiled:
    """Return a step and its evaluation, run uncompiled for one case after the other.

    An input that the step donated is gone by the caller's leave, and counts as unchanged.
    """
    outcomes, kept, after = [], [], []
    for index in range(len(case.seed)):
        host = take((before, case), index)
        state, own = jax.tree_util.tree_map(jnp.asarray, host)
        given = (state, own)
        new, info = subject.step(state, own.x, own.y, own.lr)
        kept.append(host)
        if jax.tree_util.tree_structure(given) == jax.tree_util.tree_structure(host):
            given = jax.tree_util.tree_map(
                lambda was, now: was if _is_deleted(now) else np.array(now), host, given
            )
        after.append(given)
        fresh = jax.tree_util.tree_map(jnp.asarray, (host[1].x, host[1].y))
        outcomes.append(_host(Outcome(new, info, subject.evaluate(new, *fresh))))
    outcome: Outcome = stack(outcomes)
    return Uncompiled(*outcome, stack(kept), _stacked_or_first(after))


def _is_deleted(leaf: Any) -> bool:
    return bool(hasattr(leaf, "is_deleted") and leaf.is_deleted())


def _stacked_or_first(trees: Sequence[Any]) -> Any:
    """Return trees stacked; where their structures differ, the first that is unlike the others."""
    structures = [jax.tree_util.tree_structure(tree) for tree in trees]
    unlike = next((t for t, s in zip(trees, structures, strict=True) if s != structures[0]), None)
    return stack(trees) if unlike is None else unlike


def _solution(solution: Callable[..., Any], case: Case) -> Solution:
    whole, fractional = [], []
    for index in range(len(case.seed)):
        one = take(case, index)
        seed, lr = int(one.seed), float(one.lr)
        fraction = 0.75 if seed >= 0 else -0.75  # the integer part is towards zero
        x, y = jnp.asarray(one.x), jnp.asarray(one.y)
        whole.append(np.asarray(solution(float(seed), x, y, lr)))
        fractional.append(np.asarray(solution(seed + fraction, x, y, lr)))
    return Solution(np.stack(whole), np.stack(fractional))
