"""Shrinking: smaller and simpler counterexamples, both single cases and histories."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import hypothesis
import hypothesis.errors
import numpy as np
from hypothesis import strategies as st

from bnverify import strategies
from bnverify.evidence import Call
from bnverify.judge import FAINT
from bnverify.model import Case, Domain, Shape
from bnverify.pytree import stack, take

if TYPE_CHECKING:
    from bnverify.laws import Law
    from bnverify.runs import Runner, Tally

T = TypeVar("T")

CLEAR = 8.0
"""A residual this large cannot be due to the random roundings, so it needs no second reading."""

TRIES = 200
"""The number of cases that Hypothesis tries in search of a counterexample."""

ROUNDS = 12
"""The most rounds of simplification."""

FEW = 64
"""In batches of up to this many numbers, each number is simplified separately."""


def complexity(case: Case) -> tuple[float, ...]:
    """Return a sort key for how hard a case is to read: its size first, then its digits."""
    rows, features = case.shape
    values = np.concatenate([np.ravel(case.x), np.ravel(case.y), [case.lr]])
    digits = sum(len(np.format_float_positional(abs(v), trim="-")) for v in values)
    return (rows * features, rows, int(case.warmup), digits, abs(int(case.seed)))


def simpler(case: Case) -> list[Case]:
    """Return simpler cases of the same shape, each with one or a few changes, the simplest first."""
    found = [case._replace(warmup=np.int32(0)), case._replace(seed=np.int32(0))]
    found += [case._replace(lr=np.float32(lr)) for lr in (0.0, 0.1, 0.5, 1.0)]
    for name in ("x", "y"):
        value = getattr(case, name)
        flat = np.ravel(value)
        wholes = [np.zeros_like(value), np.ones_like(value)]
        wholes.append(np.arange(value.size, dtype=np.float32).reshape(value.shape))
        wholes += [np.round(value, digits) for digits in (0, 1, 2, 3)]
        wholes += [(value * np.float32(10.0**-k)) for k in (1, 2, 3)]
        found += [case._replace(**{name: whole.astype(np.float32)}) for whole in wholes]
        for index in range(min(flat.size, 64)):
            for to in (0.0, 1.0, -1.0, 2.0, float(np.round(flat[index], 1))):
                other = flat.copy()
                other[index] = to
                found.append(case._replace(**{name: other.reshape(value.shape)}))
    own = complexity(case)
    ranked = [(complexity(candidate), candidate) for candidate in found]
    below = [pair for pair in ranked if pair[0] < own]
    return [candidate for _, candidate in sorted(below, key=lambda pair: pair[0])]


def simplify(
    runner: Runner, tally: Tally, others: Sequence[Tally], shapes: Sequence[Shape], seed: int
) -> None:
    """Shrink a law's counterexample to one that a single run confirms, or dismiss the violation.

    Differences between stacked and single runs are judged by vmap_equals_loop alone.

    Args:
        runner: runs and judges the subject.
        tally: the results for the law.
        others: the results for other violated laws; cases tried for this law may violate them, too.
        shapes: small shapes in which to look for a simpler case.
        seed: the seed of the search.
    """
    law, worst = tally.law, tally.worst or 0.0
    assert tally.case is not None
    candidates: Sequence[Case | None]
    if law in runner.affordable(tally.case.shape) and runner.stacks:
        candidates = [_simplest_stacked(runner, tally, others)]
    elif {"eager", "solution"}.intersection(law.observes):
        candidates = _plainer(tally.case, shapes)
    else:
        candidates = [_found(shapes, runner, law, seed)]
    for case in (*candidates, tally.case, tally.worst_case):
        if case is not None and runner.confirmed(law, case, worst):
            tally.replace(case)
            return
    tally.dismissed = True


def simplest(case: Case, breaks: Callable[[list[Case]], int | None]) -> Case:
    """Return a simpler case of the same shape that violates the law, too.

    Args:
        case: a case that violates the law.
        breaks: (cases of one shape, the simplest first) -> the index of the first that violates the law,
            or None.
    """
    for _ in range(ROUNDS):
        candidates = simpler(case)
        found = breaks(candidates) if candidates else None
        if found is None:
            break
        case = candidates[found]
    return case


def _simplest_stacked(runner: Runner, tally: Tally, others: Collection[Tally]) -> Case:
    """Return the simplest case that violates the same law in a stack; keep what ``others`` show."""
    assert tally.case is not None
    block = runner.block(tally.case.shape)

    def breaks(candidates: list[Case]) -> int | None:
        cases = stack(candidates[:block])
        broken = {
            law: np.nan_to_num(values, nan=np.inf) > 1
            for law, values in runner.residuals(cases).items()
        }
        for other in others:
            if other.law.name in broken:
                other.keep_simplest(cases, broken[other.law.name])
        return next(map(int, np.flatnonzero(broken[tally.law.name])), None)

    return simplest(tally.case, breaks)


def _found(shapes: Sequence[Shape], runner: Runner, law: Law, seed: int) -> Case | None:
    """Return the simplest violating case that Hypothesis finds; None if it finds none."""

    def violates(case: Case) -> bool:
        return bool(runner.singly(stack([case]), [law]).get(law.name, np.full(1, -1.0))[0] > 1)

    try:
        found: Case = hypothesis.find(
            strategies.cases(shape=st.sampled_from(shapes), domain=runner.domain),
            violates,
            settings=_settings(TRIES),
            random=random.Random(seed),  # noqa: S311 - test inputs, not cryptography
        )
    except hypothesis.errors.NoSuchExample:
        return None
    return found


def _plainer(case: Case, shapes: Sequence[Shape]) -> list[Case]:
    """Return a few cases of small shapes that may show the same violation, the simplest first.

    For subjects too expensive for a search: consecutive numbers, and the corner of the case that
    fits.
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


