"""A data-parallel step: one device's part of it, beside the single-device step it must equal."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from bnverify.subject import State, StepInfo, Subject


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
        exempt: law name -> why the law does not apply.
    """

    name: str
    single: Subject
    step: Callable[..., tuple[State, StepInfo]]
    axis: str = "data"
    counted_step: Callable[..., tuple[State, StepInfo]] | None = None
    sharded_step: Callable[..., tuple[State, StepInfo]] | None = None
    exempt: Mapping[str, str] = field(default_factory=dict)
