"""Verdicts of the laws without Hypothesis: proofs, and stacked cases of one shape.

The only place where recordings judge laws.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from bnverify import proof
    from bnverify.laws import Law

BLOCK = 128


def verdicts(subject: Any, shape: tuple[int, int], seed: int) -> tuple[dict[str, Any], Any]:
    """Return law -> {"status", "residual"}, and the influence as in reports.

    Args:
        subject: the recorded subject.
        shape: (N, D) of the stacked cases.
        seed: the seed of the cases.

    Raises:
        Exception: anything that prevents judging the laws; the caller records a note.
    """
    from bnverify import proof
    from bnverify.laws import STEP_LAWS

    reading = proof.read(subject)
    found: dict[str, Any] = {}
    abstract = reading.abstract
    shown = None
    if abstract is not None:
        shown = proof.capabilities(subject, abstract, reading.probe)
    running = []
    for law in STEP_LAWS.values():
        if shown is not None and proof.exemption(law, subject, shown) is not None:
            found[law.name] = {"status": "exempt", "residual": None}
        elif law.kind == "structure":
            evidence = proof.judge_structure(law, reading)
            found[law.name] = {"status": evidence.status, "residual": None}
        elif proof.prove_influence(law, reading) is not None:
            found[law.name] = {"status": "proved", "residual": None}
        elif law.kind == "residual":
            running.append(law)
    if reading.traced is not None:
        found.update(_stacked(reading, running, shape, seed))
    flows = reading.influence
    influence = (
        {}
        if flows is None
        else {
            "scope": flows.scope,
            "proved": flows.proved,
            "matrix": {output: sorted(sources) for output, sources in flows.matrix.items()},
            "unknown": list(flows.unknown),
        }
    )
    return found, influence


def _stacked(
    reading: proof.Reading, laws: list[Law], shape: tuple[int, int], seed: int
) -> dict[str, Any]:
    # bnverify.runs needs Hypothesis to shrink, which the recorded environment may not have.
    from bnverify.judge import READ_NEEDS, Judge, judged
    from bnverify.observe import VOLUME, CompiledSubject, observe
    from bnverify.stacks import stacked_cases

    assert reading.traced is not None
    tracer = reading.traced.tracer
    chosen = judged(laws, VOLUME | READ_NEEDS)
    calls = CompiledSubject(tracer.subject, tracer=tracer)
    cases = stacked_cases(np.random.default_rng(seed), shape, BLOCK)
    t = observe(calls, cases, {need for law in chosen for need in law.observes})
    found = {}
    for name, values in Judge(tracer, reading.abstract).residuals(t, chosen).items():
        worst = float(np.max(np.nan_to_num(values, nan=np.inf)))
        status = "violated" if worst > 1 else "held" if worst >= 0 else "untriggered"
        residual = None if status == "untriggered" else worst if math.isfinite(worst) else None
        found[name] = {"status": status, "residual": residual}
    return found
