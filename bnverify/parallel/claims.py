"""What a step on many devices must agree on with the same step on one."""

from __future__ import annotations

from bnverify.claim import Claim

PMAP = "https://docs.jax.dev/en/latest/_autosummary/jax.pmap.html"
SYNCHRONISED = "Flax, BatchNorm: axis_name; https://github.com/google/flax/issues/877"

WRONG = (
    "statistics_not_synchronised",
    "variances_averaged",
    "gradients_not_synchronised",
    "gradients_summed",
    "mean_of_means",
)

CLAIMS: dict[str, Claim] = {
    claim.name: claim
    for claim in (
        Claim(
            "vmap_with_an_axis_equals_one_device",
            "parallel",
            "Under jax.vmap with an axis name, the shards' step is the step on the whole batch.",
            WRONG,
            SYNCHRONISED,
        ),
        Claim(
            "pmap_equals_one_device",
            "parallel",
            "Under jax.pmap, the shards' step is the step on the whole batch.",
            WRONG,
            PMAP,
        ),
        Claim(
            "shard_map_equals_one_device",
            "parallel",
            "Under shard_map, the shards' step is the step on the whole batch.",
            WRONG,
            "https://docs.jax.dev/en/latest/notebooks/shard_map.html",
        ),
        Claim(
            "jit_with_shardings_equals_one_device",
            "parallel",
            "Under jax.jit with a sharded batch, the step is the step on one device.",
            WRONG,
            "https://docs.jax.dev/en/latest/notebooks/Distributed_arrays_and_automatic_parallelization.html",
        ),
        Claim(
            "replicas_agree_to_the_bit",
            "parallel",
            "After a step every device has the same params, statistics and optimizer state.",
            ("statistics_not_synchronised", "gradients_not_synchronised"),
            "https://github.com/google/flax/issues/319",
        ),
        Claim(
            "unequal_shards_equal_one_device",
            "parallel",
            "With a padded last batch, whose shards have unequal numbers of rows, the step is "
            "the step on the real rows.",
            ("unequal_shards", "mean_of_means"),
            "https://github.com/google/flax/issues/2417",
        ),
    )
}
