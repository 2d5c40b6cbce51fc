"""Analyse the traced programs of a step for ``bnverify.model.Look``.

These are facts; the laws decide which of them are wrong. Reachability in a program only shows what may
happen, so a fact is included only if it is certain.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any

import jax.numpy as jnp
import numpy as np

from bnverify.adapters.accumulation import parts
from bnverify.adapters.by_design import Declared
from bnverify.adapters.optimizer import paper_checks, rates, schedules
from bnverify.adapters.programs import ROWS, Layers, Programs, under
from bnverify.adapters.rows import pairings
from bnverify.adapters.teachers import teachers
from bnverify.adapters.traced import DRAWS, SAME_VALUES, Flows
from bnverify.model import Axis, Copy, Draw, Look, Lookahead, Mask
from bnverify.proof import asked

PARAMS, STATISTICS = "params/", "batch_stats/"


def look_at(
    programs: Programs,
    layers: Layers,
    declared: Declared,
    every: int,
    makers: Sequence[Callable[..., Any]],
) -> Look:
    """Return what the programs of a subject show.

    Args:
        programs: the traced functions of the subject.
        layers: its normalisation layers.
        declared: the user's declarations.
        every: the number of steps per update.
        makers: the user's functions that create the optimizer.
    """
    frozen = _Frozen(programs, layers, declared)
    return Look(
        draws=tuple(_draws(programs)),
        passes=layers.passes(),
        parts=tuple(parts(programs, layers)),
        teachers=tuple(teachers(programs)),
        lookaheads=tuple(_lookaheads(programs)),
        copies=tuple(_copies(programs)),
        pretrained=tuple(_pretrained(programs, layers, declared)),
        frozen_params=tuple(sorted(frozen.params)),
        frozen_statistics=tuple(sorted(frozen.statistics())),
        scaled=tuple(frozen.scaled()),
        axes=tuple(_axes(programs, layers)),
        masks=tuple(_masks(programs)),
        pairings=tuple(pairings(programs)),
        skips=_skips(programs),
        schedules=tuple(schedules(programs, declared, every, makers)),
        rates=tuple(rates(programs)),
        papers=tuple(paper_checks(programs.subject.optimizer)),
    )


# Random numbers.


def _draws(programs: Programs) -> Iterator[Draw]:
    flows = programs.flows
    live = flows.origins(flows.outputs)
    names = {node: path for path, node in programs.inputs.items()}
    reused = _keys_that_init_draws_from(programs)
    found: dict[Draw, None] = {}
    for node in flows.of_primitives(DRAWS):
        keys = tuple(sorted(names[n] for n in flows.origins([node]) if n in names))
        shape = flows.aval(node).shape
        # Numbers from a constant key, equal for all rows, may be part of the model: a random projection.
        if node not in live or (not keys and shape[:1] != programs.x.shape[:1]):
            continue
        moves = any(programs.outputs.get(path) != programs.inputs[path] for path in keys)
        again = bool({_key(flows, n) for n in flows.operands(node)} & reused)
        found[Draw(flows.where(node), keys, moves, again)] = None
    yield from found


def _keys_that_init_draws_from(programs: Programs) -> set[int]:
    """Return the inputs of the step that hold a key from which ``init`` draws without splitting it."""
    flows, outputs = programs.start
    used = {
        flows.number(_key(flows, operand))
        for node in flows.of_primitives(DRAWS)
        for operand in flows.operands(node)
        if not flows.is_constant(operand)
    }
    kept = {path: node for path, node in outputs.items() if path.startswith("extra/")}
    return {
        programs.inputs[path]
        for path, node in kept.items()
        if not flows.is_constant(node) and flows.number(_key(flows, node)) in used
    }


def _key(flows: Flows, node: int) -> int:
    """Return the origin of a key that is only wrapped or unwrapped on the way."""
    eqn = flows.equation(node)
    while eqn is not None and eqn.primitive.name in {"random_wrap", "random_unwrap"}:
        node = flows.operands(node)[0]
        eqn = flows.equation(node)
    return node


# Copies of the params.


def _copies(programs: Programs) -> Iterator[Copy]:
    """Yield each copy of the params that follows them and has statistics beside it."""
    inputs, outputs, flows = programs.inputs, programs.outputs, programs.flows
    gradients = set().union(*programs.gradients)
    results = [node for node in flows.outputs if node not in flows.inputs]
    read = flows.origins(results) | {inputs[p] for p in read_by_evaluation(programs)}
    known: set[str] = set()
    for network in programs.networks():
        own_params, own_statistics = PARAMS + network, STATISTICS + network
        ends = [p.removeprefix(own_params) for p in inputs if p.startswith(own_params)]
        kept = [p.removeprefix(own_statistics) for p in inputs if p.startswith(own_statistics)]
        if not ends or not kept:
            continue
        statistics = programs.heads(own_statistics, kept)
        own = [own_params + end for end in ends]
        from_params = flows.reached(
            [*(inputs[p] for p in own), *(outputs[p] for p in own if p in outputs)],
            around=gradients,
        )
        for head in programs.heads(own_params, ends):
            copied = [head + end for end in ends]
            moves = all(outputs.get(p) in from_params and outputs[p] != inputs[p] for p in copied)
            beside = [h for h in statistics if _role(h) == _role(head)]
            inner = any(head.startswith(whole) for whole in known)  # a layer of a known copy
            if head == own_params or inner or not moves or len(beside) != 1:
                continue
            known.add(head)
            stay = [beside[0] + end for end in kept]
            written = any(outputs.get(path) != inputs[path] for path in stay)
            if written or any(inputs[path] in read for path in stay):
                yield Copy(carried_name(head), carried_name(beside[0]), written)


def read_by_evaluation(programs: Programs) -> list[str]:
    """Return the paths of the leaves of the state that may affect the eval loss."""
    behind = programs.eval_flows.origins(programs.eval_flows.outputs)
    return [p for p, n in programs.eval_inputs.items() if n in behind and p in programs.inputs]


_PARTS = (
    "params",
    "batch_stats",
    "batch",
    "stats",
    "model",
    "state",
    "fields",
    "extra",
    "variables",
)


def _role(head: str) -> tuple[str, ...]:
    """Return the words of a path other than those for params or statistics: ("target",)."""
    words = head.replace("/", "_").split("_")
    return tuple(word for word in words if word and word not in _PARTS)


def carried_name(head: str) -> str:
    """Return a user's name for a path in the state: "ema_params" for "extra/fields/ema_params/"."""
    return head.removeprefix("extra/").removeprefix("fields/").rstrip("/")


