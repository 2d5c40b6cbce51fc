"""Observing normalisation layers, biases and optimizers while a user's step is traced.

The results of the step do not change. Linen has interceptors; methods of nnx and Optax classes are
patched temporarily. Values are marked (``bnverify.adapters.traced``) and recorded in a
:class:`Recording`; the traced program then shows what becomes of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from inspect import signature
from typing import Any

import flax.linen as nn
import jax
import optax
from flax import nnx

from bnverify import compat
from bnverify.adapters.calls import INFERENCE, TRAINING, known_names, trains
from bnverify.adapters.objects import by_variable_path, modules_of, statistics_of
from bnverify.adapters.traced import mark
from bnverify.statistic_names import has_both, moments_among


@dataclass(frozen=True)
class Call:
    """One traced call of a normalisation layer.

    Attributes:
        path: the path of the layer in its model: "block_1/BatchNorm_0".
        shape: the shape of its input.
        feature_axes: the axes that it does not reduce over, ascending, not negative; () if unknown.
        momentum: its declared momentum, as in Flax; None: unknown.
        training: whether it is in train mode.
        masked: whether it has a mask.
        turn: the number of the forward pass that it belongs to.
        names: the names of its statistics.
        of_flax: whether it is Flax's own BatchNorm.
        known: whether ``path`` is already the path in ``State.batch_stats``.
    """

    path: str
    shape: tuple[int, ...]
    feature_axes: tuple[int, ...]
    momentum: float | None
    training: bool
    masked: bool
    turn: int
    names: tuple[str, ...]
    of_flax: bool = False
    known: bool = False


@dataclass
class Recording:
    """What was recorded while a step was traced.

    Attributes:
        calls: label of a layer's input -> the call of the layer. Its old statistics are marked
            "LABEL old NAME".
        biases: label -> the path in ``params`` of the bias that was added last to the marked value.
        power_iterated: the paths of modules whose statistics are vectors of a power iteration.
        turns: for each forward pass the label of the first array that it is given; None without one.
        updates: for each update by an optimizer, path -> label of a gradient.
        optimizers: the optimizer of each update.
        alike: networks of the same class whose copies cannot be distinguished.
    """

    calls: dict[str, Call] = field(default_factory=dict)
    biases: dict[str, str] = field(default_factory=dict)
    power_iterated: set[str] = field(default_factory=set)
    turns: list[str | None] = field(default_factory=list)
    updates: list[dict[tuple[str, ...], str]] = field(default_factory=list)
    optimizers: list[Any] = field(default_factory=list)
    alike: set[str] = field(default_factory=set)
    _depth: int = 0
    _marks: int = 0

    @property
    def size(self) -> int:
        """The number of calls that were recorded."""
        return self._marks + len(self.turns)

    @contextmanager
    def pass_of_a_model(self, args: Sequence[Any]) -> Iterator[Sequence[Any]]:
        """Count the outermost of nested calls of a model as a forward pass; yield marked arguments."""
        if self._depth == 0:
            args = self._begun(args)
        self._depth += 1
        try:
            yield args
        finally:
            self._depth -= 1

    def _begun(self, args: Sequence[Any]) -> Sequence[Any]:
        # Other containers, such as nnx modules, must be passed on as they are.
        def whole(given: Any) -> bool:
            return not isinstance(given, dict | list | tuple)

        leaves, structure = jax.tree_util.tree_flatten(list(args), is_leaf=whole)
        first = next((i for i, leaf in enumerate(leaves) if hasattr(leaf, "dtype")), None)
        if first is None:
            self.turns.append(None)
            return args
        self.turns.append(self.label("pass"))
        leaves[first] = mark(leaves[first], str(self.turns[-1]))
        marked: list[Any] = jax.tree_util.tree_unflatten(structure, leaves)
        return marked

    def given(
        self,
        path: str,
        x: Any,
        mask: Any,
        statistics: Mapping[str, Any],
        *,
        layer: Any,
        training: bool,
        known: bool = False,
    ) -> tuple[Any, Any]:
        """Record a call of a normalisation layer; return its marked input and mask."""
        label = self.label(path)
        of_flax = isinstance(layer, nn.BatchNorm | nnx.BatchNorm)
        for name, value in statistics.items():
            mark(value, f"{label} old {name}")
        self.calls[label] = Call(
            path=path,
            shape=tuple(x.shape),
            feature_axes=_feature_axes(layer, x.shape, statistics),
            # A user's own module may mean the weight of the new value by the same word.
            momentum=layer.momentum if of_flax else None,
            training=training,
            masked=mask is not None,
            turn=len(self.turns),
            names=tuple(statistics),
            of_flax=of_flax,
            known=known,
        )
        return mark(x, label), mask if mask is None else mark(mask, f"{label} mask")

    def biased(self, path: str, out: Any) -> Any:
        """Record the output of a layer that adds its bias last; return it marked."""
        label = self.label(path)
        self.biases[label] = f"{path}/bias" if path else "bias"
        return mark(out, label)

    def updated(self, optimizer: Any, grads: Any) -> Any:
        """Record gradients that are passed to an optimizer; return them marked."""
        label = self.label("gradient")
        labels = {name: f"{label} {'/'.join(name)}" for name in by_variable_path(grads)}
        self.updates.append(labels)
        self.optimizers.append(optimizer)
        leaves, treedef = jax.tree_util.tree_flatten(grads)
        marked = [mark(leaf, each) for leaf, each in zip(leaves, labels.values(), strict=True)]
        return jax.tree_util.tree_unflatten(treedef, marked)

    def label(self, what: str) -> str:
        """Return a unique label for a mark."""
        self._marks += 1
        return f"{what}#{self._marks}"


def _feature_axes(
    layer: Any, shape: tuple[int, ...], statistics: Mapping[str, Any]
) -> tuple[int, ...]:
    """Return the axes of its input that a layer does not reduce over, ascending; () if unknown.

    They are those that the layer names, if its statistics have their size, or else the last axis, or
    the only one, of the size of the statistics.
    """
    said = getattr(layer, "axis", -1)
    axes = said if isinstance(said, list | tuple) else (said,)
    own = [a % len(shape) for a in axes if isinstance(a, int) and -len(shape) <= a < len(shape)]
    if isinstance(layer, nn.BatchNorm | nnx.BatchNorm):
        return tuple(sorted(own))
    sizes = {math.prod(leaf.shape) for leaf in moments_among(statistics).values()}
    if len(sizes) != 1 or not shape:
        return ()
    (size,) = sizes
    if own and len(own) < len(shape) and math.prod(shape[a] for a in own) == size:
        return tuple(sorted(own))
    fitting = [axis for axis in range(1, len(shape)) if shape[axis] == size]
    last = len(shape) - 1
    if last in fitting:
        return (last,)
    return tuple(fitting) if len(fitting) == 1 else ()


_CURRENT: ContextVar[Recording | None] = ContextVar("recording", default=None)


@contextmanager
def watching() -> Iterator[Recording]:
    """Record what happens in this context; nnx models must be registered by ``noting``.

    Inside another ``watching`` context, it yields the outer recording.
    """
    outer = _CURRENT.get()
    if outer is not None:
        yield outer
        return
    recording = Recording()
    token = _CURRENT.set(recording)
    try:
        given = recording.updates, recording.optimizers
        with (
            nn.intercept_methods(_Interceptor(recording)),
            _watched_optimizers(recording.updated, given),
        ):
            yield recording
    finally:
        _CURRENT.reset(token)


# Linen


@dataclass(frozen=True)
class _Interceptor:
    """An interceptor for ``flax.linen.intercept_methods`` that records and marks values."""

    recording: Recording

    def __call__(self, call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        """Run one method call, and record it if it is a layer's."""
        module = context.module
        if module.is_initializing():  # only creates the variables
            return call(*args, **kwargs)
        if not module.path:
            with self.recording.pass_of_a_model(args) as marked:
                return self._layer(module, call, tuple(marked), kwargs, context)
        return self._layer(module, call, args, kwargs, context)

    def _layer(
        self, module: nn.Module, call: Callable[..., Any], args: Any, kwargs: Any, context: Any
    ) -> Any:
        if context.method_name != "__call__":
            return call(*args, **kwargs)
        path = "/".join(module.path)
        if isinstance(module, nn.SpectralNorm):
            self.recording.power_iterated.add(path)
        collection, statistics = _statistics(module)
        if statistics and args and hasattr(args[0], "shape"):
            x, mask = self.recording.given(
                path,
                args[0],
                kwargs.get("mask"),
                statistics,
                layer=module,
                training=_trains(module, collection, args, kwargs),
            )
            args = (x, *args[1:])
            kwargs = kwargs if mask is None else {**kwargs, "mask": mask}
        out = call(*args, **kwargs)
        if isinstance(module, nn.Dense | nn.Conv) and module.use_bias and hasattr(out, "shape"):
            out = self.recording.biased(path, out)
        return out


