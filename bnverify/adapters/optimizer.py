"""The optimizer of a step: steps per update, its schedule, its learning rate, and its paper's formula.

It is analysed apart from the step: how many batches make one update, whether a learning-rate schedule is as
long as the training, and whether the rate keeps its digits. While a user's function creates an optimizer,
the calls of Optax's functions are recorded with their arguments. Each such call is then repeated for two
params, a matrix and a vector, and the updates are compared with those of ``bnverify.optimizers``.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, is_dataclass
from functools import partial
from types import FunctionType
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bnverify.adapters.by_design import Declared
from bnverify.adapters.explain import is_library
from bnverify.adapters.programs import RATE, Programs
from bnverify.adapters.traced import Evaluation, Flows
from bnverify.jaxpr.interpreter import live, read
from bnverify.jaxpr.rounding import evaluate
from bnverify.jaxpr.tracing import Abstract, leaf_names, trace
from bnverify.model import PaperCheck, RateUse, Schedule, State, Subject
from bnverify.optimizers import PAPERS, Paper, expected
from bnverify.pytree import by_path

MOST = 64  # the largest number of steps per update that is tried
BATCHES = re.compile(r"batches|micro_?steps|mini_?steps", re.IGNORECASE)
"""Names of variables that contain a number of batches."""


def updates_every(subject: Subject, state: State) -> int:
    """Return the number of steps per update with ``optax.MultiSteps``; 1 without it."""
    counts = [p for p in leaf_names(state) if p.startswith("opt_state/") and "mini_step" in p]
    if not counts or subject.optimizer is None:
        return 1
    zeros = jax.tree_util.tree_map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), state.params)
    tx = subject.optimizer(jnp.float32(RATE))
    kept = jax.eval_shape(tx.init, zeros)
    program, after = jax.make_jaxpr(lambda k: tx.update(zeros, k, zeros)[1], return_shape=True)(
        kept
    )
    place = next(i for i, name in enumerate(leaf_names(after)) if name.endswith("mini_step"))
    # Only the counter is computed, from one step to the next.
    counting = live(program, place)
    leaves = [jnp.zeros(leaf.shape, leaf.dtype) for leaf in jax.tree_util.tree_leaves(kept)]
    for count in range(1, MOST + 1):
        (leaves[place],) = read(counting, Evaluation(), leaves)
        if int(leaves[place]) == 0:
            return count
    return 1


def schedules(
    programs: Programs, declared: Declared, every: int, makers: Sequence[Callable[..., Any]]
) -> Iterator[Schedule]:
    """Yield, for each possible number of batches, whether the schedule is exactly that long.

    Args:
        programs: the traced functions of the subject.
        declared: the user's declarations, of which ``batches`` is used.
        every: the number of steps per update.
        makers: the user's functions that create the optimizer; integers in their code whose names
            mean a number of batches are tried.
    """
    optimizer = programs.subject.optimizer
    if every == 1 or optimizer is None:
        return
    ends = _Ends(optimizer, programs.state.params, every)
    if declared.batches is not None:
        said = f"batches={declared.batches}"
        yield Schedule(declared.batches, said, ends.after(declared.batches))
        return
    for name, number in sorted(_numbers(makers).items()):
        yield Schedule(number, f"{name} = {number}", ends.after(number))


def rates(programs: Programs) -> Iterator[RateUse]:
    """Yield how hyperparameters are kept, and how the learning rate reaches each float32 param."""
    singles = [
        p for p, (_, t) in programs.types.items() if p.startswith("params/") and t == "float32"
    ]
    for name, (_, dtype) in programs.types.items():
        kept = name.startswith("opt_state/") and "hyperparams" in name.split("/")
        if kept and singles and programs.is_floating(name):
            yield RateUse(name, dtype.itemsize < 4)
    optimizer = programs.subject.optimizer
    if optimizer is None:
        return
    params = jax.tree_util.tree_map(lambda p: Abstract(p.shape, p.dtype), programs.state.params)

    def update(rate: Any, params: Any) -> Any:
        tx = optimizer(rate)
        return tx.update(params, tx.init(params), params)[0]

    try:
        program = trace(update, Abstract((), np.dtype(np.float32)), params)
    except Exception:  # noqa: BLE001 - a user's optimizer may need more than params and gradients
        return
    flows = Flows(program.jaxpr)
    leaves = by_path(params)
    if len(leaves) != len(flows.outputs):
        return

    def is_wide(node: int) -> bool:
        aval = flows.aval(node)
        return aval is None or not flows.is_floating(node) or aval.dtype.itemsize >= 4

    reached = flows.reached(flows.inputs[:1])
    in_full = flows.reached(flows.inputs[:1], through=is_wide)
    for (path, leaf), node in zip(leaves.items(), flows.outputs, strict=True):
        if leaf.dtype == np.float32 and node in reached:
            yield RateUse(f"params/{path}", node not in in_full)


class _Ends:
    """Determines whether the schedule of an accumulating optimizer ends after a number of updates."""

    def __init__(self, optimizer: Callable[[Any], Any], params: Any, every: int) -> None:
        ones = jax.tree_util.tree_map(lambda leaf: np.ones(leaf.shape, leaf.dtype), params)

        def update(params: Any, state: Any) -> Any:
            return optimizer(jnp.float32(RATE)).update(params, state, params)[0]

        self._params, self._every = ones, every
        try:
            self._state = optimizer(jnp.float32(RATE)).init(ones)
            self._program: Any = trace(update, ones, self._state)
        except Exception:  # noqa: BLE001 - a user's optimizer may need more than params and gradients
            self._program = None

    def after(self, count: int) -> bool:
        """Return whether the learning rate changes up to update ``count`` but not after it."""
        if self._program is None or count < 1:
            return False
        before, at, *later = (self._update(c) for c in (count - 1, count, count + 1, 2 * count + 1))
        still = all(np.array_equal(at, each) for each in later)
        return still and not np.array_equal(before, at)

    def _update(self, count: int) -> Any:
        """Return the update after ``count`` others, flattened."""

        def counted(node: Any) -> Any:
            named = getattr(node, "_fields", ())
            changed: dict[str, Any] = {}
            if "mini_step" in named:
                changed["mini_step"] = jnp.asarray(self._every - 1, node.mini_step.dtype)
            scheduled = re.search("schedule|hyperparam", type(node).__name__, re.IGNORECASE)
            if "count" in named and scheduled:
                changed["count"] = jnp.asarray(count, node.count.dtype)
            inner = {name: counted(getattr(node, name)) for name in named if name not in changed}
            if hasattr(node, "_fields"):
                return node._replace(**changed, **inner)
            if isinstance(node, tuple | list):
                return type(node)(counted(each) for each in node)
            if isinstance(node, dict):
                return {key: counted(each) for key, each in node.items()}
            return node

        given = self._params, jax.tree_util.tree_map(np.asarray, counted(self._state))
        leaves = jax.tree_util.tree_leaves(evaluate(self._program, *given))
        return np.concatenate([np.ravel(leaf) for leaf in leaves])


def _numbers(makers: Sequence[Callable[..., Any]]) -> dict[str, int]:
    """Return name -> integer that some functions use, if the name means a number of batches."""
    found: dict[str, int] = {}
    pending: list[Any] = list(makers)
    seen: set[int] = set()
    while pending:
        value = pending.pop()
        function = _function(value)
        if function is None or id(function) in seen or is_library(function.__code__.co_filename):
            continue
        seen.add(id(function))
        scope = inspect.getclosurevars(function)
        own = getattr(value, "__self__", None)
        for name, held in [*scope.globals.items(), *scope.nonlocals.items(), ("self", own)]:
            found |= {n: v for n, v in _named(name, held) if BATCHES.search(n) and v > 1}
            pending.append(held)
    return found


def _function(value: Any) -> FunctionType | None:
    value = getattr(value, "func", value)  # of a partial
    value = getattr(value, "__func__", value)
    value = inspect.unwrap(value) if callable(value) else value
    return value if isinstance(value, FunctionType) else None


def _named(name: str, value: Any) -> Iterator[tuple[str, int]]:
    """Yield (name, integer) for a variable that is an integer, or for its fields that are."""
    inner: Mapping[str, Any] = {}
    if isinstance(value, int) and not isinstance(value, bool):
        yield name, value
    elif is_dataclass(value) and not isinstance(value, type):
        inner = {each.name: getattr(value, each.name, None) for each in fields(value)}
    elif isinstance(value, Mapping):
        inner = value
    elif type(value).__module__ != "builtins" and not callable(value):
        inner = getattr(value, "__dict__", {})
    for key, each in inner.items():
        if isinstance(each, int) and not isinstance(each, bool):
            yield str(key), each


# The formulas of papers.


UPDATES = 8
"""The number of updates compared: with its defaults, radam's variance is tractable from the sixth on."""

