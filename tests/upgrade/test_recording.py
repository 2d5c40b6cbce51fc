"""Recording: results are kept bit for bit, and can be replayed."""

from __future__ import annotations

import subprocess
import sys

import altered_step
import numpy as np
import pytest

from bnverify.errors import UsageError
from bnverify.upgrade import record as recorder
from bnverify.upgrade import recording
from bnverify.upgrade.record import TreeMismatchError, containers, fill, named


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    """A function that records the altered step, with one small shape to compile less."""
    home = tmp_path_factory.mktemp("step")
    target = altered_step.write(home)

    def call(old=None, laws=False, rows=(5,), budget=recorder.BUDGET, **altered):
        altered_step.alter(home, **altered)
        with pytest.MonkeyPatch.context() as patch:
            patch.delitem(sys.modules, "side", raising=False)
            patch.setattr(recorder, "ROWS", rows)
            patch.setattr(recorder, "CASES", 4)
            patch.setattr(recorder, "BUDGET", budget)
            return recorder.record(target, old=old, laws=laws)

    return call


@pytest.fixture(scope="module")
def made(record):
    """The recording of the unaltered step."""
    return record()


def test_the_same_step_gives_the_same_recording(record, made):
    """Recordings are bit-identical, so a file under version control does not change."""
    assert record().digest == made.digest


def test_a_recording_holds_every_output_of_every_step(record, tmp_path):
    """States, losses and gradients of every shape have a noise, and can be read from the file."""
    made = record(rows=(2, 5))
    recording.write(tmp_path / "step.bnv", made.manifest, made.arrays)
    read = recording.read(tmp_path / "step.bnv")
    assert read.digest == made.digest
    values = read.under("shape1/step2/value")
    expected = {"params/kernel", "params/out", "batch_stats/mean", "batch_stats/var"}
    assert expected | {"loss", "grads/kernel", "grads/out", "eval_loss"} == set(values)
    assert set(read.under("shape1/step2/noise")) == set(values)
    assert values["params/kernel"].shape == (4, 3, 2)
    assert read.manifest["shapes"] == [(2, 1), (5, 3)]
    assert read.leaves(1, "state")["params/kernel"] == ("float32", (3, 2))


def test_each_step_starts_where_the_last_one_ended(made):
    """A recording that is not a replay follows its own states."""
    after = made.under("shape0/step0/value")
    before = made.before(0, 1)
    assert list(before) == list(made.leaves(0, "state"))
    assert all(np.array_equal(before[leaf], after[leaf]) for leaf in before)


def test_a_replay_starts_each_step_from_the_recorded_state(record, made):
    """A changed momentum shows in every step by one step's effect, without accumulation."""
    old = made
    new = record(old, momentum=0.5)
    before = old.before(0, 2)["batch_stats/mean"].astype(float)
    moment = (old.under("shape0/step2/value")["batch_stats/mean"] - 0.9 * before) / 0.1
    expected = 0.5 * before + 0.5 * moment
    actual = new.under("shape0/step2/value")["batch_stats/mean"]
    assert np.allclose(actual, expected, rtol=1e-4, atol=1e-4 * np.abs(before).max())
    assert new.manifest["replays"] == old.digest


def test_the_laws_are_judged_where_possible(record):
    """Verdicts and the influence matrix are part of the recording."""
    made = record(laws=True)
    assert made.manifest["laws"]["batch_stats_keep_their_tree"]["status"] == "proved"
    assert made.manifest["laws"]["batch_stats_change_only_by_ema"]["status"] == "held"
    assert "batch_stats" not in made.manifest["influence"]["matrix"]["params"]


def test_a_step_that_does_not_run_raises_in_a_recording_but_not_in_a_replay(record, made):
    """The old side must run; errors on the new side are a result."""
    with pytest.raises(UsageError, match="gone since"):
        record(raises=True)
    replayed = record(made, raises=True)
    assert "gone since" in replayed.manifest["errors"]["target"]
    assert replayed.arrays == {}


