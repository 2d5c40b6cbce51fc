"""Recognise which operation of a step first gives a number that is not finite."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from bnverify.clues.observed import Clues, ObservedCase
from bnverify.jaxpr.graph import source_line
from bnverify.jaxpr.interpreter import Body, read
from bnverify.jaxpr.numeric import apply, from_jax, through_jax
from bnverify.lazy import jax, jnp
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
            read(jax.make_jaxpr(function)(*given), reading, _widened(given))
            if reading.found:
                return reading.found
    return {}


def _widened(given: Any) -> list[Any]:
    return [from_jax(leaf) for leaf in jax.tree_util.tree_leaves(given)]


class _FirstNonfinite:
    """Runs a program in NumPy and notes the first equation that gives a non-finite number.

    Numbers are held in float64; one beyond the range of the program's own dtype is infinite. Programs
    with loops and branches are not run.

    Attributes:
        found: the clues; empty if all numbers are finite.
    """

    def __init__(self) -> None:
        self.found: Clues = {}

    def constant(self, value: Any, _aval: Any, /) -> Any:
        """Return it as an array."""
        return from_jax(value)

    def equation(self, eqn: Any, inputs: Sequence[Any]) -> Sequence[Any]:
        """Run it; finite numbers that give others are noted."""
        try:
            results = apply(eqn, inputs)
        except NotImplementedError:
            results = through_jax(eqn, inputs)
        results = [
            _in_range(value, atom.aval.dtype)
            for value, atom in zip(results, eqn.outvars, strict=True)
        ]
        if not self.found and all(map(_finite, inputs)) and not all(map(_finite, results)):
            self.found = {"nonfinite": eqn.primitive.name, "nonfinite_at": source_line([eqn]) or ""}
        return results

    def call(self, _eqn: Any, inputs: Sequence[Any], body: Body[Any]) -> Sequence[Any]:
        """Run its body."""
        return body(inputs)

    def scan(self, eqn: Any, _split: Any, _inputs: Any, _body: Any) -> Sequence[Any]:
        """Refuse it."""
        raise NotImplementedError(eqn.primitive.name)

    def while_loop(self, eqn: Any, _inputs: Any, _predicate: Any, _body: Any) -> Sequence[Any]:
        """Refuse it."""
        raise NotImplementedError(eqn.primitive.name)

    def cond(self, eqn: Any, _inputs: Any, _branches: Any) -> Sequence[Any]:
        """Refuse it."""
        raise NotImplementedError(eqn.primitive.name)


def _finite(value: Any) -> bool:
    return value.dtype.kind != "f" or bool(np.all(np.isfinite(value)))


def _in_range(value: Any, dtype: Any) -> Any:
    if not jnp.issubdtype(dtype, jnp.floating):
        return value
    return np.where(np.abs(value) > float(jnp.finfo(dtype).max), np.sign(value) * np.inf, value)