def _statistics(module: nn.Module) -> tuple[str, dict[str, Any]]:
    """Return (the collection with a module's mean and variance, the arrays in it)."""
    if module.scope is None:
        return "", {}
    for name, variables in module.variables.items():
        if name != "params" and has_both(variables):
            arrays = {n: leaf for n, leaf in variables.items() if hasattr(leaf, "dtype")}
            return name, arrays
    return "", {}


def _trains(module: nn.Module, collection: str, args: Any, kwargs: Any) -> bool:
    """Return whether a normalisation layer is in train mode."""
    said = trains(_said(module, args, kwargs, nn.BatchNorm))
    # Without an argument for it, a module is in train mode if its collection is mutable.
    return module.is_mutable_collection(collection) if said is None else said


def _said(module: Any, args: Any, kwargs: Any, norm: type) -> dict[str, Any]:
    said = dict(vars(module)) | {k: v for k, v in kwargs.items() if v is not None}
    if isinstance(module, norm):
        if len(args) > 1 and args[1] is not None:
            said["use_running_average"] = args[1]
        return said
    names = list(signature(type(module).__call__).parameters)[1:]
    return said | {
        name: value for name, value in zip(names, args, strict=False) if value is not None
    }


# nnx


@contextmanager
def noting(models: Mapping[str, Any]) -> Iterator[None]:
    """Record the layer calls of nnx models inside a ``watching`` context.

    nnx has no interceptors, so ``__call__`` of the classes of models and layers is patched temporarily.
    Calls of modules of the called model are recorded, also if ``nnx.grad`` or ``nnx.jit`` copies it.
    Layers that are copied further inside (``nnx.scan``, ``vmap``, ``remat``) are not recorded.

    Args:
        models: network ("" for a single one) -> model.
    """
    recording = _CURRENT.get()
    if recording is None:
        yield
        return
    found = [module for model in models.values() for _, module in modules_of(model)]
    layers = [module for module in found if _is_norm(module) or _is_linear(module)]
    stand_in = _StandIn(models, recording)
    with ExitStack() as stack:
        for cls in dict.fromkeys(type(module) for module in (*models.values(), *layers)):
            stack.enter_context(stand_in.of(cls))
        yield


