"""The traced programs of a subject, and the normalisation layers found in them.

Every function is traced once. ``bnverify.adapters.watch`` has marked the input of each call of a layer. The
program then shows which layer of the State it is, how often it updates its statistics, and which biases are
only added before it.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bnverify.adapters.explain import is_library
from bnverify.adapters.traced import (
    SAME_VALUES,
    Flows,
    labels,
    labels_anywhere,
    layer_input,
    links,
    marked,
)
from bnverify.adapters.trees import extra_of
from bnverify.adapters.watch import Call, Recording, watching
from bnverify.compat import transformations
from bnverify.jaxpr.tracing import leaf_names, traced_anew
from bnverify.model import LayerInput, Pass, State, Subject
from bnverify.pytree import by_path, is_floating, path_name

ROWS = 24  # in the traces: unlikely as a feature size, and divisible by many numbers of shards
FEATURES = 6  # if any will do
RATE = 0.1


def example_of(sizes: tuple[int, int]) -> tuple[Any, Any, Any]:
    """Return a seed and a batch, x (N, D) and y (N,), as ShapeDtypeStructs to trace with."""
    shape: Any = jax.ShapeDtypeStruct
    return shape((), "int32"), shape(sizes, "float32"), shape(sizes[:1], "float32")


def under(nodes: Mapping[str, int], *heads: str) -> list[int]:
    """Return those of the nodes by path whose path starts with one of ``heads``: "params/"."""
    return [node for path, node in nodes.items() if path.startswith(heads)]


def sizes_of(features: tuple[int, ...] | None, rows: int | None = None) -> tuple[int, int]:
    """Return the (N, D) of the traces, N a multiple of ``rows``."""
    return math.lcm(ROWS, rows or 1), features[0] if features else FEATURES


class Programs:
    """The traced functions of a subject.

    Args:
        subject: a training step.

    Attributes:
        subject: as given.
        x: the inputs of the traces, a ShapeDtypeStruct; ``y``: the targets.
        state: the initial state, of ShapeDtypeStructs; ``after``: the state after one step.
        info: the StepInfo of the step, likewise.
        step: the program of the step; ``evaluate``: that of the evaluation.
        recording: what was recorded while the step was traced; ``evaluation``: the evaluation.
        flows: the dependency graph of the step; ``eval_flows``: of the evaluation.
        inputs: path -> node of an input of the step: "params/Dense_0/kernel", "x", "y", "lr";
            ``eval_inputs``: of the evaluation.
        types: path -> (shape, dtype) of a leaf of the state.
        outputs: path -> node of a leaf of the new state.
        loss: the node of the training loss; None if it is unknown.
        inline: label -> how often it occurs where its value can be read; ``anywhere``: in total.
    """

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        seed, self.x, self.y = example_of(sizes_of(subject.features, subject.rows))
        self.state: State = jax.eval_shape(subject.init, seed, self.x)
        given = (self.state, self.x, self.y)
        with watching() as self.recording:
            self.step, out = _traced(subject.step, *given, np.float32(RATE))
        if self.state.batch_stats and not self.recording.calls:
            # An inner compiled function may have been traced before, without being observed.
            with watching() as self.recording:
                self.step, out = _traced(traced_anew(subject.step), *given, np.float32(RATE))
        self.after, self.info = out
        with watching() as self.evaluation:
            self.evaluate, _ = _traced(subject.evaluate, *given)
        self.flows = Flows(self.step)
        self.eval_flows = Flows(self.evaluate)
        self.inline, self.anywhere = labels(self.step), labels_anywhere(self.step)
        names = leaf_names(self.state)
        leaves = jax.tree_util.tree_leaves(self.state)
        self.types = {n: (leaf.shape, leaf.dtype) for n, leaf in zip(names, leaves, strict=True)}
        self.inputs = dict(zip(names, self.flows.inputs, strict=False))
        self.inputs |= dict(zip(("x", "y", "lr"), self.flows.inputs[len(names) :], strict=True))
        self.eval_inputs = dict(zip((*names, "x", "y"), self.eval_flows.inputs, strict=True))
        after = leaf_names(self.after)
        self.outputs = dict(zip(after, self.flows.outputs, strict=False))
        self.loss = self.flows.outputs[len(after)] if self.info.loss is not None else None

    def stopped(self, sources: Iterable[int]) -> set[int]:
        """Return the nodes in the loss where user code stops a gradient that depends on ``sources``."""
        if self.loss is None:
            return set()
        on_the_way = self.flows.reached(sources) & self.flows.origins([self.loss])
        stops = set(self.flows.of_primitives({"stop_gradient"})) & on_the_way
        return {node for node in stops if not _of_library(self.flows.equation(node))}

    def before_a_clip(self, nodes: Iterable[int], shape: tuple[int, ...]) -> list[int]:
        """Return the gradients behind some that were scaled by a number made of themselves.

        That is what a clip by a norm does which a user writes before the optimizer.

        Args:
            nodes: gradients as the optimizer is given them.
            shape: of each.
        """
        flows = self.flows
        forward = flows.origins([self.loss]) if self.loss is not None else set()
        found: list[int] = []
        pending, seen = list(nodes), set(nodes)
        while pending:
            node = pending.pop()
            eqn = flows.equation(node)
            name = eqn.primitive.name if eqn is not None else ""
            if name not in SAME_VALUES | {"mul", "div", "select_n"}:
                continue
            same = [n for n in flows.operands(node) if flows.shape(n) == shape]
            for value in {*same} - forward - set(flows.inputs):
                factor = flows.origins([n for n in flows.operands(node) if n != value])
                if name in {"mul", "div"} and value in factor:
                    found.append(value)
            pending += [n for n in same if n not in seen]
            seen.update(same)
        return found

    def after_backward(self, gradients: Iterable[int]) -> list[int]:
        """Return the nodes between the backward pass and the optimizer, from the optimizer's side.

        Args:
            gradients: as the optimizer is given them.
        """
        flows = self.flows
        forward = flows.origins([self.loss]) if self.loss is not None else set()
        found: list[int] = []
        pending, seen = list(gradients), set(gradients)
        while pending:
            node = pending.pop()
            eqn = flows.equation(node)
            if eqn is None or node in forward or _of_backward_pass(eqn):
                continue
            found.append(node)
            shape = flows.shape(node)
            # A loop's or a branch's node has other operands than the inputs of its equation.
            for operand, atom in zip(flows.operands(node), eqn.invars, strict=False):
                if operand not in seen and tuple(atom.aval.shape) == shape:
                    seen.add(operand)
                    pending.append(operand)
        return found

    def losses(self) -> Iterator[tuple[str, Flows, Mapping[str, int], int]]:
        """Yield ("training" or "eval", the program, its inputs by path, the node of its loss)."""
        if self.loss is not None:
            yield "training", self.flows, self.inputs, self.loss
        yield "eval", self.eval_flows, self.eval_inputs, self.eval_flows.outputs[0]

    def is_floating(self, path: str) -> bool:
        """Return whether a leaf of the state has a floating-point dtype."""
        return bool(jnp.issubdtype(self.types[path][1], jnp.floating))

    def lookaheads(self) -> list[str]:
        """Return the paths of the params that are pairs of fast and slow ones, as of optax.lookahead."""

        def is_pair(node: Any) -> bool:
            return isinstance(node, optax.LookaheadParams)

        nodes = jax.tree_util.tree_flatten_with_path(self.state.params, is_leaf=is_pair)[0]
        return [f"params/{path_name(path)}".rstrip("/") for path, node in nodes if is_pair(node)]

    def networks(self) -> list[str]:
        """Return the prefix of the paths of each network's params; "" for a single network."""
        params, batch_stats = self.state.params, self.state.batch_stats
        if not isinstance(params, dict) or not isinstance(batch_stats, dict):
            return [""]
        both = set(params) & set(batch_stats)
        return ["", *(f"{name}/" for name in sorted(both) if isinstance(params[name], dict))]

    def heads(self, own: str, ends: Sequence[str]) -> list[str]:
        """Return the prefixes of the trees in the state with the same leaves as those under ``own``.

        Args:
            own: a prefix of paths in the state: "params/".
            ends: the rest of the path of each leaf under it.
        """
        types = self.types
        found: dict[str, list[Any]] = {}
        for head in sorted({p.removesuffix(ends[0]) for p in types if p.endswith(ends[0])}):
            below = [p for p in types if p.startswith(head)]
            if set(below) == {head + end for end in ends}:
                found[head] = [types[head + end] for end in ends]
        return [head for head, each in found.items() if each == found[own]]

    @cached_property
    def gradients(self) -> list[set[int]]:
        """For each update by an optimizer the nodes of its gradients."""
        return [
            {node for label in names.values() for node in self.flows.of_label(label)}
            for names in self.recording.updates
        ]

    def updates(self) -> int:
        """Return the number of optimizer updates in a step; an update in a loop counts as 2."""
        count = 0
        for names in self.recording.updates:
            label = next(iter(names.values()), None)
            if label is None:
                count += 1
            elif self.anywhere[label]:
                count += self.inline[label] or 2
        return count

    @cached_property
    def start(self) -> tuple[Flows, dict[str, int]]:
        """The dependency graph of init, and path -> node of a leaf of the state."""
        flows = Flows(_traced(self.subject.init, np.int32(0), self.x)[0])
        return flows, dict(zip(leaf_names(self.state), flows.outputs, strict=True))


