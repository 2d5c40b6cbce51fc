"""A loop with Flax's TrainState as a Subject; see ``bnverify.adapters.loop``."""

from bnverify.adapters.batches import image_and_label
from bnverify.adapters.loop import train_state

__all__ = ["image_and_label", "train_state"]
