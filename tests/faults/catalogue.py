"""The types of the catalogue of faults, and the functions that add to it.

Most faults are one edit of a correct step: a name, the mistake, what is wrong, and the part of the step that
is replaced. The laws that detect them are in ``expected.json``, which audits write.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bnverify import Subject
from bnverify.mistakes import MISTAKES
from tests.faults.steps import CanonicalStep

EXPECTED = Path(__file__).with_name("expected.json")


@dataclass(frozen=True)
class Fault:
    """One wrong training step.

    Attributes:
        name: its name.
        family: the part of the step that is wrong.
        mistake: a name in :data:`bnverify.mistakes.MISTAKES`.
        sentence: what is wrong, in one sentence.
        make: returns the step, with the declarations that its author would have made in good faith.
        law: the law that must detect a fault of a loop, of saving and restoring, or of several devices,
            which is not in ``FAULTS``; empty for a fault of a single step.
        blind: whether it was written before any law, from the problem and from users' reports alone.
        survives: why no law detects it: it is equivalent, or outside the domain. Empty: one must.
        tolerated: why no law needs to detect it although it has an effect: it may be intended.
        minimal: the smallest (N, D) at which it has an effect.
        raises: the exception with which jax or flax refuses it, if they do; the check must then explain it.
        source: the address of a public report; empty if there is none.

    Raises:
        ValueError: its mistake is not one of MISTAKES.
    """

    name: str
    family: str
    mistake: str
    sentence: str
    make: Callable[[], Any]
    law: str = ""
    blind: bool = False
    survives: str = ""
    tolerated: str = ""
    minimal: tuple[int, int] = (1, 1)
    raises: str = ""
    source: str = ""

    def __post_init__(self) -> None:
        if self.mistake not in MISTAKES:
            raise ValueError(f"{self.name}: no mistake is named {self.mistake!r}")

    @property
    def expected(self) -> tuple[str, ...]:
        """The laws that must detect it: those that did in every audit so far."""
        return (self.law,) if self.law else tuple(learned().get(self.name, ()))


@functools.cache
def learned() -> dict[str, list[str]]:
    """Return fault -> the laws that detected it in every audit, in the order of the laws."""
    found: dict[str, list[str]] = json.loads(EXPECTED.read_text(encoding="utf-8"))
    return found


@dataclass(frozen=True)
class Control:
    """One correct training step; a law that it violates is wrong.

    Attributes:
        name: how it differs from the reference.
        sentence: why it is correct.
        make: returns the step.
    """

    name: str
    sentence: str
    make: Callable[[], Subject]


FAULTS: dict[str, Fault] = {}
CONTROLS: dict[str, Control] = {}


def enter(
    name: str,
    mistake: str,
    sentence: str,
    /,
    *,
    family: str,
    base: type[CanonicalStep] = CanonicalStep,
    blind: bool = True,
    survives: str = "",
    tolerated: str = "",
    minimal: tuple[int, int] = (1, 1),
    raises: str = "",
    source: str = "",
    **parts: Any,
) -> None:
    """Add ``base`` with ``parts`` replaced to the catalogue; see Fault for the other arguments.

    The first argument of a part that is a function is the step; ``step.right`` is the unedited step.
    """
    make = edit(base, parts, f"fault[{name}]")
    _new(name)
    FAULTS[name] = Fault(
        name=name,
        family=family,
        mistake=mistake,
        sentence=sentence,
        make=make,
        blind=blind,
        survives=survives,
        tolerated=tolerated,
        minimal=minimal,
        raises=raises,
        source=source,
    )


def control(
    name: str, sentence: str, /, base: type[CanonicalStep] = CanonicalStep, **parts: Any
) -> None:
    """Add ``base`` with ``parts`` replaced to the correct steps."""
    make = edit(base, parts, f"control[{name}]")
    _new(name)
    CONTROLS[name] = Control(name, sentence, make)


def edit(base: type[Any], parts: dict[str, Any], name: str) -> Callable[[], Any]:
    """Return a function that makes the subject of ``base`` with ``parts`` replaced.

    Raises:
        TypeError: ``base`` has no such part.
    """
    unknown = [part for part in parts if not hasattr(base, part) and callable(parts[part])]
    if unknown:
        raise TypeError(f"{name}: {base.__name__} has no part {unknown[0]!r}")
    made: Any = type(name, (base,), parts)
    made.right = property(lambda step: super(made, step))
    return lambda: made().subject(name)


def _new(name: str) -> None:
    if name in FAULTS or name in CONTROLS:
        raise ValueError(f"{name} is in the catalogue already")
