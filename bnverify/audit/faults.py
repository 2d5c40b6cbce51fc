"""Faults that can be inserted into any training step, to see which of them the user's tests miss.

A fault changes params, running statistics, optimizer state or the loss in what a step returns, or the
state that an evaluation receives. It therefore fits every Subject and every function that takes and
returns a state.

JAX is not imported until a faulty function is called.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from bnverify.lazy import jax, jnp
from bnverify.model import Subject, Tree
from bnverify.statistic_names import moment_of

PARTS = ("params", "batch_stats", "opt_state")

Again = Callable[[Any], Any]  # the same step from another state -> the state after it
Touched = Callable[[], None]  # called when the fault changes something


@dataclass(frozen=True)
class Fault:
    """A fault that can be inserted into any step.

    Attributes:
        name: its name.
        mistake: a name in ``bnverify.mistakes``.
        part: the part of the state that it changes, "loss" or "evaluation".
        sentence: what is wrong, in one sentence.
        change: for a part of the state, (old part, new part, ``Again``) -> part; for the loss,
            loss -> loss; for evaluation, state -> state.
    """

    name: str
    mistake: str
    part: str
    sentence: str
    change: Callable[..., Any]


def _map(function: Callable[..., Any], *trees: Tree) -> Tree:
    return jax.tree_util.tree_map(function, *trees)


def _moved(old: Tree, new: Tree, times: float) -> Tree:
    """Return ``old`` moved ``times`` as far as to ``new``; integers are those of ``new``."""

    def leaf(was: Any, now: Any) -> Any:
        if not jnp.issubdtype(jnp.asarray(now).dtype, jnp.floating):
            return now
        return (was + times * (now - was)).astype(now.dtype)

    return _map(leaf, old, new)


def _initial(statistics: Tree) -> Tree:
    """Return the statistics of a new model: variances are 1, everything else is 0."""

    def leaf(path: Any, value: Any) -> Any:
        name = str(getattr(path[-1], "key", getattr(path[-1], "name", "")))
        return jnp.ones_like(value) if moment_of(name) == "var" else jnp.zeros_like(value)

    return jax.tree_util.tree_map_with_path(leaf, statistics)


def _first_leaf_kept(old: Tree, new: Tree, again: Again) -> Tree:
    leaves, structure = jax.tree_util.tree_flatten(new)
    first = jax.tree_util.tree_leaves(old)[0]
    return jax.tree_util.tree_unflatten(structure, [first, *leaves[1:]])


_ROWS = (
    Fault(
        "statistics_dropped",
        "new_statistics_dropped",
        "batch_stats",
        "The new running statistics are dropped.",
        lambda old, new, again: old,
    ),
    Fault(
        "statistics_reset",
        "statistics_reinitialised",
        "batch_stats",
        "Every step starts its moving average from the initial statistics.",
        lambda old, new, again: again(_initial(old)),
    ),
    Fault(
        "statistics_folded_twice",
        "ema_applied_twice",
        "batch_stats",
        "Every batch is folded into the statistics twice.",
        lambda old, new, again: again(new),
    ),
    Fault(
        "statistics_forget_ten_times_as_fast",
        "momentum_reversed",
        "batch_stats",
        "The statistics move ten times as far as they should: momentum 0.9 instead of 0.99.",
        lambda old, new, again: _moved(old, new, 10.0),
    ),
    Fault(
        "statistics_rounded_to_bfloat16",
        "statistics_in_low_precision",
        "batch_stats",
        "The statistics are rounded to bfloat16, two or three digits.",
        lambda old, new, again: _map(
            lambda leaf: leaf.astype(jnp.bfloat16).astype(leaf.dtype), new
        ),
    ),
    Fault(
        "update_dropped",
        "update_dropped",
        "params",
        "The params are not updated.",
        lambda old, new, again: old,
    ),
    Fault(
        "update_negated",
        "wrong_sign",
        "params",
        "The params move up the gradient.",
        lambda old, new, again: _moved(old, new, -1.0),
    ),
    Fault(
        "update_doubled",
        "update_applied_twice",
        "params",
        "The params move twice as far as they should.",
        lambda old, new, again: _moved(old, new, 2.0),
    ),
    Fault(
        "update_a_hundredth",
        "learning_rate_ignored",
        "params",
        "The params move by a hundredth of the update, as with another learning rate.",
        lambda old, new, again: _moved(old, new, 0.01),
    ),
    Fault(
        "first_leaf_frozen",
        "wrong_gradient",
        "params",
        "One leaf of the params is not trained.",
        _first_leaf_kept,
    ),
    Fault(
        "params_decay",
        "decay_outside_the_learning_rate",
        "params",
        "All params shrink by a thousandth in each step.",
        lambda old, new, again: _map(lambda leaf: (leaf * 0.999).astype(leaf.dtype), new),
    ),
    Fault(
        "optimizer_state_dropped",
        "old_optimizer_state_kept",
        "opt_state",
        "The optimizer's new state is dropped.",
        lambda old, new, again: old,
    ),
    Fault(
        "optimizer_state_zeroed",
        "optimizer_reinitialised",
        "opt_state",
        "The optimizer's state is all zeros after each step.",
        lambda old, new, again: _map(lambda leaf: leaf * 0, new),
    ),
    Fault(
        "loss_doubled",
        "sum_instead_of_mean",
        "loss",
        "The reported loss is twice the loss.",
        lambda loss: loss * 2,
    ),
    Fault(
        "loss_is_zero",
        "gradient_of_another_loss",
        "loss",
        "The reported loss is zero.",
        lambda loss: loss * 0,
    ),
    Fault(
        "evaluates_initial_statistics",
        "eval_of_stale_state",
        "evaluation",
        "Evaluation uses the initial statistics.",
        lambda state: put(state, batch_stats=_initial(get(state, "batch_stats"))),
    ),
    Fault(
        "evaluates_halved_params",
        "eval_of_stale_state",
        "evaluation",
        "Evaluation uses params other than the trained ones.",
        lambda state: put(state, params=_map(lambda leaf: leaf * 0.5, get(state, "params"))),
    ),
)

FAULTS = {fault.name: fault for fault in _ROWS}
"""Name -> the fault."""


def get(state: Any, part: str) -> Any:
    """Return a part of a state-like object: the attribute or the item of that name."""
    return state[part] if isinstance(state, Mapping) else getattr(state, part)


def put(state: Any, **changes: Any) -> Any:
    """Return a copy of a state-like object with parts replaced."""
    if isinstance(state, Mapping):
        return {**state, **changes}
    if hasattr(state, "_replace"):
        return state._replace(**changes)
    return state.replace(**changes) if hasattr(state, "replace") else replace(state, **changes)


def is_state(value: Any) -> bool:
    """Return whether ``value`` has params and running statistics under these names."""
    if isinstance(value, Mapping):
        return {"params", "batch_stats"} <= set(value)
    return hasattr(value, "params") and hasattr(value, "batch_stats")


def faulty(value: Any, fault: Fault, touched: Touched) -> Any:
    """Return ``value`` with a fault in it.

    Args:
        value: a Subject, a function that returns one, a training step that takes and returns a
            state, an evaluation that takes one, or a function that returns a loss.
        fault: the fault.
        touched: called whenever the fault changes something.
    """
    if isinstance(value, Subject):
        return replace(
            value,
            step=_step(value.step, fault, touched),
            evaluate=_step(value.evaluate, fault, touched),
            solution=None,
        )
    return _step(value, fault, touched)


def _step(function: Callable[..., Any], fault: Fault, touched: Touched) -> Any:
    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        index = next((i for i, value in enumerate(args) if is_state(value)), None)
        if index is None:
            result = function(*args, **kwargs)
            return faulty(result, fault, touched) if isinstance(result, Subject) else result

        def call(state: Any) -> Any:
            given = _kept(state)  # the step may donate, and so delete, its argument
            return function(*args[:index], given, *args[index + 1 :], **kwargs)

        old = args[index]
        result = call(old)
        if _state_in(result) is None:
            return _evaluation(result, old, call, fault, touched)
        return _training(result, old, call, fault, touched)

    return wrapped


def _kept(state: Any) -> Any:
    return _map(lambda leaf: jnp.array(leaf, copy=True) if hasattr(leaf, "dtype") else leaf, state)


def _state_in(result: Any) -> Any:
    if is_state(result):
        return result
    inside = result if isinstance(result, tuple | list) else ()
    return next((each for each in inside if is_state(each)), None)


def _training(result: Any, old: Any, call: Again, fault: Fault, touched: Touched) -> Any:
    new = _state_in(result)
    if fault.part in PARTS:
        part = fault.part
        if not jax.tree_util.tree_leaves(get(new, part)):
            return result

        def again(other: Any) -> Any:
            return get(_state_in(call(put(old, **{part: other}))), part)

        changed = put(new, **{part: fault.change(get(old, part), get(new, part), again)})
        touched()
        return _replaced(result, new, changed)
    if fault.part == "loss" and result is not new:
        touched()
        return _rebuilt(result, lambda each: each if each is new else _scaled(each, fault.change))
    return result


def _evaluation(result: Any, old: Any, call: Again, fault: Fault, touched: Touched) -> Any:
    if fault.part != "evaluation":
        return result
    touched()
    return call(fault.change(old))


def _replaced(result: Any, new: Any, changed: Any) -> Any:
    if result is new:
        return changed
    return _rebuilt(result, lambda each: changed if each is new else each)


def _rebuilt(result: Any, function: Callable[[Any], Any]) -> Any:
    parts = [function(each) for each in result]
    return type(result)(*parts) if hasattr(result, "_fields") else type(result)(parts)


def _scaled(value: Any, change: Callable[[Any], Any]) -> Any:
    """Return ``value`` with its loss changed: the value itself, or its field or item of that name."""
    if isinstance(value, Mapping):
        return {**value, "loss": change(value["loss"])} if "loss" in value else value
    if hasattr(value, "_replace") and hasattr(value, "loss"):
        return value._replace(loss=change(value.loss))
    return change(value) if getattr(value, "size", 0) == 1 else value
