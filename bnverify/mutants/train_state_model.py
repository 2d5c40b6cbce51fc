"""The TrainState behind the faults of TrainState steps; imported when a step runs."""

from __future__ import annotations

from typing import Any

from flax.training.train_state import TrainState


class TrainStateWithStatistics(TrainState):
    """A TrainState that carries the statistics beside the params, as Flax's guide has it."""

    batch_stats: Any
