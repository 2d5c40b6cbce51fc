"""Which parts of the old state and of the batch can reach which results of a step.

``influence`` reads the traced step and evaluation as graphs. What is *not* in its matrix is a
proof, for all values and for every size in ``scope``: that input cannot change that output.
What is in the matrix may flow; whether it does is for a run to show.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bnverify.jaxpr.graph import Graph
from bnverify.jaxpr.interpreter import read
from bnverify.jaxpr.source import source_line
from bnverify.jaxpr.tracing import Program, leaf_names

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from bnverify.jaxpr.shapes import Run, Traces

INPUTS = ("params", "batch_stats", "opt_state", "extra", "x", "y", "lr")


@dataclass(frozen=True)
class Link:
    """One equation on the way from an input to an output.

    Attributes:
        primitive: its name.
        source: ``path:line (function)`` in the user's code, where JAX knows it.
    """

    primitive: str
    source: str | None

    def __str__(self) -> str:
        return f"{self.primitive} at {self.source}" if self.source else self.primitive


@dataclass(frozen=True)
class _Reading:
    """One program as a graph, with the leaves' names on its ends."""

    graph: Graph
    inputs: dict[str, int]
    outputs: dict[str, int]


@dataclass(frozen=True)
class Influence:
    """What can reach what.

    Outputs are "params", "batch_stats", "opt_state" (the new ones), "extra" where there is any,
    "loss", "grads", "eval_loss", and, where the subject shows the state that evaluation leaves,
    "eval_params" and so on. Inputs are "params", "batch_stats", "opt_state", "extra" (the old
    ones; for evaluation, those passed in), "x", "y", "lr".

    Attributes:
        matrix: output tree -> the input trees that may reach it. A tree that the subject hides
            (None) is missing.
        leaves: output leaf -> the input leaves that may reach it; names like
            ``params/Dense_0/kernel``.
        unchanged: output leaf -> the input leaf whose very value it is.
        unknown: names of primitives read without knowing what they do.
        scope: what was quantified over.
        proved: see ``bnverify.jaxpr.shapes.Traces``.
    """

    matrix: dict[str, frozenset[str]]
    leaves: dict[str, frozenset[str]]
    unchanged: dict[str, str]
    unknown: tuple[str, ...]
    scope: str
    proved: bool
    _readings: tuple[_Reading, ...]

    def path(self, source: str, output: str) -> tuple[Link, ...] | None:
        """Return the equations on a shortest way from ``source`` to ``output``.

        Args:
            source: an input tree or leaf: "batch_stats", "params/Dense_0/kernel".
            output: an output tree or leaf.

        Returns:
            The links in the order of computation, empty where the output is the input itself;
            None where no way exists.
        """
        for reading in self._readings:
            way = reading.graph.shortest(
                _under(source, reading.inputs), _under(output, reading.outputs)
            )
            if way is not None:
                equations = (reading.graph.equations[node] for node in way[1:])
                return tuple(Link(eqns[-1].primitive.name, source_line(eqns)) for eqns in equations)
        return None

    def steps(self, source: str, output: str) -> tuple[str, ...]:
        """Return that path in words, from ``source`` to ``output``; empty where there is none.

        Operations that follow each other on one line of the user's code are one step.
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


def _read(program: Program, inputs: Sequence[str], outputs: Sequence[str]) -> _Reading:
    graph = Graph(len(inputs))
    results = read(program.jaxpr, graph, graph.sources)
    ends = dict(zip(outputs, results, strict=True))
    return _Reading(graph, dict(zip(inputs, graph.sources, strict=True)), ends)


def _state_names(state: Any, prefix: str = "") -> list[str]:
    named = zip(state._fields, state, strict=True)
    return [name for tree, value in named for name in leaf_names(value, prefix + tree)]


def _readings(run: Run) -> Iterable[_Reading]:
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
    trees += ["extra"] if leaf_names(run.before.extra) else []  # most subjects have nothing there
    info = [name for name in ("loss", "grads") if getattr(run.info, name) is not None]
    after = [f"eval_{tree}" for tree in trees] if run.after_eval is not None else []
    return [*trees, *info, "eval_loss", *after]


def _tree(leaf: str) -> str:
    return leaf.split("/", 1)[0]


def influence(traces: Traces) -> Influence:
    """Return what can reach what in a traced subject.

    Args:
        traces: the subject as ``bnverify.jaxpr.shapes.trace_subject`` traced it. Where it took
            several runs to cover the scope, what may flow in one of them may flow.
    """
    readings = [reading for run in traces.runs for reading in _readings(run)]
    matrix: dict[str, set[str]] = {name: set() for name in _output_trees(traces.runs[0])}
    leaves: dict[str, set[str]] = {}
    unchanged: dict[str, set[str | None]] = {}
    for reading in readings:
        labels = reading.graph.labels()
        named = {node: name for name, node in reading.inputs.items()}
        for leaf, node in reading.outputs.items():
            reached = {name for bit, name in enumerate(reading.inputs) if labels[node] >> bit & 1}
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
        unknown=tuple(sorted(set().union(*(reading.graph.unknown for reading in readings)))),
        scope=traces.scope,
        proved=traces.proved,
        _readings=tuple(readings),
    )
