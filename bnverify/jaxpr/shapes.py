"""Trace a subject for every batch size and feature size at once, or as widely as possible.

Under ``jax.export.symbolic_shape`` the subject's Python code runs once with symbolic sizes, so
whatever is read from the trace (tree structures, shapes, dtypes, data flow) holds for every size.
Nothing is compiled.

If a subject does not trace with symbolic sizes, the claim is narrowed step by step, and ``scope``
says what remains: every N and D; N a multiple of 24 (for a step that splits its batch); every N at
the feature sizes that the subject declares, or at a few; one concrete shape.

Source: https://docs.jax.dev/en/latest/export/shape_poly.html
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.export

from bnverify.errors import first_line
from bnverify.jaxpr.graph import Graph
from bnverify.jaxpr.interpreter import read
from bnverify.jaxpr.tracing import Abstract, Program, Tracer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

# Used if D cannot be symbolic: 1, because broadcasting can hide errors there, and two others. Three
# sizes are also enough to tell whether a parameter's size is affine in D.
SIZES = (1, 3, 8)
CONCRETE = (4, 3)
CORNERS = ((1, 1), (2, 2))


class TraceError(Exception):
    """The subject does not trace at any size; the message names the function."""


@dataclass(frozen=True)
class Run:
    """A subject traced at one batch size and feature size; all leaves are ``Abstract``.

    Attributes:
        n: the batch size, an int or symbolic.
        d: the feature size, an int or symbolic.
        before: the State that ``init`` makes and the step starts from.
        after: the State after the step.
        info: the StepInfo: loss and gradients.
        eval_loss: what ``evaluate`` returns.
        after_eval: the State after evaluation, or None if the subject does not return it.
        programs: "init", "step", "evaluate" and, if present, "after_eval" -> the traced function.
            "init" is missing if ``before`` was inferred from other sizes.
    """

    n: Any
    d: Any
    before: Any
    after: Any
    info: Any
    eval_loss: Any
    after_eval: Any
    programs: dict[str, Program]


@dataclass(frozen=True)
class Traces:
    """A subject traced as widely as possible.

    Attributes:
        runs: together they cover ``scope``; the smallest sizes come last, separately, because
            Python code may branch on them.
        scope: the sizes covered, as text: "every N and D".
        proved: whether the batch size was symbolic, so that ``scope`` holds for every N (or every
            multiple). If False, ``runs`` are examples and prove nothing beyond their shapes.
        narrowed: why the scope is not wider; empty if it is the widest.
    """

    runs: tuple[Run, ...]
    scope: str
    proved: bool
    narrowed: str = ""


def _stage(tracer: Tracer, stage: str, *args: Any) -> Program:
    try:
        return tracer.trace(stage, getattr(tracer.subject, stage), *args)
    except Exception as error:  # the user's code may raise anything
        raise TraceError(f"{stage} does not trace: {first_line(error)}") from error


def trace_at(tracer: Tracer, n: Any, d: Any, before: Any = None) -> Run:
    """Trace a subject at one batch size and feature size.

    Args:
        tracer: traces init, step, evaluate and, if present, after_eval of the subject.
        n: the batch size, an int or symbolic.
        d: the feature size, an int or symbolic.
        before: the state to step from; None traces ``init`` to get it.

    Raises:
        TraceError: one of the functions does not trace at these sizes.
    """
    seed, x, y, lr, _ = tracer.batch(n, d)
    programs = {}
    if before is None:
        programs["init"] = _stage(tracer, "init", seed, x)
        before = programs["init"].out
    programs["step"] = _stage(tracer, "step", before, x, y, lr)
    after, info = programs["step"].out
    programs["evaluate"] = _stage(tracer, "evaluate", before, x, y)
    if getattr(tracer.subject, "after_eval", None) is not None:
        programs["after_eval"] = _stage(tracer, "after_eval", before, x, y)
    after_eval = programs["after_eval"].out if "after_eval" in programs else None
    return Run(n, d, before, after, info, programs["evaluate"].out, after_eval, programs)


def _lift_size(sizes: Sequence[Any], dims: Sequence[int], d: Any) -> Any:
    """Return ``sizes``, known at each of ``dims``, as an affine function of ``d``."""
    if len(set(sizes)) == 1:
        return sizes[0]
    if not all(isinstance(size, int) for size in sizes):
        raise TraceError("the size of a parameter depends on both N and D")
    slope, rest = divmod(sizes[1] - sizes[0], dims[1] - dims[0])
    offset = sizes[0] - slope * dims[0]
    if rest or any(size != slope * dim + offset for size, dim in zip(sizes, dims, strict=True)):
        raise TraceError("the size of a parameter is not an affine function of D")
    return slope * d + offset


def lift_state(states: Sequence[Any], dims: Sequence[int], d: Any) -> Any:
    """Return the state at symbolic feature size ``d``, from the states at three concrete ones.

    Raises:
        TraceError: the tree structures differ, or a size is not an affine function of D.
    """
    flat: list[tuple[Any, Any]] = [jax.tree_util.tree_flatten(state) for state in states]
    if any(treedef != flat[0][1] for _, treedef in flat):
        raise TraceError("init returns a different tree structure for different D")
    lifted = []
    for leaves in zip(*(leaves for leaves, _ in flat), strict=True):
        if len({(len(leaf.shape), leaf.dtype, leaf.weak_type) for leaf in leaves}) != 1:
            raise TraceError("init returns different dtypes or ranks for different D")
        shape = tuple(
            _lift_size(sizes, dims, d)
            for sizes in zip(*(leaf.shape for leaf in leaves), strict=True)
        )
        lifted.append(Abstract(shape, leaves[0].dtype, leaves[0].weak_type))
    return jax.tree_util.tree_unflatten(flat[0][1], lifted)


def _format_dims(dims: Sequence[int]) -> str:
    return f"D = {dims[0]}" if len(dims) == 1 else f"D in {tuple(dims)}"


def _attempts(tracer: Tracer) -> Iterator[tuple[str, Callable[[], tuple[Run, ...]]]]:
    """Yield (scope, function that traces it), the widest scope first."""
    features = tuple(tracer.subject.features or ())
    n, d = jax.export.symbolic_shape("n, d")
    multiple, _ = jax.export.symbolic_shape("24*n, d")
    if not features:
        yield "every N and D", lambda: (trace_at(tracer, n, d),)
        yield (
            f"every N and D, with the state's shapes extrapolated from {_format_dims(SIZES)}",
            lambda: (_trace_lifted(tracer, n, d),),
        )
        yield "every N divisible by 24, every D", lambda: (trace_at(tracer, multiple, d),)
    dims = features or SIZES
    for size, every in ((n, "every N"), (multiple, "every N divisible by 24")):
        scope = f"{every}, {_format_dims(dims)}"
        yield scope, partial(_trace_each, tracer, size, dims)


def _corners(tracer: Tracer) -> Iterator[Run]:
    """Yield runs at the smallest sizes, where Python code may branch differently.

    ``n == 1`` and ``n == d`` are false for symbolic sizes, so a symbolic trace misses the other
    branch. Sizes that do not trace are skipped.
    """
    for n, d in CORNERS:
        features = tracer.subject.features
        size = min(features) if features else d
        try:
            yield trace_at(tracer, n, size)
        except TraceError:  # running the step reports it
            continue


def _trace_each(tracer: Tracer, n: Any, dims: Sequence[int]) -> tuple[Run, ...]:
    return tuple(trace_at(tracer, n, d) for d in dims)


def _trace_lifted(tracer: Tracer, n: Any, d: Any) -> Run:
    batches = [tracer.batch(n, dim) for dim in SIZES]
    states = [_stage(tracer, "init", batch.seed, batch.x).out for batch in batches]
    return trace_at(tracer, n, d, lift_state(states, SIZES, d))


def trace_subject(
    subject: Any,
    concrete: tuple[int, int] = CONCRETE,
    *,
    tracer: Tracer | None = None,
    corners: bool = True,
) -> Traces:
    """Trace ``subject`` for as many sizes as possible, without compiling anything.

    Args:
        subject: see ``bnverify.model.Subject``.
        concrete: the (N, D) to use if no size can be symbolic; ``subject.features`` overrides D.
        tracer: the subject's tracer, to share its traces; its ``init_is_free`` is set.
        corners: whether to also trace the smallest sizes.

    Raises:
        TraceError: the subject does not trace even at ``concrete``.
    """
    tracer = tracer or Tracer(subject)
    narrowed = ""
    for scope, attempt in _attempts(tracer):
        try:
            runs = attempt()
        except TraceError as refusal:
            narrowed = narrowed or f"at wider sizes {refusal}"
        else:
            tracer.init_is_free = all(_init_is_free(run) for run in runs)
            smallest = _corners(tracer) if corners else ()
            return Traces((*runs, *smallest), scope, proved=True, narrowed=narrowed)
    n, d = concrete[0], (subject.features or concrete[1:])[0]
    run = trace_at(tracer, n, d)
    return Traces((run,), f"N = {n}, D = {d} only", proved=False, narrowed=narrowed)


def _init_is_free(run: Run) -> bool:
    """Return whether the state that ``init`` makes is independent of the batch and its size."""
    program = run.programs.get("init")
    if program is None:
        return False
    graph = Graph(len(program.jaxpr.jaxpr.invars))
    ends = read(program.jaxpr, graph, graph.sources)
    labels = graph.labels()
    batch = 1 << len(graph.sources) - 1  # x is the last input
    named = str(run.n)
    sizes = {str(size) for leaf in jax.tree_util.tree_leaves(program.out) for size in leaf.shape}
    return not any(labels[node] & batch for node in ends) and not any(named in s for s in sizes)
