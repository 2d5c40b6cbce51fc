"""What one observed step did, with the counterfactual re-runs that laws ask for.

``observe`` runs a subject on one case, or on thousands of stacked ones: the subject's functions
are compiled once for each shape, and called again for every re-run. What changes between two
calls is NumPy, so nothing else is compiled.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import numpy as np

from bnverify.case import Case
from bnverify.compiled import Compiled
from bnverify.lazy import jax, jnp
from bnverify.subject import State, StepInfo, Subject, Tree
from bnverify.unusable import first_line

FEW_ROWS = 8
"""Up to so many rows each row is evaluated alone; a law about rows needs no more."""


class Outcome(NamedTuple):
    """What one call of ``step`` gave, and the loss evaluated after it where it was asked for."""

    state: State
    info: StepInfo
    eval_loss: Any = None


class Transition(NamedTuple):
    """One observed step. Every leaf may carry a leading stack axis.

    Attributes:
        case: the input.
        before: the state before the step.
        after: the state after it.
        info: its loss and gradients.
        eval_loss: (1,), evaluated on the same batch in the state after.
        reruns: name of a re-run -> its outcome; see ``RERUNS`` and ``LATER_RERUNS``.
        evals: name of a re-evaluation -> (1,), see ``EVALS``; "rows" -> (N, 1), each row alone.
        facts: what else was observed of the subject, by name.
        exact: the outcome in float64; None where no rounding was read.
        noise: the error that rounding allows each value of ``exact``; an Outcome. Infinite where
            rounding leaves no digits to compare.
    """

    case: Case
    before: State
    after: State
    info: StepInfo
    eval_loss: Any
    reruns: Mapping[str, Outcome]
    evals: Mapping[str, Any]
    facts: Mapping[str, Any]
    exact: Any = None
    noise: Any = None


Inputs = tuple[State, Case]
Seen = Mapping[str, Outcome]


def is_floating(leaf: Any) -> bool:
    """Return whether a leaf holds floating-point numbers: a counter is nobody's average."""
    return bool(jnp.issubdtype(leaf.dtype, jnp.floating))


def with_statistics(state: State, change: Callable[[Any], Any]) -> State:
    """Return ``state`` with ``change`` applied to every floating-point statistic."""
    return state._replace(batch_stats=_changed(state.batch_stats, change))


def with_params(state: State, change: Callable[[Any], Any]) -> State:
    """Return ``state`` with ``change`` applied to every floating-point param."""
    return state._replace(params=_changed(state.params, change))


def _changed(tree: Tree, change: Callable[[Any], Any]) -> Tree:
    def leaf(value: Any) -> Any:
        return change(value).astype(value.dtype) if is_floating(value) else value

    return jax.tree_util.tree_map(leaf, tree)


def huge(dtype: Any) -> float:
    """Return the power of two that stands for a huge statistic: far from overflow, exact."""
    return float(2.0 ** int(0.8 * jnp.finfo(dtype).maxexp))


def other_statistic(value: Any) -> Any:
    """Return another value for a statistic: never the same, always positive, as variances are."""
    return 2 * abs(value) + 1


def other_param(value: Any) -> Any:
    """Return another value for a param, moderate where that is: zeros and ones move, too."""
    return 0.5 - 0.75 * value


def other_inputs(case: Case) -> Case:
    """Return the case with 1, 2 or 3 added to each input: neighbouring rows never move alike.

    What all rows are moved by a normalisation takes away again.
    """
    rows, features = case.shape
    moves = 1 + np.add.outer(np.arange(rows), np.arange(features)) % 3
    return case._replace(x=case.x + moves.astype(np.float32))


def other_targets(case: Case) -> Case:
    """Return the same case with 1 added to each target."""
    return case._replace(y=case.y + np.float32(1))


NUDGES = 3


