"""Recognise which operation of a step first gives a number that is not finite."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from bnverify.clues.observed import Clues, ObservedCase
from bnverify.jaxpr.graph import source_line
from bnverify.jaxpr.rounding import RoundingReading, evaluate
from bnverify.jaxpr.tracing import trace
from bnverify.jaxpr.values import Array
from bnverify.lazy import jnp
from bnverify.pytree import take
from bnverify.reruns import constant_features


def first_nonfinite(observed: ObservedCase) -> Clues:
    """Return the primitive, and its line, that makes the first infinite or undefined number.

    The step is read on the case, and on the same case with constant features; then the evaluation.
    """
    subject, t = observed.calls.subject, observed.t
    even = observed.case._replace(seed=np.zeros_like(observed.case.seed))  # all features, not one
    for case in (observed.case, constant_features(even)):
        one = take(case, 0)
        for function, state, more in (
            (subject.step, t.before, (one.lr,)),
            (subject.evaluate, t.after, ()),
        ):
            given = (take(state, 0), one.x, one.y, *more)
            reading = _FirstNonfinite()
            evaluate(trace(function, *given), *given, reading=reading)
            if reading.found:
                return reading.found
    return {}


class _FirstNonfinite(RoundingReading):
    """Evaluates a program and notes the first equation that makes finite numbers non-finite.

    Numbers are held in float64; one beyond the range of the program's own dtype is infinite.

    Attributes:
        found: the clues; empty if all numbers are finite.
    """

    def __init__(self) -> None:
        super().__init__(count=1)
        self.found: Clues = {}

    def equation(self, eqn: Any, inputs: Sequence[Array]) -> Sequence[Array]:
        """Evaluate it."""
        outputs = [
            _in_range(value, atom.aval.dtype)
            for value, atom in zip(super().equation(eqn, inputs), eqn.outvars, strict=True)
        ]
        if not self.found and all(map(_finite, inputs)) and not all(map(_finite, outputs)):
            self.found = {"nonfinite": eqn.primitive.name, "nonfinite_at": source_line([eqn]) or ""}
        return outputs


def _finite(value: Any) -> bool:
    return value.dtype.kind != "f" or bool(np.all(np.isfinite(value)))


def _in_range(value: Any, dtype: Any) -> Any:
    if not jnp.issubdtype(dtype, jnp.floating):
        return value
    return np.where(np.abs(value) > float(jnp.finfo(dtype).max), np.sign(value) * np.inf, value)
