"""Notes the normalisation layers of an nnx module, by standing in for their ``__call__``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

from flax import nnx

from bnverify.adapters.layers import Recording
from bnverify.adapters.modes import trains
from bnverify.adapters.nnx_compat import modules_of


@contextmanager
def noting(model: Any, recording: Recording) -> Iterator[None]:
    """Note and mark what the layers of ``model`` are given, while the context is open.

    nnx has no interception, so the classes of the model and of its layers get another
    ``__call__`` for the time. Noted are calls on modules of the model being called, which
    ``nnx.grad`` and ``nnx.jit`` copy; of a layer that is copied further in (``nnx.scan``,
    ``vmap``, ``remat``) nothing is claimed.
    """
    layers = [module for _, module in modules_of(model) if _is_norm(module) or _is_linear(module)]
    stand_in = _StandIn(type(model), recording)
    stand_in.look(model)
    with ExitStack() as stack:
        for cls in dict.fromkeys([type(model), *(type(module) for module in layers)]):
            stack.enter_context(stand_in.of(cls))
        yield


class _StandIn:
    """What calls of a model's classes go through while it is noted."""

    def __init__(self, root: type, recording: Recording) -> None:
        self._root = root
        self._recording = recording
        self._paths: dict[int, str] = {}
        self._alive: list[Any] = []  # an id is a module's own only as long as that exists
        self._busy: set[int] = set()  # a class and its base may both stand in for one call

    def look(self, model: Any) -> None:
        """Remember where the modules of ``model`` sit in it."""
        self._alive.append(model)
        self._paths.update({id(module): path for path, module in modules_of(model)})

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
            is_root = type(module) is self._root
            if is_root and id(module) not in self._paths:
                self.look(module)
            self._busy.add(id(module))
            try:
                with self._recording.root_call() if is_root else nullcontext():
                    return self._noted(original, module, args, kwargs)
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
        if path is not None and _is_norm(module):
            args, kwargs = _given(module, path, args, kwargs, self._recording)
        out = original(module, *args, **kwargs)
        if path is None or not _is_linear(module) or not hasattr(out, "shape"):
            return out
        return self._recording.biased(path, out) if getattr(module, "use_bias", False) else out


def _is_norm(module: Any) -> bool:
    if isinstance(module, nnx.BatchNorm):
        return True
    return all(isinstance(vars(module).get(name), nnx.BatchStat) for name in ("mean", "var"))


def _is_linear(module: Any) -> bool:
    return isinstance(module, nnx.Linear | nnx.Conv)


def _given(
    module: Any, path: str, args: Any, kwargs: Any, recording: Recording
) -> tuple[Any, dict[str, Any]]:
    if not args or not hasattr(args[0], "shape"):
        return args, kwargs
    said = dict(vars(module)) | {k: v for k, v in kwargs.items() if v is not None}
    if isinstance(module, nnx.BatchNorm) and len(args) > 1 and args[1] is not None:
        said["use_running_average"] = args[1]
    x, mask = recording.given(
        path,
        args[0],
        kwargs.get("mask"),
        axis=getattr(module, "axis", -1),
        # A user's own module may mean the weight of the new value by the same word.
        momentum=module.momentum if isinstance(module, nnx.BatchNorm) else None,
        training=trains(said) is not False,
    )
    return (x, *args[1:]), kwargs if mask is None else {**kwargs, "mask": mask}