SHAPES = {"matrix": (3, 2), "vector": (3,)}
MASKS = frozenset({"mask", "weight_decay_mask"})
"""Parameters that select the params to decay, which make no difference to the formula for one param."""


@dataclass(frozen=True)
class Made:
    """A call of an Optax function.

    Attributes:
        function: the function.
        name: its name.
        arguments: its arguments by name, including defaults.
    """

    function: Callable[..., Any]
    name: str
    arguments: Mapping[str, Any]


def paper_checks(optimizer: Callable[[Any], Any] | None) -> Iterator[PaperCheck]:
    """Yield how the Optax optimizers that a function creates compare with their papers' formulas.

    Args:
        optimizer: learning rate -> ``optax.GradientTransformation``; None if it is unknown.
    """
    told: set[PaperCheck] = set()
    for made in _made(optimizer) if optimizer is not None else []:
        paper = PAPERS[made.name]
        values = _values(made, paper)
        if values is not None:
            check = PaperCheck(f"optax.{made.name}", paper.source, _difference(made, paper, values))
            if check not in told:
                yield check
            told.add(check)


def _difference(made: Made, paper: Paper, values: Mapping[str, Any]) -> str:
    """Return the first update that differs from the formula, in words; "" if none does."""
    rng = np.random.default_rng(0)
    params = {n: np.asarray(rng.normal(size=s), np.float32) for n, s in SHAPES.items()}
    grads = {n: _decades(rng, (UPDATES, *s)) for n, s in SHAPES.items()}
    arguments = {n: None if n in MASKS else value for n, value in made.arguments.items()}
    updates = _updates(made.function(**arguments), params, grads)
    for name, param in params.items():
        wide = param.astype(np.float64), list(grads[name].astype(np.float64))
        exact, allowed = expected(paper, values, *wide)
        off = np.abs(updates[name] - exact) > allowed
        off |= ~np.isfinite(updates[name])
        off[: paper.first - 1] = False
        if off.any():
            at = tuple(int(i) for i in np.argwhere(off)[0])
            given = ", ".join(f"{g:.3g}" for g in grads[name][(slice(at[0] + 1), *at[1:])])
            got = f"update {at[0] + 1} of a {name} with gradients {given} is"
            return f"{got} {updates[name][at]:.6g}, but the formula gives {exact[at]:.6g}"
    return ""


