"""A program as a graph of what can reach what; a sound one, for all values at once.

A node is a value, or all outputs of one equation. Its parents are the values it is computed
from. Labels flow from sources along the edges, round loops as often as need be. Whatever an
equation does with its inputs, its outputs can depend on nothing else: so "every input reaches
every output" is right for any pure equation, known or not. What an equation may also do:

- write to a mutable array (a Ref): the Ref's node gets the written values as parents;
- talk to the world outside (``io_callback``): its outputs may hold anything, so every source
  is their parent.

Both, and equations that hide a program or a Python function which is not entered, are named in
``unknown``. Not seen: whether a loop ends, and which error is raised.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any

from bnverify.jaxpr.interpreter import hides_code

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bnverify.jaxpr.interpreter import Body

# One output for each input, value for value, so identity survives them.
_PASS_THROUGH = frozenset({"copy", "copy_p", "optimization_barrier"})

# These carry a program, yet what they do with it is known: combine values of their own inputs.
_COMBINERS = frozenset({"reduce", "reduce_window", "custom_linear_solve"})
_COMBINER_FAMILIES = ("scatter", "select_and_scatter")

# Effects that move no value into an output: axis names, printing, and Refs (followed apart).
_HARMLESS_EFFECTS = frozenset(
    {
        "NamedAxisEffect",
        "DebugEffect",
        "OrderedDebugEffect",
        "ReadEffect",
        "WriteEffect",
        "AccumEffect",
        "InternalMutableArrayEffect",
    }
)


def _is_ref(aval: Any) -> bool:
    return hasattr(aval, "inner_aval")


def _effects_outside(eqn: Any) -> bool:
    return any(type(effect).__name__ not in _HARMLESS_EFFECTS for effect in eqn.effects)


def _is_opaque(eqn: Any) -> bool:
    name = eqn.primitive.name
    known = name in _COMBINERS or name.startswith(_COMBINER_FAMILIES)
    return hides_code(eqn) and not known


class Graph:
    """The reading that builds the graph; its values are node numbers.

    Attributes:
        parents: for each node, the nodes it is computed from.
        equations: for each node, its equation, after the calls around it, outermost first;
            empty for inputs and constants.
        sources: the nodes of the program's inputs.
        unknown: names of primitives read conservatively, without an idea of what they do.
    """

    def __init__(self, inputs: int) -> None:
        self.parents: list[list[int]] = [[] for _ in range(inputs)]
        self.equations: list[tuple[Any, ...]] = [()] * inputs
        self.sources = list(range(inputs))
        self.unknown: set[str] = set()
        self._calls: tuple[Any, ...] = ()

    def _node(self, parents: Sequence[int], *eqn: Any) -> int:
        self.parents.append(list(dict.fromkeys(parents)))
        self.equations.append((*self._calls, *eqn) if eqn else ())
        return len(self.parents) - 1

    def constant(self, _value: Any, aval: Any, /) -> int:
        """Return a node that nothing reaches."""
        if _is_ref(aval):  # it outlives the step: what this one writes, the next one reads
            self.unknown.add("captured Ref")
        return self._node(())

    def equation(self, eqn: Any, inputs: Sequence[int]) -> Sequence[int]:
        """Let every input reach every output, and every Ref among the inputs."""
        if eqn.primitive.name in _PASS_THROUGH and len(inputs) == len(eqn.outvars):
            return inputs
        parents = list(inputs)
        if _effects_outside(eqn):
            self.unknown.add(eqn.primitive.name)
            parents += self.sources
        elif eqn.outvars and _is_opaque(eqn):
            self.unknown.add(eqn.primitive.name)
        node = self._node(parents, eqn)
        for atom, written in zip(eqn.invars, inputs, strict=True):
            if _is_ref(atom.aval):
                self.parents[written].append(node)
        return [node] * len(eqn.outvars)

    def call(self, eqn: Any, inputs: Sequence[int], body: Body[int]) -> Sequence[int]:
        """Enter it."""
        self._calls += (eqn,)
        outputs = body(inputs)
        self._calls = self._calls[:-1]
        return outputs

    def scan(
        self, eqn: Any, split: tuple[int, int], inputs: Sequence[int], body: Body[int]
    ) -> Sequence[int]:
        """Close the loop over the carry."""
        consts, rest = split[0], sum(split)
        carry = [self._node([value], eqn) for value in inputs[consts:rest]]
        slices = [self._node([value], eqn) for value in inputs[rest:]]
        outputs = body([*inputs[:consts], *carry, *slices])
        carried = self._close(carry, inputs[consts:rest], outputs[: len(carry)])
        return [*carried, *(self._node([value], eqn) for value in outputs[len(carry) :])]

    def while_loop(
        self, eqn: Any, inputs: Sequence[int], predicate: Body[int], body: Body[int]
    ) -> Sequence[int]:
        """Close the loop; the predicate reaches every value that the body changes."""
        first, second = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
        starts = inputs[first + second :]
        carry = [self._node([value], eqn) for value in starts]
        again = predicate([*inputs[:first], *carry])
        outputs = body([*inputs[first : first + second], *carry])
        return self._close(carry, starts, outputs, also=again)

    def _close(
        self, carry: list[int], starts: Sequence[int], ends: Sequence[int], also: Sequence[int] = ()
    ) -> list[int]:
        closed = []
        for node, start, end in zip(carry, starts, ends, strict=True):
            if node == end:  # the body hands it on untouched
                closed.append(start)
            else:
                self.parents[node] += [end, *also]
                closed.append(node)
        return closed

    def cond(self, eqn: Any, inputs: Sequence[int], branches: Sequence[Body[int]]) -> Sequence[int]:
        """Join the branches; the predicate reaches every output."""
        outputs = [branch(inputs[1:]) for branch in branches]
        return [self._node([*values, inputs[0]], eqn) for values in zip(*outputs, strict=True)]

    def labels(self) -> list[int]:
        """Return, for each node, the bit set of the sources that can reach it."""
        reached = [0] * len(self.parents)
        for bit, source in enumerate(self.sources):
            reached[source] = 1 << bit
        changed = True
        while changed:  # parents come first but for loops and Refs: seldom more than a few rounds
            changed = False
            for node, parents in enumerate(self.parents):
                bits = reached[node]
                for parent in parents:
                    bits |= reached[parent]
                changed |= bits != reached[node]
                reached[node] = bits
        return reached

    def shortest(self, starts: Sequence[int], ends: Sequence[int]) -> list[int] | None:
        """Return the nodes of a shortest way from one of ``starts`` to one of ``ends``."""
        goals, towards = set(starts), {end: end for end in ends}
        queue = deque(ends)
        while queue:
            node = queue.popleft()
            if node in goals:
                way = [node]
                while towards[node] != node:
                    node = towards[node]
                    way.append(node)
                return way
            for parent in self.parents[node]:
                if parent not in towards:
                    towards[parent] = node
                    queue.append(parent)
        return None
