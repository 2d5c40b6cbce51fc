"""Every law says what it claims, where that comes from and what breaks it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import bnverify
from bnverify.engine.judge import HIDDEN
from bnverify.laws import LAWS
from bnverify.laws.law import law
from bnverify.mistakes import MISTAKES

FAMILIES = {"structure", "influence", "statistics", "update", "evaluation", "metamorphic"}


@pytest.mark.parametrize("name", sorted(LAWS))
def test_a_law_is_documented(name: str) -> None:
    """Its claim is one sentence, its source is named, its mistakes are known ones."""
    entry = LAWS[name]
    assert entry.claim.endswith(".")
    assert entry.source
    assert entry.mistakes
    assert set(entry.mistakes) <= set(MISTAKES)
    assert set(entry.requires) <= set(HIDDEN)


def test_all_families_are_there() -> None:
    """No family of the design is missing."""
    assert {entry.family for entry in LAWS.values()} == FAMILIES


def test_every_mistake_is_used() -> None:
    """Each mistake is named by a law, a claim, a fault or an explained refusal."""
    package = Path(bnverify.__file__).parent
    sources = [path for path in package.rglob("*.py") if path.name != "mistakes.py"]
    text = "\n".join(path.read_text() for path in sources)
    assert [name for name in MISTAKES if f'"{name}"' not in text] == []


def test_a_second_law_of_the_same_name_is_refused() -> None:
    """The registry holds one law a name."""
    with pytest.raises(ValueError, match="two laws are named eval_loss_is_finite"):

        @law("evaluation")
        def eval_loss_is_finite(t: object) -> object:
            """Nothing."""
            return t


def test_the_laws_load_without_jax() -> None:
    """`bnverify list` reads the registry, so importing it must not import jax."""
    code = "import sys, bnverify.laws; sys.exit('jax' in sys.modules or 'flax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
