"""Every law has a claim, a source and mistakes that violate it."""

from __future__ import annotations

import subprocess
import sys
from itertools import groupby
from pathlib import Path

import pytest

import bnverify
from bnverify.laws import FAMILIES, LAWS, STEP_LAWS
from bnverify.laws.law import beyond_one_step, law
from bnverify.mistakes import MISTAKES
from bnverify.model import Transition
from bnverify.proof import MISSING_CAPABILITY


@pytest.mark.parametrize("name", LAWS)
def test_a_law_is_documented(name: str) -> None:
    """Its claim is one sentence, its source is named, its mistakes are known ones."""
    entry = LAWS[name]
    assert entry.name == name
    assert entry.claim.endswith(".")
    assert "\n" not in entry.claim
    assert entry.source
    assert entry.mistakes
    assert set(entry.mistakes) <= set(MISTAKES)


def test_what_a_law_requires_a_report_can_name() -> None:
    """If a subject lacks a capability, the law is exempt, and the report says why."""
    required = {name for entry in LAWS.values() for name in entry.capabilities}
    assert required <= set(MISSING_CAPABILITY)


def test_laws_stand_in_the_order_of_reports() -> None:
    """Laws are grouped by family, and every family has laws."""
    assert tuple(family for family, _ in groupby(LAWS.values(), lambda entry: entry.family)) == (
        FAMILIES
    )


def test_laws_of_one_step_are_functions_of_a_transition() -> None:
    """All other laws need histories or several devices, and raise an error that says so."""
    beyond = {name for name, entry in LAWS.items() if entry.family in {"life", "parallel"}}
    assert set(STEP_LAWS) == set(LAWS) - beyond
    assert list(STEP_LAWS) == [name for name in LAWS if name in STEP_LAWS]
    transition = Transition(*[None] * 5, {}, {}, {})  # type: ignore[arg-type]  # nothing reads it
    for name in beyond:
        assert LAWS[name].kind == LAWS[name].family
        with pytest.raises(TypeError, match="histories or devices"):
            LAWS[name].check(transition)


def test_claim_and_derivation_are_the_docstrings() -> None:
    """The first paragraph is the claim, the others the derivation, without indentation."""
    entry = LAWS["zero_learning_rate_moves_nothing"]
    assert entry.claim == "With lr = 0, params stay bit-identical (subnormals may flush to 0)."
    assert entry.derivation == ""
    assert LAWS["batch_stats_change_only_by_ema"].derivation.startswith("Two re-runs, from")
    assert "\n    " not in LAWS["batch_stats_change_only_by_ema"].derivation


def test_every_mistake_is_used() -> None:
    """Each mistake is named by a law, a fault or an explained refusal."""
    package = Path(bnverify.__file__).parent
    sources = [path for path in package.rglob("*.py") if path.name != "mistakes.py"]
    text = "\n".join(path.read_text() for path in sources)
    assert [name for name in MISTAKES if f'"{name}"' not in text] == []


def test_a_second_law_of_the_same_name_is_refused() -> None:
    """Names are unique across all kinds of laws."""
    with pytest.raises(ValueError, match="two laws are named eval_loss_is_finite"):

        @law("evaluation")
        def eval_loss_is_finite(t: object) -> object:
            """Nothing."""
            return t

    with pytest.raises(ValueError, match="two laws are named eval_loss_is_finite"):
        beyond_one_step("life", "eval_loss_is_finite", "Nothing.", mistakes=(), source="")


def test_the_laws_load_without_jax() -> None:
    """`bnverify list` reads the registry, so importing it must not import jax."""
    code = "import sys, bnverify.laws; sys.exit('jax' in sys.modules or 'flax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
