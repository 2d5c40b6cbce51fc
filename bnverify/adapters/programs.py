"""The traced programs of a subject, with what was recorded during tracing."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bnverify.adapters.explain import is_library
from bnverify.adapters.traced import Flows, labels, labels_anywhere
from bnverify.adapters.watch import watching
from bnverify.model import State, Subject
from bnverify.pytree import path_name

ROWS = 24  # in the traces: unlikely as a feature size, and divisible by many numbers of shards
FEATURES = 6  # if any will do
RATE = 0.1
SAME_VALUES = frozenset(
    {"convert_element_type", "reshape", "squeeze", "expand_dims", "broadcast_in_dim", "transpose"}
    | {"copy", "name"}
)
"""Primitives that give the values they are given, in another shape or dtype."""


def sizes_of(features: tuple[int, ...] | None, rows: int | None = None) -> tuple[int, int]:
    """Return the (N, D) of the traces, N a multiple of ``rows``."""
    return math.lcm(ROWS, rows or 1), features[0] if features else FEATURES


class Programs:
    """The traced functions of a subject.

    Args:
        subject: a training step.

    Attributes:
        subject: as given.
        x: the inputs of the traces, a ShapeDtypeStruct.
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
        shape: Any = jax.ShapeDtypeStruct
        sizes = sizes_of(subject.features, subject.rows)
        x, y = shape(sizes, "float32"), shape(sizes[:1], "float32")
        self.subject, self.x = subject, x
        self.state: State = jax.eval_shape(subject.init, shape((), "int32"), x)
        given = (self.state, x, y)
        with watching() as self.recording:
            self.step, out = _traced(subject.step, *given, np.float32(RATE))
        if self.state.batch_stats and not self.recording.calls:
            # An inner compiled function may have been traced before, without being observed.
            jax.clear_caches()
            with watching() as self.recording:
                self.step, out = _traced(subject.step, *given, np.float32(RATE))
        self.after, self.info = out
        with watching() as self.evaluation:
            self.evaluate, _ = _traced(subject.evaluate, *given)
        self.flows = Flows(self.step)
        self.eval_flows = Flows(self.evaluate)
        self.inline, self.anywhere = labels(self.step), labels_anywhere(self.step)
        names = leaf_paths(self.state)
        leaves = jax.tree_util.tree_leaves(self.state)
        self.types = {n: (leaf.shape, leaf.dtype) for n, leaf in zip(names, leaves, strict=True)}
        self.inputs = dict(zip(names, self.flows.inputs, strict=False))
        self.inputs |= dict(zip(("x", "y", "lr"), self.flows.inputs[len(names) :], strict=True))
        self.eval_inputs = dict(zip((*names, "x", "y"), self.eval_flows.inputs, strict=True))
        after = leaf_paths(self.after)
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
            same = [n for n in flows.operands(node) if shape in shapes_of(flows, n)]
            for value in {*same} - forward - set(flows.inputs):
                factor = flows.origins([n for n in flows.operands(node) if n != value])
                if name in {"mul", "div"} and value in factor:
                    found.append(value)
            pending += [n for n in same if n not in seen]
            seen.update(same)
        return found

    def is_floating(self, path: str) -> bool:
        """Return whether a leaf of the state has a floating-point dtype."""
        return bool(jnp.issubdtype(self.types[path][1], jnp.floating))

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
        return flows, dict(zip(leaf_paths(self.state), flows.outputs, strict=True))


def shapes_of(flows: Flows, node: int) -> list[tuple[int, ...]]:
    """Return the shapes of what the equation of a node makes; none for inputs and constants."""
    eqn = flows.equation(node)
    return [] if eqn is None else [tuple(var.aval.shape) for var in eqn.outvars]


def _traced(function: Callable[..., Any], *args: Any) -> tuple[Any, Any]:
    """Return (the program of a function, the shapes of its result); always traced again."""
    # A new function object, since JAX caches the program of one that it has traced before.
    anew = partial(function)
    found: tuple[Any, Any] = jax.make_jaxpr(anew, return_shape=True)(*args)
    return found


def leaf_paths(state: State) -> list[str]:
    """Return the path of every leaf of a State: "params/Dense_0/kernel"."""
    return [
        f"{name}/{path_name(path)}" if path else name
        for name, tree in zip(state._fields, state, strict=True)
        for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0]
    ]


def _of_library(eqn: Any) -> bool:
    """Return whether a library stops the gradient, as ``jax.nn.softmax`` does."""
    try:
        frames = list(eqn.source_info.traceback.frames)
        own = [i for i, frame in enumerate(frames) if frame.function_name == "stop_gradient"]
        caller = frames[own[-1] + 1].file_name  # a differentiation rule may add inner frames
    except (AttributeError, TypeError, IndexError):  # tracebacks are not public API
        return False
    return is_library(caller) and not caller.startswith("<")