# The params of optax.lookahead.


def _lookaheads(programs: Programs) -> Iterator[Lookahead]:
    """Yield each pair of fast and slow params of which the gradient depends on one."""
    flows = programs.flows
    seen = set().union(*programs.gradients) or set(filter(None, [programs.loss]))
    behind = flows.origins(seen)

    for head in programs.lookaheads():
        fast, slow = (
            not behind.isdisjoint(under(programs.inputs, f"{head}/{name}/"))
            for name in ("fast", "slow")
        )
        if fast or slow:
            yield Lookahead(head, fast)


# The initial state.


def _pretrained(
    programs: Programs, layers: Layers, declared: Declared
) -> Iterator[tuple[str, bool]]:
    """Yield each layer whose params are constant arrays in ``init``, and whether its statistics are, too.

    Such params do not depend on the seed and are not all equal, so they come from a trained model.
    """
    if declared.pretrained is False:
        return
    flows, outputs = programs.start
    held, seeded = flows.reached(flows.captured), flows.reached(flows.inputs[:1])
    params = {p for p, n in outputs.items() if p.startswith(PARAMS) and n in held - seeded}
    if not params:
        return
    everything = {p for p in outputs if p.startswith(PARAMS)} == params
    for path in layers.owners:
        own = {p for p in outputs if p.startswith(f"{PARAMS}{path}/")}
        statistics = under(outputs, f"{STATISTICS}{path}/")
        if own <= params if own else everything:
            yield path, all(node in held for node in statistics)


