"""How many cases a call stacks, and of how many rows: as many as the model's own size allows."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np

from bnverify.case import Domain
from bnverify.jaxpr.noise import ROWS
from bnverify.lazy import jax
from bnverify.subject import Subject

OPERATIONS = 2e10
"""Operations of one stacked call: some twenty seconds of a core in float64."""

BYTES = 4e9
"""Bytes that they read and write; where convolutions are read as products, as many may be held."""

AT_ONCE = 2
"""Stacks that run at the same time, whatever the machine: each keeps little more than a core busy."""

PAYS = 1e8
"""Operations from which on optimising what reads the rounding pays: compiling it takes a core some
1.5 s longer then, and so does running so many unoptimised, which the next check does again."""

OFTEN = 20
"""Stacks of a shape from which on optimising all that they run pays."""

LARGE = 1e6
"""Operations of one row that make a model a large one; the reference takes a few hundred."""


class Budget:
    """What a subject's stacks may hold.

    Args:
        subject: what is verified.
        block: the most cases in a stack.
        blocks: how many stacks of a shape are run.

    Attributes:
        often: whether these are so many that optimising whatever they run pays.
    """

    def __init__(self, subject: Subject, block: int, blocks: int = 1) -> None:
        self._subject = subject
        self._block = block
        self._blocks = blocks
        self.often = blocks > OFTEN

    def block(self, shape: tuple[int, int]) -> int:
        """Return how many cases of a shape (N, D) are stacked: one at least."""
        rows, features = shape
        operations, moved = self._row(features)
        share = rows * max(operations / OPERATIONS, moved / BYTES)
        return self._block if share * self._block <= 1 else max(1, int(1 / share))

    def at_once(self, shape: tuple[int, int]) -> int:
        """Return how many stacks may run at the same time: one where it fills the memory."""
        return AT_ONCE if self.block(shape) == self._block else 1

    def pays(self, shape: tuple[int, int]) -> bool:
        """Return whether stacks of a shape take so long that optimising their rounding pays."""
        rows, features = shape
        cases = self.block(shape) * self._blocks
        return self.often or rows * self._row(features)[0] * cases > PAYS

    def held(self, shape: tuple[int, int]) -> int:
        """Return how many coarse rows are held at once: fewer where one case alone is too large."""
        rows, features = shape
        share = rows * self._row(features)[1] / BYTES
        fitting = (held for held in (ROWS, 4) if share * (1 + held) <= 1 + ROWS)
        return next(fitting, 2)

    def rows(self, features: int) -> int | None:
        """Return the most rows of a case of a large model, None for others.

        One of so many takes four times the operations of a stack, or all its bytes.
        """
        operations, moved = self._row(features)
        if operations < LARGE * (1 + ROWS):
            return None
        return max(2, int(1 / max(operations / OPERATIONS / 4, moved / BYTES)))

    def _row(self, features: int) -> tuple[float, float]:
        """Return the operations and the bytes of one row with its rounding; 0 where unknown.

        Only the narrowest and the widest batch are asked about, since a step is traced for each:
        what lies between costs at most what lies on a line between them.
        """
        widths, costs = self._ends
        operations, moved = (float(np.interp(features, widths, cost)) for cost in costs)
        return operations, moved

    @cached_property
    def _ends(self) -> tuple[list[int], Any]:
        """The narrowest and the widest batch, and what one row of each costs."""
        given = self._subject.features or (1, Domain().max_features)
        widths, rows = sorted({min(given), max(given)}), 2
        costs = np.array([_cost(self._subject, (rows, width)) for width in widths])
        return widths, (1 + ROWS) / rows * costs.T


class Fixed(Budget):
    """A budget of so many cases in every stack: of a subject whose cost is not asked for."""

    def _row(self, features: int) -> tuple[float, float]:
        """Return no cost."""
        del features
        return 0.0, 0.0


def _cost(subject: Subject, shape: tuple[int, int]) -> tuple[float, float]:
    """Return the operations and the bytes of a step and an evaluation, before optimisation."""
    lr = jax.ShapeDtypeStruct((), "float32")
    x = jax.ShapeDtypeStruct(shape, "float32")
    y = jax.ShapeDtypeStruct(shape[:1], "float32")

    def run(state: Any, x: Any, y: Any, lr: Any) -> Any:
        after, info = subject.step(state, x, y, lr)
        return after, info, subject.evaluate(after, x, y)

    try:
        state = jax.eval_shape(subject.init, jax.ShapeDtypeStruct((), "int32"), x)
        found = jax.jit(run).lower(state, x, y, lr).cost_analysis()
    except Exception:  # noqa: BLE001 - a user's step may not trace, a release may not count
        return 0.0, 0.0
    costs = found or {}
    return float(costs.get("flops", 0.0)), float(costs.get("bytes accessed", 0.0))
