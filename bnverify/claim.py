"""Laws that are not of one transition: of a state's whole life, of a step on many devices."""

from __future__ import annotations

from dataclasses import dataclass

from bnverify.evidence import Evidence
from bnverify.mistakes import MISTAKES


@dataclass(frozen=True)
class Claim:
    """A law that one transition cannot show.

    Attributes:
        name: the claim.
        family: the family it belongs to.
        claim: the law in one sentence.
        mistakes: names in ``bnverify.mistakes``, the likeliest first.
        source: where the claim comes from.
    """

    name: str
    family: str
    claim: str
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


def diagnosis(mistake: str) -> str:
    """Return a mistake and its mend in one line."""
    known = MISTAKES[mistake]
    seen = f" Seen at {known.source}" if known.source else ""
    return f"{known.name}: {known.title}. Mend: {known.mend}.{seen}"