# What is frozen.


class _Frozen:
    """The params and statistics that are frozen, as declared or as found.

    Params are found to be frozen if the optimizer never changes them or their gradient is stopped, and
    layers if neither they nor anything before them is trained.
    """

    def __init__(self, programs: Programs, layers: Layers, declared: Declared) -> None:
        self._of, self._layers, self._declared = programs, layers, declared
        self._looks = declared.frozen is not False
        paths = [p for p in programs.inputs if p.startswith(PARAMS)]
        found = (self._resting() | self._stopped()) if self._looks else set()
        self._still = {p for p in paths if programs.outputs.get(p) == programs.inputs[p]}
        if found | self._still == set(paths):  # nothing is trained at all: other laws report that
            found, self._still = set(), set()
        told = {p for p in paths if self._is_told(p.removeprefix(PARAMS))}
        self.params = found | told

    def _is_told(self, path: str) -> bool:
        return any(fnmatchcase(path, pattern) for pattern in self._declared.frozen or ())

    def _resting(self) -> set[str]:
        """Return the params that the optimizer never changes, with or without a gradient."""
        if self._of.subject.optimizer is None:
            return set()
        answers = asked(self._of.subject.optimizer, self._of.state.params, (0.0, 1.0), 1.0)
        if answers is None:
            return set()
        paths = [p for p in self._of.inputs if p.startswith(PARAMS)]
        rest = [
            not np.any(still) and not np.any(moved) for still, moved in zip(*answers, strict=True)
        ]
        return {path for path, rests in zip(paths, rest, strict=True) if rests}

    def _stopped(self) -> set[str]:
        """Return the params that affect the loss but whose gradient is stopped on every path to it."""
        flows, loss = self._of.flows, self._of.loss
        stops = set(flows.of_primitives({"stop_gradient"}))
        if not stops or loss is None:
            return set()
        behind = flows.origins([loss])
        found = set()
        for path, labels in self._gradients():
            node = self._of.inputs[path]
            nodes = [n for label in labels for n in flows.of_label(label)]
            given = set(flows.inputs) & flows.origins(nodes)
            if nodes and not given and node in behind and stops & flows.reached([node]):
                found.add(path)
        return found

    def _gradients(self) -> list[tuple[str, list[str]]]:
        """Return each param with the labels of the gradients that an optimizer receives for it."""
        paths = [p for p in self._of.inputs if p.startswith(PARAMS)]
        found: dict[str, list[str]] = defaultdict(list)
        for names in self._of.recording.updates:
            for name, label in names.items():
                own = [p for p in paths if p == PARAMS + "/".join(name)]
                own = own or [p for p in paths if p.endswith("/" + "/".join(name))]
                if len(own) == 1:
                    found[own[0]].append(label)
        return list(found.items())

    def statistics(self) -> Iterator[str]:
        """Yield the statistics that must not change."""
        inputs, outputs, flows = self._of.inputs, self._of.outputs, self._of.flows
        carried = "extra/carried/"
        for path in inputs:
            if path.startswith(carried) and self._is_told(path.removeprefix(carried)):
                yield path
        if not self._looks:
            return
        resting = self.params | self._still
        nodes = {n: p for p, n in inputs.items() if p.startswith(PARAMS)}
        for path in inputs:
            if not path.startswith((STATISTICS, carried)) or not self._of.is_floating(path):
                continue
            layer = path.removeprefix(carried).removeprefix(STATISTICS).rpartition("/")[0]
            own = {p for p in inputs if p.startswith(f"{PARAMS}{layer}/")}
            sources = {nodes[n] for n in flows.origins([outputs[path]]) if n in nodes}
            if own | sources and own | sources <= resting and not self._is_told_apart(path):
                yield path

    def _is_told_apart(self, path: str) -> bool:
        """Return whether a statistic is declared as something else, or is already listed."""
        if not path.startswith("extra/carried/"):
            return False
        name = path.removeprefix("extra/carried/")
        told = any(fnmatchcase(name, pattern) for pattern in self._declared.carried)
        return told or self._is_told(name)

    def scaled(self) -> Iterator[tuple[str, str]]:
        """Yield (frozen param, other param whose update its gradient affects)."""
        flows, outputs = self._of.flows, self._of.outputs
        finite = set(flows.of_primitives({"is_finite"}))  # skipping an update is not scaling it
        others = {p: n for p, n in outputs.items() if p.startswith(PARAMS) and p not in self.params}
        for path, labels in self._gradients():
            if path not in self.params:
                continue
            nodes = [n for label in labels for n in flows.of_label(label)]
            if not set(flows.inputs) & flows.origins(nodes):
                continue  # its gradient is always 0
            nodes += self._of.before_a_clip(nodes, self._of.types[path][0])
            reached = flows.reached(nodes, around=finite)
            hit = next((p for p, n in others.items() if n in reached), "")
            yield path, hit


