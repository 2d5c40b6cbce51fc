"""What one observed step did, with the counterfactual re-runs that laws ask for.

``observe`` runs a subject on one case. It is written once for all ways of running: ``OneByOne``
calls the subject as a user would, ``Stacked`` runs the re-runs of one shape under one ``vmap``
and traces, so that thousands of cases can be observed in one compiled call.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple, Protocol

from bnverify.case import Case
from bnverify.lazy import jax, jnp
from bnverify.subject import State, StepInfo, Subject, Tree


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
        reruns: name of a re-run -> its outcome; see ``RERUNS``.
        evals: name of a re-evaluation -> (1,); see ``EVALS``.
        facts: what the subject showed of itself: "expected_update" (what its optimizer makes
            of its gradients), "layer_inputs", "after_eval", "solution".
        exact: the outcome in float64; None where no rounding was read.
        noise: the error that rounding allows each value of ``exact``; an Outcome.
        reliable: scalar bool: False where rounding leaves no digits to compare.
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
    reliable: Any = None


Inputs = tuple[State, Case]


def _map_floats(change: Callable[[Any], Any], tree: Tree) -> Tree:
    """Apply ``change`` to the floating-point leaves: a counter is nobody's average."""

    def leaf(value: Any) -> Any:
        return change(value) if jnp.issubdtype(value.dtype, jnp.floating) else value

    return jax.tree_util.tree_map(leaf, tree)


def huge(dtype: Any) -> float:
    """Return the power of two that stands for a huge statistic: far from overflow, exact."""
    return float(2.0 ** int(0.8 * jnp.finfo(dtype).maxexp))


def with_statistics(state: State, change: Callable[[Any], Any]) -> State:
    """Return ``state`` with ``change`` applied to every floating-point statistic."""
    return state._replace(batch_stats=_map_floats(change, state.batch_stats))


def other_statistics(state: State) -> State:
    """Return ``state`` with statistics that all differ and are all positive, as variances are."""
    return with_statistics(state, lambda s: (2 * jnp.abs(s) + 1).astype(s.dtype))


def reverse_rows(case: Case) -> Case:
    """Return the same batch with its rows in reverse order."""
    return case._replace(x=case.x[::-1], y=case.y[::-1])


RERUNS: dict[str, Callable[[State, Case], Inputs]] = {
    "zero_statistics": lambda s, c: (with_statistics(s, jnp.zeros_like), c),
    "huge_statistics": lambda s, c: (
        with_statistics(s, lambda v: jnp.full_like(v, huge(v.dtype))),
        c,
    ),
    "other_statistics": lambda s, c: (other_statistics(s), c),
    "other_targets": lambda s, c: (s, c._replace(y=c.y + 1)),
    "zero_lr": lambda s, c: (s, c._replace(lr=jnp.zeros_like(c.lr))),
    "reversed_rows": lambda s, c: (s, reverse_rows(c)),
}
"""Re-runs of the same step on changed inputs of the same shape."""

LATER_RERUNS: dict[str, Callable[[Mapping[str, Outcome], State, Case], Inputs]] = {
    "own_statistics": lambda seen, s, c: (
        s._replace(batch_stats=own_statistics(seen, s)),
        c._replace(lr=jnp.zeros_like(c.lr)),
    ),
    "second_step": lambda seen, s, c: (
        seen["zero_lr"].state,
        c._replace(lr=jnp.zeros_like(c.lr)),
    ),
}
"""Re-runs whose inputs come out of earlier ones: the batch's own moments, a step repeated."""

LATER_NEEDS = {
    "own_statistics": ("zero_statistics", "huge_statistics"),
    "second_step": ("zero_lr",),
}

EVALS: dict[str, Callable[[State, State, Mapping[str, Outcome], Case], Inputs]] = {
    "other_statistics": lambda before, after, seen, c: (other_statistics(after), c),
    "reversed_rows": lambda before, after, seen, c: (after, reverse_rows(c)),
    "own_statistics": lambda before, after, seen, c: (
        before._replace(batch_stats=own_statistics(seen, before)),
        c,
    ),
}
"""Re-evaluations: from other statistics, of the rows reversed, from the batch's own moments."""

EVAL_NEEDS = {"own_statistics": ("zero_statistics", "huge_statistics")}


def own_weight(zero: Any, high: Any, dtype: Any) -> Any:
    """Return 1 - m of new = m * old + (1 - m) * b, from the new values for old = 0 and huge.

    Where a decimal of four places lies within rounding of the measured value it is that
    decimal: people write 0.99, and 1 - m would otherwise lose two digits to the subtraction.

    Args:
        zero: what the step writes over 0, any shape.
        high: what it writes over ``huge(dtype)``, likewise.
        dtype: of the statistic.
    """
    weight = 1 - (high - zero) / huge(dtype)
    decimal = jnp.round(weight * 1e4) / 1e4
    near = jnp.abs(weight - decimal) <= 4 * float(jnp.finfo(dtype).eps)
    return jnp.where(near, decimal, weight)


