"""Where the rows of a batch meet in a loss.

A mean over independent rows never combines one row with another. Some losses do so by design: they rank
rows, or scale the targets by their own deviation. Others do so by mistake: predictions (N, 1) minus targets
(N,) broadcast to (N, N), each prediction with every target.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from bnverify.adapters.explain import is_library
from bnverify.adapters.programs import ROWS, Programs, under
from bnverify.adapters.traced import SAME_VALUES, Flows
from bnverify.jaxpr.arithmetic import ADDITIONS, BY_ELEMENT
from bnverify.model import Pairing

ELEMENTWISE = BY_ELEMENT | ADDITIONS
Shape = tuple[int, ...]
Spread = Literal["implicit", "explicit", "unknown"]
"""How a value got a further axis: by NumPy's broadcasting, by an index or a reshape, or unknown."""


def pairings(programs: Programs) -> Iterator[Pairing]:
    """Yield where the losses combine every row with every row by elementwise arithmetic."""
    batch = programs.x.shape[0]
    for loss, flows, inputs, end in programs.losses():
        yield from dict.fromkeys(_paired(loss, flows, inputs, flows.origins([end]), batch))


def _paired(
    loss: str, flows: Flows, inputs: Mapping[str, int], behind: Collection[int], batch: int
) -> Iterator[Pairing]:
    data = flows.reached([inputs["x"], inputs["y"]])
    params = flows.reached(under(inputs, "params/"))
    for node in sorted(params & data & set(behind)):
        eqn, operands = flows.equation(node), flows.operands(node)
        if eqn is None or eqn.primitive.name not in ELEMENTWISE or _rows(eqn.outvars[0]) < 2:
            continue
        if len(eqn.invars) != 2 or len(set(operands)) != 2 or not data.issuperset(operands):
            continue
        sides = [_source(flows, *side) for side in zip(operands, eqn.invars, strict=True)]
        if any(_rows(atom) != 1 for _, atom in sides):
            continue
        ways = {
            way
            for operand, atom in zip(operands, eqn.invars, strict=True)
            for way in _spreads(flows, operand, atom, eqn)
        }
        # A prediction spread on purpose and a target by broadcasting may be meant or not.
        if "unknown" not in ways and len(ways) < 2:
            shapes = " and ".join(str(_shape(atom)) for _, atom in sides)
            shapes = re.sub(rf"\b{batch}\b", "N", shapes)
            yield Pairing(loss, _short(flows.where(node)), shapes, by_design="implicit" not in ways)


def _shape(atom: Any) -> Shape:
    return tuple(atom.aval.shape)


def _rows(atom: Any) -> int:
    """Return how many axes of a value are over the rows of the batch."""
    return sum(size > 0 and size % ROWS == 0 for size in _shape(atom))


def _short(place: str) -> str:
    """Return "path:line (function)" with the path relative to the working directory, if it is inside."""
    return place.removeprefix(f"{Path.cwd()}{os.sep}")


def _source(flows: Flows, node: int, atom: Any) -> tuple[int, Any]:
    """Return the value that was broadcast to this one, if it has fewer axes over rows."""
    eqn = flows.equation(node)
    while eqn is not None and eqn.primitive.name == "broadcast_in_dim" and flows.operands(node):
        node, atom = flows.operands(node)[0], eqn.invars[0]
        eqn = flows.equation(node)
    return node, atom


def _spreads(flows: Flows, node: int, atom: Any, use: Any) -> Iterator[Spread]:
    """Yield how a value with rows got its further axes, back to the operation that made its rows."""
    pending, seen = [(node, atom)], {node}
    while pending:
        node, atom = pending.pop()
        eqn, operands = flows.equation(node), flows.operands(node)
        if eqn is None or len(operands) != len(eqn.invars):
            continue
        moved = eqn.primitive.name in SAME_VALUES
        for operand, given in zip(operands, eqn.invars, strict=True):
            if moved and _rows(given) and len(_shape(given)) < len(_shape(atom)):
                yield _way(eqn, use)
            follows = moved or (eqn.primitive.name in ELEMENTWISE and _shape(given) == _shape(atom))
            if follows and operand not in seen:
                seen.add(operand)
                pending.append((operand, given))


def _way(spread: Any, use: Any) -> Spread:
    """Return whether a value was spread in the library call that uses it, or before.

    Both calls of a user may go through one method of arrays, but no further.
    """
    frames = [_library_frames(eqn) for eqn in (spread, use)]
    if not all(frames):
        return "unknown"
    shared = 0
    for one, other in zip(*frames, strict=False):
        if one != other:
            break
        shared += 1
    return "implicit" if shared > 2 else "explicit"


def _library_frames(eqn: Any) -> list[tuple[Any, ...]]:
    """Return the user's frame that made an equation and the library's inside it; [] if unknown.

    Under ``jax.vmap`` the batching itself spreads values, unless nothing is mapped: see
    ``bnverify.jaxpr.tracing.traced_anew``.
    """
    try:
        frames = list(eqn.source_info.traceback.frames)
    except (AttributeError, TypeError):  # tracebacks are not public API
        return []
    names = [frame.function_name for frame in frames]
    outer = [i for i, name in enumerate(names) if name.endswith("with_nothing_mapped")]
    if any(name.startswith("vmap") for name in names[: outer[-1] if outer else None]):
        return []
    files = [frame.file_name for frame in frames]
    # "<...>" is code typed at a prompt.
    users = [i for i, name in enumerate(files) if name.startswith("<") or not is_library(name)]
    if not users:
        return []
    own = users[0]
    inner = [(frame.file_name, frame.function_name) for frame in reversed(frames[:own])]
    return [(frames[own].file_name, frames[own].line_num), *inner]


def statistic_of_targets(programs: Programs) -> int | None:
    """Return where the eval loss combines each target with a statistic of all of them; None: nowhere.

    A return or an advantage is often scaled by the mean and the deviation of its batch.
    """
    flows, inputs = programs.eval_flows, programs.eval_inputs
    others = [node for path, node in inputs.items() if path != "y"]
    of_targets = flows.reached([inputs["y"]]) - flows.reached(others)
    for node in sorted(of_targets & flows.origins(flows.outputs)):
        eqn, operands = flows.equation(node), flows.operands(node)
        if eqn is None or eqn.primitive.name not in ELEMENTWISE or len(set(operands)) < 2:
            continue
        if len(operands) != len(eqn.invars) or not _rows(eqn.outvars[0]):
            continue
        for operand, atom in zip(operands, eqn.invars, strict=True):
            source, value = _source(flows, operand, atom)
            if source in of_targets and not _rows(value):
                return node
    return None
