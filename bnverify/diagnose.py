"""From the laws that are broken, and those that hold, to the mistake that usually looks like this.

A naive Bayes classifier. What it learned from is ``signatures.json``: for each mistake, how many
faults of the catalogue embody it and how many of those broke each law when the audit held them to
all laws. ``bnverify.mutants.learned`` makes it from the JSON of audits.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from importlib import resources
from typing import Any

from bnverify.evidence import Evidence
from bnverify.laws import LAWS, Law
from bnverify.mistakes import MISTAKES, Mistake, described

NAMED = 0.5
"""How likely a mistake is taken to break a law that names it, before any fault was seen."""


@functools.cache
def signatures() -> Mapping[str, Any]:
    """Return mistake -> {"faults": how many, "broken": {law: by how many of them}}."""
    text = resources.files("bnverify").joinpath("signatures.json").read_text("utf-8")
    found: dict[str, Any] = json.loads(text)
    return found


@functools.cache
def _often(law: str) -> float:
    """Return which part of all faults breaks ``law``; never 0, never 1."""
    total: int = sum(seen["faults"] for seen in signatures().values())
    broken: int = sum(seen["broken"].get(law, 0) for seen in signatures().values())
    return (broken + 0.5) / (total + 1.0)


def _likelihood(mistake: str, law: str) -> float:
    """Return how likely ``mistake`` breaks ``law``: the faults seen, and one more to begin with."""
    seen = signatures().get(mistake, {"faults": 0, "broken": {}})
    names = law in LAWS and mistake in LAWS[law].mistakes
    first = NAMED if names else _often(law)
    return float((seen["broken"].get(law, 0) + first) / (seen["faults"] + 1.0))


def likeliest(law: Law, violated: Collection[str], held: Collection[str] = ()) -> list[Mistake]:
    """Return the mistakes that break ``law``, the likeliest first.

    Args:
        law: a broken law.
        violated: the names of all broken laws.
        held: the names of the laws that were reached and not broken.
    """
    broken = {*violated, law.name}
    seen = signatures()
    names = [
        name
        for name in MISTAKES
        if name in law.mistakes or seen.get(name, {"broken": {}})["broken"].get(law.name)
    ]

    def rank(name: str) -> float:
        common = math.log(1.0 + seen.get(name, {"faults": 0})["faults"]) / 3
        there = sum(math.log(_likelihood(name, each)) for each in broken)
        return common + there + sum(math.log(1 - _likelihood(name, each)) for each in held)

    return [MISTAKES[name] for name in sorted(names, key=rank, reverse=True)]


def diagnosed(results: Sequence[Evidence]) -> list[Evidence]:
    """Return ``results``, those of broken laws with the likeliest mistake, unless one is known.

    Args:
        results: what is known about all the laws: what holds tells mistakes apart, too.
    """
    violated = {each.law for each in results if each.status == "violated"}
    held = {each.law for each in results if each.status in {"held", "proved"}}
    return [
        replace(each, diagnosis=_described(likeliest(LAWS[each.law], violated, held)))
        if each.law in violated and each.law in LAWS and each.diagnosis is None
        else each
        for each in results
    ]


def _described(mistakes: Sequence[Mistake]) -> str:
    """Return the first mistake and its mend, and what else it may be, in a few lines."""
    if not mistakes:
        return "no common mistake is known to break this law"
    first, *others = mistakes
    text = described(first)
    if others:
        text += " Or " + "; or ".join(other.title for other in others[:2]) + "."
    return text
