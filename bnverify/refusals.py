"""Mistakes that JAX and Flax refuse themselves: from the exception to the mistake's name."""

from __future__ import annotations

from bnverify.mistakes import MISTAKES, Mistake

SAID = (
    # Words of the message, all of which must be there, in any release supported -> the mistake.
    (("batch_stats", "immutable"), "mutable_forgotten"),
    # jax.grad shows the value it got: "Output was (Array(0.2, dtype=float32), {...})".
    (("Gradient only defined for scalar-output functions", "Output was ("), "has_aux_forgotten"),
    (("Gradient only defined for scalar-output functions",), "loss_not_reduced"),
)


def mistake(error: BaseException) -> Mistake | None:
    """Return the mistake that usually raises ``error``; None where no common one is known."""
    text = str(error)
    for words, name in SAID:
        if all(word in text for word in words):
            return MISTAKES[name]
    return None
