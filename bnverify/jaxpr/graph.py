"""The data-flow graph of a jaxpr: a sound over-approximation of what can reach what.

A node is an input, a constant, or one output of an equation; its parents are the values it is
computed from, one for each operand. Labels flow from sources along the edges, around loops until nothing changes. A pure
equation's outputs depend only on its inputs, so "every input reaches every output" is sound for
any primitive. Two kinds of effect need more:

- Writing to a mutable array (a Ref): the Ref's node gets the written values as parents.
- Input from outside (``io_callback``): the outputs may hold anything, so every source is a parent.

Such equations, and those that carry a jaxpr or a Python function that is not entered, are listed in
``unknown``. Not modelled: whether a loop terminates, and which error is raised.
"""

from __future__ import annotations

import contextlib
import os
from collections import deque
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bnverify.jaxpr.interpreter import hides_code, open_jaxpr

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bnverify.jaxpr.interpreter import Body

# Output i is input i, so a value keeps its node.
_PASS_THROUGH = frozenset({"copy", "copy_p", "optimization_barrier"})

# These carry a jaxpr, but are known to only combine values of their own inputs.
_COMBINERS = frozenset({"reduce", "reduce_window", "custom_linear_solve"})
_COMBINER_FAMILIES = ("scatter", "select_and_scatter")

# Effects that move no value into an output; Refs are handled separately.
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
        equations: for each node, the enclosing calls, outermost first, then its equation;
            empty for inputs and constants.
        variables: for each node, the variable of the jaxpr that it is; None for inputs and constants.
        constants: node -> (value, aval) of each literal and each captured array.
        sources: the nodes of the program's inputs.
        unknown: names of primitives that are handled conservatively.
    """

    def __init__(self, inputs: int) -> None:
        self.parents: list[list[int]] = [[] for _ in range(inputs)]
        self.equations: list[tuple[Any, ...]] = [()] * inputs
        self.variables: list[Any] = [None] * inputs
        self.constants: dict[int, tuple[Any, Any]] = {}
        self.sources = list(range(inputs))
        self.unknown: set[str] = set()
        self._calls: tuple[Any, ...] = ()

    def _node(self, parents: Sequence[int], eqn: Any = None, variable: Any = None) -> int:
        self.parents.append(list(parents))
        self.equations.append(() if eqn is None else (*self._calls, eqn))
        self.variables.append(variable)
        return len(self.parents) - 1

    def constant(self, value: Any, aval: Any, /) -> int:
        """Return a node without parents."""
        if _is_ref(aval):  # it outlives the step, so one step may read what another wrote
            self.unknown.add("captured Ref")
        node = self._node(())
        self.constants[node] = value, aval
        return node

    def equation(self, eqn: Any, inputs: Sequence[int]) -> Sequence[int]:
        """Connect every input to every output, and to every Ref among the inputs."""
        if eqn.primitive.name in _PASS_THROUGH and len(inputs) == len(eqn.outvars):
            return inputs
        parents = list(inputs)
        if _effects_outside(eqn):
            self.unknown.add(eqn.primitive.name)
            parents += self.sources
        elif eqn.outvars and _is_opaque(eqn):
            self.unknown.add(eqn.primitive.name)
        for atom, written in zip(eqn.invars, inputs, strict=True):
            if _is_ref(atom.aval):
                self.parents[written].append(self._node(parents, eqn))
        return [self._node(parents, eqn, variable) for variable in eqn.outvars]

    def call(self, eqn: Any, inputs: Sequence[int], body: Body[int]) -> Sequence[int]:
        """Interpret the called jaxpr."""
        self._calls += (eqn,)
        outputs = body(inputs)
        self._calls = self._calls[:-1]
        return outputs

    def scan(
        self, eqn: Any, split: tuple[int, int], inputs: Sequence[int], body: Body[int]
    ) -> Sequence[int]:
        """Connect the body's outputs back to the carry."""
        consts, rest = split[0], sum(split)
        within = open_jaxpr(eqn.params["jaxpr"])[0].invars
        carry = self._nodes(inputs[consts:rest], eqn, eqn.outvars[: split[1]])
        slices = self._nodes(inputs[rest:], eqn, within[rest:])
        outputs = body([*inputs[:consts], *carry, *slices])
        carried = self._close(carry, inputs[consts:rest], outputs[: len(carry)])
        return [*carried, *self._nodes(outputs[len(carry) :], eqn, eqn.outvars[len(carry) :])]

    def while_loop(
        self, eqn: Any, inputs: Sequence[int], predicate: Body[int], body: Body[int]
    ) -> Sequence[int]:
        """Connect the body's outputs and the predicate back to the carry."""
        first, second = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
        starts = inputs[first + second :]
        carry = self._nodes(starts, eqn, eqn.outvars)
        again = predicate([*inputs[:first], *carry])
        outputs = body([*inputs[first : first + second], *carry])
        return self._close(carry, starts, outputs, also=again)

    def _nodes(self, values: Sequence[int], eqn: Any, variables: Sequence[Any]) -> list[int]:
        """Return a node of ``eqn`` for each value and the variable that it goes to."""
        pairs = zip(values, variables, strict=True)
        return [self._node([value], eqn, variable) for value, variable in pairs]

    def _close(
        self, carry: list[int], starts: Sequence[int], ends: Sequence[int], also: Sequence[int] = ()
    ) -> list[int]:
        closed = []
        for node, start, end in zip(carry, starts, ends, strict=True):
            if node == end:  # the body returns it unchanged
                closed.append(start)
            else:
                self.parents[node] += [end, *also]
                closed.append(node)
        return closed

    def cond(self, eqn: Any, inputs: Sequence[int], branches: Sequence[Body[int]]) -> Sequence[int]:
        """Connect each branch's outputs and the index to the outputs."""
        outputs = [branch(inputs[1:]) for branch in branches]
        return [
            self._node([*values, inputs[0]], eqn, variable)
            for *values, variable in zip(*outputs, eqn.outvars, strict=True)
        ]

    def labels(self) -> list[int]:
        """Return, for each node, the bit set of sources that can reach it."""
        reached = [0] * len(self.parents)
        for bit, source in enumerate(self.sources):
            reached[source] = 1 << bit
        changed = True
        while changed:  # only loops and Refs have edges backwards, so a few rounds are enough
            changed = False
            for node, parents in enumerate(self.parents):
                bits = reached[node]
                for parent in parents:
                    bits |= reached[parent]
                changed |= bits != reached[node]
                reached[node] = bits
        return reached

    def shortest(self, starts: Sequence[int], ends: Sequence[int]) -> list[int] | None:
        """Return the nodes of a shortest path from any of ``starts`` to any of ``ends``, or None."""
        goals, towards = set(starts), {end: end for end in ends}
        queue = deque(ends)
        while queue:
            node = queue.popleft()
            if node in goals:
                path = [node]
                while towards[node] != node:
                    node = towards[node]
                    path.append(node)
                return path
            for parent in self.parents[node]:
                if parent not in towards:
                    towards[parent] = node
                    queue.append(parent)
        return None


