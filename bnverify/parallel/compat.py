"""Differences between jax releases in mapping a function over devices, absorbed in one place."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import jax


def shard_map(function: Callable[..., Any], mesh: Any, in_specs: Any, out_specs: Any) -> Any:
    """Return ``function`` mapped over the shards of a mesh, without checked replication.

    ``jax.shard_map`` with ``check_vma`` from jax 0.6.2, where ``jax.experimental.shard_map`` with
    ``check_rep`` was before. Unchecked, a gradient inside is the shard's own and the user's pmean
    takes the mean, as under ``pmap``; checked, newer releases sum it already.
    """
    new: Any = getattr(jax, "shard_map", None)
    if new is not None:
        return new(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
    old: Any = import_module("jax.experimental.shard_map").shard_map
    return old(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_rep=False)


def has_pmap() -> bool:
    """Return whether this release still has ``jax.pmap``."""
    return getattr(jax, "pmap", None) is not None
