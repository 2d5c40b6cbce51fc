"""Which parts of the old state and of the batch can reach which results of a step.

``influence`` reads the traced step and evaluation as graphs. A pair that is *absent* from its
matrix is proved: that input cannot change that output, for all values and every size in ``scope``.
A pair that is present may flow; only running the step can show whether it does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bnverify.jaxpr.graph import Graph, source_line
from bnverify.jaxpr.interpreter import read
from bnverify.jaxpr.tracing import Program, leaf_names

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from bnverify.jaxpr.shapes import Run, Traces

INPUTS = ("params", "batch_stats", "opt_state", "extra", "x", "y", "lr")


@dataclass(frozen=True)
class Link:
    """One equation on a path from an input to an output.

    Attributes:
        primitive: the primitive's name.
        source: ``path:line (function)`` in the user's code, if JAX recorded it.
    """

    primitive: str
    source: str | None

    def __str__(self) -> str:
        return f"{self.primitive} at {self.source}" if self.source else self.primitive


@dataclass(frozen=True)
class _ProgramGraph:
    """The graph of one program, with the names of its input and output leaves."""

    graph: Graph
    inputs: dict[str, int]
    outputs: dict[str, int]


@dataclass(frozen=True)
class Influence:
    """Which input trees and leaves can reach which output trees and leaves.

    Outputs are the new "params", "batch_stats", "opt_state" and "extra" (if any), "loss", "grads",
    "eval_loss", and "eval_params" etc. if the subject returns the state after evaluation. Inputs
    are the old "params", "batch_stats", "opt_state" and "extra" (for evaluation, those passed in),
    "x", "y" and "lr".

    Attributes:
        matrix: output tree -> the input trees that may reach it. Trees that the subject does not
            return (None) are missing.
        leaves: output leaf -> the input leaves that may reach it; names like
            ``params/Dense_0/kernel``.
        unchanged: output leaf -> the input leaf that it is returned from unmodified.
        unknown: names of primitives that are handled conservatively.
        scope: the sizes for which this holds.
        proved: see ``bnverify.jaxpr.shapes.Traces``.
    """

    matrix: dict[str, frozenset[str]]
    leaves: dict[str, frozenset[str]]
    unchanged: dict[str, str]
    unknown: tuple[str, ...]
    scope: str
    proved: bool
    _graphs: tuple[_ProgramGraph, ...]

    def path(self, source: str, output: str) -> tuple[Link, ...] | None:
        """Return the equations on a shortest path from ``source`` to ``output``.

        Args:
            source: an input tree or leaf: "batch_stats", "params/Dense_0/kernel".
            output: an output tree or leaf.

        Returns:
            The links in the order of computation, empty if the output is the input itself, or
            None if there is no path.
        """
        for program in self._graphs:
            path = program.graph.shortest(
                _under(source, program.inputs), _under(output, program.outputs)
            )
            if path is not None:
                equations = (program.graph.equations[node] for node in path[1:])
                return tuple(Link(eqns[-1].primitive.name, source_line(eqns)) for eqns in equations)
        return None

    def steps(self, source: str, output: str) -> tuple[str, ...]:
        """Return that path as text, from ``source`` to ``output``; empty if there is none.

        Consecutive equations from one line of the user's code form one step.
        """
        path = self.path(source, output)
        if path is None:
            return ()
        lines: list[tuple[str | None, list[str]]] = []
        for link in path:
            if not lines or lines[-1][0] != link.source:
                lines.append((link.source, []))
            lines[-1][1].append(link.primitive)
        steps = (", ".join(names) + (f" at {at}" if at else "") for at, names in lines)
        return (source, *steps, output)


def _under(name: str, leaves: dict[str, int]) -> list[int]:
    return [node for leaf, node in leaves.items() if leaf == name or leaf.startswith(f"{name}/")]


def _read(program: Program, inputs: Sequence[str], outputs: Sequence[str]) -> _ProgramGraph:
    graph = Graph(len(inputs))
    results = read(program.jaxpr, graph, graph.sources)
    ends = dict(zip(outputs, results, strict=True))
    return _ProgramGraph(graph, dict(zip(inputs, graph.sources, strict=True)), ends)


def _state_names(state: Any, prefix: str = "") -> list[str]:
    named = zip(state._fields, state, strict=True)
    return [name for tree, value in named for name in leaf_names(value, prefix + tree)]


def _program_graphs(run: Run) -> Iterable[_ProgramGraph]:
    batch = [*_state_names(run.before), "x", "y"]
    info = leaf_names(run.info.loss, "loss") + leaf_names(run.info.grads, "grads")
    step = _read(run.programs["step"], [*batch, "lr"], _state_names(run.after) + info)
    evaluate = _read(run.programs["evaluate"], batch, leaf_names(run.eval_loss, "eval_loss"))
    yield step
    yield evaluate
    if run.after_eval is not None:
        names = _state_names(run.after_eval, "eval_")
        yield _read(run.programs["after_eval"], batch, names)


def _output_trees(run: Run) -> list[str]:
    trees = ["params", "batch_stats", "opt_state"]
    trees += ["extra"] if leaf_names(run.before.extra) else []
    info = [name for name in ("loss", "grads") if getattr(run.info, name) is not None]
    after = [f"eval_{tree}" for tree in trees] if run.after_eval is not None else []
    return [*trees, *info, "eval_loss", *after]


def _tree(leaf: str) -> str:
    return leaf.split("/", 1)[0]


def influence(traces: Traces) -> Influence:
    """Return which inputs can reach which outputs of a traced subject.

    Args:
        traces: the result of ``bnverify.jaxpr.shapes.trace_subject``. A flow in any of its runs
            counts.
    """
    graphs = [graph for run in traces.runs for graph in _program_graphs(run)]
    matrix: dict[str, set[str]] = {name: set() for name in _output_trees(traces.runs[0])}
    leaves: dict[str, set[str]] = {}
    unchanged: dict[str, set[str | None]] = {}
    for program in graphs:
        labels = program.graph.labels()
        named = {node: name for name, node in program.inputs.items()}
        for leaf, node in program.outputs.items():
            reached = {name for bit, name in enumerate(program.inputs) if labels[node] >> bit & 1}
            leaves.setdefault(leaf, set()).update(reached)
            matrix[_tree(leaf)].update(map(_tree, reached))
            unchanged.setdefault(leaf, set()).add(named.get(node))
    return Influence(
        matrix={name: frozenset(reached) for name, reached in matrix.items()},
        leaves={name: frozenset(reached) for name, reached in leaves.items()},
        unchanged={
            leaf: origin
            for leaf, (origin, *others) in unchanged.items()
            if origin is not None and not others
        },
        unknown=tuple(sorted(set().union(*(program.graph.unknown for program in graphs)))),
        scope=traces.scope,
        proved=traces.proved,
        _graphs=tuple(graphs),
    )
