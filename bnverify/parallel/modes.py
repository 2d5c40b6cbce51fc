"""The ways in which a step is mapped over devices."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any, NamedTuple

import numpy as np

from bnverify.evidence import DEVICES
from bnverify.lazy import jax
from bnverify.model import Parallel

Mapped = Callable[..., Any]
"""``(state, x, y, lr) -> (State, StepInfo)``, every leaf with a leading axis over the devices."""


class Mode(NamedTuple):
    """A way to map a step over devices.

    Attributes:
        make: (the step) -> the mapped step.
        devices: the number of devices that it needs.
        replicated: whether every device has its own copy of the state.
    """

    make: Callable[[Parallel], Mapped]
    devices: int = DEVICES
    replicated: bool = False


def by_vmap(parallel: Parallel) -> Mapped:
    """Return the step under ``jax.vmap`` with an axis name, compiled."""
    mapped = jax.jit(jax.vmap(parallel.step, in_axes=(None, 0, 0, None), axis_name=parallel.axis))
    return lambda state, x, y, lr: mapped(state, split(x), split(y), lr)


def has_pmap() -> bool:
    """Return whether this release still has ``jax.pmap``."""
    return getattr(jax, "pmap", None) is not None


def by_pmap(parallel: Parallel) -> Mapped:
    """Return the step under ``jax.pmap``."""
    mapped = jax.pmap(
        parallel.step,
        in_axes=(None, 0, 0, None),
        axis_name=parallel.axis,
        devices=jax.devices()[:DEVICES],
    )
    return lambda state, x, y, lr: mapped(state, split(x), split(y), lr)


def by_shard_map(parallel: Parallel) -> Mapped:
    """Return the step under ``shard_map``, compiled."""
    spec = jax.sharding.PartitionSpec
    shared, sharded = spec(), spec(parallel.axis)

    def one(*args: Any) -> Any:
        return jax.tree_util.tree_map(lambda leaf: leaf[None], parallel.step(*args))

    specs = (shared, sharded, sharded, shared)
    mapped: Mapped = jax.jit(shard_map(one, _mesh(parallel.axis), specs, sharded))
    return mapped


def shard_map(function: Callable[..., Any], mesh: Any, in_specs: Any, out_specs: Any) -> Any:
    """Return ``function`` mapped over the shards of a mesh, without checking replication.

    ``jax.shard_map`` with ``check_vma`` from jax 0.6.2 on, ``jax.experimental.shard_map`` with
    ``check_rep`` before. Without the check, a gradient inside is that of the shard, and the user's
    pmean averages it, as under ``pmap``; with it, newer releases already sum the gradient.
    """
    new: Any = getattr(jax, "shard_map", None)
    if new is not None:
        return new(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
    old: Any = import_module("jax.experimental.shard_map").shard_map
    return old(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_rep=False)


def by_shardings(parallel: Parallel) -> Mapped:
    """Return the whole step under ``jax.jit`` with a sharded batch and everything else replicated."""
    spec = jax.sharding.PartitionSpec
    mesh = _mesh(parallel.axis)
    shared = jax.sharding.NamedSharding(mesh, spec())
    sharded = jax.sharding.NamedSharding(mesh, spec(parallel.axis))
    jitted = jax.jit(
        parallel.sharded_step or parallel.single.step,
        in_shardings=(shared, sharded, sharded, shared),
        out_shardings=shared,
    )
    return lambda *args: jax.tree_util.tree_map(lambda leaf: np.asarray(leaf)[None], jitted(*args))


def by_counts(parallel: Parallel) -> Mapped:
    """Return the step with padding under ``jax.vmap``, its batch padded with zeros to equal shards.

    A step that counts the zeros has wrong moments.
    """
    axes = (None, 0, 0, 0, None)
    mapped = jax.jit(jax.vmap(parallel.counted_step, in_axes=axes, axis_name=parallel.axis))

    def run(state: Any, x: Any, y: Any, lr: Any) -> Any:
        rows = len(x)
        room = -(-rows // DEVICES) * DEVICES
        weights = (np.arange(room) < rows).astype(np.float32)
        x = np.concatenate([x, np.zeros((room - rows, x.shape[1]), np.float32)])
        y = np.concatenate([y, np.zeros(room - rows, np.float32)])
        return mapped(state, split(x), split(y), split(weights), lr)

    return run


def _mesh(axis: str) -> Any:
    return jax.sharding.Mesh(np.array(jax.devices()[:DEVICES]), (axis,))


def split(rows: Any) -> Any:
    """Return rows (N, ...) as shards (DEVICES, N / DEVICES, ...)."""
    return rows.reshape(DEVICES, -1, *rows.shape[1:])


PMAP = "pmap_equals_one_device"
UNEQUAL = "unequal_shards_equal_one_device"

MODES = {
    "vmap_with_an_axis_equals_one_device": Mode(by_vmap, devices=1),
    PMAP: Mode(by_pmap, replicated=True),
    "shard_map_equals_one_device": Mode(by_shard_map, replicated=True),
    "jit_with_shardings_equals_one_device": Mode(by_shardings),
    UNEQUAL: Mode(by_counts, devices=1),
}
"""Name of a law -> the mode that it compares with the step on one device."""
