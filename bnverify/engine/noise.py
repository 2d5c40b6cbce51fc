"""The step's own rounding noise, added to observed transitions: the tolerance of their laws."""

from __future__ import annotations

from collections.abc import Callable, Collection
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
from bnverify.pytree import take
from bnverify.subject import State, Subject, Tree
from bnverify.transition import Outcome

PORTION = 128
"""Stacked cases that a call of the program takes, where one or a few are often all that count."""


class Known(NamedTuple):
    """What float64 tells of one step and evaluation.

    Attributes:
        exact: the outcome without rounding.
        noise: like ``exact``: how far rounding may move each value.
        direction: a tree like params; None where the subject shows no loss.
        slope: (value, allowed error, whether it is known) of the loss along ``direction``.
        layer_inputs: like what the subject's function of this name returns: how far rounding may
            move each value; None where it was not asked for.
    """

    exact: Any
    noise: Any
    direction: Any = None
    slope: Any = None
    layer_inputs: Any = None


class Noise:
    """Reads the rounding of ``subject``'s step and evaluation, a program for each shape.

    Args:
        subject: what is verified.
        optimise: from the shape (N, D) of a case to whether its program runs often; see
            ``bnverify.compiled.Compiled``.
        seed: of the draws.
        held: from the shape (N, D) of a case to how many coarse rows are held at once.
        portion: how many stacked cases a call of a program takes at most; None: all there are.
    """

    def __init__(
        self,
        subject: Subject,
        *,
        optimise: Callable[[tuple[int, int]], bool] = lambda shape: False,
        seed: int = 0,
        held: Callable[[tuple[int, int]], int] = lambda shape: ROWS,
        portion: int | None = PORTION,
    ) -> None:
        self._subject = subject
        self._seed = seed
        self._optimise = optimise
        self._held = held
        self._portion = portion
        self._programs: dict[Any, tuple[frozenset[str], Callable[[State, Case], Known]]] = {}

    def __call__(
        self, before: State, case: Case, also: Collection[str] = (), count: int | None = None
    ) -> Known:
        """Return the exact outcomes of one step and evaluation, and the noise around them.

        Args:
            before: stacked states.
            case: stacked cases.
            also: which of "slope", with the direction, and "layer_inputs" is asked for too.
            count: how many of the stack count: of the others, some other's is told. None: all.
        """
        block = len(case.x)
        size = min(block, self._portion or block)
        if size == block:
            return self._read(before, case, also)
        asked = block if count is None else count
        parts = []
        for start in range(0, asked, size):
            places = np.minimum(np.arange(start, start + size), block - 1)
            part = self._read(*take((before, case), places), also)
            parts.append(jax.tree_util.tree_map(np.asarray, part))
        known: Known = jax.tree_util.tree_map(lambda *leaves: np.concatenate(leaves), *parts)
        return take(known, np.minimum(np.arange(block), asked - 1))

    def _read(self, before: State, case: Case, also: Collection[str]) -> Known:
        """Return what ``__call__`` does, by a program for stacks of just this size."""
        of = jax.tree_util.tree_structure(before), case.x.shape
        told, program = self._programs.get(of, (frozenset(), None))
        if program is None or not told.issuperset(also):
            told |= frozenset(also)  # rather more than asked than compile again
            program = self._program(before, case, told)
            self._programs[of] = told, program
        with compat.enable_x64():
            return program(before, case)

    def _program(
        self, before: State, case: Case, also: Collection[str]
    ) -> Callable[[State, Case], Known]:
        inputs = self._subject.layer_inputs if "layer_inputs" in also else None

        def run(before: State, case: Case) -> tuple[Outcome, Any]:
            after, info = self._subject.step(before, case.x, case.y, case.lr)
            given = inputs(before, case.x, case.y) if inputs is not None else None
            return Outcome(after, info, self._subject.evaluate(after, case.x, case.y)), given

        # Traced here, while 64-bit types are off.
        abstract = jax.tree_util.tree_map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), (before, case)
        )
        step = rounding(run, *abstract, seed=self._seed)
        out, given = step.program.out
        output = _place(out.info.loss, out) if "slope" in also else None

        def rounded(before: State, case: Case, rows: Any = None) -> Known:
            exact, noise = step.evaluate(before, case, rows=rows)
            return Known(exact[0], noise[0], layer_inputs=noise[1])

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
                return sloped(before, case, rounded(before, case))

            known = Known(out, out, layer_inputs=given)
            if output is not None:
                known = known._replace(direction=before.params, slope=tuple(Slope._fields))
            identity = self._identity(step.program, output, known)
            return Compiled(jax.vmap(whole), optimise=optimise, identity=identity)

        part = Compiled(jax.vmap(rounded, (0, 0, None)), optimise=optimise)
        rest = Compiled(jax.vmap(sloped), optimise=optimise)

        def in_parts(before: State, case: Case) -> Known:
            numbers = np.arange(1, 1 + ROWS, dtype=np.int32).reshape(-1, held)
            parts = [
                jax.tree_util.tree_map(np.asarray, part(before, case, rows)) for rows in numbers
            ]
            noise, inputs = jax.tree_util.tree_map(
                _length, *((known.noise, known.layer_inputs) for known in parts)
            )
            known: Known = rest(before, case, parts[0]._replace(noise=noise, layer_inputs=inputs))
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
