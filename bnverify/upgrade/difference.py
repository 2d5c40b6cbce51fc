"""One thing that an upgrade changed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Kind = Literal["api", "structure", "dtype", "initialisation", "rounding", "meaning"]

KINDS: tuple[Kind, ...] = get_args(Kind)
"""The classes of change, in the order in which they explain each other.

- api: the code no longer runs.
- structure: a tree has other leaves, or a leaf another shape.
- dtype: a leaf has another type.
- initialisation: the initial state of the same seed differs; the step from a given state need not.
- rounding: values differ within the rounding noise of either side.
- meaning: values differ beyond it, or a law that held is violated.
"""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One thing that differs between two recordings.

    Attributes:
        kind: its class, written `class` in files.
        subject: the name of what was recorded.
        leaf: the path of the leaf, as `params/Dense_0/kernel`; None where no leaf is to blame.
        size: how far apart the values are, in units of rounding noise; None where it is no number.
        text: what differs, in one line.
        witness: a standalone script that shows it, where there is one.
        explanation: the end of the text, where it says what explains every value; see `values`.
    """

    kind: Kind
    subject: str
    text: str
    leaf: str | None = None
    size: float | None = None
    witness: str | None = None
    explanation: str = ""

    def to_json(self) -> dict[str, str | float | None]:
        """Return the public JSON form."""
        return {
            "class": self.kind,
            "subject": self.subject,
            "leaf": self.leaf,
            "size": self.size,
            "text": self.text,
            "explanation": self.explanation,
            "witness": self.witness,
        }
