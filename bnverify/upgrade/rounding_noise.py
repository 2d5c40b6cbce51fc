"""The rounding noise of recorded values: how far arithmetic may take them from the exact ones.

The noise of a value is finite; infinite, if rounding leaves no digits to compare; or NaN, if it is
unknown because the program contains something that cannot be evaluated.

The only place where recordings compute rounding.
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
    """Computes the rounding noise of one function, traced once for each shape of its arguments.

    Attributes:
        unread: why it cannot be computed; empty if it can.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self._ready: dict[Any, Any] = {}
        self.unread = ""

    def __call__(self, *stacked: Any) -> Any:
        """Return the noise as a pytree like the function's result, or None if it is unknown.

        Args:
            *stacked: the function's arguments, with a leading axis of cases on every leaf.
        """
        try:
            return self._read(stacked)
        except Exception as error:  # noqa: BLE001 - a step that runs but does not trace is not an error
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
    """Return a bound as float32, rounded up.

    If the program contains something unknown, an infinite bound may stem from it, so it becomes
    NaN.
    """
    with np.errstate(over="ignore"):
        narrow = (np.asarray(bound, np.float64) * (1 + 2.0**-23)).astype(np.float32)
    return np.where(np.isinf(narrow), np.float32("nan"), narrow) if unknown else narrow
