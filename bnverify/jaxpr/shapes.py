"""Trace a subject for every batch size and feature size at once, or as widely as it allows.

Tracing under ``jax.export.symbolic_shape`` runs the subject's Python once with sizes that are
names, so what is read off the result (tree structures, shapes, dtypes, who reaches whom) holds
for every size. Nothing is compiled.

Not everything traces so. The claim is then narrowed, step by step, and says what is left of it:
every N and D; N in multiples of 24 (a step that splits its batch); every N at the sizes D that
the subject declares, or at a few; one concrete shape.

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

# Used where a symbolic D is refused: 1, because broadcasting hides there, and two others, far
# apart. Three also tell whether a parameter's size is affine in D.
SIZES = (1, 3, 8)
CONCRETE = (4, 3)
CORNERS = ((1, 1), (2, 2))


class TraceError(Exception):
    """A subject that does not trace at any size; the message says where, the cause says why."""


@dataclass(frozen=True)
class Run:
    """A subject traced at one pair of sizes.

    Attributes:
        n: the batch size, an int or symbolic.
        d: the feature size, likewise.
        before: the State that ``init`` makes, and from which the step was traced.
        after: the State after the step.
        info: the StepInfo: loss and gradients.
        eval_loss: what ``evaluate`` returns.
        after_eval: the State evaluation leaves, where the subject shows it; else None.
        programs: "init", "step", "evaluate" and perhaps "after_eval" -> the traced function.
            "init" is missing where its State was inferred from other sizes.

    All leaves are ``Abstract``.
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
    """A subject traced as widely as it allows.

    Attributes:
        runs: together they cover ``scope``; last those of the smallest sizes on their own, where
            Python code may take other turns.
        scope: what was quantified over, in words: "every N and D".
        proved: whether the batch size was symbolic, so that ``scope`` speaks of every N (or of
            every multiple). If not, ``runs`` are examples and prove nothing beyond their shapes.
        narrowed: why the scope is not wider; empty where it is the widest.
    """

    runs: tuple[Run, ...]
    scope: str
    proved: bool
    narrowed: str = ""


def _stage(tracer: Tracer, stage: str, *args: Any) -> Program:
    try:
        return tracer.trace(stage, getattr(tracer.subject, stage), *args)
    except Exception as error:  # whatever a user's code raises on sizes it cannot take
        raise TraceError(f"{stage} does not trace: {first_line(error)}") from error


def trace_at(tracer: Tracer, n: Any, d: Any, before: Any = None) -> Run:
    """Return a subject traced at one pair of sizes.

    Args:
        tracer: of the subject; only init, step, evaluate and, where there is one, after_eval are
            used.
        n: the batch size, an int or symbolic.
        d: the feature size, likewise.
        before: the state to step from; None traces ``init`` for it.

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
    """Return the size as an affine function of ``d``, from its values at three of ``dims``."""
    if len(set(sizes)) == 1:
        return sizes[0]
    if not all(isinstance(size, int) for size in sizes):
        raise TraceError("a parameter's size depends on N and on D")
    slope, rest = divmod(sizes[1] - sizes[0], dims[1] - dims[0])
    offset = sizes[0] - slope * dims[0]
    if rest or any(size != slope * dim + offset for size, dim in zip(sizes, dims, strict=True)):
        raise TraceError("a parameter's size is no affine function of D")
    return slope * d + offset


def lift_state(states: Sequence[Any], dims: Sequence[int], d: Any) -> Any:
    """Return the state at the symbolic feature size ``d``, from the states at three known ones.

    Raises:
        TraceError: the trees differ, or a size is no affine function of D.
    """
    flat: list[tuple[Any, Any]] = [jax.tree_util.tree_flatten(state) for state in states]
    if any(treedef != flat[0][1] for _, treedef in flat):
        raise TraceError("init makes another tree at another D")
    lifted = []
    for leaves in zip(*(leaves for leaves, _ in flat), strict=True):
        if len({(len(leaf.shape), leaf.dtype, leaf.weak_type) for leaf in leaves}) != 1:
            raise TraceError("init makes other types at another D")
        shape = tuple(
            _lift_size(sizes, dims, d)
            for sizes in zip(*(leaf.shape for leaf in leaves), strict=True)
        )
        lifted.append(Abstract(shape, leaves[0].dtype, leaves[0].weak_type))
    return jax.tree_util.tree_unflatten(flat[0][1], lifted)


def _listed(dims: Sequence[int]) -> str:
    return f"D = {dims[0]}" if len(dims) == 1 else f"D in {tuple(dims)}"


def _attempts(tracer: Tracer) -> Iterator[tuple[str, Callable[[], tuple[Run, ...]]]]:
    """Yield (scope, how to trace it), the widest first."""
    features = tuple(tracer.subject.features or ())
    n, d = jax.export.symbolic_shape("n, d")
    multiple, _ = jax.export.symbolic_shape("24*n, d")
    if not features:
        yield "every N and D", lambda: (trace_at(tracer, n, d),)
        yield (
            f"every N and D, from states shaped as init makes them at {_listed(SIZES)}",
            lambda: (_trace_lifted(tracer, n, d),),
        )
        yield "every N divisible by 24, every D", lambda: (trace_at(tracer, multiple, d),)
    dims = features or SIZES
    for size, every in ((n, "every N"), (multiple, "every N divisible by 24")):
        scope = f"{every}, {_listed(dims)}"
        yield scope, partial(_trace_each, tracer, size, dims)


def _corners(tracer: Tracer) -> Iterator[Run]:
    """Yield runs at sizes where Python code takes turns that a symbolic size does not show.

    To JAX ``n == 1`` and ``n == d`` are plainly false for symbolic sizes, so a branch on them
    goes unseen. What is read must hold there too; a size that no trace takes is left out.
    """
    for n, d in CORNERS:
        features = tracer.subject.features
        size = min(features) if features else d
        try:
            yield trace_at(tracer, n, size)
        except TraceError:  # running will tell
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
    """Return ``subject`` traced for as many sizes as it allows, without compiling anything.

    Args:
        subject: see ``bnverify.model.Subject``.
        concrete: (N, D) to fall back to where no size may be symbolic; D gives way to the
            subject's own ``features``.
        tracer: of the subject, to share its traces; told whether ``init`` needs the batch.
        corners: whether to trace the smallest sizes on their own, too.

    Raises:
        TraceError: it does not trace even there.
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
    """Return whether the state that ``init`` makes depends on neither the batch nor its size."""
    program = run.programs.get("init")
    if program is None:
        return False
    graph = Graph(len(program.jaxpr.jaxpr.invars))
    ends = read(program.jaxpr, graph, graph.sources)
    labels = graph.labels()
    batch = 1 << len(graph.sources) - 1  # the last of its inputs
    named = str(run.n)
    sizes = {str(size) for leaf in jax.tree_util.tree_leaves(program.out) for size in leaf.shape}
    return not any(labels[node] & batch for node in ends) and not any(named in s for s in sizes)
