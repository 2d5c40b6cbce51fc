"""The canonical step around other optimizers, for faults that need one with a state."""

from __future__ import annotations

from typing import Any

from bnverify.lazy import LazyModule
from bnverify.mutants.canonical import CanonicalStep
from bnverify.mutants.trees import kernels

optax: Any = LazyModule("optax")

DECAY = 1e-2


class WithMomentum(CanonicalStep):
    """SGD with momentum 0.9: its state has one buffer like the params."""

    def optimizer(self, lr: Any) -> Any:
        """Return SGD with momentum."""
        return optax.sgd(lr, momentum=0.9)


class WithAdam(CanonicalStep):
    """Adam: two buffers and a count."""

    def optimizer(self, lr: Any) -> Any:
        """Return Adam."""
        return optax.adam(lr)


class WithMaskedDecay(CanonicalStep):
    """SGD with weight decay on the kernels alone, as it should be."""

    def optimizer(self, lr: Any) -> Any:
        """Return SGD with masked decay."""
        return optax.chain(optax.add_decayed_weights(DECAY, mask=kernels), optax.sgd(lr))


class WithMaskedAdamW(CanonicalStep):
    """AdamW, its decay on the kernels alone."""

    def optimizer(self, lr: Any) -> Any:
        """Return AdamW with masked decay."""
        return optax.adamw(lr, weight_decay=DECAY, mask=kernels)
