"""A claim that does not hold."""

from __future__ import annotations

from bnverify.claim import Claim, diagnosis
from bnverify.engine.counterexample import Violation
from bnverify.evidence import Evidence


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
            f"{claim.name}: {claim.claim} {reason}.\nUsually: {diagnosis(self.mistake)}{pasted}"
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