def _updates(tx: Any, params: Any, grads: Any) -> Any:
    """Return an optimizer's updates for stacked gradients, in float64: a tree like ``grads``."""

    def run(params: Any, grads: Any) -> Any:
        def turn(carry: Any, gradient: Any) -> Any:
            params, state = carry
            update, state = tx.update(gradient, state, params)
            return (jax.tree_util.tree_map(jnp.add, params, update), state), update

        return jax.lax.scan(turn, (params, tx.init(params)), grads)[1]

    return evaluate(trace(run, params, grads), params, grads)


def _decades(rng: np.random.Generator, shape: tuple[int, ...]) -> Any:
    """Return gradients of very different sizes, because epsilon only matters for small ones."""
    signs = rng.choice([-1.0, 1.0], shape)
    sizes = 10.0 ** (rng.uniform(-8, 1, shape[1:]) + rng.uniform(-0.5, 0.5, shape))
    return np.asarray(signs * sizes, np.float32)


def _values(made: Made, paper: Paper) -> dict[str, Any] | None:
    """Return the hyperparameters of a formula; None if it does not cover the call."""
    values: dict[str, Any] = {}
    defaults = inspect.signature(made.function).parameters
    for name, value in made.arguments.items():
        if name in paper.flags or (value is None and name in paper.numbers):
            values[name] = value
        elif name in paper.numbers or name == "learning_rate":
            try:
                values[name] = float(value)
            except (TypeError, jax.errors.JAXTypeError):  # a schedule or a tracer
                return None
        elif name not in MASKS and not _is_same(value, defaults[name].default):
            return None
    return values


def _is_same(value: Any, default: Any) -> bool:
    return value is default or (isinstance(value, int | float | str) and value == default)


def _made(optimizer: Callable[[Any], Any]) -> list[Made]:
    """Return the calls of Optax's functions that create an optimizer."""
    args: tuple[Any, ...] = (np.float32(RATE),)
    options: dict[str, Any] = {}
    function: Any = optimizer
    while _name(function) is None and isinstance(function, partial):
        args, options = (*function.args, *args), {**function.keywords, **options}
        function = function.func
    name = _name(function)
    # An Optax function is called by its name, since only the function of that name is recorded.
    make = function if name is None else partial(_by_name, name)
    # Traced, a user's function compiles nothing. It is run where it raises, or gives no numbers.
    traced = partial(jax.eval_shape, lambda: (make(*args, **options), None)[1])
    return next(filter(None, map(_noted, (traced, partial(make, *args, **options)))), [])


def _noted(call: Callable[[], Any]) -> list[Made]:
    """Return the calls of Optax's functions in a call; [] if it raises or their arguments are traced."""
    with _noting() as seen:
        try:
            call()
        except Exception:  # noqa: BLE001 - whatever a user's function raises
            return []
    given = (value for made in seen for value in made.arguments.values())
    return [] if any(isinstance(value, jax.core.Tracer) for value in given) else seen


def _by_name(name: str, *args: Any, **options: Any) -> Any:
    return getattr(optax, name)(*args, **options)


def _name(function: Any) -> str | None:
    """Return the name of an Optax function that has a paper; None for any other function."""
    return next((name for name in PAPERS if getattr(optax, name, None) is function), None)


@contextmanager
def _noting() -> Iterator[list[Made]]:
    """Record the calls of Optax's functions within this context."""
    seen: list[Made] = []

    def noting(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(function)

        def call(*args: Any, **options: Any) -> Any:
            bound = signature.bind(*args, **options)
            bound.apply_defaults()
            seen.append(Made(function, name, bound.arguments))
            return function(*args, **options)

        call.__signature__ = signature  # type: ignore[attr-defined]  # for inject_hyperparams
        return call

    with ExitStack() as stack:
        for name in filter(partial(hasattr, optax), PAPERS):
            stand_in = noting(name, getattr(optax, name))
            stack.enter_context(mock.patch.object(optax, name, stand_in))
        yield seen
