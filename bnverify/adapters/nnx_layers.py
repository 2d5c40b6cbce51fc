"""Notes the normalisation layers of an nnx module, by standing in for their ``__call__``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from flax import nnx

from bnverify.adapters.layers import Recording
from bnverify.adapters.modes import trains
from bnverify.adapters.nnx_compat import modules_of


@contextmanager
def noting(node: Any, recording: Recording) -> Iterator[None]:
    """Note and mark what the layers of ``node`` are given, while the context is open.

    nnx has no interception, so the classes of its layers get another ``__call__`` for the time.
    Only calls on the modules of this very ``node`` are noted: inside ``nnx.scan``, ``vmap`` or
    ``remat`` a module is a copy, and nothing is claimed of it.
    """
    paths = {id(module): path for path, module in modules_of(node)}
    layers = [module for _, module in modules_of(node) if _is_norm(module) or _is_linear(module)]
    busy: set[int] = set()  # a class and its base may both stand in for one call
    with ExitStack() as stack:
        for cls in dict.fromkeys(type(module) for module in layers):
            stack.enter_context(_standing_in(cls, paths, recording, busy))
        yield


@contextmanager
def _standing_in(
    cls: type, paths: dict[int, str], recording: Recording, busy: set[int]
) -> Iterator[None]:
    own = cls.__dict__.get("__call__")
    original: Any = cls.__call__

    def call(module: Any, *args: Any, **kwargs: Any) -> Any:
        path = paths.get(id(module))
        if path is None or id(module) in busy:
            return original(module, *args, **kwargs)
        busy.add(id(module))
        try:
            if _is_norm(module):
                args, kwargs = _given(module, path, args, kwargs, recording)
            out = original(module, *args, **kwargs)
        finally:
            busy.discard(id(module))
        if _is_linear(module) and _has_bias(module) and hasattr(out, "shape"):
            out = recording.biased(path, out)
        return out

    setattr(cls, "__call__", call)  # noqa: B010 - mypy refuses the assignment
    try:
        yield
    finally:
        if own is None:
            delattr(cls, "__call__")
        else:
            setattr(cls, "__call__", own)  # noqa: B010 - as above


def _is_norm(module: Any) -> bool:
    if isinstance(module, nnx.BatchNorm):
        return True
    return all(isinstance(vars(module).get(name), nnx.BatchStat) for name in ("mean", "var"))


def _is_linear(module: Any) -> bool:
    return isinstance(module, nnx.Linear | nnx.Conv)


def _has_bias(module: Any) -> bool:
    return bool(getattr(module, "use_bias", False))


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
