"""Correct steps, as unlike each other as correct steps are: no law may object to one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bnverify.lazy import LazyModule
from bnverify.model import State
from bnverify.mutants import canonical
from bnverify.mutants.canonical import CanonicalStep, HandwrittenNorm
from bnverify.mutants.catalogue import control
from bnverify.mutants.evaluation import WithSolution
from bnverify.mutants.loss import PaddingEntersStatistics
from bnverify.mutants.nnx_faults import NnxStep
from bnverify.mutants.optimizers import (
    WithAdam,
    WithMaskedAdamW,
    WithMaskedDecay,
    WithMomentum,
)
from bnverify.mutants.train_state_faults import TrainStateStep

optax: Any = LazyModule("optax")


def variant(name: str, sentence: str, base: type[CanonicalStep], **changes: Any) -> None:
    """Enter ``base`` with other settings as a correct step."""
    control(type(name, (base,), {"__doc__": sentence, **changes}))


def around(name: str, sentence: str, make: Callable[[Any], Any]) -> None:
    """Enter the canonical step around another optimizer as a correct step."""
    variant(name, sentence, CanonicalStep, optimizer=lambda self, lr: make(lr))


variant("Canonical", "The canonical step itself.", CanonicalStep)
variant("OneChannel", "A single hidden channel.", CanonicalStep, hidden=1)
variant("ThreeChannels", "Three hidden channels.", CanonicalStep, hidden=3)
variant("ThirtyTwoChannels", "More channels than rows.", CanonicalStep, hidden=32)

variant("NineTenths", "Momentum 0.9.", CanonicalStep, momentum=0.9)
variant("OneHalf", "Momentum 0.5: old and new weigh the same.", CanonicalStep, momentum=0.5)
variant("NoMemory", "Momentum 0: the last batch's moments.", CanonicalStep, momentum=0.0)
variant("NineHundredNinetyNine", "Momentum 0.999.", CanonicalStep, momentum=0.999)

variant("Momentum", "SGD with momentum 0.9.", WithMomentum)
variant("Adam", "Adam.", WithAdam)
variant("AdamwMasked", "AdamW that decays the kernels alone.", WithMaskedAdamW)
variant("DecayMasked", "SGD with a decay of the kernels alone.", WithMaskedDecay)
around(
    "Nesterov",
    "SGD with Nesterov's momentum.",
    lambda lr: optax.sgd(lr, momentum=0.9, nesterov=True),
)
around(
    "Adamw",
    "AdamW that decays every parameter, and says so.",
    lambda lr: optax.adamw(lr, weight_decay=1e-2),
)
around("Lion", "Lion, whose update is a sign.", lambda lr: optax.lion(lr, weight_decay=0.0))
around("Rmsprop", "RMSprop.", lambda lr: optax.rmsprop(lr, decay=0.9))
around(
    "ClippedAndDeclared",
    "SGD on gradients clipped to a global norm of 1, as its optimizer declares.",
    lambda lr: optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(lr)),
)

variant("SlowVariance", "The variance in two passes.", CanonicalStep, fast_variance=False)
variant("TwoLayers", "Two normalised layers.", CanonicalStep, layers=2)
variant("ThreeLayers", "Three normalised layers.", CanonicalStep, layers=3)
variant("LargerEpsilon", "Epsilon 0.001.", CanonicalStep, epsilon=1e-3)
variant("NoBiasBeforeNorm", "The Dense before BatchNorm has no bias.", CanonicalStep, bias=False)
variant("Handwritten", "BatchNorm written out by hand.", HandwrittenNorm)
variant(
    "HandwrittenSlowVariance",
    "BatchNorm written out by hand, the variance in two passes.",
    HandwrittenNorm,
    fast_variance=False,
)
variant("HandwrittenTwoLayers", "Two handwritten layers.", HandwrittenNorm, layers=2)
variant("OneCall", "Has the one-call function as well.", WithSolution)


@control
class LayerNormOnly(CanonicalStep):
    """LayerNorm in place of BatchNorm: no statistics at all."""

    momentum = None

    def normalise(self, h: Any, train: bool, layer: int, weights: Any) -> Any:
        """Normalise rows."""
        return canonical.model.flax_layer_norm(self, h, layer)

    def biases_before_norm(self) -> tuple[str, ...]:
        """Return none: the mean over channels takes away only what all biases share."""
        return ()


@control
class PaddedAndMasked(PaddingEntersStatistics):
    """The batch is padded to a multiple of four, and both BatchNorm and the loss mask that."""

    def mask(self, weights: Any) -> Any:
        """Mask BatchNorm."""
        return weights


@control
class InputsScaled(CanonicalStep):
    """Inputs are divided by 1024 before the model, in training and evaluation alike."""

    def batch(self, x: Any, y: Any) -> tuple[Any, Any]:
        """Scale."""
        return x / 1024.0, y

    def evaluate(self, state: State, x: Any, y: Any) -> Any:
        """Scale likewise."""
        return super().evaluate(state, x / 1024.0, y)


@control
class EvalLossIsAScalar(CanonicalStep):
    """Evaluation returns its one number as a scalar, as most evaluations do."""

    def evaluate(self, state: State, x: Any, y: Any) -> Any:
        """Return a scalar."""
        return super().evaluate(state, x, y).reshape(())


variant("Nnx", "The canonical step around an nnx module.", NnxStep)
variant("NnxHalfMomentum", "An nnx module of momentum 0.5.", NnxStep, momentum=0.5)
variant("TrainState", "The canonical step around a TrainState.", TrainStateStep)
