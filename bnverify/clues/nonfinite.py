"""Recognise which operation of a step first gives a number that is not finite, and why.

Only numbers that a result depends on count: ``jnp.where(p > 0, jnp.log(p), 0.0)`` may take the logarithm of 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from bnverify.clues.observed import Clues, ObservedCase
from bnverify.jaxpr.graph import Graph, source_line
from bnverify.jaxpr.interpreter import live, read
from bnverify.jaxpr.rounding import RoundingReading
from bnverify.jaxpr.tracing import leaf_names, trace
from bnverify.jaxpr.values import Array, is_float, widen
from bnverify.lazy import jax
from bnverify.pytree import take
from bnverify.reruns import constant_features

EXPONENTIALS = frozenset({"exp", "exp2", "expm1", "sinh", "cosh"})
LOGARITHMS = frozenset({"log", "log1p"})
POWERS = frozenset({"pow", "integer_pow"})

# Between a divisor and the deviations whose squares it is made of. All except "add" have one operand
# besides constants.
_TO_DEVIATIONS = frozenset(
    {
        *("add", "broadcast_in_dim", "convert_element_type", "copy", "max", "reshape", "select_n"),
        *("squeeze", "stop_gradient", "transpose", "abs", "div", "mul", "psum", "reduce_sum"),
        *("sqrt", "square", *POWERS),
    }
)


def first_nonfinite(observed: ObservedCase) -> Clues:
    """Return which operation makes the first infinite or undefined number of the results.

    The step is read on the case, and on the same case with constant features; then the evaluation.

    Returns:
        {} if all numbers are finite; else "nonfinite", the primitive; "nonfinite_at", its line; and
        "nonfinite_kind": "exponential", "logarithm", "zero variance" or "division" (a divisor that is
        0), "negative variance", "slope" (of a function at a point where it is infinite), "domain"
        (of a function that is not defined there) or "overflow".
    """
    subject, t = observed.calls.subject, observed.t
    even = observed.case._replace(seed=np.zeros_like(observed.case.seed))  # all features, not one
    for case in (observed.case, constant_features(even)):
        one = take(case, 0)
        for function, state, more in (
            (subject.step, t.before, (one.lr,)),
            (subject.evaluate, t.after, ()),
        ):
            found = nonfinite(function, take(state, 0), one.x, one.y, *more)
            if found:
                return found
    return {}


def nonfinite(function: Callable[..., Any], *args: Any) -> Clues:
    """Return the clues about the first number that makes a result of a function non-finite.

    Args:
        function: anything that traces under ``jax.jit``.
        *args: pytrees of arrays.
    """
    program = trace(function, *args)
    jaxpr, reading = live(program.jaxpr), _FirstNonfinite()
    leaves = zip(jax.tree_util.tree_leaves(args), program.jaxpr.in_avals, strict=True)
    with np.errstate(all="ignore"):
        given = [widen(leaf, aval.dtype)[None, None] for leaf, aval in leaves]
        origin = reading.first(read(jaxpr, reading, given))
    if origin is None:
        return {}
    graph = Graph(len(given))
    read(jaxpr, graph, range(len(given)))
    node = next(n for n, made in enumerate(graph.equations) if made and made[-1] is origin.eqn)
    divisors = _Divisors(graph, leaf_names(args))
    line = source_line(graph.equations[node])
    return {
        "nonfinite": origin.eqn.primitive.name,
        "nonfinite_kind": _kind(origin, graph.parents[node], divisors),
        **({"nonfinite_at": line} if line else {}),
    }


class Origin(NamedTuple):
    """An equation that makes finite numbers non-finite: its operands, and whether the result is NaN."""

    eqn: Any
    operands: Sequence[Array]
    undefined: bool


class _FirstNonfinite(RoundingReading):
    """Evaluates a program in its own dtypes, and notes the origins of numbers that are not finite."""

    def __init__(self) -> None:
        super().__init__(count=1)
        self._origins: list[Origin] = []
        self._traced: dict[
            int, tuple[Array, int]
        ] = {}  # holds the array, so that its id stays its own

    def first(self, results: Sequence[Array]) -> Origin | None:
        """Return the first origin of a result that is not finite; None if all are finite."""
        bad = [value for value in results if not _finite(value)]
        # A result of a loop or a branch is not the array that an equation in it made.
        origins = [self._traced.get(id(value), (value, 0))[1] for value in bad]
        return self._origins[min(origins)] if origins and self._origins else None

    def equation(self, eqn: Any, inputs: Sequence[Array]) -> Sequence[Array]:
        """Evaluate it."""
        outputs = [
            widen(value, atom.aval.dtype) if is_float(atom.aval.dtype) else value
            for value, atom in zip(super().equation(eqn, inputs), eqn.outvars, strict=True)
        ]
        bad = [value for value in outputs if not _finite(value)]
        if not bad:
            return outputs
        origins = [self._traced[id(value)][1] for value in inputs if id(value) in self._traced]
        undefined = any(map(_undefined, bad)) and not any(map(_undefined, inputs))
        if not origins and (undefined or all(map(_finite, inputs))):
            origins = [len(self._origins)]
            self._origins.append(Origin(eqn, inputs, undefined))
        if origins:
            self._traced |= {id(value): (value, min(origins)) for value in bad}
        return outputs


def _finite(value: Array) -> bool:
    return value.dtype.kind != "f" or bool(np.all(np.isfinite(value)))


def _undefined(value: Array) -> bool:
    return value.dtype.kind == "f" and bool(np.any(np.isnan(value)))


def _kind(origin: Origin, nodes: Sequence[int], divisors: _Divisors) -> str:
    """Return why an equation's result is not finite; see ``first_nonfinite``.

    Args:
        origin: the equation.
        nodes: of its operands in the graph.
        divisors: says what a divisor is.
    """
    name, operands, kind = origin.eqn.primitive.name, origin.operands, ""
    if name in EXPONENTIALS:
        kind = "exponential"
    elif name in LOGARITHMS:
        kind = "logarithm"
    elif name in {"sqrt", "rsqrt"} and np.any(operands[0] < 0):
        kind = "negative variance" if divisors.is_variance(nodes[0]) else "domain"
    elif name == "rsqrt":
        # The derivative of arcsin(x) is 1 / sqrt(1 - x^2).
        kind = divisors.kind(nodes[0], slope=divisors.made(nodes[0]) == "sub")
    elif name in POWERS:
        exponent = np.asarray(origin.eqn.params["y"] if len(operands) == 1 else operands[1])
        if np.any((operands[0] == 0) & (exponent < 0)):
            kind = divisors.kind(nodes[0], slope=bool(np.all(exponent > -1)))
    elif name in {"div", "rem"} and np.any(operands[1] == 0):
        # The derivative of sqrt(x) is 0.5 / sqrt(x).
        slope = bool(np.all(operands[0] == 0.5)) and divisors.is_constant(nodes[0])
        kind = divisors.kind(nodes[1], slope=slope and divisors.made(nodes[1]) == "sqrt")
    return kind or ("domain" if origin.undefined else "overflow")


class _Divisors:
    """What the divisors in a program are.

    Args:
        graph: of the program.
        names: of its inputs.
    """

    def __init__(self, graph: Graph, names: Sequence[str]) -> None:
        self._graph = graph
        self._names = names

    def kind(self, node: int, *, slope: bool) -> str:
        """Return the kind of a division by 0; ``slope``: whether it is a derivative, if of no variance."""
        if slope and self.made(node) == "sqrt":  # that of a standard deviation, too
            return "slope"
        if self.is_variance(node):
            return "zero variance"
        return "slope" if slope else "division"

    def made(self, node: int) -> str:
        """Return the name of the primitive that made a value; "" for inputs and constants."""
        made = self._graph.equations[node]
        return made[-1].primitive.name if made else ""

    def is_constant(self, node: int) -> bool:
        """Return whether a value depends on no input."""
        parents = self._graph.parents[node]
        if not parents:
            return node in self._graph.constants or bool(self._graph.equations[node])
        return all(parent < node and self.is_constant(parent) for parent in parents)

    def is_variance(self, node: int) -> bool:
        """Return whether a value is a variance, a multiple of one, or the root of one.

        It is a running statistic, the mean of squared differences from a mean, or a difference of
        two such means.
        """
        pending, seen = [node], set[int]()
        while pending:
            node = pending.pop()
            if node in seen:
                continue
            seen.add(node)
            if node < len(self._names):
                if "batch_stats" in self._names[node].split("/"):
                    return True
                continue
            operands = self._variable(node)
            if self.made(node) == "sub" and len(operands) == 2 and self._is_mean(operands[1]):
                return True
            if self._leads_on(node, operands):
                pending += operands
        return False

    def _leads_on(self, node: int, operands: Sequence[int]) -> bool:
        name = self.made(node)
        return name in _TO_DEVIATIONS and (len(operands) == 1 or name == "add")

    def _variable(self, node: int) -> list[int]:
        """Return the operands that are not constant."""
        parents = dict.fromkeys(self._graph.parents[node])
        return [parent for parent in parents if not self.is_constant(parent)]

    def _is_mean(self, node: int) -> bool:
        while self.made(node) != "reduce_sum":
            operands = self._variable(node)
            if len(operands) != 1 or not self._leads_on(node, operands):
                return False
            (node,) = operands
        return True
