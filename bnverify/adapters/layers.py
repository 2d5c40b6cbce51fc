"""The normalisation layers that a training pass goes through, whatever library they are from.

A recorder of the library marks what each layer is given (``bnverify.adapters.capture``) and notes
the call in a :class:`Recording`. What is certain is read off the traced program: how often a
layer is called, which input can be shown, which bias goes into a normalisation and nowhere else.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from bnverify.adapters.capture import (
    labels,
    labels_anywhere,
    layer_input,
    links,
    mark,
    marked,
)
from bnverify.pytree import path_name
from bnverify.subject import LayerInput, State


@dataclass(frozen=True)
class Call:
    """One call of a normalisation layer, as it was traced.

    Attributes:
        path: the layer's, in the statistics: "block_1/BatchNorm_0".
        shape: of its input.
        feature_axes: the axes it keeps, ascending, none negative.
        momentum: the weight of the old value that it declares, in Flax's sense; None: unknown.
        training: whether it normalises by the batch's own moments and writes.
        masked: whether it was given a mask.
        turn: which pass of the model it belongs to.
    """

    path: str
    shape: tuple[int, ...]
    feature_axes: tuple[int, ...]
    momentum: float | None
    training: bool
    masked: bool
    turn: int = 0


@dataclass
class Recording:
    """What was noted while a pass was traced.

    Attributes:
        calls: label -> the call of a normalisation layer whose input has that mark.
        biases: label -> the path in ``params`` of the bias added last to the marked value.
        power_iterated: paths of modules whose statistics are vectors of a power iteration.
        turns: how many passes of the model were begun.
    """

    calls: dict[str, Call] = field(default_factory=dict)
    biases: dict[str, str] = field(default_factory=dict)
    power_iterated: set[str] = field(default_factory=set)
    turns: int = 0
    _depth: int = 0

    @contextmanager
    def root_call(self) -> Iterator[None]:
        """Count the outermost of nested calls of the model as a pass."""
        self.turns += self._depth == 0
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1

    def given(
        self,
        path: str,
        x: Any,
        mask: Any,
        *,
        axis: Any,
        momentum: float | None,
        training: bool,
    ) -> tuple[Any, Any]:
        """Note that a normalisation layer is called; return its input and mask, marked."""
        label = self._label(path)
        axes = tuple(axis) if isinstance(axis, list | tuple) else (axis,)
        self.calls[label] = Call(
            path=path,
            shape=tuple(x.shape),
            feature_axes=tuple(sorted(a % x.ndim for a in axes)),
            momentum=momentum,
            training=training,
            masked=mask is not None,
            turn=self.turns,
        )
        return mark(x, label), mask if mask is None else mark(mask, f"{label} mask")

    def biased(self, path: str, out: Any) -> Any:
        """Note that ``out`` is what the layer at ``path`` gives, its bias added last; mark it."""
        label = self._label(path)
        self.biases[label] = f"{path}/bias" if path else "bias"
        return mark(out, label)

    def _label(self, path: str) -> str:
        return f"{path}#{len(self.calls) + len(self.biases)}"


def layer_inputs(
    run: Callable[..., Any], recording: Recording, args: tuple[Any, ...]
) -> dict[str, LayerInput]:
    """Run and return what each normalisation layer was given in training.

    Left out is what cannot be told: a layer called more than once, one inside a loop, one under
    ``vmap``.

    Args:
        run: calls the model and notes its layers in ``recording``.
        recording: an empty one.
        args: of ``run``.
    """
    return inputs_of(marked(run, *args), recording)


def inputs_of(values: Mapping[str, list[Any]], recording: Recording) -> dict[str, LayerInput]:
    """Return what each normalisation layer was given, from all marked values."""
    seen: dict[str, list[LayerInput | None]] = defaultdict(list)
    for label, call in recording.calls.items():
        if call.training:
            masks = values.get(f"{label} mask", [])
            for value in values.get(label, []):
                mask = masks[0] if call.masked and masks else None
                seen[call.path].append(layer_input(value, mask, call.shape, call.feature_axes))
    return {path: found[0] for path, found in seen.items() if len(found) == 1 and found[0]}


@dataclass(frozen=True)
class Survey:
    """What one abstract trace of the training pass shows of the layers.

    Attributes:
        momenta: path of a layer -> the weight of the old value after one step: the declared
            momentum to the power of the layer's calls in one pass of the model. None: it cannot be told.
        repeated: paths of the layers that write more than once in a pass of the model, or may.
        biases: paths in ``params`` of the biases that go into a normalisation and nowhere else.
    """

    momenta: Mapping[str, float | None]
    repeated: tuple[str, ...]
    biases: tuple[str, ...]

    @property
    def declared(self) -> set[float]:
        """The momenta that are known."""
        return {momentum for momentum in self.momenta.values() if momentum is not None}

    @property
    def momentum(self) -> float | None:
        """The one momentum of the whole model; None where there are several or not all known."""
        if len(self.declared) != 1 or None in self.momenta.values():
            return None
        return next(iter(self.declared))


def survey(jaxpr: Any, recording: Recording, state: State) -> Survey:
    """Return what a traced training pass shows.

    Args:
        jaxpr: of the pass.
        recording: of that trace alone.
        state: its leaves need only have shapes.
    """
    inline, anywhere = labels(jaxpr), labels_anywhere(jaxpr)
    params = {path_name(path) for path, _ in jax.tree_util.tree_flatten_with_path(state.params)[0]}
    momenta: dict[str, float | None] = {}
    repeated = []
    for path, leaves in _owners(state.batch_stats).items():
        traced = {
            label: call
            for label, call in recording.calls.items()
            if call.path == path and anywhere[label]
        }
        writes = _writes(leaves, traced, inline)
        if writes != 1:
            repeated.append(path)
        declared = {call.momentum for call in traced.values()}
        momentum = declared.pop() if len(declared) == 1 else None
        told = momentum is not None and writes is not None
        momenta[path] = float(momentum**writes) if told else None  # type: ignore[operator]
    biases = (bias for bias in _biases(jaxpr, recording, inline) if bias in params)
    return Survey(momenta, tuple(repeated), tuple(biases))


def _owners(batch_stats: Any) -> dict[str, list[Any]]:
    """Return path of a layer -> its floating-point statistics."""
    owners: dict[str, list[Any]] = defaultdict(list)
    for path, leaf in jax.tree_util.tree_flatten_with_path(batch_stats)[0]:
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            owners[path_name(path).rpartition("/")[0]].append(leaf)
    return owners


def _writes(leaves: list[Any], traced: Mapping[str, Call], inline: Counter[str]) -> int | None:
    """Return how often a layer writes in one pass of the model; None where it cannot be told.

    Args:
        leaves: its statistics.
        traced: label -> its calls that are in the program.
        inline: how often each label is marked where it runs once.
    """
    writing = [label for label, call in traced.items() if call.training]
    if all(inline[label] for label in writing):
        # A layer shared within one pass writes twice by design; one pass too many is a mistake.
        per_turn: Counter[int] = Counter()
        for label in writing:
            per_turn[traced[label].turn] += inline[label]
        return max([1, *per_turn.values()])
    # In a loop or a vmapped module every turn has a slice of its own, or writes again.
    features = max(len(call.feature_axes) for call in traced.values())
    sliced = len(writing) == 1 and all(len(leaf.shape) > features for leaf in leaves)
    return 1 if sliced else None


def _biases(jaxpr: Any, recording: Recording, inline: Counter[str]) -> tuple[str, ...]:
    """Return the biases whose only way to the loss leads through a normalisation over rows."""
    uses: Counter[str] = Counter()
    for label, times in inline.items():
        if label in recording.biases:
            uses[recording.biases[label]] += times
    found = []
    for source, target in sorted(links(jaxpr)):
        bias, call = recording.biases.get(source), recording.calls.get(target)
        if bias is None or call is None or uses[bias] != 1:
            continue
        # The bias runs along the last axis: reduced over, it would no longer be a constant.
        if call.training and call.feature_axes[-1:] == (len(call.shape) - 1,):
            found.append(bias)
    return tuple(found)