class _StandIn:
    """Patches ``__call__`` of the classes of models while they are observed."""

    def __init__(self, models: Mapping[str, Any], recording: Recording) -> None:
        self._recording = recording
        self._paths: dict[int, str] = {}
        self._alive: list[Any] = []  # ids are unique only while their objects are alive
        self._busy: set[int] = set()  # both a class and its base may be patched
        self._roots: dict[type, list[str]] = {}
        for network, model in models.items():
            self._roots.setdefault(type(model), []).append(network)
            self._look(model, network)

    def _look(self, model: Any, network: str) -> None:
        """Store the paths of the modules in ``model``."""
        self._alive.append(model)
        head = f"{network}/" if network else ""
        self._paths.update({id(m): (head + path).strip("/") for path, m in modules_of(model)})

    @contextmanager
    def of(self, cls: Any) -> Iterator[None]:
        """Patch ``__call__`` of a class within this context."""
        own = cls.__dict__.get("__call__")
        original = getattr(cls, "__call__", None)  # noqa: B004 - the function itself is wanted
        if original is None:
            yield
            return

        def call(module: Any, *args: Any, **kwargs: Any) -> Any:
            if id(module) in self._busy:
                return original(module, *args, **kwargs)
            networks = self._roots.get(type(module), [])
            if len(networks) == 1 and id(module) not in self._paths:
                self._look(module, networks[0])
            elif networks and id(module) not in self._paths:
                self._recording.alike.update(networks)
            around = self._recording.pass_of_a_model(args) if networks else nullcontext(args)
            self._busy.add(id(module))
            try:
                with around as marked:
                    return self._noted(original, module, marked, kwargs)
            finally:
                self._busy.discard(id(module))

        cls.__call__ = call
        try:
            yield
        finally:
            if own is None:
                del cls.__call__
            else:
                cls.__call__ = own

    def _noted(self, original: Any, module: Any, args: Any, kwargs: Any) -> Any:
        path = self._paths.get(id(module))
        if path is not None and _is_norm(module) and args and hasattr(args[0], "shape"):
            said = trains(_said(module, args, kwargs, nnx.BatchNorm))
            kept = statistics_of(module)
            x, mask = self._recording.given(
                path,
                args[0],
                kwargs.get("mask"),
                {name: compat.held(value) for name, value in kept.items()},
                layer=module,
                training=said is not False,
                known=True,
            )
            args = (x, *args[1:])
            kwargs = kwargs if mask is None else {**kwargs, "mask": mask}
        out = original(module, *args, **kwargs)
        if path is None or not _is_linear(module) or not hasattr(out, "shape"):
            return out
        return self._recording.biased(path, out) if getattr(module, "use_bias", False) else out