def nudged(value: Any, pattern: int) -> Any:
    """Return ``value`` with its elements moved up and down by eight roundings, in a pattern."""
    index = np.arange(value.shape[-1] if value.ndim else 1)
    signs = 1 - 2 * ((index * (2654435769, 0, 1)[pattern] >> (4 if pattern == 0 else 0)) % 2)
    moved: Any = value * (1 + 4 * float(jnp.finfo(value.dtype).eps) * signs)
    return moved.reshape(value.shape)


def reverse_rows(case: Case) -> Case:
    """Return the same batch with its rows in reverse order."""
    return case._replace(x=case.x[..., ::-1, :], y=case.y[..., ::-1])


def shift(case: Case) -> Any:
    """Return how far the biases before a normalisation are moved: in proportion to the batch."""
    return 0.25 * abs(case.x).mean(axis=(-2, -1))


RERUNS: dict[str, Callable[[State, Case], Inputs]] = {
    "zero_statistics": lambda s, c: (with_statistics(s, np.zeros_like), c),
    "huge_statistics": lambda s, c: (
        with_statistics(s, lambda v: np.full(v.shape, huge(v.dtype))),
        c,
    ),
    "other_statistics": lambda s, c: (with_statistics(s, other_statistic), c),
    "other_params": lambda s, c: (with_params(s, other_param), c),
    "other_inputs": lambda s, c: (s, other_inputs(c)),
    "other_targets": lambda s, c: (s, other_targets(c)),
    "reversed_targets": lambda s, c: (s, c._replace(y=c.y[..., ::-1])),
    "zero_lr": lambda s, c: (s, _rest(c)),
    "reversed_rows": lambda s, c: (s, reverse_rows(c)),
    "doubled_batch": lambda s, c: (s, double_batch(c)),
}
"""Re-runs of the same step on changed inputs."""

LATER_RERUNS: dict[str, Callable[[Seen, State, Case], Inputs]] = {
    "own_statistics": lambda seen, s, c: (own_statistics(seen, s), _rest(c)),
    "second_step": lambda seen, s, c: (seen["zero_lr"].state, _rest(c)),
}
"""Re-runs whose inputs come out of earlier ones: the batch's own moments, a step repeated."""

EVALS: dict[str, Callable[[Seen, State, State, Case], Inputs]] = {
    "other_statistics": lambda seen, before, after, c: (
        with_statistics(after, other_statistic),
        c,
    ),
    "other_inputs": lambda seen, before, after, c: (after, other_inputs(c)),
    "other_targets": lambda seen, before, after, c: (after, other_targets(c)),
    "reversed_rows": lambda seen, before, after, c: (after, reverse_rows(c)),
    "own_statistics": lambda seen, before, after, c: (own_statistics(seen, before), c),
}
"""Re-evaluations: of another state or batch, of the rows reversed, from the batch's own moments
and from those moved by a few places."""


def _nudge(pattern: int) -> Callable[[Seen, State, State, Case], Inputs]:
    return lambda seen, before, after, c: (
        with_statistics(own_statistics(seen, before), lambda v: nudged(v, pattern)),
        c,
    )


EVALS |= {f"nudged_statistics_{pattern}": _nudge(pattern) for pattern in range(NUDGES)}

AVERAGE = ("step:zero_statistics", "step:huge_statistics")
FIRST = {
    "step:own_statistics": AVERAGE,
    "step:second_step": ("step:zero_lr",),
    "eval:own_statistics": AVERAGE,
    **{f"eval:nudged_statistics_{pattern}": AVERAGE for pattern in range(NUDGES)},
}
"""What must have run before."""


def _rest(case: Case) -> Case:
    return case._replace(lr=np.zeros_like(case.lr))


def double_batch(case: Case) -> Case:
    """Return the case with every row twice."""
    return case._replace(
        x=np.concatenate([case.x, case.x], axis=-2), y=np.concatenate([case.y, case.y], axis=-1)
    )


