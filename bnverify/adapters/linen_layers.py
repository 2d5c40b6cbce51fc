"""The normalisation layers of a linen module, found by intercepting their calls."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from bnverify.adapters.capture import (
    labels,
    labels_anywhere,
    layer_input,
    links,
    mark,
    marked,
)
from bnverify.adapters.modes import trains
from bnverify.subject import LayerInput, State
from bnverify.transition import path_name


@dataclass(frozen=True)
class Call:
    """One call of a normalisation layer, as it was traced.

    Attributes:
        path: the layer's, in the statistics: "block_1/BatchNorm_0".
        shape: of its input.
        feature_axes: the axes it keeps.
        momentum: the weight of the old value that it declares, in Flax's sense; None: unknown.
        training: whether it normalises by the batch's own moments and writes.
        masked: whether it was given a mask.
    """

    path: str
    shape: tuple[int, ...]
    feature_axes: tuple[int, ...]
    momentum: float | None
    training: bool
    masked: bool


@dataclass
class Recorder:
    """Marks what normalisation layers are given, and what linear layers with a bias give.

    Attributes:
        statistics: the collection that holds running statistics.
        calls: label -> the call of a normalisation layer.
        biases: label -> the path in ``params`` of the bias added last to the marked value.
        power_iterated: paths of the ``nn.SpectralNorm`` modules called.
    """

    statistics: str = "batch_stats"
    calls: dict[str, Call] = field(default_factory=dict)
    biases: dict[str, str] = field(default_factory=dict)
    power_iterated: set[str] = field(default_factory=set)

    def __call__(self, call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        """Intercept one method call; see ``flax.linen.intercept_methods``."""
        module = context.module
        if context.method_name != "__call__":
            return call(*args, **kwargs)
        if isinstance(module, nn.SpectralNorm):
            self.power_iterated.add("/".join(module.path))
        if args and hasattr(args[0], "shape") and self._keeps_moments(module):
            args, kwargs = self._given(module, args, kwargs)
        out = call(*args, **kwargs)
        if isinstance(module, nn.Dense | nn.Conv) and module.use_bias and hasattr(out, "shape"):
            label = self._label(module)
            self.biases[label] = "/".join((*module.path, "bias"))
            out = mark(out, label)
        return out

    def _keeps_moments(self, module: nn.Module) -> bool:
        if isinstance(module, nn.BatchNorm):
            return True
        return all(module.has_variable(self.statistics, name) for name in ("mean", "var"))

    def _given(self, module: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
        x, *rest = args
        label, mask = self._label(module), kwargs.get("mask")
        axis = getattr(module, "axis", -1)
        axes = tuple(axis) if isinstance(axis, list | tuple) else (axis,)
        said = dict(vars(module)) | {k: v for k, v in kwargs.items() if v is not None}
        if isinstance(module, nn.BatchNorm) and rest and rest[0] is not None:
            said["use_running_average"] = rest[0]
        self.calls[label] = Call(
            path="/".join(module.path),
            shape=tuple(x.shape),
            feature_axes=tuple(sorted(a % x.ndim for a in axes)),
            # A module of the user's own may mean the weight of the new value by the same word.
            momentum=module.momentum if isinstance(module, nn.BatchNorm) else None,
            training=trains(said) is not False,
            masked=mask is not None,
        )
        if mask is not None:
            kwargs = {**kwargs, "mask": mark(mask, f"{label} mask")}
        return (mark(x, label), *rest), kwargs

    def _label(self, module: nn.Module) -> str:
        return f"{'/'.join(module.path)}#{len(self.calls) + len(self.biases)}"


def layer_inputs(
    run: Callable[..., Any], recorder: Recorder, args: tuple[Any, ...]
) -> dict[str, LayerInput]:
    """Run and return what each normalisation layer was given in training.

    Left out is what cannot be told: a layer called more than once, one inside a loop, one under
    ``vmap``.

    Args:
        run: calls the model under ``recorder``.
        recorder: a fresh one.
        args: of ``run``.
    """
    values = marked(run, *args)
    seen: dict[str, list[LayerInput | None]] = defaultdict(list)
    for label, call in recorder.calls.items():
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
            momentum to the power of the layer's calls. None: it cannot be told.
        biases: paths in ``params`` of the biases that go into a normalisation and nowhere else.
    """

    momenta: Mapping[str, float | None]
    biases: tuple[str, ...]


def survey(jaxpr: Any, recorder: Recorder, state: State) -> Survey:
    """Return what a traced training pass shows.

    Args:
        jaxpr: traced under ``recorder``.
        recorder: of that trace alone.
        state: its leaves need only have shapes.
    """
    inline, anywhere = labels(jaxpr), labels_anywhere(jaxpr)
    owners = _owners(state.batch_stats)
    params = {path_name(path) for path, _ in jax.tree_util.tree_flatten_with_path(state.params)[0]}
    return Survey(
        momenta={
            path: _momentum(path, leaves, recorder, inline, anywhere)
            for path, leaves in owners.items()
        },
        biases=tuple(bias for bias in _biases(jaxpr, recorder, inline) if bias in params),
    )


def _owners(batch_stats: Any) -> dict[str, list[Any]]:
    """Return path of a layer -> its floating-point statistics."""
    owners: dict[str, list[Any]] = defaultdict(list)
    for path, leaf in jax.tree_util.tree_flatten_with_path(batch_stats)[0]:
        if jax.numpy.issubdtype(leaf.dtype, np.floating):
            owners[path_name(path).rpartition("/")[0]].append(leaf)
    return owners


def _momentum(
    path: str,
    leaves: list[Any],
    recorder: Recorder,
    inline: Counter[str],
    anywhere: Counter[str],
) -> float | None:
    calls = {label: call for label, call in recorder.calls.items() if call.path == path}
    traced = {label: call for label, call in calls.items() if anywhere[label]}
    if not traced or any(call.momentum is None for call in traced.values()):
        return None
    declared = {call.momentum for call in traced.values() if call.momentum is not None}
    writing = {label for label, call in traced.items() if call.training}
    if len(declared) != 1:
        return None
    (momentum,) = declared
    if all(inline[label] for label in writing):
        times = sum(inline[label] for label in writing)
        return float(momentum ** max(times, 1))
    # Inside a loop or a vmapped module: once for each slice, where every turn has its own.
    features = {len(call.feature_axes) for call in traced.values()}
    stacked = len(writing) == 1 and all(len(leaf.shape) > max(features) for leaf in leaves)
    return float(momentum) if stacked else None


def _biases(jaxpr: Any, recorder: Recorder, inline: Counter[str]) -> tuple[str, ...]:
    """Return the biases whose only way to the loss leads through a normalisation over rows."""
    uses = Counter(recorder.biases[label] for label in inline if label in recorder.biases)
    found = []
    for source, target in sorted(links(jaxpr)):
        bias, call = recorder.biases.get(source), recorder.calls.get(target)
        if bias is None or call is None or uses[bias] != 1:
            continue
        # The bias runs along the last axis: reduced over, it would no longer be a constant.
        if call.training and call.feature_axes[-1:] == (len(call.shape) - 1,):
            found.append(bias)
    return tuple(found)
