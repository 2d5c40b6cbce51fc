"""Reading a traced program: the values of marks, and which values depend on which.

A value cannot simply be stored during tracing: inside ``value_and_grad``, ``remat`` or ``vmap`` it
belongs to a trace that ends. So it is marked by an identity equation with a name, which is found again
in the program. A mark inside a loop, a branch or the backward pass has no single value.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from bnverify.jaxpr.graph import Graph, source_line
from bnverify.jaxpr.interpreter import Body, called_jaxpr, inner_jaxprs, open_jaxpr, read
from bnverify.model import LayerInput

PREFIX = "bnverify:"
PRIMITIVE = "name"  # of checkpoint_name, which does nothing where no policy asks for the name
DRAWS = frozenset(
    {"random_bits", "random_gamma", "threefry2x32", "rng_bit_generator", "rng_uniform"}
)
# Their bodies see one shard, along an axis that is not bound outside.
_MAPPED = frozenset({"shard_map", "xla_pmap"})
SAME_VALUES = frozenset(
    {"convert_element_type", "reshape", "squeeze", "expand_dims", "broadcast_in_dim", "transpose"}
    | {"copy", "name"}
)
"""Primitives that give the values they are given, in another shape or dtype."""


def mark(value: Any, label: str) -> Any:
    """Return ``value``, marked."""
    return checkpoint_name(value, PREFIX + label)


def label_of(eqn: Any) -> str | None:
    """Return the label of a mark; None if the equation is not a mark."""
    name = str(eqn.params.get("name", "")) if eqn.primitive.name == PRIMITIVE else ""
    return name.removeprefix(PREFIX) if name.startswith(PREFIX) else None


def marked(function: Callable[..., Any], *args: Any) -> dict[str, list[Any]]:
    """Run ``function`` and return label -> the values with this mark, in order.

    Args:
        function: a traceable function.
        *args: trees of arrays, or of tracers.
    """
    return evaluated(function, *args)[1]


def evaluated(function: Callable[..., Any], *args: Any) -> tuple[Any, dict[str, list[Any]]]:
    """Run ``function`` and return (its result, the result of ``marked``)."""
    # A new function object, since JAX caches the program of one that it has traced before.
    jaxpr, shapes = jax.make_jaxpr(partial(function), return_shape=True)(*args)
    reading = Evaluation()
    results = read(jaxpr, reading, jax.tree_util.tree_leaves(args))
    structure = jax.tree_util.tree_structure(shapes)
    return jax.tree_util.tree_unflatten(structure, results), reading.found


class Evaluation:
    """Evaluates a program and collects the marked values; enters only calls that contain marks.

    Attributes:
        found: label -> the values with this mark, in order.
    """

    def __init__(self) -> None:
        self.found: dict[str, list[Any]] = {}

    def constant(self, value: Any, _aval: Any, /) -> Any:
        """Return it."""
        return value

    def equation(self, eqn: Any, inputs: Sequence[Any]) -> Sequence[Any]:
        """Run it, and collect its input if it is a mark."""
        label = label_of(eqn)
        if label is not None:
            self.found.setdefault(label, []).extend(inputs)
            # The mark stays, because the program may be read again as part of the one that runs it.
            return [mark(value, label) for value in inputs]
        # By JAX's own interpreter, which keeps the lines of the user's code.
        atoms = list(zip(eqn.invars, inputs, strict=True))
        given = [(atom, value) for atom, value in atoms if not hasattr(atom, "val")]
        variables = [atom for atom, _ in given]
        alone = _blank(len(variables), len(eqn.outvars)).replace(
            invars=variables, eqns=[eqn], outvars=eqn.outvars
        )
        results: list[Any] = jax.core.eval_jaxpr(alone, [], *(value for _, value in given))
        return results

    def call(self, eqn: Any, inputs: Sequence[Any], body: Body[Any]) -> Sequence[Any]:
        """Enter it if it contains marks and can be inlined, else run it."""
        called = called_jaxpr(eqn)
        if _is_backward(eqn) or eqn.primitive.name in _MAPPED or not labels(called):
            return self.equation(eqn, inputs)
        return body(inputs)

    def scan(
        self, eqn: Any, _split: tuple[int, int], inputs: Sequence[Any], _body: Body[Any]
    ) -> Sequence[Any]:
        """Run it."""
        return self.equation(eqn, inputs)

    def while_loop(
        self, eqn: Any, inputs: Sequence[Any], _predicate: Body[Any], _body: Body[Any]
    ) -> Sequence[Any]:
        """Run it."""
        return self.equation(eqn, inputs)

    def cond(
        self, eqn: Any, inputs: Sequence[Any], _branches: Sequence[Body[Any]]
    ) -> Sequence[Any]:
        """Run it."""
        return self.equation(eqn, inputs)


@cache
def _blank(inputs: int, outputs: int) -> Any:
    """Return a jaxpr to be filled: its debugging information fits these numbers of variables."""
    return open_jaxpr(jax.make_jaxpr(lambda *_: (0.0,) * outputs)(*(0.0,) * inputs))[0]


def _is_backward(eqn: Any) -> bool:
    return bool(eqn.params.get("differentiated"))  # remat's second run of the forward pass


def levels(jaxpr: Any) -> Iterator[Any]:
    """Yield a program and every program that it calls exactly once: no loops, branches or remat."""
    inner, _ = open_jaxpr(jaxpr)
    yield inner
    for eqn in inner.eqns:
        called = called_jaxpr(eqn)
        if called is not None and not _is_backward(eqn) and eqn.primitive.name not in _MAPPED:
            yield from levels(called)


def labels(jaxpr: Any) -> Counter[str]:
    """Return how often each label occurs where ``marked`` finds it."""
    found = (label_of(eqn) for level in levels(jaxpr) for eqn in level.eqns)
    return Counter(label for label in found if label is not None)


def labels_anywhere(jaxpr: Any) -> Counter[str]:
    """Return how often each label occurs, including loops, branches and remat."""
    return Counter(label for eqn in equations(jaxpr) if (label := label_of(eqn)) is not None)


def marks_within(jaxpr: Any) -> bool:
    """Return whether there are marks in the calls, loops or branches of a program."""
    inner, _ = open_jaxpr(jaxpr)
    return any(labels_anywhere(each) for eqn in inner.eqns for each in inner_jaxprs(eqn))


def labels_in_loops(jaxpr: Any) -> set[str]:
    """Return the labels inside ``lax.scan``, ``fori_loop``, ``map`` and ``while_loop``."""
    loops = [eqn for eqn in equations(jaxpr) if eqn.primitive.name in {"scan", "while"}]
    return {label for eqn in loops for body in inner_jaxprs(eqn) for label in labels_anywhere(body)}


def equations(jaxpr: Any) -> Iterator[Any]:
    """Yield every equation of a program and of its inner programs."""
    inner, _ = open_jaxpr(jaxpr)
    for eqn in inner.eqns:
        yield eqn
        for each in inner_jaxprs(eqn):
            yield from equations(each)


def links(jaxpr: Any) -> set[tuple[str, str]]:
    """Return the pairs (a, b) of labels such that the only use of the value marked a is the mark b."""
    found = set()
    for level in levels(jaxpr):
        uses: dict[Any, list[Any]] = {}
        for eqn in level.eqns:
            for atom in eqn.invars:
                if not hasattr(atom, "val"):  # not a literal
                    uses.setdefault(atom, []).append(eqn)
        results = {atom for atom in level.outvars if not hasattr(atom, "val")}
        for eqn in level.eqns:
            label = label_of(eqn)
            if label is None or eqn.outvars[0] in results:
                continue
            readers = uses.get(eqn.outvars[0], [])
            if len(readers) == 1 and (reader := label_of(readers[0])) is not None:
                found.add((label, reader))
    return found


def holds_tracers(jaxpr: Any) -> bool:
    """Return whether a program closes over a tracer of another trace, so that it cannot be run."""
    inner, consts = open_jaxpr(jaxpr)
    if any(isinstance(const, jax.core.Tracer) for const in consts):
        return True
    return any(holds_tracers(each) for eqn in inner.eqns for each in inner_jaxprs(eqn))


class Flows:
    """The dependency graph of one program, as ``bnverify.jaxpr`` reads it.

    Args:
        jaxpr: a traced program.

    Attributes:
        inputs: the nodes of its inputs.
        outputs: the nodes of its outputs.
        captured: the nodes of the arrays that it closes over.
    """

    def __init__(self, jaxpr: Any) -> None:
        inner, consts = open_jaxpr(jaxpr)
        self._graph = Graph(len(inner.invars))
        self.inputs = self._graph.sources
        self.outputs = read(jaxpr, self._graph, self.inputs)
        self._children: dict[int, list[int]] = {}
        for node, parents in enumerate(self._graph.parents):
            for parent in parents:
                self._children.setdefault(parent, []).append(node)
        self._marks: dict[str, list[int]] = {}
        for node in self.of_primitives({PRIMITIVE}):
            self._marks.setdefault(str(label_of(self.equation(node))), []).append(node)
        self._numbers: dict[int, int] = {}
        self._of_key: dict[Any, int] = {}
        # Reading a program first creates a node for each captured array.
        first = len(inner.invars)
        self.captured = [
            first + place for place, const in enumerate(consts) if getattr(const, "ndim", 0)
        ]

    def reached(
        self,
        nodes: Iterable[int],
        *,
        around: Collection[int] = (),
        through: Callable[[int], bool] = lambda node: True,
    ) -> set[int]:
        """Return the nodes that depend on these, including themselves.

        Args:
            nodes: the sources.
            around: nodes that may be neither on the path nor its end.
            through: whether a node may be on the path, or its end.
        """
        return self._closure(
            nodes, self._children, lambda node: node not in around and through(node)
        )

    def depends_on(self, nodes: Iterable[int]) -> bool:
        """Return whether an output of the program depends on any of these nodes."""
        return not self.reached(nodes).isdisjoint(self.outputs)

    def origins(self, nodes: Iterable[int]) -> set[int]:
        """Return the nodes on which these depend, including themselves."""
        return self._closure(nodes, dict(enumerate(self._graph.parents)))

    @staticmethod
    def _closure(
        nodes: Iterable[int],
        edges: dict[int, list[int]],
        through: Callable[[int], bool] = lambda node: True,
    ) -> set[int]:
        seen = set(nodes)
        pending = list(seen)
        while pending:
            for node in edges.get(pending.pop(), ()):
                if node not in seen and through(node):
                    seen.add(node)
                    pending.append(node)
        return seen

    def of_primitives(self, names: Collection[str]) -> list[int]:
        """Return the nodes computed by these primitives."""
        return [
            node
            for node, eqns in enumerate(self._graph.equations)
            if eqns and eqns[-1].primitive.name in names
        ]

    def of_label(self, label: str) -> list[int]:
        """Return the nodes with this mark."""
        return self._marks.get(label, [])

    def operands(self, node: int) -> list[int]:
        """Return the nodes from which a node is computed, in the order of its equation's inputs."""
        return self._graph.parents[node]

    def value(self, node: int) -> int:
        """Return the node that computes a value which is only reshaped, converted or copied later."""
        while (eqn := self.equation(node)) is not None and eqn.primitive.name in SAME_VALUES:
            node = self.operands(node)[0]
        return node

    def is_constant(self, node: int) -> bool:
        """Return whether a node is a literal or a captured array that is never written."""
        return node in self._graph.constants and not self.operands(node)

    def equation(self, node: int) -> Any:
        """Return the equation that computes a node; None for inputs and constants."""
        eqns = self._graph.equations[node]
        return eqns[-1] if eqns else None

    def aval(self, node: int) -> Any:
        """Return the shape and dtype of a computed value; None for inputs and constants."""
        variable = self._graph.variables[node]
        return None if variable is None else variable.aval

    def is_floating(self, node: int) -> bool:
        """Return whether a computed value is floating-point; True for inputs and constants."""
        aval = self.aval(node)
        return aval is None or bool(jnp.issubdtype(aval.dtype, jnp.floating))

    def shape(self, node: int) -> tuple[int, ...] | None:
        """Return the shape of a computed value; None for inputs and constants."""
        aval = self.aval(node)
        return None if aval is None else tuple(aval.shape)

    def number(self, node: int) -> int:
        """Return a number that is equal for nodes computed in the same way from the same values.

        The outputs of one equation, such as the keys that one ``unstack`` returns, have different
        numbers.
        """
        for each in sorted(self.origins([node])):  # operands come before their results
            if each in self._numbers:
                continue
            eqn, operands = self.equation(each), self.operands(each)
            if eqn is not None and label_of(eqn) is not None:  # a mark equals its operand
                self._numbers[each] = self._numbers[operands[0]]
                continue
            key: Any = each  # an input, or a loop variable
            if self.is_constant(each):
                key = self._content(each)
            elif eqn is not None and all(operand in self._numbers for operand in operands):
                variable = self._graph.variables[each]
                place = [i for i, output in enumerate(eqn.outvars) if output is variable]
                numbers = tuple(self._numbers[operand] for operand in operands)
                key = (eqn.primitive.name, said(eqn), *place, numbers)
            self._numbers[each] = self._of_key.setdefault(key, len(self._of_key))
        return self._numbers[node]

    def _content(self, node: int) -> Any:
        """Return a key that is equal for constants with equal values; the node if it has no array."""
        value, aval = self._graph.constants[node]
        try:
            array = np.asarray(value, aval.dtype)
        except TypeError:  # a key, a Ref, or a value of another trace
            return node
        return str(array.dtype), array.shape, array.tobytes()

    def where(self, node: int) -> str:
        """Return "path:line (function)" of the user's code that computes a node; "" if unknown."""
        return source_line(self._graph.equations[node]) or ""