def own_statistics(seen: Mapping[str, Outcome], state: State) -> Tree:
    """Return the batch's own moments b, found from outside: new(old = 0) = (1 - m) * b."""

    def leaf(old: Any, zero: Any, high: Any) -> Any:
        if not jnp.issubdtype(old.dtype, jnp.floating):
            return old
        return (zero / own_weight(zero, high, zero.dtype)).astype(old.dtype)

    return jax.tree_util.tree_map(
        leaf,
        state.batch_stats,
        seen["zero_statistics"].state.batch_stats,
        seen["huge_statistics"].state.batch_stats,
    )


class Calls(Protocol):
    """A way of calling a subject's functions."""

    def glue(self, name: str, function: Callable[..., Any], *args: Any) -> Any:
        """Return ``function(*args)``: our own arithmetic between the subject's calls."""

    def init(self, case: Case) -> State:
        """Return the state before the first step."""

    def warm(self, state: State, case: Case) -> State:
        """Return the state after ``case.warmup`` steps on the same batch."""

    def steps(self, inputs: Mapping[str, Inputs]) -> dict[str, Outcome]:
        """Return the outcome of one step for each of ``inputs``, all of one shape."""

    def evals(self, inputs: Mapping[str, Inputs]) -> dict[str, Any]:
        """Return the eval loss for each of ``inputs``, all of one shape."""


class OneByOne:
    """Calls one after another, compiled by ``jax.jit`` or, with ``jit=False``, eager."""

    def __init__(self, subject: Subject, *, jit: bool = True) -> None:
        wrap: Callable[[Any], Any] = jax.jit if jit else lambda fn: fn
        self._init = wrap(subject.init)
        self._step = wrap(subject.step)
        self._evaluate = wrap(subject.evaluate)
        self._glue: dict[str, Any] = {}

    def glue(self, name: str, function: Callable[..., Any], *args: Any) -> Any:
        if name not in self._glue:  # compiled once: eager arithmetic would compile every operation
            self._glue[name] = jax.jit(function)
        return self._glue[name](*args)

    def init(self, case: Case) -> State:
        state: State = self._init(case.seed, case.x)
        return state

    def step(self, state: State, case: Case) -> Outcome:
        """Return the outcome of one step."""
        return Outcome(*self._step(state, case.x, case.y, case.lr))

    def evaluate(self, state: State, case: Case) -> Any:
        """Return the eval loss."""
        return self._evaluate(state, case.x, case.y)

    def warm(self, state: State, case: Case) -> State:
        for _ in range(int(case.warmup)):
            state = self.step(state, case).state
        return state

    def steps(self, inputs: Mapping[str, Inputs]) -> dict[str, Outcome]:
        return {name: self.step(*given) for name, given in inputs.items()}

    def evals(self, inputs: Mapping[str, Inputs]) -> dict[str, Any]:
        return {name: self.evaluate(*given) for name, given in inputs.items()}


class Stacked:
    """Calls of one shape stacked under one ``vmap``: one copy of the step to compile."""

    def __init__(self, subject: Subject) -> None:
        self._subject = subject

    def glue(self, name: str, function: Callable[..., Any], *args: Any) -> Any:
        return function(*args)

    def init(self, case: Case) -> State:
        return self._subject.init(case.seed, case.x)

    def warm(self, state: State, case: Case) -> State:
        def once(_: Any, state: State) -> State:
            return self._subject.step(state, case.x, case.y, case.lr)[0]

        return jax.lax.fori_loop(0, case.warmup, once, state)

    def steps(self, inputs: Mapping[str, Inputs]) -> dict[str, Outcome]:
        def step(state: State, case: Case) -> Outcome:
            return Outcome(*self._subject.step(state, case.x, case.y, case.lr))

        return _stacked(step, inputs)

    def evals(self, inputs: Mapping[str, Inputs]) -> dict[str, Any]:
        def evaluate(state: State, case: Case) -> Any:
            return self._subject.evaluate(state, case.x, case.y)

        return _stacked(evaluate, inputs)


def _stacked(function: Callable[..., Any], inputs: Mapping[str, Inputs]) -> dict[str, Any]:
    if not inputs:
        return {}
    stack = jax.tree_util.tree_map(lambda *leaves: jnp.stack(leaves), *inputs.values())
    out = jax.vmap(function)(*stack)
    return {
        name: jax.tree_util.tree_map(lambda leaf, i=i: leaf[i], out)
        for i, name in enumerate(inputs)
    }


