"""Real releases from the package index: recording with the oldest and newest, and the gate."""

from __future__ import annotations

import json
from pathlib import Path

import altered_step
import pytest

from bnverify.cli import main
from bnverify.upgrade import recording
from bnverify.upgrade.environments import parse, resolve, workspace

PINS = Path(__file__).parents[2] / "pins"

pytestmark = pytest.mark.nightly


def test_the_ends_of_the_matrix_can_record(cache, monkeypatch, tmp_path):
    """The oldest and the newest release are installed as requested, and their recordings can be read."""
    monkeypatch.setenv("BNVERIFY_CACHE", str(cache))
    for name in ("jax-0.4.30.txt", "jax-0.12.0.1.txt"):
        side = parse(str(PINS / name))
        path = tmp_path / name
        with workspace() as work:
            environment = resolve(side, work)
            command = ["-m", "bnverify", "record", "--no-laws", "-o", str(path)]
            done = environment.run(command, work)
        assert done.returncode == 0, done.stderr
        pins = dict(line.split("==") for line in side.lines() if "==" in line)
        told = recording.read(path).manifest["versions"]
        assert told == {package: pins[package] for package in told}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """One cache for the tests of this file, because the environments are the same."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def judged(cache, monkeypatch, capsys):
    """A function that gates a target from jax 0.4.38 to 0.10.2: exit status and JSON report."""
    monkeypatch.setenv("BNVERIFY_CACHE", str(cache))

    def judge(*target):
        sides = ["--from", str(PINS / "jax-0.4.38.txt"), "--to", str(PINS / "jax-0.10.2.txt")]
        status = main(["gate", *target, *sides, "--format", "json"])
        return status, json.loads(capsys.readouterr().out)

    return judge


def test_between_real_releases_the_reference_keeps_its_meaning(judged):
    """Different random numbers are reported as such, values differ by rounding, and it passes."""
    status, told = judged()
    assert status == 0
    assert {d["class"] for d in told["differences"]} == {"initialisation", "rounding"}
    assert told["verdict"] == "the step did not change; initialisation did"
    assert told["to"]["versions"]["jax"] == "0.10.2"


@pytest.mark.parametrize(
    ("altered", "leaves"),
    [
        ({"momentum": 0.99}, {"batch_stats/mean", "batch_stats/var"}),
        ({"ddof": 1}, {"batch_stats/var", "loss"}),
        ({"scale": 1.1}, {"init/params/kernel"}),
    ],
    ids=["momentum", "divisor", "initialiser"],
)
def test_a_step_that_changes_with_the_release_is_found(judged, tmp_path, altered, leaves):
    """Momentum, variance divisor, initial weights: each is found at its leaf, with exit status 1."""
    altered_step.alter(tmp_path, **altered)
    side = tmp_path / "side.py"
    switch = "\nimport jax\nif jax.__version_info__ < (0, 10): ALTERED = {}\n"
    side.write_text(side.read_text(encoding="utf-8") + switch, encoding="utf-8")
    status, told = judged(altered_step.write(tmp_path))
    assert status == 1
    found = [d for d in told["differences"] if d["mark"] == "failing"]
    assert {d["class"] for d in found} == {"meaning"}
    assert leaves <= {d["leaf"] for d in found}
    assert all(d["witness"] for d in found if d["leaf"] in leaves)
