"""Laws of data parallelism: a step on shards of a batch equals the same step on the whole batch.

They are judged by running the step in each of JAX's ways to use several devices.
"""

from __future__ import annotations

from bnverify.laws.law import beyond_one_step

PMAP = "https://docs.jax.dev/en/latest/_autosummary/jax.pmap.html"
SYNCHRONISED = "Flax, BatchNorm: axis_name; https://github.com/google/flax/issues/877"

WRONG = (
    "statistics_not_synchronised",
    "moments_used_before_averaged",
    "variances_averaged",
    "gradients_not_synchronised",
    "gradients_summed",
    "mean_of_means",
    "clipped_before_averaged",
)

beyond_one_step(
    "parallel",
    "vmap_with_an_axis_equals_one_device",
    "Under jax.vmap with an axis name, the step on shards equals the step on the whole batch.",
    mistakes=WRONG,
    source=SYNCHRONISED,
)
beyond_one_step(
    "parallel",
    "pmap_equals_one_device",
    "Under jax.pmap, the step on shards equals the step on the whole batch.",
    mistakes=WRONG,
    source=PMAP,
)
beyond_one_step(
    "parallel",
    "shard_map_equals_one_device",
    "Under shard_map, the step on shards equals the step on the whole batch.",
    mistakes=WRONG,
    source="https://docs.jax.dev/en/latest/notebooks/shard_map.html",
)
beyond_one_step(
    "parallel",
    "jit_with_shardings_equals_one_device",
    "Under jax.jit with a sharded batch, the step equals the step on one device.",
    mistakes=WRONG,
    source="https://docs.jax.dev/en/latest/notebooks/Distributed_arrays_and_automatic_parallelization.html",
)
beyond_one_step(
    "parallel",
    "replicas_agree_to_the_bit",
    "After a step, params, statistics and optimizer state are bit-identical on all devices.",
    mistakes=("statistics_not_synchronised", "gradients_not_synchronised"),
    source="https://github.com/google/flax/issues/319",
)
beyond_one_step(
    "parallel",
    "unequal_shards_equal_one_device",
    "With a padded last batch, whose shards have different numbers of real rows, the step equals the "
    "step on the real rows alone.",
    mistakes=("unequal_shards", "mean_of_means"),
    source="https://github.com/google/flax/issues/2417",
)