def test_a_state_with_other_leaves_is_described_but_not_replayed(record, made):
    """The new tree is recorded, so that the comparison can name the leaf."""
    replayed = record(made, leaf=True)
    assert "params/new" in replayed.leaves(0, "state")
    assert replayed.under("shape0/step0/value") == {}
    assert any("not replayed" in note for note in replayed.manifest["notes"])


def test_a_large_state_has_fewer_cases(record):
    """The file stays small for any model."""
    made = record(budget=1500)
    assert made.manifest["cases"] < 4
    assert any("large state" in note for note in made.manifest["notes"])


def test_trees_are_filled_by_path_or_by_position():
    """Renamed paths are matched by position if shapes allow, and reported; other leaves raise."""
    tree = {"a": np.zeros(2, np.float32), "b": (np.zeros(3, np.float32),)}
    assert containers(tree) == "dict(*, tuple(*))"
    values = {path: leaf + 1 for path, leaf in named(tree).items()}
    same, alike = fill(tree, values)
    assert alike
    assert np.array_equal(same["b"][0], np.ones(3))
    renamed = dict(zip(("a", "c/0"), values.values(), strict=True))
    same, alike = fill(tree, renamed)
    assert not alike
    assert np.array_equal(same["a"], np.ones(2))
    with pytest.raises(TreeMismatchError):
        fill(tree, {"a": np.zeros(2)})
    with pytest.raises(TreeMismatchError):
        fill(tree, {"a": np.zeros(3), "b/0": np.zeros(3)})


def test_recording_needs_only_the_packages_the_gate_installs():
    """Of bnverify's dependencies an environment has msgspec only."""
    code = (
        "import sys\n"
        "absent = ('hypothesis', 'jinja2', 'packaging', 'pytest', 'shtab', 'uv', 'xdist')\n"
        "for name in absent: sys.modules[name] = None\n"
        "from bnverify import cli\n"
        "cli.build_parser()\n"  # the gate records by the command line
        "from bnverify.upgrade import record\n"
        "record.ROWS = (2,)\n"
        "manifest = record.record('bnverify.reference:sgd').manifest\n"
        "assert manifest['laws'], manifest['notes']\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_command_writes_a_file_or_reports_an_error_in_one_line(tmp_path, monkeypatch):
    """The status is 0 with a file, or 2 with a line."""
    from bnverify.cli import main

    monkeypatch.setattr(recorder, "ROWS", (2,))
    monkeypatch.delitem(sys.modules, "side", raising=False)
    target = altered_step.write(tmp_path)
    altered_step.alter(tmp_path)
    file = tmp_path / "step.bnv"
    assert main(["record", target, "-o", str(file), "--no-laws"]) == 0
    assert recording.read(file).manifest["subject"] == "small"
    assert main(["record", target, "-o", str(tmp_path / "nowhere" / "x")]) == 2
    assert main(["record", target, "-o", str(file), "--replay", str(tmp_path / "none")]) == 2
    assert main(["record", target, "-o", str(file), "--seed", "-1"]) == 2


def test_the_batches_are_multiples_that_the_step_accepts(tmp_path, monkeypatch):
    """A subject declares them as ``rows``."""
    (tmp_path / "split.py").write_text(SPLIT)
    monkeypatch.setattr(recorder, "ROWS", (5,))
    monkeypatch.setattr(recorder, "CASES", 4)
    made = recorder.record(f"{tmp_path / 'split.py'}:subject", laws=False)
    assert [rows for rows, _ in made.manifest["shapes"]] == [7]
    assert made.manifest["notes"] == []
    assert recorder.multiples((2, 5, 32), 4) == [4, 8, 32]
    assert recorder.multiples((2, 5, 32), 24) == [24, 48, 72]
    assert recorder.multiples((2, 5, 32), 1) == [2, 5, 32]


SPLIT = """
from dataclasses import replace
from bnverify import reference

whole = reference.sgd()


def step(state, x, y, lr):
    x.reshape(7, -1, x.shape[1])  # raises for other sizes
    return whole.step(state, x, y, lr)


subject = replace(whole, step=step, rows=7)
"""