# The feature axis of a normalisation layer.

ELEMENTWISE = frozenset(
    {"add", "sub", "mul", "div", "max", "min", "neg", "tanh", "logistic", "exp", "log1p", "erf"}
    | {"select_n", "integer_pow", "rsqrt", "sqrt", "convert_element_type", "copy", "name", "abs"}
    | {"reduce_window_max", "reduce_window_sum", "reduce_window", "pad", "reshape", "squeeze"}
    | {"expand_dims", "broadcast_in_dim"}
)
"""Primitives that keep the axes of their operand, except those of size 1."""
RESHAPING = frozenset({"reshape", "squeeze", "expand_dims", "broadcast_in_dim"})


def _axes(programs: Programs, layers: Layers) -> Iterator[Axis]:
    """Yield the axes of Flax's BatchNorm layers whose features come from a known operation."""
    flows, calls = programs.flows, programs.recording.calls
    of_batch = flows.reached([programs.inputs["x"], programs.inputs["y"]])
    for path in layers.owners:
        for label in layers.training(path)[:1]:
            call, nodes = calls[label], flows.of_label(label)
            if call.momentum is None or len(nodes) != 1 or len(call.feature_axes) != 1:
                continue
            if flows.shape(nodes[0]) != call.shape:  # mapped: the layer has other axes
                continue
            features = _feature_axis(flows, nodes[0], len(call.shape), of_batch)
            if features is not None:
                yield Axis(path, call.feature_axes[0], features, call.shape)


def _feature_axis(flows: Flows, node: int, rank: int, of_batch: Collection[int]) -> int | None:
    """Return the feature axis of a value; None if it is unknown.

    It is traced back to the convolution or the product with params that produced the features.
    """
    axes: list[int | None] = list(
        range(rank)
    )  # for each axis of the current value, the axis of the original value
    while (eqn := flows.equation(node)) is not None and len(eqn.outvars) == 1:
        name, shape, operands = eqn.primitive.name, eqn.outvars[0].aval.shape, flows.operands(node)
        if name == "conv_general_dilated":
            place: int = eqn.params["dimension_numbers"].out_spec[1]
            return axes[place]
        if name == "dot_general":
            (_, contracted), (_, batched) = eqn.params["dimension_numbers"]
            free = eqn.invars[1].aval.ndim - len(contracted) - len(batched)
            by_params = len(operands) == 2 and operands[1] not in of_batch
            return axes[-1] if free == 1 and by_params else None
        if name == "transpose":
            before: list[int | None] = [None] * len(shape)
            for place, source in enumerate(eqn.params["permutation"]):
                before[source] = axes[place]
            node, axes = operands[0], before
            continue
        ahead = [(n, given) for n in operands if n in of_batch and (given := flows.shape(n))]
        if name not in ELEMENTWISE or not ahead:
            break
        node, given = ahead[0]
        if len(given) == len(shape) and name not in RESHAPING:
            continue
        kept = [(axis, size) for axis, size in zip(axes, shape, strict=True) if size != 1]
        if [size for size in given if size != 1] != [size for _, size in kept]:
            break
        left = iter(kept)
        axes = [next(left)[0] if size != 1 else None for size in given]
    return None


