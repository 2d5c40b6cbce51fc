"""Two tiers: what the default leaves out the nightly holds, and what both must hold is there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from pkgutil import iter_modules

import pytest

from bnverify import commands, zoo
from bnverify.laws import STEP_LAWS
from bnverify.reference import VARIANTS
from tests.faults import CONTROLS, FAULTS
from tests.faults.life import LIFE_FAULTS
from tests.faults.parallel import PARALLEL_FAULTS

ROOT = Path(__file__).parents[1]

COLLECT = """
import json, sys
import pytest

class Collected:
    def pytest_collection_finish(self, session):
        tiers = {item.nodeid: item.get_closest_marker("nightly") is not None for item in session.items}
        with open(sys.argv[1], "w") as file:
            json.dump(tiers, file)

sys.exit(pytest.main(["--collect-only", "-qq", "-m", "", "-p", "no:cacheprovider"], [Collected()]))
"""

ENDS = {
    "audit": "tests/test_audit.py::test_the_command_tells_what_the_tests_miss",
    "bisect": "tests/upgrade/test_bisect.py::test_the_first_changed_release_is_found_in_logarithmically_many_trials",
    "check": "tests/test_docs.py::test_the_readme_shows_what_check_prints",
    "compare": "tests/upgrade/test_compare.py::test_the_command_reports_and_exits_by_the_policy",
    "explain": "tests/test_cli.py::test_explain_a_law",
    "gate": "tests/upgrade/test_gate.py::test_a_changed_step_is_reported_and_then_answered_from_the_cache",
    "list": "tests/test_cli.py::test_list_names_every_law",
    "merge": "tests/test_merge.py::test_the_merged_report_is_that_of_one_machine",
    "record": "tests/upgrade/test_recording.py::test_the_command_writes_a_file_or_reports_an_error_in_one_line",
}
"""A command -> the test of the default tier that runs it from one end to the other."""


@pytest.fixture(scope="module")
def tiers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bool]:
    """Return the name of each test -> whether only the nightly tier runs it."""
    file = tmp_path_factory.mktemp("tiers") / "tiers.json"
    done = subprocess.run(
        [sys.executable, "-c", COLLECT, str(file)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTEST_ADDOPTS": ""},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, bool] = json.loads(file.read_text())
    return found


OF_THE_REFERENCE = [
    law for law in STEP_LAWS.values() if not {"look", "row_weights"}.intersection(law.capabilities)
]
"""The laws that apply to it; the others have subjects of their own in tests/faults/test_loops.py."""


def asked(names: object, test: str) -> list[str]:
    """Return the ids of a test that is parametrized by names."""
    return [f"{test}[{name}]" for name in names]  # type: ignore[attr-defined] # any iterable


def test_the_tiers_together_hold_everything(tiers: dict[str, bool]) -> None:
    """Every law, fault, control, subject of the zoo and optimizer; every command by default."""
    expected = [
        *asked(zoo.SUBJECTS, "tests/zoo/test_zoo.py::test_no_law_objects"),
        *asked(PARALLEL_FAULTS, "tests/test_parallel.py::test_each_fault_is_caught_and_named"),
        *asked(LIFE_FAULTS, "tests/test_life.py::test_each_fault_is_caught_and_named"),
        *asked(
            CONTROLS, "tests/faults/test_catalogue.py::test_every_step_traces_under_jit_and_vmap"
        ),
    ]
    for name, fault in FAULTS.items():
        test = (
            "survivors_agree_with_what_was_meant"
            if fault.survives
            else "every_fault_shows_on_a_simple_batch"
        )
        test = "what_a_library_refuses_is_named" if fault.raises else test
        expected.append(f"tests/faults/test_catalogue.py::test_{test}[{name}]")
    for law in OF_THE_REFERENCE:
        test = f"properties/test_{law.family}.py::test_{law.name}"
        expected += asked(("reference[sgd]", "reference[adam]"), test)
        if law.family in {"structure", "influence", "update"}:
            expected += asked([f"reference[{make.__name__}]" for make in VARIANTS], test)
    assert [name for name in expected if name not in tiers] == []


def test_the_default_tier_holds_an_example_of_each(tiers: dict[str, bool]) -> None:
    """Each law red and green, SGD and Adam, five models of the zoo, the README, each command."""
    default = {name for name, nightly in tiers.items() if not nightly}
    plain = {name.partition("[")[0] for name in default}
    modules = {module.name for module in iter_modules(commands.__path__)}
    assert set(ENDS) == modules
    assert set(ENDS.values()) <= plain
    models = [
        name for name in default if name.startswith("tests/zoo/test_zoo.py::test_no_law_objects")
    ]
    assert len(models) == 5
    laws = [name for name in default if name.startswith("properties/")]
    assert all(name.endswith(("reference[sgd]]", "reference[adam]]")) for name in laws)
    assert len(laws) == 2 * len(OF_THE_REFERENCE)
    # tests/laws/test_red.py asserts itself that it names every law.
    assert not any(
        nightly for name, nightly in tiers.items() if name.startswith("tests/laws/test_red.py")
    )
    assert "tests/test_runs.py::test_the_reference_keeps_every_law" in default
    assert "tests/test_docs.py::test_sessions_on_the_page_run_as_shown[README.md]" in default
