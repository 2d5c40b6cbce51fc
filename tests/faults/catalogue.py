"""The catalogue of faults: wrong training steps, each wrong in one way, each with a name.

A fault that is one edit of a right step is a row: its name, the mistake, what is wrong, and by what it
replaces a part of the step. Which laws notice it is data too (``expected.json``), learned from audits.
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
        name: the fault.
        family: the part of the step that it sits in.
        mistake: what its author did, a name from :data:`bnverify.mistakes.MISTAKES`.
        sentence: what is wrong, in one sentence.
        make: returns the step, with the fields its author would have declared in good faith.
        law: the law that must catch it, where none of a single step can: of whole loops, of the life
            of a state, of many devices. Such a fault is in a dictionary beside the catalogue.
        blind: written from the problem and from users' reports alone, without sight of any law.
        survives: why nothing catches it: equivalent, or out of the domain. Empty: it must die.
        tolerated: why laws let it pass although it shows: it is also what somebody may want.
        minimal: the smallest (N, D) at which it can show.
        raises: the exception with which jax or flax refuses it, where one does: such a step
            does not trace, and what is asked of the checker is an explanation.
        source: a public address where users met it; empty where it is elementary.

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
        """The laws that must catch it: those that did in every audit so far."""
        return (self.law,) if self.law else tuple(learned().get(self.name, ()))


@functools.cache
def learned() -> dict[str, list[str]]:
    """Return fault -> the laws that noticed it in every audit, in the order of the laws."""
    found: dict[str, list[str]] = json.loads(EXPECTED.read_text(encoding="utf-8"))
    return found


@dataclass(frozen=True)
class Control:
    """One correct training step, in which a law that objects is itself wrong.

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
    """Enter ``base`` with ``parts`` replaced into the catalogue; see Fault for the rest.

    A part that is a function takes the step first; ``step.right`` is the step before the edit.
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
    """Enter ``base`` with ``parts`` replaced as a correct step."""
    make = edit(base, parts, f"control[{name}]")
    _new(name)
    CONTROLS[name] = Control(name, sentence, make)


def edit(base: type[Any], parts: dict[str, Any], name: str) -> Callable[[], Any]:
    """Return what makes the subject of ``base`` with ``parts`` replaced.

    Raises:
        TypeError: a part replaces nothing.
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
