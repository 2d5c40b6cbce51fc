"""The programs of a subject: each function traced once, with what was noted on the way."""

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
from bnverify.pytree import path_name
from bnverify.subject import State, Subject

ROWS = 24  # of the traces: a size that no feature has by chance, and that a step may split evenly
FEATURES = 6  # where any will do
RATE = 0.1


def sizes_of(features: tuple[int, ...] | None, rows: int | None = None) -> tuple[int, int]:
    """Return the (N, D) of the traces, N a multiple of ``rows``."""
    return math.lcm(ROWS, rows or 1), features[0] if features else FEATURES


class Programs:
    """What one trace of a subject's functions shows.

    Args:
        subject: a training step.

    Attributes:
        subject: as given.
        x: the inputs of the traces, of shapes without values.
        state: the state before the first step, of shapes without values; ``after`` one step.
        info: what the step tells besides, likewise.
        step: the program of the step; ``evaluate`` that of the evaluation.
        recording: what was noted while the step was traced; ``evaluation`` the evaluation.
        flows: what reaches what in the step; ``eval_flows`` in the evaluation.
        inputs: path -> the node of a leaf that the step is given: "params/Dense_0/kernel", "x",
            "y", "lr"; ``eval_inputs`` that the evaluation is.
        types: path -> (shape, dtype) of a leaf of the state.
        outputs: path -> the node of a leaf of the state after the step.
        loss: the node of the training loss; None where it is hidden.
        inline: label -> how often it is marked where a value can be read; ``anywhere`` at all.
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
            # A function compiled inside of the step may have been traced before, unwatched.
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
        """Return where a user's line stops the gradient of a value made of ``sources`` in the loss."""
        if self.loss is None:
            return set()
        on_the_way = self.flows.reached(sources) & self.flows.origins([self.loss])
        stops = set(self.flows.of_primitives({"stop_gradient"})) & on_the_way
        return {node for node in stops if not _of_library(self.flows.equation(node))}

    def is_floating(self, path: str) -> bool:
        """Return whether a leaf of the state is of a floating-point type."""
        return bool(jnp.issubdtype(self.types[path][1], jnp.floating))

    def updates(self) -> int:
        """Return how often optimizers update params in a step; 2 stands for a loop."""
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
        """What reaches what in init: its flows, and path -> the node of a leaf of the state."""
        flows = Flows(_traced(self.subject.init, np.int32(0), self.x)[0])
        return flows, dict(zip(leaf_paths(self.state), flows.outputs, strict=True))


def _traced(function: Callable[..., Any], *args: Any) -> tuple[Any, Any]:
    """Return the program of a function, and its result's shapes; traced anew each time."""
    # JAX keeps the program of a function that it has traced before.
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
    """Return whether a library's own line stops a gradient, as ``jax.nn.softmax`` does."""
    try:
        frames = list(eqn.source_info.traceback.frames)
        own = [i for i, frame in enumerate(frames) if frame.function_name == "stop_gradient"]
        caller = frames[own[-1] + 1].file_name  # a derivative's rule may stop it once more, inside
    except (AttributeError, TypeError, IndexError):  # no public promise
        return False
    return is_library(caller) and not caller.startswith("<")
