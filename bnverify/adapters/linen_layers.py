"""Notes the normalisation layers of a linen module, by intercepting their calls."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import flax.linen as nn

from bnverify.adapters.layers import Recording
from bnverify.adapters.modes import trains


@dataclass(frozen=True)
class Interceptor:
    """For ``flax.linen.intercept_methods``: notes and marks, changes nothing.

    Attributes:
        recording: where calls are noted.
        statistics: the collection that holds running statistics.
    """

    recording: Recording
    statistics: str = "batch_stats"

    def __call__(self, call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        """Run one method call, noting it where it is a layer's."""
        module = context.module
        with self.recording.root_call() if not module.path else nullcontext():
            if context.method_name != "__call__":
                return call(*args, **kwargs)
            return self._layer(module, call, args, kwargs)

    def _layer(self, module: nn.Module, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        path = "/".join(module.path)
        if isinstance(module, nn.SpectralNorm):
            self.recording.power_iterated.add(path)
        if args and hasattr(args[0], "shape") and self._keeps_moments(module):
            x, mask = self.recording.given(
                path,
                args[0],
                kwargs.get("mask"),
                axis=getattr(module, "axis", -1),
                # A user's own module may mean the weight of the new value by the same word.
                momentum=module.momentum if isinstance(module, nn.BatchNorm) else None,
                training=_trains(module, args, kwargs),
            )
            args = (x, *args[1:])
            kwargs = kwargs if mask is None else {**kwargs, "mask": mask}
        out = call(*args, **kwargs)
        if isinstance(module, nn.Dense | nn.Conv) and module.use_bias and hasattr(out, "shape"):
            out = self.recording.biased(path, out)
        return out

    def _keeps_moments(self, module: nn.Module) -> bool:
        if isinstance(module, nn.BatchNorm):
            return True
        return all(module.has_variable(self.statistics, name) for name in ("mean", "var"))


def _trains(module: nn.Module, args: Any, kwargs: Any) -> bool:
    """Return whether a normalisation layer normalises by the batch's own moments."""
    said = dict(vars(module)) | {k: v for k, v in kwargs.items() if v is not None}
    if isinstance(module, nn.BatchNorm) and len(args) > 1 and args[1] is not None:
        said["use_running_average"] = args[1]
    return trains(said) is not False
