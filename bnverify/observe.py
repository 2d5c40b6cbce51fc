"""Run a subject on stacked cases, with the re-runs that laws ask for.

A subject's functions are traced once for each signature of their arguments. The traced program is
compiled under ``jax.vmap``, once for each shape, and reused by every re-run, evaluation and later
step. Proofs and rounding noise are read from the same traces.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np

from bnverify import compat
from bnverify.errors import first_line
from bnverify.jaxpr.arithmetic import count_operations, count_values
from bnverify.jaxpr.rounding import evaluate_stacked
from bnverify.jaxpr.tracing import Abstract, Program, Tracer, TreeFunction
from bnverify.lazy import jax, jnp
from bnverify.model import Case, Outcome, State, Subject, Transition, Tree
from bnverify.pytree import form, signature, stack, take
from bnverify.reruns import (
    EVALS,
    FIRST,
    LATER_RERUNS,
    LONG_SEED,
    RERUNS,
    nudged_inputs,
    other_padding,
    shaken,
    shift,
    shift_biases,
)

How: TypeAlias = Literal["vmap", "jit", "eager", "read"]

OPERATIONS = 2e9
"""The most operations in the steps of one stack, a few seconds on one core."""

NUMBERS = 2e6
"""The most intermediate values in the steps of one stack; their rounding noise takes about a second."""

FEW_ROWS = 8
"""Rows are evaluated one by one in batches of up to this many rows."""

QUICK = {
    "xla_backend_optimization_level": 0,
    "xla_cpu_use_fusion_emitters": False,
    # Otherwise one of two programs may round to 16 bits where the other does not.
    "xla_allow_excess_precision": False,
    # Otherwise the sum of relu(NaN) over a large array is 0 (docs/findings.md).
    "xla_cpu_experimental_ynn_fusion_type": "",
}
"""XLA's compiler options for programs that run a few times; the first two halve the compile time."""

COMPILERS = 2
"""The number of programs compiled in parallel; compiling one uses about one core."""

ROW_WEIGHTS = frozenset({"eval:rows", "step:other_padding", "eval:other_padding"})
"""The observations that need the row weights of a subject that declares them."""

VOLUME = frozenset(
    [f"step:{name}" for name in (*RERUNS, *LATER_RERUNS, "shifted_bias", "other_padding")]
    + [f"eval:{name}" for name in (*EVALS, "rows", "other_padding")]
    + ["expected_update", "after_eval"]
)
"""The observations that stacked runs provide."""

SINGLE = frozenset({"again", "eager", "stacked", "solution"})
"""The observations that only runs of one case at a time provide: other ways of running the step."""


class Again(NamedTuple):
    """A second run of the same input; every leaf is stacked, (K, ...)."""

    before: Any
    state: Any
    info: Any
    eval_loss: Any


class Uncompiled(NamedTuple):
    """A run without jit, and copies of its inputs before and after; every leaf is stacked, (K, ...).

    Only without jit does a step get the caller's own arrays and containers instead of tracers.
    """

    state: Any
    info: Any
    eval_loss: Any
    inputs_before: Any
    inputs_after: Any


class Solution(NamedTuple):
    """Results of the one-call function, each (K, ...): for the seed, and for it with a fraction.

    Seeds from ``LONG_SEED`` on get no fraction.
    """

    whole: Any
    fractional: Any