def observe(calls: Calls, subject: Subject, case: Case, needs: Collection[str]) -> Transition:
    """Run one step of ``subject`` on ``case`` and the re-runs named in ``needs``.

    Args:
        calls: the way to call the subject.
        subject: what is observed.
        case: the input; its leaves may be tracers.
        needs: names that laws declare: "step:NAME" of ``RERUNS`` or ``LATER_RERUNS``,
            "eval:NAME" of ``EVALS``, or a fact.

    Returns:
        The transition, without rounding: ``exact``, ``noise`` and ``reliable`` are None.
    """
    steps = {need.removeprefix("step:") for need in needs if need.startswith("step:")}
    evals = [name for name in EVALS if f"eval:{name}" in needs]
    for name in [*steps]:
        steps.update(LATER_NEEDS.get(name, ()))
    for name in evals:
        steps.update(EVAL_NEEDS.get(name, ()))
    before = calls.warm(calls.init(case), case)

    def first(before: State, case: Case) -> dict[str, Inputs]:
        inputs = {name: make(before, case) for name, make in RERUNS.items() if name in steps}
        if "shifted_bias" in steps:
            inputs["shifted_bias"] = (shift_biases(subject, before), case)
        return inputs

    def later(seen: Mapping[str, Outcome], before: State, case: Case) -> dict[str, Inputs]:
        return {n: make(seen, before, case) for n, make in LATER_RERUNS.items() if n in steps}

    def again(seen: Mapping[str, Outcome], before: State, after: State, case: Case) -> Any:
        return {name: EVALS[name](before, after, seen, case) for name in evals}

    seen = calls.steps({"actual": (before, case), **calls.glue("first", first, before, case)})
    actual = seen.pop("actual")
    seen |= calls.steps(calls.glue("later", later, seen, before, case))
    if "doubled_batch" in steps:
        twice = calls.glue("twice", double_batch, case)
        seen |= calls.steps({"doubled_batch": (before, twice)})
    losses = calls.evals(
        {
            "actual": (actual.state, case),
            **calls.glue("again", again, seen, before, actual.state, case),
        }
    )
    if "eval:rows" in needs:
        losses["rows"] = _row_losses(calls, actual.state, case)
    return Transition(
        case=case,
        before=before,
        after=actual.state,
        info=actual.info,
        eval_loss=losses.pop("actual"),
        reruns=seen,
        evals=losses,
        facts=_facts(calls, subject, case, before, actual, needs),
    )


def double_batch(case: Case) -> Case:
    """Return the case with every row twice."""
    return case._replace(x=jnp.concatenate([case.x, case.x]), y=jnp.concatenate([case.y, case.y]))


def shift_biases(subject: Subject, state: State) -> State:
    """Return ``state`` with 1 added to every bias that stands right before a normalisation."""

    def leaf(path: Any, value: Any) -> Any:
        return value + 1 if path_name(path) in subject.biases_before_norm else value

    return state._replace(params=jax.tree_util.tree_map_with_path(leaf, state.params))


def path_name(path: Any) -> str:
    """Return a pytree path as "outer/inner": dict keys, attributes and indices alike."""
    return "/".join(
        str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path
    )


def _row_losses(calls: Calls, state: State, case: Case) -> Any:
    """Return the eval loss of each row alone, (N, 1)."""

    def split(state: State, case: Case) -> dict[str, Inputs]:
        rows = range(case.x.shape[0])
        parts = [case._replace(x=case.x[i : i + 1], y=case.y[i : i + 1]) for i in rows]
        return {str(i): (state, part) for i, part in enumerate(parts)}

    return jnp.stack(list(calls.evals(calls.glue("rows", split, state, case)).values()))


def _facts(
    calls: Calls,
    subject: Subject,
    case: Case,
    before: State,
    actual: Outcome,
    needs: Collection[str],
) -> dict[str, Any]:
    def expected_update(lr: Any, grads: Tree, before: State) -> State:
        assert subject.optimizer is not None
        tx = subject.optimizer(lr)
        updates, opt_state = tx.update(grads, before.opt_state, before.params)
        params = jax.tree_util.tree_map(jnp.add, before.params, updates)
        return State(params, None, opt_state)

    facts: dict[str, Any] = {}
    if "expected_update" in needs and subject.optimizer is not None:
        given = (case.lr, actual.info.grads, before)
        facts["expected_update"] = calls.glue("expected_update", expected_update, *given)
    if "layer_inputs" in needs and subject.layer_inputs is not None:
        inputs = subject.layer_inputs
        facts["layer_inputs"] = calls.glue("layer_inputs", inputs, before, case.x, case.y)
    if "after_eval" in needs and subject.after_eval is not None:
        after_eval = subject.after_eval
        facts["after_eval"] = calls.glue("after_eval", after_eval, actual.state, case.x, case.y)
    return facts
