"""The ways in which a step is mapped over devices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from bnverify.lazy import jax
from bnverify.parallel.compat import shard_map
from bnverify.parallel.subject import DEVICES, Parallel

Mapped = Callable[..., Any]


class Mode(NamedTuple):
    """A way to map a step over devices.

    Attributes:
        claim: the claim that it is held to.
        make: Parallel -> ``(state, x, y, lr) -> (State, StepInfo)``, every leaf with a leading
            axis over the devices.
        devices: how many devices it needs.
    """

    claim: str
    make: Callable[[Parallel], Mapped]
    devices: int


def by_vmap(parallel: Parallel) -> Mapped:
    """Return the step under ``jax.vmap`` with an axis name, compiled."""
    mapped = jax.jit(jax.vmap(parallel.step, in_axes=(None, 0, 0, None), axis_name=parallel.axis))
    return lambda state, x, y, lr: mapped(state, split(x), split(y), lr)


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


def by_counts(parallel: Parallel) -> Mapped:
    """Return the step with padding under ``jax.vmap``, its batch padded to shards of equal size.

    Zeros are what padding usually is; a fault that counts them shows in the moments.
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


def by_shardings(parallel: Parallel) -> Mapped:
    """Return the whole step under ``jax.jit`` with its batch sharded and the rest on all devices."""
    spec = jax.sharding.PartitionSpec
    mesh = _mesh(parallel.axis)
    shared = jax.sharding.NamedSharding(mesh, spec())
    sharded = jax.sharding.NamedSharding(mesh, spec(parallel.axis))
    step = parallel.sharded_step or parallel.single.step
    jitted = jax.jit(
        step,
        in_shardings=(shared, sharded, sharded, shared),
        out_shardings=shared,
    )

    def run(*args: Any) -> Any:
        return jax.tree_util.tree_map(lambda leaf: np.asarray(leaf)[None], jitted(*args))

    return run


def _mesh(axis: str) -> Any:
    return jax.sharding.Mesh(np.array(jax.devices()[:DEVICES]), (axis,))


def split(rows: Any) -> Any:
    """Return rows (N, ...) as shards (DEVICES, N / DEVICES, ...)."""
    return rows.reshape(DEVICES, -1, *rows.shape[1:])


MODES = {
    "vmap": Mode("vmap_with_an_axis_equals_one_device", by_vmap, 1),
    "pmap": Mode("pmap_equals_one_device", by_pmap, DEVICES),
    "shard_map": Mode("shard_map_equals_one_device", by_shard_map, DEVICES),
    "jit": Mode("jit_with_shardings_equals_one_device", by_shardings, DEVICES),
    "counts": Mode("unequal_shards_equal_one_device", by_counts, 1),
}
