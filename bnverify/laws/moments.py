"""The moments of what a normalisation layer was given, in float64: what its statistics should hold."""

from __future__ import annotations

from typing import Any, NamedTuple

from bnverify.laws.residuals import wide
from bnverify.lazy import jnp
from bnverify.subject import LayerInput


class Moments(NamedTuple):
    """Of each feature, over all that counts.

    Attributes:
        mean: (*features,).
        var: (*features,), the biased variance.
        count: (*features,), how many numbers it is of.
    """

    mean: Any
    var: Any
    count: Any


def moments(given: LayerInput) -> Moments:
    """Return the moments of a layer's input."""
    value, weights = wide(given.value), _weights(given)
    count = jnp.sum(weights, axis=0)
    mean = jnp.sum(value * weights, axis=0) / count
    # In two passes: no digits are lost to cancellation.
    return Moments(mean, jnp.sum((value - mean) ** 2 * weights, axis=0) / count, count)


def apart_by(given: LayerInput, own: Moments, moved: Any) -> tuple[Any, Any]:
    """Return how far at most mean and variance move where each input moves by up to ``moved``.

    Args:
        given: a layer's input.
        own: its moments.
        moved: like the input's value.
    """
    weights = _weights(given)
    moved = jnp.where(weights > 0, moved, 0.0)
    deviation = jnp.abs(wide(given.value) - own.mean)
    of_var = jnp.sum((2 * deviation + moved) * moved * weights, axis=0) / own.count
    return jnp.sum(moved * weights, axis=0) / own.count, of_var


def _weights(given: LayerInput) -> Any:
    value = wide(given.value)
    if given.weights is None:
        return jnp.ones_like(value)
    return jnp.broadcast_to(wide(given.weights), value.shape)