def _is_norm(module: Any) -> bool:
    return has_both(statistics_of(module))


def _is_linear(module: Any) -> bool:
    return isinstance(module, nnx.Linear | nnx.Conv)


# Optax


@dataclass
class Updates:
    """The gradients passed to optimizers while a step ran.

    Attributes:
        gradients: for each update path -> gradient.
        optimizers: the optimizer of each update.
    """

    gradients: list[dict[tuple[str, ...], Any]] = field(default_factory=list)
    optimizers: list[Any] = field(default_factory=list)


@contextmanager
def updates() -> Iterator[Updates]:
    """Collect the gradients passed to optimizers in this context, without marking them."""
    found = Updates()

    def collect(optimizer: Any, grads: Any) -> Any:
        found.gradients.append(by_variable_path(grads))
        found.optimizers.append(optimizer)
        return grads

    with _watched_optimizers(collect, (found.gradients, found.optimizers)):
        yield found


@contextmanager
def _watched_optimizers(
    seen: Callable[[Any, Any], Any], noted_of: tuple[list[Any], list[Any]]
) -> Iterator[None]:
    """Call ``seen`` with the gradients of every outermost optimizer; its result replaces them.

    ``GradientTransformation.update`` is patched, so it does not matter where the step gets its
    optimizer: from a train state, an argument or a closure. An optimizer whose whole result is passed
    to another one, as when gradients are clipped by hand, counts as part of it: what was recorded of
    it is removed.

    Args:
        seen: called with each optimizer and its gradients; appends one item to each list of ``noted_of``.
        noted_of: these lists.
    """
    depth = [0]
    results: list[list[Any]] = []  # the leaves of each recorded update, kept alive for their ids

    def take_back_parts(grads: Any) -> None:
        given = set(map(id, jax.tree_util.tree_leaves(grads)))
        for place in reversed(range(len(results))):
            if results[place] and {id(leaf) for leaf in results[place]} <= given:
                for noted in (results, *noted_of):
                    del noted[place]

    def noted(optimizer: Any, update: Callable[..., Any]) -> Callable[..., Any]:
        def stand_in(grads: Any, *args: Any, **kwargs: Any) -> Any:
            if depth[0]:
                return update(grads, *args, **kwargs)
            take_back_parts(grads)
            grads = seen(optimizer, grads)
            results.append([])
            depth[0] += 1
            try:
                returned = update(grads, *args, **kwargs)
            finally:
                depth[0] -= 1
            results[-1] = jax.tree_util.tree_leaves(returned[0])
            return returned

        return stand_in

    pair: Any = optax.GradientTransformation
    several: Any = optax.MultiSteps
    read, step = pair.__dict__["update"], several.update
    pair.update = property(lambda tx: noted(tx, read.__get__(tx, type(tx))))
    several.update = lambda tx, *args, **kwargs: noted(tx, step.__get__(tx, several))(
        *args, **kwargs
    )
    try:
        yield
    finally:
        pair.update = read
        several.update = step


# Evaluation by a training step: every model is put into eval mode.


@contextmanager
def evaluating() -> Iterator[None]:
    """Put every model that is called in this context into eval mode."""

    def told(call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        if context.method_name != "__call__":
            return call(*args, **kwargs)
        names = list(signature(type(context.module).__call__).parameters)[1:]
        args = tuple(
            _of_evaluation(name, value) for name, value in zip(names, args, strict=False)
        ) + tuple(args[len(names) :])
        kwargs = {name: _of_evaluation(name, value) for name, value in kwargs.items()}
        fields = {
            name: value
            for name in known_names(vars(context.module))
            if isinstance(value := getattr(context.module, name), bool)
        }
        for name, value in fields.items():
            object.__setattr__(context.module, name, _of_evaluation(name, value))
        try:
            return call(*args, **kwargs)
        finally:
            for name, value in fields.items():
                object.__setattr__(context.module, name, value)

    train: Any = nnx.Module.train
    module: Any = nnx.Module
    module.train = nnx.Module.eval
    try:
        with nn.intercept_methods(told):
            yield
    finally:
        module.train = train


def _of_evaluation(name: str, value: Any) -> Any:
    if not isinstance(value, bool):
        return value
    if name in TRAINING:
        return False
    return True if name in INFERENCE else value
