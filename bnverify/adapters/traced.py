"""Reading one traced pass: what a marked value was, and what reaches what.

A value cannot simply be stored while a model is traced: inside ``value_and_grad``, ``remat`` or
``vmap`` it belongs to a trace that is gone afterwards. So it is marked by an identity equation
with a name, and the program is read with an eye on those equations. A mark inside a loop, a
branch or the backward pass has no one value: there it stands for many, or for none.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from bnverify.jaxpr.graph import Graph
from bnverify.jaxpr.interpreter import Body, called_jaxpr, inner_jaxprs, open_jaxpr, read
from bnverify.jaxpr.source import source_line
from bnverify.subject import LayerInput

PREFIX = "bnverify:"
PRIMITIVE = "name"  # of checkpoint_name, which does nothing where no policy asks for the name
DRAWS = frozenset({"random_bits", "threefry2x32", "rng_bit_generator", "rng_uniform"})
# Their bodies see one shard, along an axis that nothing binds outside of them.
_MAPPED = frozenset({"shard_map", "xla_pmap"})


def mark(value: Any, label: str) -> Any:
    """Return ``value``, marked."""
    return checkpoint_name(value, PREFIX + label)


def label_of(eqn: Any) -> str | None:
    """Return the label that an equation marks; None where it is no mark."""
    name = str(eqn.params.get("name", "")) if eqn.primitive.name == PRIMITIVE else ""
    return name.removeprefix(PREFIX) if name.startswith(PREFIX) else None


def marked(function: Callable[..., Any], *args: Any) -> dict[str, list[Any]]:
    """Run ``function`` and return label -> the values marked so, in the order they arise.

    Args:
        function: traces under ``jax.jit``.
        *args: trees of arrays, or of tracers.
    """
    return evaluated(function, *args)[1]


def evaluated(function: Callable[..., Any], *args: Any) -> tuple[Any, dict[str, list[Any]]]:
    """Run ``function`` and return its result, and what ``marked`` returns."""
    # A function of its own: JAX keeps the program of one that it has traced before, marks and all.
    jaxpr, shapes = jax.make_jaxpr(partial(function), return_shape=True)(*args)
    reading = Evaluation()
    results = read(jaxpr, reading, jax.tree_util.tree_leaves(args))
    structure = jax.tree_util.tree_structure(shapes)
    return jax.tree_util.tree_unflatten(structure, results), reading.found


class Evaluation:
    """A program's values themselves. Only calls with a mark inside are entered.

    Attributes:
        found: label -> the values that have this mark, in the order they arise.
    """

    def __init__(self) -> None:
        self.found: dict[str, list[Any]] = {}

    def constant(self, value: Any, _aval: Any, /) -> Any:
        """Return it."""
        return value

    def equation(self, eqn: Any, inputs: Sequence[Any]) -> Sequence[Any]:
        """Run it; remember what it marks."""
        label = label_of(eqn)
        if label is not None:
            self.found.setdefault(label, []).extend(inputs)
            # The mark stays: a program may be read once more, as part of the one that runs it.
            return [mark(value, label) for value in inputs]
        # Run by JAX's own interpreter, which keeps the lines of the user's code on what it binds.
        atoms = list(zip(eqn.invars, inputs, strict=True))
        given = [(atom, value) for atom, value in atoms if not hasattr(atom, "val")]
        alone: Any = SimpleNamespace(
            constvars=[], invars=[atom for atom, _ in given], eqns=[eqn], outvars=eqn.outvars
        )
        results: list[Any] = jax.core.eval_jaxpr(alone, [], *(value for _, value in given))
        return results

    def call(self, eqn: Any, inputs: Sequence[Any], body: Body[Any]) -> Sequence[Any]:
        """Enter it where that shows a mark, and nothing else changes by it."""
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


def _is_backward(eqn: Any) -> bool:
    return bool(eqn.params.get("differentiated"))  # remat's second run of the forward pass


def levels(jaxpr: Any) -> Iterator[Any]:
    """Yield a program and every program it calls exactly once: no loops, branches, re-runs."""
    inner, _ = open_jaxpr(jaxpr)
    yield inner
    for eqn in inner.eqns:
        called = called_jaxpr(eqn)
        if called is not None and not _is_backward(eqn) and eqn.primitive.name not in _MAPPED:
            yield from levels(called)


def labels(jaxpr: Any) -> Counter[str]:
    """Return how often each label is marked where ``marked`` reads it."""
    found = (label_of(eqn) for level in levels(jaxpr) for eqn in level.eqns)
    return Counter(label for label in found if label is not None)


def labels_anywhere(jaxpr: Any) -> Counter[str]:
    """Return how often each label is marked, loops, branches and re-runs included."""
    return Counter(label for eqn in equations(jaxpr) if (label := label_of(eqn)) is not None)


def equations(jaxpr: Any) -> Iterator[Any]:
    """Yield every equation of a program, and of the programs in it."""
    inner, _ = open_jaxpr(jaxpr)
    for eqn in inner.eqns:
        yield eqn
        for each in inner_jaxprs(eqn):
            yield from equations(each)


def links(jaxpr: Any) -> set[tuple[str, str]]:
    """Return the pairs (a, b) where the value marked a is used once: as the value marked b."""
    found = set()
    for level in levels(jaxpr):
        uses: dict[Any, list[Any]] = {}
        for eqn in level.eqns:
            for atom in eqn.invars:
                if not hasattr(atom, "val"):  # a literal is nobody's output
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
    """Return whether a program closes over a value of some other trace, which cannot be run."""
    inner, consts = open_jaxpr(jaxpr)
    if any(isinstance(const, jax.core.Tracer) for const in consts):
        return True
    return any(holds_tracers(each) for eqn in inner.eqns for each in inner_jaxprs(eqn))


class Flows:
    """What reaches what in one program, over the graph that ``bnverify.jaxpr`` reads.

    Args:
        jaxpr: a traced program.

    Attributes:
        inputs: the nodes of its inputs.
        outputs: the nodes of its outputs.
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
        # The reading makes a node of each captured array first of all.
        first = len(inner.invars)
        self._literals = first + len(consts)
        self.captured = [
            first + place for place, const in enumerate(consts) if getattr(const, "ndim", 0)
        ]

    def reached(
        self, nodes: Iterable[int], *, through: Callable[[int], bool] = lambda node: True
    ) -> set[int]:
        """Return all that these nodes may reach, themselves among it.

        Args:
            nodes: the sources.
            through: which nodes may be on the way, or at its end.
        """
        return self._closure(nodes, self._children, through)

    def origins(self, nodes: Iterable[int]) -> set[int]:
        """Return all that may reach these nodes, themselves among it."""
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
        """Return the nodes that equations of these primitives make."""
        return [
            node
            for node, eqns in enumerate(self._graph.equations)
            if eqns and eqns[-1].primitive.name in names
        ]

    def of_label(self, label: str) -> list[int]:
        """Return the nodes that have a mark."""
        return self._marks.get(label, [])

    def operands(self, node: int) -> list[int]:
        """Return what a node is computed from."""
        return self._graph.parents[node]

    def is_constant(self, node: int) -> bool:
        """Return whether a node is a literal or a captured array."""
        return (
            node >= len(self.inputs) and not self._graph.equations[node] and not self.operands(node)
        )

    def equation(self, node: int) -> Any:
        """Return the equation that makes a node; None for inputs and constants."""
        eqns = self._graph.equations[node]
        return eqns[-1] if eqns else None

    def number(self, node: int) -> int:
        """Return a number that nodes share which are computed alike from the same values."""
        for each in sorted(self.origins([node])):  # operands come before what is made of them
            if each in self._numbers:
                continue
            eqn, operands = self.equation(each), self.operands(each)
            if eqn is not None and label_of(eqn) is not None:  # a mark is the value that it marks
                self._numbers[each] = self._numbers[operands[0]]
                continue
            if eqn is None and each >= self._literals:
                key: Any = "literal"  # told apart by the equation that reads it
            elif eqn is None or any(operand not in self._numbers for operand in operands):
                key = each  # an input, a captured array, or a value that a loop changes
            else:
                numbers = tuple(self._numbers[operand] for operand in operands)
                key = (eqn.primitive.name, _said(eqn), numbers)
            self._numbers[each] = self._of_key.setdefault(key, len(self._of_key))
        return self._numbers[node]

    def where(self, node: int) -> str:
        """Return "path:line (function)" of the user's code that makes a node; "" if unknown."""
        return source_line(self._graph.equations[node]) or ""


def _said(eqn: Any) -> str:
    """Return what an equation does besides its operands: parameters, literals, result."""
    given = [str(atom.val) for atom in eqn.invars if hasattr(atom, "val")]
    results = [str(var.aval) for var in eqn.outvars]
    return f"{sorted(map(str, eqn.params.items()))} {given} {results}"


def rows_first(value: Any, feature_axes: Sequence[int]) -> Any:
    """Return ``value`` as (R, *features): the other axes moved to the front and flattened."""
    kept = sorted(axis % value.ndim for axis in feature_axes)
    reduced = [axis for axis in range(value.ndim) if axis not in kept]
    shape = tuple(value.shape[axis] for axis in kept)
    return value.transpose(*reduced, *kept).reshape(-1, *shape)


def layer_input(
    value: Any, mask: Any, shape: tuple[int, ...], feature_axes: Sequence[int]
) -> LayerInput | None:
    """Return what a normalisation layer was given, or None where a transformation changed it.

    Args:
        value: as read from the program.
        mask: likewise; broadcastable to ``shape``. None: all counts.
        shape: the input's shape as the layer saw it; one ``vmap`` of size 1 may surround it.
        feature_axes: the axes that the layer keeps.
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
