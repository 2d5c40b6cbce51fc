"""Explicit cases: drawn and found by Hypothesis, and which of them are worth a costly run."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import hypothesis
import hypothesis.errors
import numpy as np
from hypothesis import strategies as st

from bnverify import strategies
from bnverify.case import Case, Domain
from bnverify.engine.judge import FAINT
from bnverify.engine.tally import complexity

ALIKE = 3
"""Uncompiled cases of the smallest shape before those of any: JAX lowers an uncompiled step's every
operation for every shape, for two seconds of a core and more."""


def draw(shapes: Sequence[tuple[int, int]], domain: Domain, examples: int, seed: int) -> list[Case]:
    """Return the cases that Hypothesis draws for ``seed``, the same ones every time."""
    drawn: list[Case] = []

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=examples,
        database=None,
        deadline=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(strategies.cases(shape=st.sampled_from(shapes), domain=domain))
    def collect(case: Case) -> None:
        drawn.append(case)

    collect()
    return drawn


def find(
    shapes: Sequence[tuple[int, int]],
    domain: Domain,
    condition: Callable[[Case], bool],
    seed: int,
    examples: int,
) -> Case | None:
    """Return the simplest case that Hypothesis finds with ``condition``; None where it finds none."""
    settings = hypothesis.settings(
        max_examples=examples,
        database=None,
        deadline=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    try:
        found: Case = hypothesis.find(
            strategies.cases(shape=st.sampled_from(shapes), domain=domain),
            condition,
            settings=settings,
            random=random.Random(seed),  # noqa: S311 - it chooses inputs, it guards nothing
        )
    except hypothesis.errors.NoSuchExample:
        return None
    return found


def plainer(case: Case, shapes: Sequence[tuple[int, int]]) -> list[Case]:
    """Return cases of small shapes that may show what ``case`` shows, the simplest first.

    A few, for what is too costly to be searched for: counted numbers, and what fits of the case.
    """
    rest = (np.int32(0), np.float32(0.5), np.int32(0)), (case.seed, case.lr, case.warmup)
    found = []
    for rows, features in shapes:
        counted = np.arange(1, 1 + rows * features, dtype=np.float32).reshape(rows, features)
        batches = [(counted, np.zeros(rows, np.float32)), (counted, counted[:, 0])]
        if rows <= case.shape[0] and features <= case.shape[1]:
            batches.append((case.x[:rows, :features], case.y[:rows]))
        found += [Case(seed, x, y, lr, warmup) for x, y in batches for seed, lr, warmup in rest]
    return sorted(found, key=complexity)


def uncompiled(cases: Sequence[Case], smallest: tuple[int, int], count: int) -> list[int]:
    """Return which cases are run uncompiled too: ``ALIKE`` of the smallest shape, then any."""
    ranked = rich(cases)
    first = [index for index in ranked if cases[index].shape == smallest][:ALIKE]
    return [*first, *(index for index in ranked if index not in first)][:count]


def rich(cases: Sequence[Case]) -> list[int]:
    """Return the places of the cases that show most first: those of the most distinct numbers.

    Little shows on a batch of zeros, or of what arithmetic takes for zeros, such as Hypothesis
    likes to draw, and little more on a batch that came before.
    """

    def distinct(index: int) -> int:
        case = cases[index]
        seen = [np.where(np.abs(values) < FAINT, 0, values) for values in (case.x, case.y)]
        return sum(len(np.unique(values)) for values in seen) + int(case.lr > 0)

    apart: dict[bytes, int] = {}
    ranked = sorted(range(len(cases)), key=distinct, reverse=True)
    for index in ranked:
        apart.setdefault(np.asarray(cases[index].x).tobytes(), index)
    first = set(apart.values())
    return sorted(ranked, key=lambda index: index not in first)