def _traced(function: Callable[..., Any], *args: Any) -> tuple[Any, Any]:
    """Return (the program of a function, the shapes of its result); always traced again."""
    # A new function object, since JAX caches the program of one that it has traced before.
    anew = partial(function)
    found: tuple[Any, Any] = jax.make_jaxpr(anew, return_shape=True)(*args)
    return found


def _of_backward_pass(eqn: Any) -> bool:
    """Return whether ``jax.grad`` made an equation."""
    return "transpose" in transformations(eqn)


def _of_library(eqn: Any) -> bool:
    """Return whether a library stops the gradient, as ``jax.nn.softmax`` does."""
    try:
        frames = list(eqn.source_info.traceback.frames)
        own = [i for i, frame in enumerate(frames) if frame.function_name == "stop_gradient"]
        caller = frames[own[-1] + 1].file_name  # a differentiation rule may add inner frames
    except (AttributeError, TypeError, IndexError):  # tracebacks are not public API
        return False
    return is_library(caller) and not caller.startswith("<")


# The normalisation layers.


ELSEWHERE = "extra/"
"""The path of a layer whose statistics are in ``State.extra``, such as a target network's."""


class Layers:
    """The normalisation layers of one subject.

    Args:
        programs: the traced functions of the subject.
        passes: the declared number of batches that each layer processes per step; None: counted.
    """

    def __init__(self, programs: Programs, passes: int | None = None) -> None:
        self._of = programs
        self._passes = passes

    @cached_property
    def owners(self) -> dict[str, list[Any]]:
        """Path of a layer in batch_stats -> its floating-point leaves."""
        found: dict[str, list[Any]] = defaultdict(list)
        for path, leaf in by_path(self._of.state.batch_stats).items():
            if is_floating(leaf):
                found[path.rpartition("/")[0]].append(leaf)
        return found

    @cached_property
    def calls(self) -> dict[str, list[str]]:
        """Path of a layer in batch_stats -> the labels of its calls."""
        found: dict[str, list[str]] = defaultdict(list)
        for label, call in self._of.recording.calls.items():
            path = self._owner(label, call)
            if path in self.owners and self._of.anywhere[label]:
                found[path].append(label)
        return found

    def _owner(self, label: str, call: Call) -> str | None:
        """Return the layer of a call, by where its statistics come from, or else by name.

        ``ELSEWHERE``: a network whose statistics are not in the State. None: unknown.
        """
        if call.known:
            return call.path if call.path in self.owners else None
        fitting = [p for p in self.owners if p == call.path or p.endswith(f"/{call.path}")]
        if self._is_of_a_constant_network(label, call):
            return ELSEWHERE
        for name in call.names:
            for node in self._of.flows.of_label(f"{label} old {name}"):
                behind = self._of.flows.origins([node])
                own = [
                    p for p in fitting if self._of.inputs.get(f"batch_stats/{p}/{name}") in behind
                ]
                elsewhere = set(under(self._of.inputs, "extra/"))
                if len(own) == 1 or (not own and elsewhere & set(self._of.flows.operands(node))):
                    return own[0] if own else ELSEWHERE
        return fitting[0] if len(fitting) == 1 else None

    def _is_of_a_constant_network(self, label: str, call: Call) -> bool:
        """Return whether a layer's statistics are constants, and those of its namesake are not.

        A teacher in a closure, of the same class as the model, has layers of the same names.
        """
        if not self._has_constant_statistics(label, call):
            return False
        others = self._of.recording.calls.items()
        return any(
            other.path == call.path and not self._has_constant_statistics(name, other)
            for name, other in others
        )

    def _has_constant_statistics(self, label: str, call: Call) -> bool:
        flows = self._of.flows
        old = [node for name in call.names for node in flows.of_label(f"{label} old {name}")]
        return bool(old) and flows.origins(old).isdisjoint(flows.inputs)

    @cached_property
    def _ambiguous(self) -> set[str]:
        """The layers to which some calls cannot be assigned with certainty."""
        alike = tuple(f"{network}/" for network in self._of.recording.alike)
        found = {path for path in self.owners if alike and path.startswith(alike)}
        for label, call in self._of.recording.calls.items():
            untold = not any(label in each for each in self.calls.values())
            if call.training and untold and self._owner(label, call) != ELSEWHERE:
                found |= {p for p in self.owners if p.endswith(f"/{call.path}")}
        return found

    def training(self, path: str) -> list[str]:
        """Return the labels of a layer's calls in train mode."""
        return [
            label for label in self.calls.get(path, ()) if self._of.recording.calls[label].training
        ]

    def writes(self, path: str) -> int | None:
        """Return how many batches update a layer's statistics in a step; None if it is unknown.

        A layer that is called twice in one forward pass, or processes several batches, counts several
        times. A second forward pass of the same batch does not count, because it is a mistake.
        """
        writing = [label for label in self.training(path) if self._is_trained_by(label, path)]
        if path in self._ambiguous:
            return None
        if all(self._of.inline[label] for label in writing):
            turns: Counter[int] = Counter()
            for label in writing:
                turns[self._of.recording.calls[label].turn] += self._of.inline[label]
            most: dict[Any, int] = {}
            for turn, count in turns.items():
                given = self._given_to(turn)
                most[given] = max(count, most.get(given, 0))
            return max(1, sum(most.values()))
        # In a loop or a vmapped module, each iteration has its own slice or writes again.
        traced = [self._of.recording.calls[label] for label in self.calls[path]]
        features = max(len(call.feature_axes) for call in traced)
        sliced = len(writing) == 1 and all(len(leaf.shape) > features for leaf in self.owners[path])
        return 1 if sliced else None

    def parts(self) -> dict[str, int]:
        """Return path of a layer -> the number of rows it normalises at once, if a step splits its batch.

        Either a call stands for several, in a loop or under ``jax.vmap``, or the calls have different
        inputs with as many rows as the batch in total. If a single call has fewer rows than the batch,
        the other rows are not used: that is not a split.
        """
        found, flows, total = {}, self._of.flows, self._of.x.shape[0]
        for path in self.owners:
            inputs: dict[int, set[int]] = defaultdict(set)
            for label in self.training(path):
                call = self._of.recording.calls[label]
                rows = call.shape[0] if len(call.shape) > 1 and 0 not in call.feature_axes else 0
                if not (1 < rows < total and total % rows == 0):
                    continue
                inputs[rows].update(map(flows.number, flows.of_label(label)))
                if self._stands_for_several(label, call) or len(inputs[rows]) * rows >= total:
                    found[path] = rows
        return found

    def _stands_for_several(self, label: str, call: Call) -> bool:
        if not self._of.inline[label]:
            return True
        flows = self._of.flows
        sizes = [flows.aval(node).size for node in flows.of_label(label)]
        return any(size > math.prod(call.shape) for size in sizes)

    def passes(self) -> tuple[Pass, ...]:
        """Return the batches of layers that process several batches, or one batch several times.

        Layers that are called in a loop are left out, and so are batches that do not train the layer,
        such as those of an adversarial attack or behind a stopped gradient.
        """
        found: list[Pass] = []
        for path in self.owners:
            calls = [n for n in self.training(path) if self._is_trained_by(n, path)]
            plain = path not in self._ambiguous and all(self._of.inline[n] == 1 for n in calls)
            if plain and len({self._of.recording.calls[n].turn for n in calls}) > 1:
                found += self._passes_of(path, calls)
        return tuple(found)

    def _passes_of(self, path: str, calls: list[str]) -> list[Pass]:
        flows, recording = self._of.flows, self._of.recording
        old = {p: n for p, n in self._of.inputs.items() if p.startswith(f"batch_stats/{path}/")}
        new = {self._of.outputs[p] for p, n in old.items() if self._of.outputs[p] != n}
        if not new:  # the statistics are never updated; other laws report that
            return []
        marks = {label: set(flows.of_label(label)) for label in self.calls[path]}
        of_params = flows.reached(under(self._of.inputs, "params/"))
        turns: dict[int, bool] = {}
        given: dict[int, Any] = {}
        for label in calls:
            turn = recording.calls[label].turn
            others = {n for each, nodes in marks.items() if each != label for n in nodes}
            reached = flows.reached(marks[label], around=others)
            turns[turn] = turns.get(turn, False) or bool(new & reached)
            batch = self._given_to(turn)
            given[turn] = ("pass", turn) if batch is None else batch
        found = []
        for batch in dict.fromkeys(given.values()):
            own = [turn for turn in turns if given[turn] == batch]
            folds = sum(turns[turn] for turn in own)
            nodes = self._input_of(own[0])
            by_itself = any(self._trains(turn, path) for turn in own)
            # A batch computed from params is adversarial or perturbed.
            if folds or (by_itself and not set(nodes) & of_params):
                at = flows.where(nodes[0]) if nodes else ""
                found.append(Pass(path, own[0], at, folds))
        return found

    def _trains(self, turn: int, path: str) -> bool:
        """Return whether a forward pass contributes to the update, not counting stopped gradients."""
        flows, recording = self._of.flows, self._of.recording
        calls = [n for n in self.training(path) if recording.calls[n].turn == turn]
        others = {
            node
            for number, label in enumerate(recording.turns, 1)
            if label and number != turn
            for node in flows.of_label(label)
        }
        stops = set(flows.of_primitives({"stop_gradient"}))
        return any(self._is_trained_by(label, path, others | stops) for label in calls)

    def _is_trained_by(self, label: str, path: str, around: Collection[int] = ()) -> bool:
        """Return whether a layer's call contributes to the update of its own network's params.

        When a generator is trained through a discriminator, the discriminator's layers process a batch
        that does not train them.

        Args:
            label: the label of the call.
            path: the path of the layer.
            around: nodes that the path from the call to the update must avoid.
        """
        own = self._updates_of(path)
        if not own:
            return True
        marks = {n for update in self._of.gradients for n in update}
        goals = {n for index in own for n in self._of.gradients[index]}
        closed = marks - goals | set(around)
        calls = self._of.flows.of_label(label)
        reached = self._of.flows.reached(calls, around=closed)
        return bool(reached & goals) or not calls

    def _updates_of(self, path: str) -> list[int]:
        """Return the indices of the updates of a layer's network; [] if that is ambiguous."""
        params = {path: leaf.size for path, leaf in by_path(self._of.state.params).items()}
        found = []
        for index, names in enumerate(self._of.recording.updates):
            inner = {"/".join(name): self._size(label) for name, label in names.items()}
            first = next(iter(inner), "")
            ends = [p.removesuffix(first) for p in params if first and p.endswith(first)]
            heads = [
                head
                for head in ends
                if all(params.get(head + name) == size for name, size in inner.items())
            ]
            if len(heads) != 1:
                return []
            found += [index] if path.startswith(heads[0]) else []
        return found

    def _size(self, label: str) -> int | None:
        nodes = self._of.flows.of_label(label)
        return int(self._of.flows.aval(nodes[0]).size) if nodes else None

    def _given_to(self, turn: int) -> Any:
        """Return a number that is equal for forward passes with the same input; None if unknown."""
        nodes = self._input_of(turn)
        return self._of.flows.number(self._of.flows.operands(nodes[0])[0]) if nodes else None

    def _input_of(self, turn: int) -> list[int]:
        """Return the nodes of the input of a forward pass; [] if it is unknown."""
        label = self._of.recording.turns[turn - 1] if turn else None
        return self._of.flows.of_label(label) if label else []

    def momentum(self) -> float | None:
        """Return the effective momentum of all layers; None if it differs or is unknown."""
        momenta = set(self.momenta().values())
        return momenta.pop() if len(momenta) == 1 else None

    def momenta(self) -> dict[str, float | None]:
        """Return path of a layer -> its effective momentum per step; None if it is unknown."""
        found: dict[str, float | None] = {}
        for path in self.owners:
            said = {self._of.recording.calls[label].momentum for label in self.calls.get(path, ())}
            momentum = said.pop() if len(said) == 1 else None
            writes = self._passes or self.writes(path)
            told = momentum is not None and writes is not None
            found[path] = float(momentum**writes) if told else None  # type: ignore[operator]
        return found

    def biases(self) -> tuple[str, ...]:
        """Return the biases that affect the loss only through a normalisation over rows."""
        uses: Counter[str] = Counter()
        for label, times in self._of.inline.items():
            if label in self._of.recording.biases:
                uses[self._of.recording.biases[label]] += times
        params = leaf_names(self._of.state.params)
        found = []
        for source, target in sorted(links(self._of.step)):
            bias, call = self._of.recording.biases.get(source), self._of.recording.calls.get(target)
            if bias is None or call is None or uses[bias] != 1:
                continue
            fitting = [p for p in params if p == bias or p.endswith(f"/{bias}")]
            # The bias is constant over rows only if the layer does not reduce over the last axis.
            last = call.feature_axes[-1:] == (len(call.shape) - 1,)
            if call.training and last and len(fitting) == 1:
                found += fitting
        return tuple(found)

    def _has_its_moments(self, label: str, path: str) -> bool:
        """Return whether a layer's statistics can be the moments of its input.

        Not if a user's own layer also has params through which its statistics pass, such as the kernel
        of a convolution before the normalisation.
        """
        call, flows = self._of.recording.calls[label], self._of.flows
        if call.of_flax or not call.feature_axes:
            return call.of_flax
        layer = f"batch_stats/{path}" if path else "batch_stats"
        new = {n for p, n in self._of.outputs.items() if p.rpartition("/")[0] == layer}
        own = flows.of_label(label)
        return new.isdisjoint(flows.reached(under(self._of.inputs, "params/"), around=own))

    def compared(self) -> dict[str, str]:
        """Return the label of a call -> path of the layer, of the layers whose inputs are known."""
        return {
            labels[0]: path
            for path in self.owners
            if len(labels := self.training(path)) == 1
            and self._of.inline[labels[0]] == 1
            and path not in self._ambiguous
            and self._has_its_moments(labels[0], path)
        }

    def layer_inputs(self) -> Callable[..., Mapping[str, LayerInput]] | None:
        """Return a function that computes the layers' inputs in training; None if there is none.

        Layers that are called more than once, in a loop or under ``vmap`` are left out.
        """
        once = self.compared()
        step = self._of.subject.step

        def inputs(state: State, x: Any, y: Any) -> dict[str, LayerInput]:
            with watching() as recording:
                values = marked(step, state, x, y, jnp.float32(RATE))
            return _inputs_of(values, recording, once)

        if not once:
            return None
        of = self._of
        return inputs if jax.eval_shape(inputs, of.state, of.x, of.y) else None

    def without_statistics(self) -> str:
        """Return an error message if layers are trained but their statistics are missing; else ""."""
        training = {c.path for c in self._of.recording.calls.values() if c.training}
        if not training or self.owners or self.carried_paths():
            return ""
        return (
            f"normalisation layers run in training ({listed(training)}), but no running statistics "
            "are found in the state of the step, so they cannot be checked. Give their path, as in "
            'statistics="model_state/batch_stats"; if the step drops them, keep them: use '
            "mutable=[...] and the updates that apply returns"
        )

    def carried_paths(self) -> list[str]:
        """Return the paths of the statistics in ``State.extra``."""
        return list(extra_of(self._of.state).get("carried", {}))

    def carried(self) -> list[str]:
        """Return patterns of the statistics that are no moving averages, or that are frozen."""
        found = [
            pattern
            for path in sorted(
                self._of.recording.power_iterated | self._of.evaluation.power_iterated
            )
            for pattern in (f"{path}/*", f"*/{path}/*")
        ]
        whole = by_path(self._of.state.batch_stats)
        counters = [path for path, leaf in whole.items() if not is_floating(leaf)]
        return [*found, *counters, *(f"{path}/*" for path in self._frozen())]

    def _frozen(self) -> list[str]:
        """Return the layers whose params and statistics are both frozen while others are trained."""
        trained = self._of.flows.reached([self._of.inputs["x"], self._of.inputs["y"]])
        moving = [path for path in self.owners if self.training(path)]
        found = []
        for path in self.owners:
            own = {
                n: node for n, node in self._of.outputs.items() if n.startswith(f"params/{path}/")
            }
            resting = own and not trained & set(own.values())
            if moving and resting and self.calls.get(path) and not self.training(path):
                found.append(path)
        return found


def _inputs_of(
    values: Mapping[str, list[Any]], recording: Recording, once: Mapping[str, str]
) -> dict[str, LayerInput]:
    found = {}
    for label, path in once.items():
        call, given = recording.calls.get(label), values.get(label, [])
        if call is None or len(given) != 1:
            continue
        masks = values.get(f"{label} mask", [])
        mask = masks[0] if call.masked and masks else None
        shown = layer_input(given[0], mask, call.shape, call.feature_axes)
        if shown is not None:
            found[path] = shown
    return found


def listed(paths: Iterable[str]) -> str:
    """Return the first path and the number of others: "norm_0 and 2 more"."""
    first, *others = sorted(paths)
    return (first or "the model itself") + (f" and {len(others)} more" if others else "")
