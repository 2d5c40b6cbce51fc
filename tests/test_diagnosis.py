"""Diagnoses: from broken and kept laws to a mistake's name, learned from the audit of the catalogue."""

import pytest

from bnverify.diagnose import diagnosed, likeliest, signatures
from bnverify.evidence import Evidence
from bnverify.laws import LAWS
from bnverify.mistakes import MISTAKES
from bnverify.mutants import MUTANTS
from bnverify.mutants.learned import expected
from bnverify.mutants.learned import signatures as counted

FAULTS = [
    {"mutant": "momentum_reversed", "laws": ["momentum_is_as_declared"]},
    {"mutant": "momentum_of_the_variance_reversed", "laws": ["momentum_is_as_declared", "gone"]},
    {"mutant": "sign_flips_on_the_fifth_step", "laws": []},
]


def evidence(law: str, status: str) -> Evidence:
    return Evidence(law, LAWS[law].family, status)  # type: ignore[arg-type] # a status by name


def test_what_was_learned_names_laws_and_mistakes_that_exist() -> None:
    """A law or mistake that is renamed takes its data with it."""
    assert set(signatures()) <= set(MISTAKES)
    assert {law for seen in signatures().values() for law in seen["broken"]} <= set(LAWS)
    for seen in signatures().values():
        assert max(seen["broken"].values()) <= seen["faults"]
    assert {law for mutant in MUTANTS.values() for law in mutant.expected} <= set(LAWS)


def test_most_faults_are_named_by_the_laws_that_notice_them() -> None:
    """Of the faults that laws notice two thirds get their own mistake as the first or second name.

    Not all can: mistakes that leave the same trace are told apart by a reader only.
    """
    noticed = [mutant for mutant in MUTANTS.values() if mutant.expected]
    named = 0
    for mutant in noticed:
        held = set(LAWS) - set(mutant.expected)
        first = likeliest(LAWS[mutant.expected[0]], mutant.expected, held)[:2]
        named += mutant.mistake in [mistake.name for mistake in first]
    assert len(noticed) > 200
    assert named >= 2 / 3 * len(noticed)


@pytest.mark.parametrize(
    ("broken", "mistake"),
    [
        (["eval_rows_are_independent", "eval_uses_the_running_statistics"], "eval_in_train_mode"),
        (["step_moves_the_statistics", "momentum_is_as_declared"], "new_statistics_dropped"),
        (["momentum_is_as_declared"], "momentum_reversed"),
    ],
)
def test_well_known_patterns_have_their_names(broken: list[str], mistake: str) -> None:
    """What breaks together, while the rest holds, tells mistakes apart."""
    results = [evidence(law, "violated" if law in broken else "held") for law in LAWS]
    by_name = {each.law: each.diagnosis or "" for each in diagnosed(results)}
    assert all(by_name[law].startswith(f"{mistake}: ") for law in broken)
    assert all(not by_name[law] for law in LAWS if law not in broken)


def test_a_law_that_no_fault_broke_still_names_its_own_mistakes() -> None:
    """Without any fault seen, the law's own list and order decide."""
    law = LAWS["jit_equals_eager"]
    assert set(law.mistakes) <= {mistake.name for mistake in likeliest(law, [law.name])}


def test_signatures_count_faults_and_the_laws_they_broke() -> None:
    """A fault that broke nothing, and a law that is gone, are not counted."""
    assert counted(FAULTS) == {
        "momentum_reversed": {"faults": 2, "broken": {"momentum_is_as_declared": 2}}
    }


def test_expected_laws_are_those_of_every_audit() -> None:
    """A law that noticed a fault once and not again is not expected to."""
    again = [{"mutant": "momentum_reversed", "laws": ["variance_is_never_negative"]}]
    assert expected([FAULTS]) == {
        "momentum_reversed": ["momentum_is_as_declared"],
        "momentum_of_the_variance_reversed": ["momentum_is_as_declared"],
    }
    assert expected([FAULTS, again]) == {
        "momentum_of_the_variance_reversed": ["momentum_is_as_declared"]
    }
