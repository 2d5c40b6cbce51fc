"""The step's own rounding noise, added to observed transitions: the tolerance of their laws."""

from __future__ import annotations

from typing import Any

from bnverify import compat
from bnverify.case import Case
from bnverify.compiled import Compiled
from bnverify.jaxpr.rounding import Rounded, rounding
from bnverify.lazy import jax
from bnverify.subject import State, Subject
from bnverify.transition import Outcome


class Noise:
    """Reads the rounding of ``subject``'s step and evaluation, a program for each shape.

    Args:
        subject: what is verified.
        optimise: see ``bnverify.compiled.Compiled``.
    """

    def __init__(self, subject: Subject, *, optimise: bool = False) -> None:
        self._subject = subject
        self._optimise = optimise
        self._programs: dict[Any, Compiled] = {}

    def __call__(self, before: State, case: Case) -> Rounded:
        """Return the exact outcomes of one step and evaluation, and the noise around them.

        Args:
            before: stacked states.
            case: stacked cases.
        """
        key = jax.tree_util.tree_structure(before), case.x.shape
        if key not in self._programs:
            self._programs[key] = self._program(before, case)
        with compat.enable_x64():
            rounded: Rounded = self._programs[key](before, case)
        return rounded

    def _program(self, before: State, case: Case) -> Compiled:
        def run(before: State, case: Case) -> Outcome:
            after, info = self._subject.step(before, case.x, case.y, case.lr)
            return Outcome(after, info, self._subject.evaluate(after, case.x, case.y))

        abstract = jax.tree_util.tree_map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), (before, case)
        )
        evaluate = rounding(run, *abstract).evaluate  # traced here, while 64-bit types are off
        return Compiled(jax.vmap(evaluate), optimise=self._optimise)
