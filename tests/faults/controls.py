"""Correct steps of many kinds, which must not violate any law."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import optax

from tests.faults.catalogue import control
from tests.faults.frameworks import NnxStep, TrainStateStep
from tests.faults.steps import (
    HandwrittenNorm,
    PaddedStep,
    WithSolution,
    adam,
    masked_adamw,
    masked_decay,
    momentum,
    of_two_positions,
)


def layer_norm(s: Any, h: Any, train: bool, layer: int, weights: Any) -> Any:
    return nn.LayerNorm(epsilon=s.epsilon, name=f"LayerNorm_{layer}")(h)


# Each row in as few lines as it takes:
# fmt: off

control("canonical", "The canonical step itself.")
control("one_channel", "A single hidden channel.", hidden=1)
control("three_channels", "Three hidden channels.", hidden=3)
control("thirty_two_channels", "More channels than rows.", hidden=32)

control("nine_tenths", "Momentum 0.9.", momentum=0.9)
control("one_half", "Momentum 0.5: old and new values have the same weight.", momentum=0.5)
control("no_memory", "Momentum 0: the statistics are the last batch's moments.", momentum=0.0)
control("nine_hundred_ninety_nine", "Momentum 0.999.", momentum=0.999)

control("momentum", "SGD with momentum 0.9.", optimizer=momentum)
control("adam", "Adam.", optimizer=adam)
control("adamw_masked", "AdamW that decays only the kernels.", optimizer=masked_adamw)
control("decay_masked", "SGD with weight decay of only the kernels.", optimizer=masked_decay)
control("nesterov", "SGD with Nesterov's momentum.",
        optimizer=lambda s, lr: optax.sgd(lr, momentum=0.9, nesterov=True))
control("adamw", "AdamW that decays all params, as declared.",
        optimizer=lambda s, lr: optax.adamw(lr, weight_decay=1e-2))
control("lion", "Lion, whose update is a sign.",
        optimizer=lambda s, lr: optax.lion(lr, weight_decay=0.0))
control("rmsprop", "RMSprop.", optimizer=lambda s, lr: optax.rmsprop(lr, decay=0.9))
control("clipped_and_declared",
        "SGD on gradients clipped to a global norm of 1, as declared by its optimizer.",
        optimizer=lambda s, lr: optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(lr)))

control("slow_variance", "The variance in two passes.", fast_variance=False)
control("two_layers", "Two normalised layers.", layers=2)
control("three_layers", "Three normalised layers.", layers=3)
control("larger_epsilon", "Epsilon 0.001.", epsilon=1e-3)
control("no_bias_before_norm", "The Dense before BatchNorm has no bias.", bias=False)
control("handwritten", "BatchNorm written out by hand.", HandwrittenNorm)
control("handwritten_slow_variance", "BatchNorm written out by hand, the variance in two passes.",
        HandwrittenNorm, fast_variance=False)
control("handwritten_over_two_positions",
        "The moments are over two positions of each row, and the divisor counts both.",
        HandwrittenNorm, moments=lambda s, h, layer: of_two_positions(h, 2 * len(h)))
control("handwritten_two_layers", "Two handwritten layers.", HandwrittenNorm, layers=2)
control("one_call", "Has the one-call function as well.", WithSolution)

control("layer_norm_only", "LayerNorm instead of BatchNorm: there are no statistics.",
        momentum=None, normalise=layer_norm,
        # The mean over channels removes only the mean of the biases.
        biases_before_norm=lambda s: ())
control("padded_and_masked",
        "The batch is padded to a multiple of four, and both BatchNorm and the loss mask that.",
        PaddedStep)
control("inputs_scaled",
        "Inputs are divided by 1024 before the model, in training and evaluation alike.",
        batch=lambda s, x, y: (x / 1024.0, y),
        evaluate=lambda s, state, x, y: s.right.evaluate(state, x / 1024.0, y))
control("eval_loss_is_a_scalar",
        "Evaluation returns a scalar, as most evaluations do.",
        evaluate=lambda s, state, x, y: s.right.evaluate(state, x, y).reshape(()))

control("nnx", "The canonical step around an nnx module.", NnxStep)
control("nnx_half_momentum", "An nnx module of momentum 0.5.", NnxStep, momentum=0.5)
control("train_state", "The canonical step around a TrainState.", TrainStateStep)
