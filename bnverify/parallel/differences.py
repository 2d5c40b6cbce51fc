"""How far the outcome on many devices is from that on one, in units of its rounding."""

from __future__ import annotations

from typing import Any

import numpy as np

from bnverify.lazy import jax
from bnverify.pytree import path_name
from bnverify.transition import Transition


def differences(seen: Any, t: Transition) -> dict[str, float]:
    """Return part of the outcome -> its worst error over the devices, in units of the noise.

    Loss and gradients are compared by their mean over the devices: whether a step reports its
    shard's own or the whole batch's is its own affair, what it does with them is not.
    """
    state, info = seen
    noise = t.noise
    parts: dict[str, tuple[Any, Any, Any]] = {
        name: (getattr(state, name), getattr(t.after, name), getattr(noise.state, name))
        for name in ("batch_stats", "params", "opt_state")
    }
    for name in ("loss", "grads"):
        reported, expected = getattr(info, name), getattr(t.info, name)
        if reported is not None and expected is not None:
            mean = jax.tree_util.tree_map(_mean, reported)
            parts[name] = (mean, expected, getattr(noise.info, name))
    return {name: worst(*part) for name, part in parts.items()}


def _mean(leaf: Any) -> Any:
    wide = np.asarray(leaf, np.float64)
    return wide.mean(axis=0, keepdims=True).astype(leaf.dtype)


def worst(actual: Any, expected: Any, noise: Any) -> float:
    """Return the worst error on any device: twice the noise is allowed, once for either run.

    The arithmetic of ``bnverify.laws.residuals.within_noise``, in NumPy: a case has thousands of
    such comparisons, each too small to be worth a call of JAX.
    """
    leaves, structure = jax.tree_util.tree_flatten(actual)
    if structure != jax.tree_util.tree_structure(expected):
        return float("inf")
    others, allowances = (jax.tree_util.tree_leaves(tree) for tree in (expected, noise))
    rows = zip(leaves, others, allowances, strict=True)
    return max((_residual(*row) for row in rows), default=-1.0)


def _residual(actual: Any, expected: Any, noise: Any) -> float:
    if actual.shape[1:] != expected.shape:
        return float("inf")
    tiny = np.finfo(expected.dtype).tiny if np.issubdtype(expected.dtype, np.floating) else 0.0
    allowed = 2 * np.asarray(noise, np.float64) + tiny
    compared = np.isfinite(expected) & np.isfinite(allowed)
    if not compared.any():
        return -1.0
    with np.errstate(all="ignore"):  # what is not finite is settled by the masks
        error = np.abs(np.asarray(actual, np.float64) - expected)
        ratio = np.where(error == 0, 0.0, error / allowed)
    return float(np.max(np.where(np.isnan(ratio), np.inf, ratio)[:, compared], initial=-1.0))


def disagreeing(seen: Any) -> list[str]:
    """Return the paths of the leaves of the state that are not the same on every device."""
    state, _ = seen
    leaves = jax.tree_util.tree_flatten_with_path(state)[0]
    return [
        path_name(path)
        for path, leaf in leaves
        if any(one.tobytes() != leaf[0].tobytes() for one in leaf[1:])
    ]
