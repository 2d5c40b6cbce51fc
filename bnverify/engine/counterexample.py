"""A violation as a script that can be pasted and run, and the replay of one case."""

from __future__ import annotations

from bnverify.case import Case, Domain
from bnverify.engine import proof
from bnverify.engine.exploration import Exploration
from bnverify.engine.judge import Judge, static_facts
from bnverify.engine.volume import Volume
from bnverify.laws import LAWS
from bnverify.subject import Subject


class Violation(AssertionError):
    """A law that a case breaks."""


def script(law: str, case: Case | None, target: str | None) -> str:
    """Return a script that shows the violation.

    Args:
        law: the broken law.
        case: the case that breaks it; None for a law of structure, which all cases break.
        target: how to find the subject; None: the reader puts it in.
    """
    subject = f"bnverify.load({target!r})" if target else "...  # the subject that was verified"
    shown = (
        case.code() if case is not None else "bnverify.Case.of(seed=0, x=[[1.0]], y=[0.0], lr=0.1)"
    )
    return (
        "import bnverify\n\n"
        f"subject = {subject}\n"
        f"case = {shown}\n"
        f"bnverify.replay(subject, case, law={law!r})\n"
    )


def replay(subject: Subject, case: Case, law: str) -> float | None:
    """Run one case, as a counterexample script does, and hold it to one law.

    Args:
        subject: what is verified.
        case: the case.
        law: the name of the law.

    Returns:
        The residual; None where the case does not reach the law's precondition.

    Raises:
        Violation: the case breaks the law.
        KeyError: no law has that name.
    """
    claim = LAWS[law]
    reading = proof.read(subject)
    if claim.kind == "structure":
        evidence = proof.judge_structure(claim, reading)
        if evidence.status == "violated":
            raise Violation(f"{law}: {evidence.reason}")
        return None
    abstract = reading.abstract
    facts = static_facts(subject, abstract) if abstract else {}
    judge = Judge(subject, facts, block=1)
    # What a stack of cases does differently takes a stack to show.
    volume = Volume(subject, [], judge, domain=Domain()) if "stacked" in claim.needs else None
    exploration = Exploration(subject, [claim], judge, volume)
    residual = exploration.residuals(case).get(law, -1.0)
    if residual > 1:
        raise Violation(
            f"{law}: {claim.claim} Off by {residual:.3g} times the error allowed. "
            f"{proof.explain(claim, reading)}".strip()
        )
    return None if residual < 0 else residual
