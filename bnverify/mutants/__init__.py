"""Wrong training steps, each by name: what the verifier is verified with.

Each module of faults is one family. They enter the catalogue as they are imported, here, in the
order in which a step runs the parts that they spoil; none of them loads jax.
"""

from bnverify.mutants import (  # noqa: F401 - imported for what they enter into the catalogue
    carrying,
    controls,
    evaluation,
    gradient,
    inside_layer,
    loss,
    optimizer_use,
    statistics,
)
from bnverify.mutants.catalogue import CONTROLS, MUTANTS, Control, Mutant, control, mutant

__all__ = ["CONTROLS", "MUTANTS", "Control", "Mutant", "control", "mutant"]
