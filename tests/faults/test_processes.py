"""Steps that differ from process to process, and twins that do not."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import bnverify
from bnverify.lifetime import process
from bnverify.profile import Profile
from tests.faults.processes import LAW, MISTAKE, PROCESS_CONTROLS, PROCESS_FAULTS
from tests.tiers import first_of

TWO = Profile("two", processes=1)
HOME = "tests.faults.processes:"


def evidence(target: str, plan: Profile = TWO) -> bnverify.Evidence:
    """Return what is known of the law for a target."""
    report = bnverify.verify(bnverify.load(target), plan, select=[LAW], target=target)
    return report[LAW]


@pytest.mark.parametrize("name", first_of(PROCESS_FAULTS))
def test_a_fault_is_caught_and_named(name: str) -> None:
    """With the leaf, and a script that loads the target."""
    found = evidence(HOME + name)
    assert found.status == "violated", found.reason
    assert found.reason.startswith(("init: params/", "step: state/params/"))
    assert "in another process" in found.reason
    assert found.cause is not None
    assert found.cause.mistake == MISTAKE
    assert found.counterexample is not None
    assert f"bnverify.load('{HOME}{name}')" in found.counterexample.script


@pytest.mark.parametrize("name", first_of(PROCESS_CONTROLS))
def test_a_right_twin_is_not_accused(name: str) -> None:
    """A different order of operations is allowed for."""
    found = evidence(HOME + name)
    assert found.status == "held", found.reason


def test_a_step_without_a_target_is_exempt() -> None:
    """An object cannot be loaded elsewhere, and a quick check starts no process."""
    right = PROCESS_FAULTS["key_from_a_hash"].make()
    assert bnverify.verify(right, TWO, select=[LAW])[LAW].reason == process.NO_TARGET
    quick = evidence(HOME + "key_from_a_hash", Profile("none"))
    assert (quick.status, quick.reason) == ("exempt", process.NO_PROCESS)


def test_a_target_that_another_process_cannot_load_is_untriggered(tmp_path: Path) -> None:
    """The reason is the error of the other process."""
    file = tmp_path / "once.py"
    file.write_text(
        "import os\n"
        f"if {process.INSIDE!r} in os.environ:\n"
        "    raise RuntimeError('only once')\n"
        "from bnverify.reference import sgd\n"
    )
    found = evidence(f"{file}:sgd")
    assert found.status == "untriggered"
    assert "another process cannot load the step: TargetError" in found.reason
    assert "only once" in found.reason


def test_another_process_starts_no_third_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """A target that checks itself at import would otherwise start processes for ever."""
    monkeypatch.setitem(os.environ, process.INSIDE, "1")
    assert evidence(HOME + "key_from_a_hash").status == "untriggered"
