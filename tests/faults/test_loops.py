"""Faults of whole loops, each with its correct twin."""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby

import pytest

import bnverify
from bnverify import Evidence, Subject
from bnverify.laws import LAWS, Law
from bnverify.profile import Profile
from tests.faults.libraries import LOOP_CONTROLS, LOOP_FAULTS

FEW = Profile("few", tiny=1, shapes=0, block=64, examples=4)
CLAIMED = groupby(
    sorted(LOOP_FAULTS, key=lambda n: LOOP_FAULTS[n].law),
    key=lambda n: LOOP_FAULTS[n].law,
)
FIRST = {next(names) for _, names in CLAIMED}
"""One fault for each law."""


def each_law_once() -> list[object]:
    """Return all names; further faults of the same law are marked for nightly runs."""
    return [n if n in FIRST else pytest.param(n, marks=pytest.mark.nightly) for n in LOOP_FAULTS]


def judged(make: Callable[[], Subject], law: Law) -> Evidence:
    """Return what the law says about a loop; a law of structure needs no run."""
    alone = law.kind == "structure"
    return bnverify.verify(make(), FEW, select=[law.name], proofs_only=alone)[law.name]


@pytest.mark.parametrize("name", each_law_once())
def test_a_fault_is_caught(name: str) -> None:
    """It violates the law that it was made for, with a counterexample."""
    fault = LOOP_FAULTS[name]
    law = LAWS[fault.law]
    assert law.mistakes[0] == fault.mistake
    assert fault.sentence.endswith(".")
    wrong = judged(fault.make, law)
    assert wrong.status == "violated", wrong.reason
    assert wrong.counterexample is not None


@pytest.mark.nightly
@pytest.mark.parametrize("name", LOOP_FAULTS)
def test_the_twin_of_a_fault_is_not_accused(name: str) -> None:
    """The law is not exempt for the twin: it holds."""
    right = judged(LOOP_CONTROLS[name], LAWS[LOOP_FAULTS[name].law])
    assert right.status == "held", right.reason


@pytest.mark.nightly
@pytest.mark.parametrize("name", LOOP_CONTROLS)
def test_a_twin_keeps_every_law(name: str) -> None:
    """A law that a correct loop violates is wrong."""
    report = bnverify.verify(LOOP_CONTROLS[name](), "quick", ignore=["life"])
    assert report.ok, [(each.law, each.reason) for each in report.violated]
