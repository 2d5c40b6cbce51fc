"""Wrong training steps, each by name: what the verifier is verified with.

``python -m tests.faults``, from the root of the checkout, holds them to the laws. The faults of one step
and the correct controls are here, the others beside them: of whole loops in ``loops``, of the life of a
state in ``life``, of many devices in ``parallel``.
"""

from tests.faults import (  # noqa: F401 - imported for what they enter into the catalogue
    carrying,
    controls,
    frameworks,
    layer,
    losses,
    precision,
)
from tests.faults.catalogue import CONTROLS, FAULTS, Control, Fault

__all__ = ["CONTROLS", "FAULTS", "Control", "Fault"]
