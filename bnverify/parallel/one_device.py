"""The single-device step's own runs, which those on many devices are compared with."""

from __future__ import annotations

from typing import Any

import numpy as np

from bnverify.case import Case, Domain
from bnverify.engine.noise import Noise
from bnverify.lazy import jax
from bnverify.observe import Calls, observe
from bnverify.stacks import stacked_cases
from bnverify.subject import Subject
from bnverify.transition import Transition

MILD = Domain(max_abs_x=100.0, max_abs_y=100.0, max_lr=0.5)
"""Wilder inputs leave float32 no digits to compare more often than not."""


class OneDevice:
    """A step on one device and the rounding noise of its runs.

    Args:
        single: the step.
    """

    def __init__(self, single: Subject) -> None:
        self.single = single
        self._calls = Calls(single, "stacked")
        self._noise = Noise(single)
        self._drawn: dict[Any, Transition] = {}

    def runs(self, cases: Case) -> Transition:
        """Return the transitions of stacked cases, as arrays of NumPy's."""
        t = observe(self._calls, cases, ())
        t = t._replace(noise=self._noise(t.before, t.case).noise)
        return Transition(*jax.tree_util.tree_map(np.asarray, tuple(t)))

    def drawn(self, shape: tuple[int, int], count: int, seed: int) -> Transition:
        """Return the transitions of ``count`` cases of one shape, drawn from ``seed``."""
        key = shape, count, seed
        if key not in self._drawn:
            rng = np.random.default_rng((seed, *shape))
            self._drawn[key] = self.runs(stacked_cases(rng, shape, count, MILD))
        return self._drawn[key]


_KNOWN: dict[int, OneDevice] = {}


def one_device(single: Subject) -> OneDevice:
    """Return what is known of ``single``: steps for many devices that share it share its runs."""
    # Its id stays its own: the subject is kept.
    return _KNOWN.setdefault(id(single), OneDevice(single))
