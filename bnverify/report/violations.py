"""The violations of a report by their likely cause: one mistake usually breaks several laws."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bnverify.evidence import Cause, Counterexample, Evidence, Report


@dataclass(frozen=True)
class Group:
    """Violations with one likely cause.

    Attributes:
        cause: the mistake; None where none is known, which makes a group of one violation.
        violations: at least one, in the order of the laws.
    """

    cause: Cause | None
    violations: tuple[Evidence, ...]

    @property
    def title(self) -> str:
        """The law; where several are broken, the cause and their number."""
        if self.cause is None or len(self.violations) == 1:
            return self.violations[0].law
        return f"{self.cause.mistake}: {len(self.violations)} laws violated"

    @property
    def shown(self) -> Counterexample | None:
        """The counterexample of the simplest case."""
        simplest = self._simplest
        return simplest.counterexample if simplest is not None else None

    @property
    def line(self) -> str | None:
        """The line in the user's code that the first violation with a known line leads to."""
        return next((each.line for each in self.violations if each.line), None)

    @property
    def which(self) -> str:
        """Of which of several laws the counterexample is, to be added to a heading."""
        simplest = self._simplest
        return f" {simplest.law}" if simplest is not None and len(self.violations) > 1 else ""

    @property
    def _simplest(self) -> Evidence | None:
        shown = [each for each in self.violations if each.counterexample is not None]
        return min(shown, key=_simplicity, default=None)


def _simplicity(evidence: Evidence) -> tuple[bool, bool, int]:
    """Return what sorts the case that says most first: one that was shrunk, and a small one.

    A law that no case showed keeps any case; a law of structure is broken by every case.
    """
    shape = evidence.shape
    return evidence.mismatch is None, shape is None, prod(shape or ())


def groups(report: Report) -> list[Group]:
    """Return the violations of a report by cause, the cause that explains most first."""
    found: dict[str, list[Evidence]] = {}
    for evidence in report.violated:
        name = evidence.cause.mistake if evidence.cause is not None else f"law {evidence.law}"
        found.setdefault(name, []).append(evidence)
    ordered = sorted(found.values(), key=len, reverse=True)
    return [Group(violations[0].cause, tuple(violations)) for violations in ordered]
