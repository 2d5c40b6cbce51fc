"""The laws' verdicts on a subject, without Hypothesis: proofs, and stacked cases of one shape.

This is the only place where the gate judges laws.

"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

BLOCK = 128


def verdicts(subject: Any, shape: tuple[int, int], seed: int) -> tuple[dict[str, Any], Any]:
    """Return law -> {"status", "residual"}, and the influence as reports show it.

    Args:
        subject: what is recorded.
        shape: (N, D) of the stacked cases.
        seed: they are drawn from it.

    Raises:
        Exception: whatever keeps the laws from running here; the recording goes without.
    """
    from bnverify.engine import proof
    from bnverify.engine.judge import exemption, shown_by
    from bnverify.laws import LAWS

    reading = proof.read(subject)
    found: dict[str, Any] = {}
    abstract = reading.abstract
    shown = shown_by(subject, abstract, reading.probe) if abstract is not None else None
    running = []
    for law in LAWS.values():
        if shown is not None and exemption(law, subject, shown) is not None:
            found[law.name] = {"status": "exempt", "residual": None}
        elif law.kind == "structure":
            evidence = proof.judge_structure(law, reading)
            found[law.name] = {"status": evidence.status, "residual": None}
        elif proof.prove_influence(law, reading) is not None:
            found[law.name] = {"status": "proved", "residual": None}
        elif law.kind == "residual":
            running.append(law)
    if abstract is not None:
        found.update(_stacked(subject, abstract, running, shape, seed))
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
    subject: Any, abstract: Any, laws: list[Any], shape: tuple[int, int], seed: int
) -> dict[str, Any]:
    from bnverify.case import Domain
    from bnverify.engine.judge import Judge, judged, static_facts
    from bnverify.engine.volume import NEEDS, Volume

    chosen = judged(laws, NEEDS)
    if not chosen:
        return {}
    judge = Judge(subject, static_facts(subject, abstract), BLOCK)
    volume = Volume(subject, chosen, judge, domain=Domain())
    found = {}
    for _, residuals in volume.blocks(shape, 1, np.random.default_rng(seed)):
        for name, values in residuals.items():
            worst = float(np.max(np.nan_to_num(values, nan=np.inf)))
            status = "violated" if worst > 1 else "held" if worst >= 0 else "untriggered"
            residual = None if status == "untriggered" else worst if math.isfinite(worst) else None
            found[name] = {"status": status, "residual": residual}
    return found