def own_weight(zero: Any, high: Any, dtype: Any, xp: Any) -> Any:
    """Return 1 - m of new = m * old + (1 - m) * b, from the new values for old = 0 and huge.

    Where a decimal of four places lies within rounding of the measured value it is that
    decimal: people write 0.99, and 1 - m would otherwise lose two digits to the subtraction.

    Args:
        zero: what the step writes over 0, any shape, in float64.
        high: what it writes over ``huge(dtype)``, likewise.
        dtype: of the statistic.
        xp: numpy or jax.numpy.
    """
    weight = 1 - (high - zero) / huge(dtype)
    decimal = xp.round(weight * 1e4) / 1e4
    near = abs(weight - decimal) <= 4 * float(jnp.finfo(dtype).eps)
    return xp.where(near, decimal, weight)


def own_statistics(seen: Seen, state: State) -> State:
    """Return ``state`` with the batch's own moments b, found from outside: new(0) = (1 - m) b."""

    def leaf(old: Any, zero: Any, high: Any) -> Any:
        if not is_floating(old):
            return old
        zero, high = zero.astype(np.float64), high.astype(np.float64)
        # A statistic that never moves has no own weight; what it divides to is not compared.
        with np.errstate(all="ignore"):
            return (zero / own_weight(zero, high, old.dtype, np)).astype(old.dtype)

    own = jax.tree_util.tree_map(
        leaf,
        state.batch_stats,
        seen["zero_statistics"].state.batch_stats,
        seen["huge_statistics"].state.batch_stats,
    )
    return state._replace(batch_stats=own)


def path_name(path: Any) -> str:
    """Return a pytree path as "outer/inner": dict keys, attributes and indices alike."""
    return "/".join(
        str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path
    )


def shift_biases(subject: Subject, state: State, by: Any) -> State:
    """Return ``state`` with ``by`` added to every bias right before a normalisation."""

    def leaf(path: Any, value: Any) -> Any:
        if path_name(path) not in subject.biases_before_norm:
            return value
        return (value + np.expand_dims(by, -1)).astype(value.dtype)

    return state._replace(params=jax.tree_util.tree_map_with_path(leaf, state.params))


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
            if _signature(after) != _signature(state):
                return state  # a law of structure says so
            going = np.asarray(case.warmup) > done
            state = jax.tree_util.tree_map(
                lambda new, old, going=going: np.where(_over(going, new), new, old), after, state
            )
        return state


def form(tree: Tree) -> Any:
    """Return a tree's structure and the shapes of its leaves: what it takes to compare it."""
    leaves, structure = jax.tree_util.tree_flatten(tree)
    return structure, [leaf.shape for leaf in leaves]


def _signature(tree: Tree) -> Any:
    return form(tree), [leaf.dtype for leaf in jax.tree_util.tree_leaves(tree)]


def _over(mask: Any, leaf: Any) -> Any:
    return mask.reshape(mask.shape + (1,) * (leaf.ndim - mask.ndim))


def observe(calls: Calls, case: Case, needs: Collection[str]) -> Transition:
    """Run one step of a subject on ``case`` and the re-runs named in ``needs``.

    Args:
        calls: the subject's functions.
        case: the input; with a leading axis on every leaf where the calls are stacked.
        needs: names that laws declare: "step:NAME" of ``RERUNS`` or ``LATER_RERUNS`` or
            "step:shifted_bias", "eval:NAME" of ``EVALS`` or "eval:rows", or a fact:
            "expected_update" (what the subject's optimizer makes of its gradients),
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
        given = (case.lr, actual.info.grads, before)
        # An optimizer that takes no such gradients or state has no update to follow.
        try:
            facts["expected_update"] = calls.call("expected_update", expected_update, *given)
        except Exception as error:  # noqa: BLE001 - whatever a user's optimizer raises
            calls.refused["expected_update"] = f"the optimizer raised {first_line(error)}"
    if "layer_inputs" in wanted and subject.layer_inputs is not None:
        inputs = subject.layer_inputs
        facts["layer_inputs"] = calls.call("layer_inputs", inputs, before, case.x, case.y)
    if "after_eval" in wanted and subject.after_eval is not None:
        after_eval = subject.after_eval
        facts["after_eval"] = calls.call("after_eval", after_eval, actual.state, case.x, case.y)
    return facts
