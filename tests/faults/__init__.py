"""The catalogue of faults: wrong training steps, each with a name, which the laws must detect.

``python -m tests.faults``, from the root of the checkout, checks the first of them against the laws. ``FAULTS`` has the
faults of a single step, ``CONTROLS`` correct steps. The others are in modules of their own: faults of whole
loops in ``loops`` and ``libraries``, of saving and restoring in ``life``, of several devices in ``parallel``,
of several processes in ``processes``; tests of their own check these.
"""

from tests.faults import (  # noqa: F401 - importing them fills the catalogue
    carrying,
    controls,
    frameworks,
    layer,
    losses,
    precision,
)
from tests.faults.catalogue import CONTROLS, FAULTS, Control, Fault

__all__ = ["CONTROLS", "FAULTS", "Control", "Fault"]
