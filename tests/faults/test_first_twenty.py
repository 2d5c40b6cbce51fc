"""Twenty well-known mistakes are detected, with a small counterexample and the right diagnosis."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import bnverify
from bnverify import cli
from bnverify.profile import Profile
from tests.faults import FAULTS

FEW = Profile("few", tiny=1, shapes=0, block=64, examples=3, eager=0)
"""This is enough for each of them; benchmarks/kills.py runs the real profiles with many seeds."""

# Fault of the catalogue -> the law about it.
CAUGHT = {
    "optimizer_on_all_variables": "optimizer_state_is_that_of_params",
    "statistics_trained_as_params": "batch_stats_change_only_by_ema",
    "train_step_in_eval_mode": "step_moves_the_statistics",
    "new_statistics_dropped": "step_moves_the_statistics",
    "statistics_reinitialised": "old_statistics_reach_the_new",
    "ema_applied_twice": "momentum_is_as_declared",
    "momentum_reversed": "momentum_is_as_declared",
    "eval_in_train_mode": "eval_uses_the_running_statistics",
    "eval_of_initial_params": "eval_at_the_batchs_own_moments_is_the_training_loss",
    "eval_of_initial_statistics": "eval_uses_the_running_statistics",
    "broadcast_loss": "eval_at_the_batchs_own_moments_is_the_training_loss",
    "decay_reaches_statistics": "momentum_is_as_declared",
    "statistics_in_bfloat16": "batch_stats_are_float32",
    "old_state_returned": "params_follow_the_optimizer",
    "sum_instead_of_mean": "doubling_the_batch_changes_nothing",
    "sample_variance": "batch_moments_are_the_layers_own",
    "old_optimizer_state_kept": "optimizer_state_follows_the_optimizer",
    "update_subtracted": "params_follow_the_optimizer",
}
REFUSED = ("mutable_forgotten", "has_aux_forgotten")


def check(name: str, folder: Path, *options: str) -> int:
    file = folder / "user_step.py"
    file.write_text(f"from tests.faults import FAULTS\n\nsubject = FAULTS[{name!r}].make()\n")
    return cli.main(["check", f"{file}:subject", "--profile", "quick", *options])


def shown_well(name: str, violated: list[dict[str, Any]]) -> bool:
    """Return whether the law about a fault is violated, with N and D at most 2 and the right diagnosis."""
    small = all(max(each["shape"]) <= 2 for each in violated if each["shape"])
    mistake = FAULTS[name].mistake
    named = all((each["diagnosis"] or "").startswith(f"{mistake}:") for each in violated)
    return CAUGHT[name] in {each["law"] for each in violated} and small and named


@pytest.mark.nightly
@pytest.mark.parametrize("name", CAUGHT)
def test_a_mistake_is_caught_small_and_by_name(name: str) -> None:
    """A few cases violate the law about it, with a small counterexample and the right diagnosis."""
    report = bnverify.verify(FAULTS[name].make(), FEW, ignore=["life"])
    assert shown_well(name, [e.to_json() for e in report.results if e.status == "violated"])


@pytest.mark.nightly
def test_the_command_says_so(tmp_path: Path) -> None:
    """The exit status is 1, and the JSON has the same results."""
    seen, name = tmp_path / "report.json", "sample_variance"
    assert check(name, tmp_path, "--json", str(seen)) == 1
    results = json.loads(seen.read_text())["results"]
    assert shown_well(name, [each for each in results if each["status"] == "violated"])


@pytest.mark.parametrize("name", REFUSED)
def test_a_mistake_that_flax_or_jax_refuses_is_explained(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The exit status is 2, and the message has the error, the usual mistake and the fix."""
    assert check(name, tmp_path) == 2
    said = capsys.readouterr().err
    assert FAULTS[name].raises in said
    assert "Fix: " in said
    assert "Traceback" not in said
