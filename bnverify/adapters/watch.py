"""What is seen while a user's step is traced: its normalisation layers, its biases, its optimizer.

Nothing of the step is changed. Linen has interceptors; for nnx and Optax the classes get another
method for the time. What passes is marked (``bnverify.adapters.traced``) and noted in a
:class:`Recording`; what is certain of it is then read off the traced program.
"""

from __future__ import annotations

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

from bnverify.adapters.modes import INFERENCE, TRAINING, known_names, trains
from bnverify.adapters.objects import modules_of, variable_path
from bnverify.adapters.traced import mark


@dataclass(frozen=True)
class Call:
    """One call of a normalisation layer, as it was traced.

    Attributes:
        path: the layer's, in its model: "block_1/BatchNorm_0".
        shape: of its input.
        feature_axes: the axes it keeps, ascending, none negative.
        momentum: the weight of the old value that it declares, in Flax's sense; None: unknown.
        training: whether it normalises by the batch's own moments and writes.
        masked: whether it was given a mask.
        turn: which pass of a model it belongs to.
        names: of its statistics.
        known: whether ``path`` is already that in the State's statistics.
    """

    path: str
    shape: tuple[int, ...]
    feature_axes: tuple[int, ...]
    momentum: float | None
    training: bool
    masked: bool
    turn: int
    names: tuple[str, ...]
    known: bool = False


@dataclass
class Recording:
    """What was noted while a step was traced.

    Attributes:
        calls: label -> the call of a normalisation layer whose input has that mark. Its statistics,
            as they came in, are marked "LABEL old NAME".
        biases: label -> the path in ``params`` of the bias added last to the marked value.
        power_iterated: paths of modules whose statistics are vectors of a power iteration.
        turns: the mark of what each pass of a model was given; None where that is no array.
        updates: for each update by an optimizer, the marks of its gradients by their paths.
        optimizers: what made each of these updates.
        alike: networks of one class, of whose copies it cannot be told which is which.
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

    @contextmanager
    def pass_of_a_model(self, args: Sequence[Any]) -> Iterator[Sequence[Any]]:
        """Count the outermost of nested calls of a model as a pass; hand its arguments on, marked."""
        if self._depth == 0:
            args = self._begun(args)
        self._depth += 1
        try:
            yield args
        finally:
            self._depth -= 1

    def _begun(self, args: Sequence[Any]) -> Sequence[Any]:
        if not args or not hasattr(args[0], "dtype"):
            self.turns.append(None)
            return args
        self.turns.append(self.label("pass"))
        return (mark(args[0], str(self.turns[-1])), *args[1:])

    def given(
        self,
        path: str,
        x: Any,
        mask: Any,
        statistics: Mapping[str, Any],
        *,
        axis: Any,
        momentum: float | None,
        training: bool,
        known: bool = False,
    ) -> tuple[Any, Any]:
        """Note that a normalisation layer is called; return its input and mask, marked."""
        label = self.label(path)
        axes = tuple(axis) if isinstance(axis, list | tuple) else (axis,)
        for name, value in statistics.items():
            mark(value, f"{label} old {name}")
        self.calls[label] = Call(
            path=path,
            shape=tuple(x.shape),
            feature_axes=tuple(sorted(a % x.ndim for a in axes)),
            momentum=momentum,
            training=training,
            masked=mask is not None,
            turn=len(self.turns),
            names=tuple(statistics),
            known=known,
        )
        return mark(x, label), mask if mask is None else mark(mask, f"{label} mask")

    def biased(self, path: str, out: Any) -> Any:
        """Note that ``out`` is what the layer at ``path`` gives, its bias added last; mark it."""
        label = self.label(path)
        self.biases[label] = f"{path}/bias" if path else "bias"
        return mark(out, label)

    def updated(self, optimizer: Any, grads: Any) -> Any:
        """Note that an optimizer is given gradients; return them, marked."""
        leaves, treedef = jax.tree_util.tree_flatten_with_path(grads)
        label = self.label("gradient")
        names = [variable_path(path) for path, _ in leaves]
        labels = [f"{label} {'/'.join(name)}" for name in names]
        self.updates.append(dict(zip(names, labels, strict=True)))
        self.optimizers.append(optimizer)
        marked = [mark(leaf, each) for (_, leaf), each in zip(leaves, labels, strict=True)]
        return jax.tree_util.tree_unflatten(treedef, marked)

    def label(self, what: str) -> str:
        """Return a name for a mark that no other has."""
        self._marks += 1
        return f"{what}#{self._marks}"


_CURRENT: ContextVar[Recording | None] = ContextVar("recording", default=None)


@contextmanager
def watching() -> Iterator[Recording]:
    """Note what happens while the context is open; nnx models are to be shown by ``noting``.

    Where one watch is open already, it is that one.
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
    """For ``flax.linen.intercept_methods``: notes and marks, changes nothing."""

    recording: Recording

    def __call__(self, call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        """Run one method call, noting it where it is a layer's."""
        module = context.module
        if module.is_initializing():  # it makes the variables; no step normalises by it
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
                axis=getattr(module, "axis", -1),
                # A user's own module may mean the weight of the new value by the same word.
                momentum=module.momentum if isinstance(module, nn.BatchNorm) else None,
                training=_trains(module, collection, args, kwargs),
            )
            args = (x, *args[1:])
            kwargs = kwargs if mask is None else {**kwargs, "mask": mask}
        out = call(*args, **kwargs)
        if isinstance(module, nn.Dense | nn.Conv) and module.use_bias and hasattr(out, "shape"):
            out = self.recording.biased(path, out)
        return out