# ---- Where in the user's code an equation was written.

# Frames in these files are not the user's code. Other frames of bnverify count as the user's,
# because the reference step and the adapters' losses are there.
_LIBRARIES = ("jax", "jaxlib", "flax", "optax", "chex")
_WATCHING = ("adapters/watch.py", "adapters/traced.py")


@cache
def _library_folders() -> tuple[str, ...]:
    here = Path(__file__).parent
    folders = [str(here)]
    for name in _LIBRARIES:
        spec = find_spec(name)
        folders += (spec.submodule_search_locations or []) if spec else []
    watching = (str(here.parent / name) for name in _WATCHING)
    return (*(f"{folder}{os.sep}" for folder in folders), *watching, contextlib.__file__)


def _user_frames(eqn: Any) -> list[str]:
    """Return ``path:line (function)`` of every frame outside the libraries, innermost first."""
    try:
        frames = list(eqn.source_info.traceback.frames)
        named = [(frame.file_name, frame.line_num, frame.function_name) for frame in frames]
    except (AttributeError, TypeError):  # not a public API
        return []
    return [
        f"{path}:{line} ({function.rsplit('.', 1)[-1]})"
        for path, line, function in named
        if not path.startswith(("<", *_library_folders()))
    ]


def source_line(equations: Sequence[Any]) -> str | None:
    """Return ``path:line (function)`` of the user's code that made an equation, if known.

    Args:
        equations: the enclosing calls, outermost first, then the equation. A function under
            ``jax.jit`` is traced once and its jaxpr reused with the lines of the first call, so an
            inner line counts only if its outer frames are those of the enclosing call; otherwise
            the call's own line is returned.
    """
    around: list[str] = []
    for eqn in equations:
        frames = _user_frames(eqn)
        if frames and frames[len(frames) - len(around) :] == around:
            around = frames
    return around[0] if around else None