def _settings(examples: int, **more: Any) -> hypothesis.settings:
    return hypothesis.settings(
        max_examples=examples,
        database=None,
        deadline=None,
        suppress_health_check=list(hypothesis.HealthCheck),
        **more,
    )


def draw(shapes: Sequence[Shape], domain: Domain, examples: int, seed: int) -> list[Case]:
    """Return the cases that Hypothesis draws for ``seed``, always the same ones."""
    drawn: list[Case] = []

    @hypothesis.seed(seed)
    @_settings(examples, phases=[hypothesis.Phase.generate])
    @hypothesis.given(strategies.cases(shape=st.sampled_from(shapes), domain=domain))
    def collect(case: Case) -> None:
        drawn.append(case)

    collect()
    return drawn


def rich(cases: Sequence[Case]) -> list[int]:
    """Return the indices of cases, those with the most distinct numbers first.

    Batches of zeros or of tiny numbers, which Hypothesis often draws, reveal little, and so do
    repeated batches: both come last.
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


def breed(parents: list[Case], count: int, rng: np.random.Generator, domain: Domain) -> Case:
    """Return ``count`` stacked variations of ``parents``: rescaled, shifted, with a new lr or seed."""
    of = take(stack(parents), np.arange(count) % len(parents))
    scales = 2.0 ** rng.integers(-3, 4, (count, 1, 1))
    x = of.x * scales
    largest = np.max(np.abs(x), axis=(1, 2), keepdims=True, initial=1e-6)
    shifts = rng.normal(size=(count, 1, 1)) * (rng.random((count, 1, 1)) < 0.5)
    x = np.clip(x + shifts * largest, -domain.max_abs_x, domain.max_abs_x)
    seeds, rates = rng.integers(0, 1000, count), rng.random(count) * domain.max_lr
    return Case(
        np.where(rng.random(count) < 0.5, of.seed, seeds).astype(np.int32),
        x.astype(np.float32),
        of.y,
        np.where(rng.random(count) < 0.5, of.lr, rates).astype(np.float32),
        of.warmup,
    )


def fewest(items: Sequence[T], breaks: Callable[[list[T]], bool]) -> list[T]:
    """Return a minimal sublist of ``items`` for which ``breaks`` is true; halves are tried first."""
    kept = list(items)
    size = max(len(kept) // 2, 1)
    while True:
        before = len(kept)
        start = 0
        while start < len(kept):
            fewer = kept[:start] + kept[start + size :]
            if breaks(fewer):
                kept = fewer
            else:
                start += size
        if size == 1 and len(kept) == before:
            return kept
        size = max(size // 2, 1)


def shorten(calls: Sequence[Call], breaks: Callable[[Sequence[Call]], bool]) -> list[Call]:
    """Return a smaller history that violates the same law: fewer calls, simpler batches.

    Args:
        calls: a history that violates a law; its first call is kept.
        breaks: whether a history violates the same law; False for an invalid history.
    """
    first, *rest = calls
    kept = [first, *fewest(rest, lambda fewer: breaks([first, *fewer]))]
    for case in _batches(kept):
        alike = _with(kept, case, first.argument)
        if breaks(alike):
            kept = alike
    for case in _batches(kept):
        kept = _with_plainer(kept, case, breaks)
    return kept


def _with_plainer(
    calls: list[Call], case: Case, breaks: Callable[[Sequence[Call]], bool]
) -> list[Call]:
    """Return ``calls`` with ``case`` replaced by a simpler batch, if that still violates the law."""

    def tried(plainer: Case) -> bool:
        nonlocal calls, case
        changed = _with(calls, case, plainer)
        if breaks(changed):
            calls, case = changed, plainer
            return True
        return False

    tried(case._replace(seed=np.int32(0)))
    tried(case._replace(lr=np.float32(0)))
    for name in ("y", "x"):
        values = getattr(case, name)
        if tried(case._replace(**{name: np.zeros_like(values)})) or values.size > FEW:
            continue

        def only(places: Sequence[int], name: str = name) -> bool:
            value = getattr(case, name)
            kept = np.isin(np.arange(value.size), places).reshape(value.shape)
            return tried(case._replace(**{name: np.where(kept, value, np.float32(0))}))

        for place in fewest(range(values.size), only):
            value = getattr(case, name).copy()
            value.flat[place] = 1
            tried(case._replace(**{name: value}))
    return calls


def _batches(calls: Sequence[Call]) -> list[Case]:
    found = {id(call.argument): call.argument for call in calls}
    return [argument for argument in found.values() if isinstance(argument, Case)]


def _with(calls: Sequence[Call], case: Case, other: Case | str | None) -> list[Call]:
    return [call._replace(argument=other) if call.argument is case else call for call in calls]
