"""What initial values are like over many seeds: their distribution, whatever the random stream.

For each leaf, each of SEEDS seeds gives three averages over the leaf: of h, of h^2 and of h^4. They
tell initialisers apart: by their mean, their spread, and their tails (a normal, a truncated normal
and a uniform of equal spread differ in the fourth). Recorded are the averages' own mean and variance
over the seeds, from which two environments are compared as two samples; see ``compare``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from bnverify.upgrade.leaves import named

if TYPE_CHECKING:
    from collections.abc import Callable

SEEDS = 512
POWERS = (1, 2, 4)


def summaries(init: Callable[..., Any], x: Any) -> dict[str, Any]:
    """Return leaf -> (2, 3) float64: mean and variance over the seeds of the three averages.

    Args:
        init: (seed, x) -> State.
        x: (N, D); only its shape matters.
    """
    found: dict[str, list[list[float]]] = {}
    for seed in range(SEEDS):
        for path, leaf in named(init(np.int32(seed), x)).items():
            if leaf.dtype.kind in "fV" and leaf.size:  # V: bfloat16 and its kin
                wide = np.asarray(leaf, np.float64)
                found.setdefault(path, []).append([float(np.mean(wide**p)) for p in POWERS])
    return {
        path: np.stack([np.mean(rows, axis=0), np.var(rows, axis=0, ddof=1)])
        for path, rows in ((path, np.asarray(rows)) for path, rows in found.items())
    }
