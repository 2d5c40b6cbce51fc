"""What a user's step returns: the new state, and among the rest the loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

Reading: TypeAlias = str | Callable[[Any, Any], Any] | None
"""Where a report has its loss: a key, a function of (report, batch), or None to look for it."""


def state_and_report(returned: Any, kind: type) -> tuple[Any, Any]:
    """Return the state among what a step returned, and what else there is.

    Args:
        returned: the state, or a tuple with it; the rest is the report.
        kind: the class of the state.

    Returns:
        (state, report); None for either that is not there. A report of one part is that part.
    """
    if isinstance(returned, kind):
        return returned, None
    if not isinstance(returned, tuple | list) or not any(isinstance(r, kind) for r in returned):
        return None, returned
    state = next(part for part in returned if isinstance(part, kind))
    rest = [part for part in returned if part is not state]
    return state, rest[0] if len(rest) == 1 else tuple(rest) or None


def loss_of(report: Any, how: Reading, batch: Any) -> Any:
    """Return the loss in a report; None where it has none.

    Args:
        report: a mapping of metrics, a loss, or a tuple with one of them.
        how: see ``Reading``.
        batch: what the step was given.

    Raises:
        ValueError: the report has no entry of the name in ``how``.
    """
    if callable(how):
        return jnp.asarray(how(report, batch))
    for part in report if isinstance(report, tuple) else (report,):
        found = _in_part(part, how or "loss", named=how is not None)
        if found is not None:
            return jnp.asarray(found)
    if how is not None:
        raise ValueError(f"the step reports no {how!r}; it reports {_described(report)}")
    return None


def _in_part(part: Any, key: str, *, named: bool) -> Any:
    if isinstance(part, Mapping):
        return part.get(key)
    if named and hasattr(part, key):
        return getattr(part, key)
    is_number = isinstance(part, float) or (hasattr(part, "shape") and part.shape == ())
    return part if is_number and not named else None


def _described(report: Any) -> str:
    if isinstance(report, Mapping):
        return "the keys " + ", ".join(map(repr, report))
    return type(report).__name__


def inputs_and_targets(batch: Any) -> tuple[Any, Any]:
    """Return the two halves of a batch, for functions that take them apart.

    Args:
        batch: a pair, or a mapping whose first entry is the inputs and second the targets.
    """
    parts = list(batch.values()) if isinstance(batch, Mapping) else batch
    if isinstance(parts, tuple | list) and len(parts) >= 2:
        return parts[0], parts[1]
    return batch, None


def copied(tree: Any) -> Any:
    """Return ``tree`` with every concrete array copied: a step may donate what it is given."""
    return jax.tree_util.tree_map(
        lambda leaf: leaf if isinstance(leaf, jax.core.Tracer) else jnp.array(leaf), tree
    )
