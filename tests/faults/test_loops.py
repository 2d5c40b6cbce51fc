"""Faults of whole loops, each with its correct twin."""

from __future__ import annotations

from itertools import groupby

import pytest

import bnverify
from bnverify.laws import LAWS
from bnverify.profile import Profile
from tests.faults.libraries import LOOP_CONTROLS, LOOP_FAULTS

FEW = Profile("few", tiny=2, shapes=0, block=64, examples=4)
CLAIMED = groupby(
    sorted(LOOP_FAULTS, key=lambda n: LOOP_FAULTS[n].law),
    key=lambda n: LOOP_FAULTS[n].law,
)
FIRST = {next(names) for _, names in CLAIMED}
"""One fault for each law."""


def each_law_once() -> list[object]:
    """Return all names; further faults of the same law are marked for nightly runs."""
    return [n if n in FIRST else pytest.param(n, marks=pytest.mark.nightly) for n in LOOP_FAULTS]


@pytest.mark.parametrize("name", each_law_once())
def test_a_fault_is_caught_and_its_twin_is_not_accused(name: str) -> None:
    """The law is exempt for neither: the fault violates it, and the twin does not."""
    fault = LOOP_FAULTS[name]
    law = LAWS[fault.law]
    assert law.mistakes[0] == fault.mistake
    assert fault.sentence.endswith(".")
    read_alone = law.kind == "structure"
    wrong, right = (
        bnverify.verify(make(), FEW, select=[law.name], proofs_only=read_alone)[law.name]
        for make in (fault.make, LOOP_CONTROLS[name])
    )
    assert wrong.status == "violated", wrong.reason
    assert wrong.counterexample is not None
    assert right.status == "held", right.reason


@pytest.mark.nightly
@pytest.mark.parametrize("name", LOOP_CONTROLS)
def test_a_twin_keeps_every_law(name: str) -> None:
    """A law that a correct loop violates is wrong."""
    report = bnverify.verify(LOOP_CONTROLS[name](), "quick", ignore=["life"])
    assert report.ok, [(each.law, each.reason) for each in report.violated]
