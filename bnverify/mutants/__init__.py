"""Wrong training steps, each by name: what the verifier is verified with.

Each module of faults is one family. They enter the catalogue as they are imported, here; none of
them loads jax.
"""

from bnverify.mutants import (  # noqa: F401 - imported for what they enter into the catalogue
    carrying,
    controls,
    evaluation,
    gradient,
    ignoring,
    inside_layer,
    loss,
    low_precision,
    nnx_faults,
    one_layer,
    optimizer_use,
    shapes,
    sizes,
    small,
    statistics,
    train_state_faults,
    two_steps,
)
from bnverify.mutants.catalogue import CONTROLS, MUTANTS, Control, Mutant, control, mutant

__all__ = ["CONTROLS", "MUTANTS", "Control", "Mutant", "control", "mutant"]
