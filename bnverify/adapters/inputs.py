"""What training and evaluation do with x before the model sees it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from bnverify.adapters.programs import Programs
from bnverify.adapters.traced import SAME_VALUES, Flows, said
from bnverify.jaxpr.arithmetic import PRODUCTS

Expression = int | str | None
"""A hash of how a value is computed from x; "x" itself."""


def differing_inputs(programs: Programs) -> str | None:
    """Return a note if training and evaluation compute the model's inputs from x in different ways.

    None if they agree in one of the inputs, or if either computes them from more than x: from random
    numbers, or from statistics that the state keeps.
    """
    flows, eval_flows = programs.flows, programs.eval_flows
    training = dict(_model_inputs(flows, programs.inputs))
    evaluation = dict(_model_inputs(eval_flows, programs.eval_inputs))
    if not training or not evaluation or training.keys() & evaluation.keys():
        return None
    ways = [
        f"{mode} {_way(graph, next(iter(found.items())))}"
        for mode, graph, found in (
            ("training", flows, training),
            ("evaluation", eval_flows, evaluation),
        )
    ]
    return f"the model is not evaluated on the inputs that it is trained on: {', '.join(ways)}"


def _way(flows: Flows, found: tuple[Expression, int]) -> str:
    expression, node = found
    if expression == "x":
        return "takes x as it is"
    at = flows.where(node)
    return f"computes them from x at {at}" if at else "computes them from x"


def _model_inputs(flows: Flows, inputs: Mapping[str, int]) -> Iterator[tuple[Expression, int]]:
    """Yield the values computed from x alone that a product with params takes, and their nodes."""
    others = [node for path, node in inputs.items() if path != "x"]
    params = flows.reached([node for path, node in inputs.items() if path.startswith("params/")])
    alone = flows.reached([inputs["x"]]) - flows.reached(others)
    known: dict[int, Expression] = {inputs["x"]: "x"}
    for product in flows.of_primitives(PRODUCTS):
        operands = flows.operands(product)
        if len(operands) == 2 and operands[1] in params and operands[0] in alone:
            node = operands[0]
            while _only_moves(flows, node):
                node = flows.operands(node)[0]
            yield _expression(flows, node, known), node


def _only_moves(flows: Flows, node: int) -> bool:
    """Return whether a node has the values of its first operand, or those of some of its rows."""
    eqn = flows.equation(node)
    if eqn is None:
        return False
    if eqn.primitive.name in {"slice", "dynamic_slice"}:
        return bool(eqn.invars[0].aval.shape[1:] == eqn.outvars[0].aval.shape[1:])
    if eqn.primitive.name == "scan":  # inside, one part of what it maps over
        operands = [flows.aval(operand) for operand in flows.operands(node)]
        part = flows.aval(node)
        return len(operands) == 1 and getattr(operands[0], "shape", ())[1:] == part.shape != ()
    return eqn.primitive.name in SAME_VALUES


def _expression(flows: Flows, node: int, known: dict[int, Expression]) -> Expression:
    """Return how a value is computed; values that are only moved or cast are equal."""
    for each in sorted(flows.origins([node])):  # operands come before their results
        if each in known:
            continue
        eqn, operands = flows.equation(each), flows.operands(each)
        if eqn is None:
            known[each] = "constant"  # a literal's value is part of the equation that uses it
        elif _only_moves(flows, each):
            known[each] = known.get(operands[0])
        else:
            known[each] = hash((eqn.primitive.name, said(eqn), *map(known.get, operands)))
    return known[node]