def _statistics(module: nn.Module) -> tuple[str, dict[str, Any]]:
    """Return the collection in which a module keeps a mean and a variance, and what it keeps there."""
    if module.scope is None:
        return "", {}
    for name, variables in module.variables.items():
        if name != "params" and {"mean", "var"} <= set(variables):
            arrays = {n: leaf for n, leaf in variables.items() if hasattr(leaf, "dtype")}
            return name, arrays
    return "", {}


def _trains(module: nn.Module, collection: str, args: Any, kwargs: Any) -> bool:
    """Return whether a normalisation layer normalises by the batch's own moments."""
    said = trains(_said(module, args, kwargs, nn.BatchNorm))
    # A module that is told neither way looks whether it may write.
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
    """Note what the layers of nnx models are given, where a watch is open.

    nnx has no interception, so the classes of the models and of their layers get another
    ``__call__`` for the time. Noted are calls on modules of a model being called, which
    ``nnx.grad`` and ``nnx.jit`` copy; of a layer that is copied further in (``nnx.scan``,
    ``vmap``, ``remat``) nothing is claimed.

    Args:
        models: where each one's statistics lie in those of the State ("" or a network) -> model.
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
    """What calls of models' classes go through while they are noted."""

    def __init__(self, models: Mapping[str, Any], recording: Recording) -> None:
        self._recording = recording
        self._paths: dict[int, str] = {}
        self._alive: list[Any] = []  # an id is a module's own only as long as that exists
        self._busy: set[int] = set()  # a class and its base may both stand in for one call
        self._roots: dict[type, list[str]] = {}
        for network, model in models.items():
            self._roots.setdefault(type(model), []).append(network)
            self._look(model, network)

    def _look(self, model: Any, network: str) -> None:
        """Remember where the modules of ``model`` sit in it."""
        self._alive.append(model)
        head = f"{network}/" if network else ""
        self._paths.update({id(m): (head + path).strip("/") for path, m in modules_of(model)})

    @contextmanager
    def of(self, cls: Any) -> Iterator[None]:
        """Let calls of this class be noted."""
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
            kept = {n: v for n, v in vars(module).items() if isinstance(v, nnx.BatchStat)}
            x, mask = self._recording.given(
                path,
                args[0],
                kwargs.get("mask"),
                {name: jax.tree_util.tree_leaves(value)[0] for name, value in kept.items()},
                axis=getattr(module, "axis", -1),
                # A user's own module may mean the weight of the new value by the same word.
                momentum=module.momentum if isinstance(module, nnx.BatchNorm) else None,
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
    return all(isinstance(vars(module).get(name), nnx.BatchStat) for name in ("mean", "var"))


def _is_linear(module: Any) -> bool:
    return isinstance(module, nnx.Linear | nnx.Conv)


# Optax


@dataclass
class Updates:
    """What optimizers were given while a step ran.

    Attributes:
        gradients: for each update path -> gradient, as the values that they are.
        optimizers: what made each of the updates.
    """

    gradients: list[dict[tuple[str, ...], Any]] = field(default_factory=list)
    optimizers: list[Any] = field(default_factory=list)


@contextmanager
def updates() -> Iterator[Updates]:
    """Collect what optimizers are given while the context is open; mark nothing."""
    found = Updates()

    def collect(optimizer: Any, grads: Any) -> Any:
        leaves = jax.tree_util.tree_flatten_with_path(grads)[0]
        found.gradients.append({variable_path(path): leaf for path, leaf in leaves})
        found.optimizers.append(optimizer)
        return grads

    with _watched_optimizers(collect, (found.gradients, found.optimizers)):
        yield found


@contextmanager
def _watched_optimizers(
    seen: Callable[[Any, Any], Any], noted_of: tuple[list[Any], list[Any]]
) -> Iterator[None]:
    """Show the gradients that the outermost of nested optimizers is given; they go on as returned.

    An optimizer is a pair of functions, found under ``update`` wherever the step has it from: a
    train state, an argument, a closure. One whose whole result is given to another one, as a clip by
    hand is, is a part of that one: what was noted of it is taken back.

    Args:
        seen: told of each optimizer and its gradients; notes one item in each list of ``noted_of``.
        noted_of: these lists.
    """
    depth = [0]
    results: list[list[Any]] = []  # of each update that is noted: its leaves, which stay alive

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


# Evaluation by a training step: every model is told that it does not train.


@contextmanager
def evaluating() -> Iterator[None]:
    """Put every model that is called into eval mode, whatever mode the code around asks for."""

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
