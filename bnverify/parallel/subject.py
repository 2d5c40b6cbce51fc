"""A data-parallel step must be the single-device step, within the rounding of that step.

A ``Parallel`` is one device's part of a step, as a user writes it for ``pmap`` or ``shard_map``,
beside the single-device step that it must equal. It is run under every way of mapping that this
release of jax has; its tolerance is the single step's own rounding noise.

Four devices are simulated on the CPU. XLA reads how many there are when jax starts, so
``check_parallel`` checks a target in a process of its own (``bnverify.parallel.runner``); given a
``Parallel`` it checks here, what the devices of this process allow.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from bnverify.claim import Claim
from bnverify.evidence import Evidence
from bnverify.profile import Profile
from bnverify.subject import State, StepInfo, Subject

DEVICES = 4

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


@dataclass(frozen=True)
class Parallel:
    """A data-parallel step under verification.

    Attributes:
        name: how reports call it.
        single: the step on one device that it must equal; its ``init`` makes the state.
        step: one device's part, called with ``axis`` mapped over the devices: ``(state, x, y, lr)
            -> (State, StepInfo)`` of its shard, the state being the same on all.
        axis: the name of the mapped axis.
        counted_step: the same for shards with padding, ``(state, x, y, weights, lr)``: weights
            (n,) are 1 for rows that count and 0 for the others. None: it takes no padding.
        sharded_step: the whole step as it is given to ``jax.jit`` with a sharded batch; None:
            the single-device step itself, which JAX splits.
        exempt: claim -> why it does not apply.
    """

    name: str
    single: Subject
    step: Callable[..., tuple[State, StepInfo]]
    axis: str = "data"
    counted_step: Callable[..., tuple[State, StepInfo]] | None = None
    sharded_step: Callable[..., tuple[State, StepInfo]] | None = None
    exempt: Mapping[str, str] = field(default_factory=dict)


def check_parallel(
    what: str | Parallel = "bnverify.mutants.parallel_step:reference",
    profile: str | Profile = "ci",
    seed: int = 0,
) -> list[Evidence]:
    """Hold a data-parallel step to the claims and return what is known about each.

    Args:
        what: ``package.module:name`` or ``path/file.py:name`` of a Parallel or of a function that
            makes one: it is checked in a process with four simulated devices. A Parallel itself
            is checked in this process; what it has too few devices for reads "untriggered".
        profile: how much to do.
        seed: from which the cases are drawn.

    Raises:
        ValueError: the profile is unknown, or nothing can be made of ``what``.
    """
    if isinstance(what, Parallel):
        from bnverify.parallel.check import Check

        return Check(what, profile, seed).run()
    from bnverify.parallel.runner import run

    return run([what], profile, seed)[what]