class CompiledSubject:
    """A subject's functions, callable on stacks of cases.

    Args:
        subject: the subject.
        how: "vmap": compiled under ``jax.vmap``; "jit": compiled, and called for one case after
            another, as a user would; "eager": called for one case after another, without jit; "read":
            not compiled, but evaluated in NumPy without rounding, all cases at once.
        tracer: the tracer to use, shared with other readers of the subject's traces.
        most: the number of cases in one call under vmap, or fewer for a large model; larger stacks
            are split into blocks, smaller ones padded. None: all at once.

    Attributes:
        subject: as given.
        tracer: as given.
        refused: name of a fact that could not be observed -> the error that was raised.
    """

    def __init__(
        self,
        subject: Subject,
        how: How = "vmap",
        *,
        tracer: Tracer | None = None,
        most: int | None = None,
    ) -> None:
        self.subject = subject
        self.tracer = tracer or Tracer(subject)
        self.refused: dict[str, str] = {}
        self._how = how
        self._most = most
        self._sizes: dict[tuple[int, int], tuple[float, float]] = {}
        self._programs: dict[Any, Future[Callable[..., Any]]] = {}
        self._compilers = ThreadPoolExecutor(COMPILERS)

    def block(self, shape: tuple[int, int]) -> int:
        """Return the number of cases of a shape (N, D) in one call under vmap, at least one."""
        done, made = self._size(shape)
        room = min(OPERATIONS / max(done, 1), NUMBERS / max(made, 1))
        return max(1, int(min(self._most or 1, room)))

    def fitting_rows(self, shape: tuple[int, int]) -> int:
        """Return the N of a shape (N, D), or as many rows as one call has room for, two at least."""
        rows, _ = shape
        done, _ = self._size(shape)
        return min(rows, max(2, int(rows * OPERATIONS / max(done, 1))))

    def _size(self, shape: tuple[int, int]) -> tuple[float, float]:
        """Return (operations, values computed) of a step on a batch of a shape; 0 if unknown."""
        if shape not in self._sizes:
            self._sizes[shape] = 0.0, 0.0
            if self._how == "eager":  # it may not trace
                return self._sizes[shape]
            try:
                state, batch = self.tracer.state(*shape), self.tracer.batch(*shape)
                given = state, batch.x, batch.y, batch.lr
                jaxpr = self.tracer.trace("step", self.subject.step, *given).jaxpr
                self._sizes[shape] = count_operations(jaxpr), count_values(jaxpr)
            except Exception:  # noqa: BLE001, S110 - the step may not accept so many rows
                pass
        return self._sizes[shape]

    def prepare(self, shapes: Iterable[tuple[int, int]]) -> None:
        """Start compiling ``init``, ``step`` and ``evaluate`` for shapes (N, D), in the background."""
        for rows, features in shapes:
            case, state = self.tracer.batch(rows, features), self.tracer.state(rows, features)
            size = self.block((rows, features))
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
        """Call a function on each of some cases; return a stacked tree of NumPy arrays.

        Args:
            name: identifies the function.
            function: a function of a single case.
            shape: (N, D) of the cases.
            *args: its arguments, stacked trees.
        """
        leaves = jax.tree_util.tree_leaves(args)
        cases = len(leaves[0])
        if self._how == "eager":
            given = (jax.tree_util.tree_map(jnp.asarray, take(args, i)) for i in range(cases))
            return stack([_host(function(*each)) for each in given])
        single = jax.tree_util.tree_map(lambda leaf: Abstract(leaf.shape[1:], leaf.dtype), args)
        if self._how == "read":
            return _read(self.tracer.trace(name, function, *single), args)
        if self._how == "jit":
            program = self._program(name, function, single, None)
            given = ([leaf[i] for leaf in leaves] for i in range(cases))
            return stack([_host(program(*each)) for each in given])
        size = self.block(shape) if self._most else cases
        program = self._program(name, function, single, size)
        parts = []
        for start in range(0, cases, size):
            places = np.minimum(np.arange(start, start + size), cases - 1)
            parts.append(_host(program(*(leaf[places] for leaf in leaves))))
        if len(parts) == 1 and cases == size:
            return parts[0]
        return jax.tree_util.tree_map(lambda *part: np.concatenate(part)[:cases], *parts)

    def single(self, name: str, function: Callable[..., Any], *args: Any) -> Any:
        """Call a compiled function on one case; return a tree of JAX arrays.

        It shares its programs with ``call`` in mode "jit".

        Args:
            name: identifies the function.
            function: a function of a single case.
            *args: its arguments, trees of arrays or numbers; they are converted to JAX arrays.
        """
        given = jax.tree_util.tree_map(_on_device, args)
        types = jax.tree_util.tree_map(Abstract.of, given)
        program = self._program(name, function, types, None)
        return program(*jax.tree_util.tree_leaves(given))

    def _program(
        self, name: str, function: Callable[..., Any], single: Any, size: int | None
    ) -> Callable[..., Any]:
        """Return the compiled program of a function; it takes the leaves of its arguments.

        Args:
            name: identifies the function.
            function: a function of a single case.
            single: the shapes and dtypes of its arguments, trees of ``Abstract``.
            size: how many cases are stacked; None: the program takes a single case.
        """
        types, structure = jax.tree_util.tree_flatten(single)
        key = name, structure, tuple(types), size
        if key not in self._programs:
            traced = self.tracer.trace(name, function, *single)
            self._programs[key] = self._compilers.submit(_compiled, _lowered(traced, size))
        return _PendingProgram(self._programs[key])

    def init(self, case: Case) -> State:
        """Return the initial states."""
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
        """Return the outcomes of one step, with the eval loss after it."""
        outcome = self.step(state, case)
        return outcome._replace(eval_loss=self.evaluate(outcome.state, case))

    def warm(self, state: State, case: Case) -> State:
        """Return the states after ``case.warmup`` steps on the same batch.

        With gradient accumulation, ``warmup`` counts updates, and the next step is one that updates.
        """
        every = self.subject.updates_every
        warmup = case.warmup if every == 1 else np.maximum(case.warmup * every - 1, 0)
        for done in range(int(np.max(warmup))):
            after = self.step(state, case).state
            if signature(after) != signature(state):
                return state  # a law of structure reports it
            going = warmup > done
            state = jax.tree_util.tree_map(
                lambda new, old, going=going: np.where(_over(going, new), new, old), after, state
            )
        return state


class _PendingProgram:
    """A program that is still being compiled."""

    def __init__(self, program: Future[Callable[..., Any]]) -> None:
        self._program = program

    def __call__(self, *leaves: Any) -> Any:
        return self._program.result()(*leaves)


