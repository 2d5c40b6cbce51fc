"""The rounding noise of what is recorded: how far float32 may take each value from the exact one.

Each value's noise is one of three things: a finite number; infinity, where rounding leaves no digits
to compare; NaN, where it is not known, because the program holds something that cannot be read.

This is the only place where the gate reads rounding.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from bnverify.errors import first_line
from bnverify.jaxpr.rounding import rounding
from bnverify.lazy import jax

if TYPE_CHECKING:
    from collections.abc import Callable


class Noise:
    """Reads the rounding of one function, traced for each shape of its arguments.

    Attributes:
        unread: why nothing is known; empty where something is.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self._ready: dict[Any, Any] = {}
        self.unread = ""

    def __call__(self, *stacked: Any) -> Any:
        """Return a tree like the function's result, of noise; None where none can be read.

        Args:
            *stacked: the function's arguments, with a leading axis of cases on every leaf.
        """
        try:
            return self._read(stacked)
        except Exception as error:  # noqa: BLE001 - a step that runs and cannot be read is no fault
            self.unread = first_line(error)
            return None

    def _read(self, stacked: Any) -> Any:
        leaves, structure = jax.tree_util.tree_flatten(stacked)
        key = structure, tuple((leaf.shape, str(leaf.dtype)) for leaf in leaves)
        if key not in self._ready:
            abstract = jax.tree_util.tree_map(
                lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), stacked
            )
            self._ready[key] = rounding(self._function, *abstract)
        reading = self._ready[key]
        noise = reading.evaluate(*stacked).noise
        unknown = bool(reading.unknown)
        return jax.tree_util.tree_map(lambda bound: _float32(bound, unknown), noise)


def _float32(bound: Any, unknown: bool) -> Any:
    """Return a bound as float32, half a unit too large rather than too small.

    Where the program holds something unknown, infinity may come from that, and so is not known.
    """
    with np.errstate(over="ignore"):
        narrow = (np.asarray(bound, np.float64) * (1 + 2.0**-23)).astype(np.float32)
    return np.where(np.isinf(narrow), np.float32("nan"), narrow) if unknown else narrow
