"""The step's own rounding noise, added to observed transitions: the tolerance of their laws."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from bnverify import compat
from bnverify.case import Case
from bnverify.compiled import Compiled
from bnverify.jaxpr.digest import digest
from bnverify.jaxpr.noise import ROWS
from bnverify.jaxpr.rounding import rounding
from bnverify.jaxpr.slope import Slope, directional_derivative
from bnverify.jaxpr.tracing import Program
from bnverify.kept import Identity
from bnverify.lazy import jax, jnp
from bnverify.subject import State, Subject, Tree
from bnverify.transition import Outcome


class Known(NamedTuple):
    """What float64 tells of one step and evaluation.

    Attributes:
        exact: the outcome without rounding.
        noise: like ``exact``: how far rounding may move each value.
        direction: a tree like params; None where the subject shows no loss.
        slope: (value, allowed error, whether it is known) of the loss along ``direction``.
    """

    exact: Any
    noise: Any
    direction: Any = None
    slope: Any = None


class Noise:
    """Reads the rounding of ``subject``'s step and evaluation, a program for each shape.

    Args:
        subject: what is verified.
        optimise: from the shape (N, D) of a case to whether its program runs often; see
            ``bnverify.compiled.Compiled``.
        seed: of the draws.
        held: from the shape (N, D) of a case to how many coarse rows are held at once.
    """

    def __init__(
        self,
        subject: Subject,
        *,
        optimise: Callable[[tuple[int, int]], bool] = lambda shape: False,
        seed: int = 0,
        held: Callable[[tuple[int, int]], int] = lambda shape: ROWS,
    ) -> None:
        self._subject = subject
        self._seed = seed
        self._optimise = optimise
        self._held = held
        self._programs: dict[Any, Callable[[State, Case], Known]] = {}

    def __call__(self, before: State, case: Case, *, slope: bool = False) -> Known:
        """Return the exact outcomes of one step and evaluation, and the noise around them.

        Args:
            before: stacked states.
            case: stacked cases.
            slope: whether the slope of the loss is asked for too.
        """
        of = jax.tree_util.tree_structure(before), case.x.shape
        slope = slope or (*of, True) in self._programs  # rather more than asked than compile again
        key = (*of, slope)
        if key not in self._programs:
            self._programs[key] = self._program(before, case, slope=slope)
        with compat.enable_x64():
            return self._programs[key](before, case)

    def _program(self, before: State, case: Case, *, slope: bool) -> Callable[[State, Case], Known]:
        def run(before: State, case: Case) -> Outcome:
            after, info = self._subject.step(before, case.x, case.y, case.lr)
            return Outcome(after, info, self._subject.evaluate(after, case.x, case.y))

        # Traced here, while 64-bit types are off.
        abstract = jax.tree_util.tree_map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), (before, case)
        )
        step = rounding(run, *abstract, seed=self._seed)
        out = step.program.out
        output = _place(out.info.loss, out) if slope else None

        def sloped(before: State, case: Case, known: Known) -> Known:
            if output is None:
                return known
            direction = some_direction(before.params)
            at, noise = known.exact.info.loss, known.noise.info.loss
            args = (before.params, (*before[1:], case))  # the params are a state's first leaves
            found = directional_derivative(step.program, args, direction, at, noise, output)
            return known._replace(direction=direction, slope=tuple(found))

        held, optimise = self._held(case.shape), self._optimise(case.shape)
        if held >= ROWS:

            def whole(before: State, case: Case) -> Known:
                return sloped(before, case, Known(*step.evaluate(before, case)))

            known = Known(out, out)
            if output is not None:
                known = known._replace(direction=before.params, slope=tuple(Slope._fields))
            identity = self._identity(step.program, output, known)
            return Compiled(jax.vmap(whole), optimise=optimise, identity=identity)

        def some(rows: Any, before: State, case: Case) -> Known:
            return Known(*step.evaluate(before, case, rows=rows))

        part = Compiled(jax.vmap(some, (None, 0, 0)), optimise=optimise)
        rest = Compiled(jax.vmap(sloped), optimise=optimise)

        def in_parts(before: State, case: Case) -> Known:
            numbers = np.arange(1, 1 + ROWS, dtype=np.int32).reshape(-1, held)
            parts = [
                jax.tree_util.tree_map(np.asarray, part(rows, before, case)) for rows in numbers
            ]
            noise = jax.tree_util.tree_map(_length, *(known.noise for known in parts))
            known: Known = rest(before, case, parts[0]._replace(noise=noise))
            return known

        return in_parts

    def _identity(self, step: Program, output: int | None, out: Known) -> Identity | None:
        """Return what tells the rounding of this step from others; None where that is not certain."""
        of_step = digest(step.jaxpr)
        if of_step is None:
            return None
        name = f"rounding {of_step} slope of {output} {self._seed} {ROWS}"
        return Identity(name, jax.tree_util.tree_structure(out))


def _place(leaf: Any, tree: Any) -> int | None:
    """Return which of a tree's leaves ``leaf`` is; None: none of them, as of a loss not shown."""
    leaves = jax.tree_util.tree_leaves(tree)
    return next((number for number, each in enumerate(leaves) if each is leaf), None)


def _length(*parts: Any) -> Any:
    """Return the noise that all rows tell, from what some and others do."""
    return np.sqrt(sum(np.square(part) for part in parts))


def some_direction(params: Tree) -> Tree:
    """Return a tree like ``params``, in which every element counts: signs and sizes at random."""
    leaves, structure = jax.tree_util.tree_flatten(params)
    rng = np.random.default_rng(0)
    drawn = [
        rng.uniform(0.5, 1, leaf.shape) * rng.choice([-1.0, 1.0], leaf.shape) for leaf in leaves
    ]
    return jax.tree_util.tree_unflatten(structure, [jnp.asarray(values) for values in drawn])
