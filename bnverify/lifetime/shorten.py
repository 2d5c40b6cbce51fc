"""Making a life that breaks a claim small: fewer calls, fewer batches, plainer numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from bnverify.case import Case
from bnverify.lifetime.calls import Call

T = TypeVar("T")
Breaks = Callable[[Sequence[Call]], bool]
Values = npt.NDArray[np.float32]

FEW = 64  # numbers in a batch: up to here each is made plain by itself


def shorten(calls: Sequence[Call], breaks: Breaks) -> list[Call]:
    """Return a life as small as single changes to ``calls`` make it, which breaks the same claim.

    Args:
        calls: a life that breaks it.
        breaks: whether a life does; one that is no life, as nothing was saved to restore, does not.
    """
    first, *rest = calls
    kept = [first, *fewest(rest, lambda fewer: breaks([first, *fewer]))]
    for case in _batches(kept):
        alike = _with(kept, case, first.argument)
        if breaks(alike):
            kept = alike
    for case in _batches(kept):
        kept = _plainer(kept, case, breaks)
    return kept


def fewest(items: Sequence[T], breaks: Callable[[list[T]], bool]) -> list[T]:
    """Return what is left of ``items`` when none can go any more; halves are tried first."""
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


def _plainer(calls: list[Call], case: Case, breaks: Breaks) -> list[Call]:
    """Return ``calls`` with a plainer batch in the place of ``case``."""

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

        def only(places: Sequence[tuple[int, ...]], name: str = name) -> bool:
            return tried(_only(case, name, places))

        for place in fewest(list(np.ndindex(values.shape)), only):
            tried(case._replace(**{name: _put(getattr(case, name), place, 1.0)}))
    return calls


def _only(case: Case, name: str, places: Sequence[tuple[int, ...]]) -> Case:
    values = np.zeros_like(getattr(case, name))
    for place in places:
        values[place] = getattr(case, name)[place]
    return case._replace(**{name: values})


def _put(values: Values, place: tuple[int, ...], value: float) -> Values:
    changed = values.copy()
    changed[place] = value
    return changed


def _batches(calls: Sequence[Call]) -> list[Case]:
    found = {id(call.argument): call.argument for call in calls}
    return [argument for argument in found.values() if isinstance(argument, Case)]


def _with(calls: Sequence[Call], case: Case, other: object) -> list[Call]:
    return [call._replace(argument=other) if call.argument is case else call for call in calls]  # type: ignore[arg-type] # only batches take the place of batches
