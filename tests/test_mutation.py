"""benchmarks/mutation.py: every fault that it puts into bnverify still fits the code."""

from __future__ import annotations

import importlib.util
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_every_edit_fits_its_file_and_names_tests_that_exist() -> None:
    """Its text occurs exactly once, what replaces it compiles, and there are enough of them."""
    spec = importlib.util.spec_from_file_location("mutation", ROOT / "benchmarks/mutation.py")
    assert spec is not None
    assert spec.loader is not None
    mutation = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(mutation)
    assert len(mutation.FAULTS) >= 40
    assert len({fault.name for fault in mutation.FAULTS}) == len(mutation.FAULTS)
    for fault in mutation.FAULTS:
        compile(mutation.edited(fault), fault.file, "exec")
        assert all((ROOT / test.partition("::")[0]).exists() for test in fault.near)
