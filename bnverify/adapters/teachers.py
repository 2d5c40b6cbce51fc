"""Networks that a step does not train: which mode they are in when they make targets.

A teacher is in a closure or in the state, and no step changes it. Many networks that are not trained are in
train mode by design, so one is a teacher here only if all of this is certain: its inputs do not depend on
trained params, no trained layer takes its outputs, it draws no random numbers, and it is no copy of the params.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

from bnverify.adapters.programs import Programs
from bnverify.adapters.traced import DRAWS
from bnverify.adapters.watch import Call
from bnverify.compat import transformations
from bnverify.model import Teacher

PRODUCTS = frozenset({"dot_general", "conv_general_dilated", "mul", "div"})
"""The operations by which a trained layer takes its input."""


def teachers(programs: Programs) -> Iterator[Teacher]:
    """Yield the first normalisation layer of each call of a teacher whose outputs affect the gradient."""
    fixed = _Fixed(programs)
    told: set[int] = set()
    for label, call in programs.recording.calls.items():
        if call.turn not in told and fixed.makes_targets(label, call):
            told.add(call.turn)
            yield Teacher(call.path, fixed.where(label, call), call.training)


class _Fixed:
    """The calls of networks that no step changes.

    Args:
        programs: the traced functions of the subject.
    """

    def __init__(self, programs: Programs) -> None:
        self._of, flows = programs, programs.flows
        inputs, outputs = programs.inputs, programs.outputs
        self._copies = tuple(_copies(programs))
        self._fixed = {p for p, node in inputs.items() if outputs.get(p, node) == node}
        trained = [n for p, n in inputs.items() if p.startswith("params/") and p not in self._fixed]
        self._params = flows.reached(trained)
        self._batch = flows.reached([inputs["x"], inputs["y"]])
        self._gradients = set().union(*programs.gradients)
        behind = flows.origins([*self._gradients, *filter(None, [programs.loss])])
        self._forward = {node for node in behind if not self._is_backward(node)}

    def _is_backward(self, node: int) -> bool:
        eqn = self._of.flows.equation(node)
        return eqn is not None and "transpose" in transformations(eqn)

    def where(self, label: str, call: Call) -> str:
        """Return "path:line (function)" of the user's code that calls the network."""
        return self._of.flows.where(self._start(label, call)[0])

    def _start(self, label: str, call: Call) -> list[int]:
        """Return the nodes of the input of the forward pass, or else of the layer."""
        mark = self._of.recording.turns[call.turn - 1] if call.turn else None
        return self._of.flows.of_label(mark or label) or self._of.flows.of_label(label)

    def makes_targets(self, label: str, call: Call) -> bool:
        """Return whether a call is one of a network that no step changes, and that makes targets."""
        flows = self._of.flows
        nodes = flows.of_label(label)
        rows = call.shape[0] if len(call.shape) > 1 and 0 not in call.feature_axes else 0
        statistics = self._statistics(label, call)
        if rows < 2 or not statistics or self._batch.isdisjoint(nodes):
            return False
        if not self._is_fixed([*statistics, *nodes]) or self._is_trained_through(call):
            return False
        after = flows.reached(nodes)
        return (
            bool(self._params)
            and not after.isdisjoint(self._gradients)
            and not self._enters_a_layer(after)
            and not self._is_noisy(self._start(label, call))
        )

    def _statistics(self, label: str, call: Call) -> list[int]:
        flows = self._of.flows
        return [node for name in call.names for node in flows.of_label(f"{label} old {name}")]

    def _is_fixed(self, nodes: Collection[int]) -> bool:
        """Return whether some values depend on floating-point state that no step changes, or on none."""
        behind = self._of.flows.origins(nodes)
        floats = [
            path
            for path, node in self._of.inputs.items()
            if node in behind and path in self._of.types and self._of.is_floating(path)
        ]
        # Another function may copy the params to a network like theirs, as to a target network.
        return all(path in self._fixed and not path.startswith(self._copies) for path in floats)

    def _is_trained_through(self, call: Call) -> bool:
        """Return whether the same network is also called with inputs that depend on trained params."""
        return any(
            other.path == call.path
            and not self._params.isdisjoint(self._of.flows.of_label(label))
            and self._is_fixed(self._statistics(label, other))
            for label, other in self._of.recording.calls.items()
        )

    def _enters_a_layer(self, after: Collection[int]) -> bool:
        """Return whether the params act on a network's output, in a layer or as a weight of the loss."""
        flows = self._of.flows
        of_params_alone = self._params - self._batch
        for node in self._forward.intersection(after):
            eqn, operands = flows.equation(node), flows.operands(node)
            if eqn is None or eqn.primitive.name not in PRODUCTS:
                continue
            if of_params_alone.intersection(operands) and set(operands).intersection(after):
                return True
        return False

    def _is_noisy(self, start: Collection[int]) -> bool:
        """Return whether random numbers enter a network, or its outputs before they meet the params."""
        flows = self._of.flows
        own = (flows.reached(start) - self._params) & self._forward
        draws = [node for node in flows.of_primitives(DRAWS) if node not in flows.origins(start)]
        return not own.isdisjoint(flows.reached(draws))


def _copies(programs: Programs) -> Iterator[str]:
    """Yield the prefixes of the trees in the state that are like the params of a network."""
    for network in programs.networks():
        own = f"params/{network}"
        ends = [path.removeprefix(own) for path in programs.inputs if path.startswith(own)]
        if ends:
            yield from (head for head in programs.heads(own, ends) if head != own)