def said(eqn: Any) -> str:
    """Return a key for an equation without its operands: parameters, literals and result types."""
    given = [str(atom.val) for atom in eqn.invars if hasattr(atom, "val")]
    results = [str(var.aval) for var in eqn.outvars]
    return f"{sorted(map(str, eqn.params.items()))} {given} {results}"


def rows_first(value: Any, feature_axes: Sequence[int]) -> Any:
    """Return ``value`` as (R, *features), with all other axes moved to the front and flattened."""
    kept = sorted(axis % value.ndim for axis in feature_axes)
    reduced = [axis for axis in range(value.ndim) if axis not in kept]
    shape = tuple(value.shape[axis] for axis in kept)
    return value.transpose(*reduced, *kept).reshape(-1, *shape)


def layer_input(
    value: Any, mask: Any, shape: tuple[int, ...], feature_axes: Sequence[int]
) -> LayerInput | None:
    """Return the input of a normalisation layer; None if a transformation changed its shape.

    Args:
        value: the input, as read from the program.
        mask: the mask, broadcastable to ``shape``; None: no mask.
        shape: the shape that the layer saw, which lacks the axis of a surrounding ``vmap`` of size 1.
        feature_axes: the axes that the layer does not reduce over.
    """
    if [n for n in value.shape if n != 1] != [n for n in shape if n != 1]:
        return None
    rows = rows_first(value.reshape(shape), feature_axes)
    if mask is None:
        return LayerInput(rows)
    if mask.ndim > len(shape):
        mask = mask.reshape(mask.shape[mask.ndim - len(shape) :])
    weights = jnp.broadcast_to(mask, shape).astype(bool).astype(jnp.float32)
    return LayerInput(rows, rows_first(weights, feature_axes))
