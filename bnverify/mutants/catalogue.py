"""The catalogue of faults: wrong training steps, each wrong in one way, each with a name.

Loads no jax, nor do the modules that fill it: a step is built only when ``make`` is called.
"""

from __future__ import annotations

import functools
import inspect
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from typing import TypeVar

from bnverify.mistakes import MISTAKES
from bnverify.model import Subject
from bnverify.mutants.canonical import CanonicalStep

Parts = TypeVar("Parts", bound=type[CanonicalStep])


@dataclass(frozen=True)
class Mutant:
    """One wrong training step.

    Attributes:
        name: the fault.
        family: the part of the step that it sits in.
        mistake: what its author did, a name from :data:`bnverify.mistakes.MISTAKES`.
        sentence: what is wrong, in one sentence.
        make: returns the step, with the fields its author would have declared in good faith.
        blind: written from the problem and from users' reports alone, without sight of any law.
        survives: why nothing catches it: equivalent, or out of the domain. Empty: it must die.
        tolerated: why laws let it pass although it shows: it is also what somebody may want.
        minimal: the smallest (N, D) at which it can show.
        raises: the exception with which jax or flax refuses it, where one does: such a step
            does not trace, and what is asked of the checker is an explanation.
        source: a public address where users met it; empty where it is elementary.
    """

    name: str
    family: str
    mistake: str
    sentence: str
    make: Callable[[], Subject]
    blind: bool = False
    survives: str = ""
    tolerated: str = ""
    minimal: tuple[int, int] = (1, 1)
    raises: str = ""
    source: str = ""

    @property
    def expected(self) -> tuple[str, ...]:
        """The laws that must catch it: those that did in every audit so far."""
        return tuple(_expected().get(self.name, ()))


@functools.cache
def _expected() -> dict[str, list[str]]:
    text = resources.files("bnverify.mutants").joinpath("expected.json").read_text("utf-8")
    found: dict[str, list[str]] = json.loads(text)
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


MUTANTS: dict[str, Mutant] = {}
CONTROLS: dict[str, Control] = {}


def register(entry: Mutant) -> None:
    """Add ``entry`` to the catalogue.

    Raises:
        ValueError: its name is taken, or its mistake is not one of MISTAKES.
    """
    if entry.name in MUTANTS or entry.name in CONTROLS:
        raise ValueError(f"{entry.name} is in the catalogue already")
    if entry.mistake not in MISTAKES:
        raise ValueError(f"{entry.name} embodies no known mistake: {entry.mistake!r}")
    MUTANTS[entry.name] = entry


def mutant(
    *,
    family: str,
    mistake: str,
    blind: bool = False,
    survives: str = "",
    tolerated: str = "",
    minimal: tuple[int, int] = (1, 1),
    raises: str = "",
    source: str = "",
) -> Callable[[Parts], Parts]:
    """Enter the decorated step into the catalogue; its class name and docstring describe it."""

    def enter(parts: Parts) -> Parts:
        name = snake_case(parts.__name__)
        register(
            Mutant(
                name=name,
                family=family,
                mistake=mistake,
                sentence=inspect.getdoc(parts) or "",
                make=lambda: parts().subject(f"mutant[{name}]"),
                blind=blind,
                survives=survives,
                tolerated=tolerated,
                minimal=minimal,
                raises=raises,
                source=source,
            )
        )
        return parts

    return enter


def control(parts: Parts) -> Parts:
    """Enter the decorated step as a correct one."""
    name = snake_case(parts.__name__)
    if name in MUTANTS or name in CONTROLS:
        raise ValueError(f"{name} is in the catalogue already")
    CONTROLS[name] = Control(
        name, inspect.getdoc(parts) or "", lambda: parts().subject(f"control[{name}]")
    )
    return parts


def snake_case(name: str) -> str:
    """Return ``name`` of a class as the name of a fault: SampleVariance -> sample_variance."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()