def _lowered(traced: Program, size: int | None) -> tuple[Any, Any]:
    """Return (a traced program lowered for ``size`` stacked cases, the structure of its result)."""
    function = TreeFunction(traced)
    flat = jax.tree_util.tree_leaves(traced.args)
    lead = () if size is None else (size,)
    types = [Abstract((*lead, *leaf.shape), leaf.dtype, leaf.weak_type) for leaf in flat]
    mapped = function.flat if size is None else jax.vmap(function.flat, axis_size=size)
    return jax.jit(mapped).lower(*types), jax.tree_util.tree_structure(traced.out)


def _compiled(lowered: tuple[Any, Any]) -> Callable[..., Any]:
    stage, structure = lowered
    program = compat.compiled(stage, QUICK)
    return lambda *leaves: jax.tree_util.tree_unflatten(structure, program(*leaves))


def _read(program: Program, args: Any) -> Any:
    """Return a program's results on stacked arguments without rounding, in the program's own dtypes."""
    exact = evaluate_stacked(program, *args)
    with np.errstate(over="ignore"):  # it overflows as the step does
        return jax.tree_util.tree_map(lambda leaf, to: leaf.astype(to.dtype), exact, program.out)


def _on_device(leaf: Any) -> Any:
    return leaf if isinstance(leaf, jax.Array) else jnp.asarray(leaf)


def _host(tree: Tree) -> Any:
    return jax.tree_util.tree_map(np.asarray, tree)


def _over(mask: Any, leaf: Any) -> Any:
    return mask.reshape(mask.shape + (1,) * (leaf.ndim - mask.ndim))


def observe(calls: CompiledSubject, case: Case, needs: Collection[str]) -> Transition:
    """Run one step of a subject on stacked cases, with the re-runs named in ``needs``.

    Args:
        calls: the subject's functions.
        case: the cases, every leaf with a leading axis.
        needs: names from ``VOLUME``: "step:NAME" with a name of ``RERUNS`` or ``LATER_RERUNS``,
            "step:shifted_bias", "eval:NAME" with a name of ``EVALS``, "eval:rows",
            "step:other_padding" and "eval:other_padding" (for subjects with row weights),
            "expected_update" (the subject's optimizer applied to its gradients and, as
            "nudged_updates", to gradients and states perturbed by a few roundings, and, as
            "shaken_update", to gradients perturbed far), "after_eval". Other names are ignored.

    Returns:
        The transition, with ``exact`` and ``noise`` still None. If the step changes the structure
        or shapes of its state, re-runs that depend on a new state are left out.
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
    # These re-runs continue from a state that the step returned.
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
    """Return the weight of each row, (K, N)."""
    assert calls.subject.row_weights is not None
    return calls.call("row_weights", calls.subject.row_weights, case.shape, case.x, case.y)


def optimizer_update(calls: CompiledSubject, case: Case, grads: Tree, before: State) -> State:
    """Return the states after the subject's optimizer has applied some gradients.

    Args:
        calls: the subject's functions; it must have an optimizer.
        case: stacked cases; only their learning rates are used.
        grads: the gradients, stacked.
        before: the old states; only params and opt_state are used.
    """
    optimizer = calls.subject.optimizer
    assert optimizer is not None

    def expected_update(lr: Any, grads: Tree, before: State) -> State:
        tx = optimizer(lr)
        # A state without leaves may be stored in other containers than tx.init returns.
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
        # The optimizer may not accept the step's gradients or state.
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
    """Run one step on stacked cases, one case at a time, and in the other ways named in ``needs``.

    Args:
        single: the subject's functions, called for one case after another.
        case: the cases.
        needs: as for ``observe``, and from ``SINGLE``: "again", the same run once more; "eager", a
            run without jit; "stacked", a run of ``batched``; "solution", the subject's one-call
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
    """Return a step and its evaluation, run without jit for one case after another.

    An input that was donated counts as unchanged.
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
    """Return the trees stacked; if structures differ, the first tree that differs from the first one."""
    structures = [jax.tree_util.tree_structure(tree) for tree in trees]
    unlike = next((t for t, s in zip(trees, structures, strict=True) if s != structures[0]), None)
    return stack(trees) if unlike is None else unlike


def _solution(solution: Callable[..., Any], case: Case) -> Solution:
    whole, fractional = [], []
    for index in range(len(case.seed)):
        one = take(case, index)
        seed, lr = int(one.seed), float(one.lr)
        x, y = jnp.asarray(one.x), jnp.asarray(one.y)
        whole.append(np.asarray(solution(float(seed), x, y, lr)))
        if abs(seed) < LONG_SEED:
            fraction = 0.75 if seed >= 0 else -0.75  # truncation is towards zero
            fractional.append(np.asarray(solution(seed + fraction, x, y, lr)))
        else:
            fractional.append(whole[-1])
    return Solution(np.stack(whole), np.stack(fractional))