# Skipped updates.


def _skips(programs: Programs) -> bool:
    """Return whether new params depend on whether gradients are finite, as with a dynamic loss scale."""
    flows = programs.flows
    gradients = programs.after_backward(node for update in programs.gradients for node in update)
    given = set(gradients).union(*(flows.operands(node) for node in gradients))
    forward = flows.origins([programs.loss]) if programs.loss is not None else set()
    tests = [
        node
        for node in flows.of_primitives({"is_finite", "ne"})
        if node not in forward
        and len(operands := set(flows.operands(node))) == 1
        and operands & given
    ]
    after = flows.reached(tests)
    return any(node in after for node in under(programs.outputs, PARAMS))


# Masks of rows.


def _masks(programs: Programs) -> Iterator[Mask]:
    """Yield the mask of each loss, if the loss depends on the params only through masked values."""
    for loss, flows, inputs, end in programs.losses():
        params = under(inputs, PARAMS)
        of_params = flows.reached(params)
        gates: dict[int, list[int]] = defaultdict(list)
        masks: dict[int, int] = {}
        for gate, mask in _gates(flows, of_params, flows.reached([inputs["x"], inputs["y"]])):
            gates[flows.number(mask)].append(gate)
            masks[flows.number(mask)] = mask
        for number, gated in gates.items():
            closed = set(gated)
            if end in flows.reached(params, around=closed):
                continue  # part of the loss is not masked
            after = flows.reached(closed) & flows.origins([end])
            elsewhere = flows.reached([masks[number]], around=closed)
            counted = any(n in elsewhere for each in after - closed for n in flows.operands(each))
            if counted or _divides_by_rows(flows, after):
                yield Mask(loss, flows.where(gated[0]), counted)


def _gates(
    flows: Flows, of_params: Collection[int], of_batch: Collection[int]
) -> Iterator[tuple[int, int]]:
    """Yield (node, mask) where a value of rows is multiplied by, or selected by, a mask of rows."""

    def is_mask(node: int) -> int | None:
        """Return the boolean that a value is computed from, if it depends on the batch alone."""
        eqn = flows.equation(node)
        while eqn is not None and eqn.primitive.name in SAME_VALUES:
            if flows.aval(node).dtype == np.bool_:
                break
            node = flows.operands(node)[0]
            eqn = flows.equation(node)
        if eqn is None or flows.aval(node).dtype != np.bool_:
            return None
        node = flows.value(node)
        # One number per row: what differs within a row, as a one-hot label does, is not a mask of rows.
        sizes = [n for n in flows.shape(node) or () if n != 1]
        rows = len(sizes) == 1 and sizes[0] % ROWS == 0 and sizes[0] > 0
        return node if rows and node in of_batch and node not in of_params else None

    for node in flows.of_primitives({"mul", "select_n"}):
        eqn, operands = flows.equation(node), flows.operands(node)
        if eqn.primitive.name == "mul" and len(operands) == 2:
            for value, factor in (operands, operands[::-1]):
                if value in of_params and (mask := is_mask(factor)) is not None:
                    yield node, mask
        elif eqn.primitive.name == "select_n" and len(eqn.invars) == 3:
            mask = is_mask(operands[0])
            kept = [n for n in operands[1:] if n in of_params]
            if mask is not None and len(kept) == 1:
                yield node, mask


def _divides_by_rows(flows: Flows, nodes: Iterable[int]) -> bool:
    """Return whether one of the nodes is divided by the number of all rows, or of all values."""
    for node in nodes:
        eqn = flows.equation(node)
        if eqn is None or eqn.primitive.name != "div":
            continue
        divisor = getattr(eqn.invars[1], "val", None)
        if divisor is not None and jnp.ndim(divisor) == 0 and divisor and divisor % ROWS == 0:
            return True
    return False
