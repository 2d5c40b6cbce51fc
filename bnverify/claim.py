"""Laws that are not of one transition: of a state's whole life, of a step on many devices."""

from __future__ import annotations

from dataclasses import dataclass

from bnverify.engine.counterexample import Violation
from bnverify.evidence import Evidence
from bnverify.mistakes import MISTAKES


@dataclass(frozen=True)
class Claim:
    """A law that one transition cannot show.

    Attributes:
        name: the claim.
        family: the family it belongs to.
        sentence: the law in one sentence.
        mistakes: names in ``bnverify.mistakes``, the likeliest first.
        source: where the claim comes from.
    """

    name: str
    family: str
    sentence: str
    mistakes: tuple[str, ...]
    source: str = ""

    def evidence(
        self,
        status: str,
        *,
        cases: int = 0,
        residual: float | None = None,
        reason: str = "",
        counterexample: str | None = None,
        mistake: str = "",
        shape: tuple[int, int] | None = None,
    ) -> Evidence:
        """Return what is known about this law; see :class:`bnverify.evidence.Evidence`."""
        return Evidence(
            self.name,
            self.family,
            status,  # type: ignore[arg-type]  # one of Evidence's own statuses, as the callers write them
            cases=cases,
            residual=residual,
            reason=reason,
            counterexample=counterexample,
            diagnosis=diagnosis(mistake) if mistake else None,
            shape=shape,
        )


class Broken(Violation):
    """A claim that does not hold.

    Attributes:
        claim: the claim.
        reason: what was seen, one line.
        mistake: the likeliest mistake, a name in ``bnverify.mistakes``.
        script: shows it when pasted and run.
        shape: (N, D) of the batches.
        residual: the error in units of the error allowed.
    """

    def __init__(
        self,
        claim: Claim,
        reason: str,
        *,
        mistake: str = "",
        script: str = "",
        shape: tuple[int, int] | None = None,
        residual: float = float("inf"),
    ) -> None:
        self.claim = claim
        self.reason = reason
        self.mistake = mistake or claim.mistakes[0]
        self.script = script
        self.shape = shape
        self.residual = residual
        pasted = f"\nTo see it, paste into Python:\n\n{script}" if script else ""
        super().__init__(
            f"{claim.name}: {claim.sentence} {reason}.\nUsually: {diagnosis(self.mistake)}{pasted}"
        )

    def evidence(self, cases: int) -> Evidence:
        """Return this violation as evidence, after so many cases."""
        return self.claim.evidence(
            "violated",
            cases=cases,
            residual=self.residual,
            reason=self.reason,
            counterexample=self.script or None,
            mistake=self.mistake,
            shape=self.shape,
        )


def diagnosis(mistake: str) -> str:
    """Return a mistake and its mend in one line."""
    known = MISTAKES[mistake]
    seen = f" Seen at {known.source}" if known.source else ""
    return f"{known.name}: {known.title}. Mend: {known.mend}.{seen}"
