"""Faults that are no members of the catalogue: no law of one transition sees them, a claim must."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from bnverify.mistakes import MISTAKES
from bnverify.mutants.catalogue import snake_case


@dataclass(frozen=True)
class Fault:
    """One way to get wrong what a claim is about.

    Attributes:
        name: the fault.
        mistake: a name in ``bnverify.mistakes``.
        sentence: what is wrong, in one sentence.
        make: returns what the claim is checked of.
        expected: the claim that must catch it.
    """

    name: str
    mistake: str
    sentence: str
    make: Callable[[], Any]
    expected: str


def enter(
    faults: dict[str, Fault],
    mistake: str,
    expected: str,
    made: Callable[[type[Any], str], Any],
) -> Callable[[type[Any]], type[Any]]:
    """Return what enters the class it decorates into ``faults``; its docstring describes the fault.

    Args:
        faults: by name.
        mistake: a name in ``bnverify.mistakes``.
        expected: the claim that must catch it.
        made: from the class and the fault's name to what the claim is checked of.

    Raises:
        ValueError: no mistake has that name.
    """
    if mistake not in MISTAKES:
        raise ValueError(f"{mistake!r} is no known mistake")

    def entered(parts: type[Any]) -> type[Any]:
        name = snake_case(parts.__name__)
        sentence = inspect.getdoc(parts) or ""
        faults[name] = Fault(name, mistake, sentence, lambda: made(parts, name), expected)
        return parts

    return entered
