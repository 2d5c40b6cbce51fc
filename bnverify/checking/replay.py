"""One case, or one life, again: what a counterexample script and the next run of a suite do."""

from __future__ import annotations

from bnverify.case import Case
from bnverify.checking.claims import CLAIMS, LIFE, PARALLEL
from bnverify.engine import counterexample
from bnverify.lifetime.calls import batches, parse
from bnverify.lifetime.checkpoint import subject_of
from bnverify.lifetime.life import Life
from bnverify.parallel import check
from bnverify.parallel.subject import Parallel
from bnverify.target import Target
from bnverify.unusable import Unusable, did_you_mean


def replay(what: Target, case: Case, law: str) -> float | None:
    """Run one case, as a counterexample script does, and hold it to one law.

    Args:
        what: what is verified.
        case: the case.
        law: the name of a law, or of a claim about a step on many devices.

    Returns:
        The residual; None where the case does not reach the law's precondition.

    Raises:
        Violation: the case breaks the law.
        ValueError: no law has that name.
    """
    if law not in CLAIMS:
        raise Unusable(f"no law is named {law!r}{did_you_mean(law, CLAIMS)}")
    if isinstance(what, Parallel) and law in PARALLEL:
        residual = check.replay(what, case, law)
        return None if residual < 0 else residual
    return counterexample.replay(subject_of(what), case, law)


def again(what: Target, law: str, script: str) -> None:
    """Do what a counterexample script does, to ``what``.

    Args:
        what: what is verified.
        law: the law that the script broke.
        script: the counterexample.

    Raises:
        Violation: the law is still broken.
        ValueError: the script shows nothing that can be done.
    """
    if law in LIFE:
        Life(what).live(parse(script))
    else:
        replay(what, case_in(script), law)


def case_in(script: str) -> Case:
    """Return the case in a counterexample script.

    Raises:
        ValueError: there is none, or more than one.
    """
    found = batches(script)
    if len(found) != 1:
        raise ValueError(f"{len(found) or 'no'} case in the script")
    (case,) = found.values()
    return case
