"""The gate: two environments and a verdict; nothing is left behind if it is interrupted."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from pathlib import Path

import altered_step
import pytest

from bnverify.cli import main
from bnverify.errors import UsageError
from bnverify.upgrade import gate as gates
from bnverify.upgrade.environments import Environment
from bnverify.upgrade.policy import Policy

OLD, NEW = "old", "new"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache for this test only."""
    monkeypatch.setenv("BNVERIFY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def target(tmp_path):
    """The small step in a file; each side imports its behaviour from a directory of its own."""
    home = tmp_path / "home"
    home.mkdir()
    return altered_step.write(home)


@pytest.fixture
def sides(tmp_path, cache, monkeypatch):
    """Two environments with the running interpreter that differ in `side`."""

    def resolve(requirement, work, project=None):
        del work, project
        home = tmp_path / requirement.text
        return Environment(
            requirement=requirement.text,
            python=Path(sys.executable),
            paths=(home,),
            key=(home / "side.py").read_text(),
        )

    monkeypatch.setattr(gates, "resolve", resolve)
    altered_step.alter(tmp_path / OLD)
    altered_step.alter(tmp_path / NEW)

    def alter(**altered):
        altered_step.alter(tmp_path / NEW, **altered)

    return alter


def gate(target):
    return gates.gate(target, OLD, NEW, Policy())


def test_a_changed_step_is_reported_and_then_answered_from_the_cache(
    target, sides, cache, monkeypatch
):
    """The changed leaves fail it; the next run reads the cache, and records a damaged file again."""
    sides(momentum=0.99)
    first = gate(target)
    assert not first.ok
    assert {d.leaf for d in first.verdict.failing if d.leaf} == {
        "batch_stats/mean",
        "batch_stats/var",
    }
    left = sorted(p.name for p in (cache / "upgrade").iterdir())
    assert left == ["lock", "recordings", "work"]
    assert not list((cache / "upgrade" / "work").iterdir())

    def no_run(*args, **kwargs):
        raise AssertionError("an environment was run again")

    with monkeypatch.context() as patch:
        patch.setattr(Environment, "run", no_run)
        again = gate(target)
    assert again.comparison.differences == first.comparison.differences

    (kept, *_) = (cache / "upgrade" / "recordings").iterdir()
    intact = kept.read_bytes()
    kept.write_bytes(intact[:-10])
    runs = []

    def write_the_intact_file(environment, command, work, time_limit):
        runs.append(command)
        Path(command[command.index("-o") + 1]).write_bytes(intact)
        return subprocess.CompletedProcess(command, 0, "", "")

    with monkeypatch.context() as patch:
        patch.setattr(Environment, "run", write_the_intact_file)
        repaired = gate(target)
    assert len(runs) == 1
    assert repaired.comparison.differences == first.comparison.differences


@pytest.mark.nightly
def test_a_step_that_crashes_its_process_is_an_api_change(target, sides):
    """On the new side this is a result of the upgrade, reported with the releases."""
    sides(dies=True)
    judgement = gate(target)
    (difference,) = judgement.verdict.failing
    assert difference.kind == "api"
    assert "killed by signal 9" in difference.text
    sides = [judgement.comparison.old, judgement.comparison.new]
    assert sides[0]["versions"] == sides[1]["versions"]


def test_releases_that_cannot_be_imported_are_reported(target, sides, tmp_path):
    """They resolve and install, but do not work; the error suggests a fix."""
    altered_step.alter(tmp_path / OLD)
    (tmp_path / OLD / "optax.py").write_text("import numpy.absent_module")
    with pytest.raises(
        UsageError, match=r"(?s)old.* cannot be imported.*absent_module.*same months"
    ):
        gate(target)


def test_a_recording_that_exceeds_the_time_limit_is_stopped(target, sides, tmp_path):
    """A hanging import does not hang the gate."""
    (tmp_path / OLD / "optax.py").write_text("import time; time.sleep(600)")
    with pytest.raises(UsageError, match="with old took longer than 3 s"):
        gates.gate(target, OLD, NEW, Policy(), time_limit=3.0)


def test_unusable_arguments_are_reported_in_one_line(cache, target, capsys):
    """An invalid requirement or a missing target gives status 2 without a traceback."""
    assert main(["gate", target, "--from", "nonsense !", "--to", "installed"]) == 2
    assert "is not an environment" in capsys.readouterr().err
    assert main(["gate", "--from", "installed", "--to", "installed", "--project", "none"]) == 2
    assert main(["gate", "--from", "installed", "--to", "installed", "--seed", "-1"]) == 2
    assert main(["gate", "--from", "installed", "--to", "installed", "--time-limit", "0"]) == 2


def test_a_target_that_does_not_run_in_the_old_environment_is_rejected(sides, cache, tmp_path):
    """There would be nothing to compare with."""
    with pytest.raises(UsageError, match="no file"):
        gate(f"{tmp_path / 'nowhere.py'}:make")
    (tmp_path / "empty.py").touch()
    with pytest.raises(UsageError, match=r"with old: .*empty\.py has no 'make'"):
        gate(f"{tmp_path / 'empty.py'}:make")


@pytest.fixture(scope="module")
def judgement(tmp_path_factory):
    """A judgement with a malicious leaf name and a failing difference, made without recordings."""
    from bnverify.upgrade.compare import Comparison
    from bnverify.upgrade.policy import Difference, judge

    manifest = {
        "bnverify": "0",
        "python": "3.11.7",
        "versions": {"jax": "1", "flax": "1"},
        "laws": {},
        "influence": {},
        "costs": {},
    }
    found = (
        Difference(
            kind="meaning",
            subject="s",
            leaf="params/<b>&\x07%:|`",
            size=1e5,
            text="was 1\nis 2 <script>alert(1)</script>",
            witness="print('</pre>')\n",
        ),
        Difference(kind="rounding", subject="s", leaf="loss", size=0.5, text="differs a little"),
    )
    new = {**manifest, "versions": {"jax": "2", "flax": "1"}}
    return judge(Comparison("<s>", manifest, new, found, {}, {}), Policy(), old="a", new="b")


def test_junit_is_valid_xml_for_any_leaf_name(judgement):
    """There is one test case for each class; the failing one has its text and witness."""
    from bnverify.report.findings import findings
    from bnverify.report.junit import junit

    root = ET.fromstring(junit([findings(judgement)]))  # noqa: S314 - our own output
    (suite,) = root
    assert (suite.get("tests"), suite.get("failures")) == ("7", "1")
    (failure,) = suite.iter("failure")
    assert "</pre>" in (failure.text or "")


def test_github_commands_are_one_line_each(judgement):
    """Line breaks or colons in a leaf or message cannot inject a command."""
    from bnverify.report.findings import findings
    from bnverify.report.github import messages, summary

    found = [findings(judgement)]
    lines = messages(found).splitlines()
    assert len(lines) == 2
    assert all(line.startswith("::error title=") for line in lines)
    assert "%0A" in lines[0]
    page = summary(found)
    assert "<script>" not in page.split("````")[0]


def test_formats_go_to_their_destinations(judgement, tmp_path, capsys, monkeypatch):
    """One goes to stdout, the others to files; the GitHub format also writes the job summary."""
    from bnverify.report import formats

    page = tmp_path / "page.md"
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(page))
    files = [f"{name}={tmp_path / name}" for name in ("html", "junit", "sarif", "terminal")]
    formats.write([judgement], formats.parse([*files, "json", f"github={tmp_path / 'github'}"]))
    told = json.loads(capsys.readouterr().out)
    assert not told["ok"]
    assert told["differences"][0]["mark"] == "failing"
    (run,) = json.loads((tmp_path / "sarif").read_text())["runs"]
    assert [result["ruleId"] for result in run["results"]] == ["meaning"]
    assert all(
        (tmp_path / name).stat().st_size for name in ("html", "junit", "terminal", "page.md")
    )
    for wrong in (["json", "terminal"], ["xml"], [f"json={tmp_path / 'no' / 'where'}"]):
        with pytest.raises(UsageError):
            formats.parse(wrong)


def descendants(marker: str) -> list[str]:
    """Return the command lines of other living processes that contain a marker."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            text = entry.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if marker in text and str(os.getpid()) != entry.parent.name:
            found.append(text)
    return found


@pytest.mark.nightly
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for processes in /proc")
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_after_a_kill_at_any_moment_the_gate_can_run_again(tmp_path, cache, how):
    """No process remains, no incomplete recording is used, and the verdict is the same."""
    home = tmp_path / "killed_gate"
    home.mkdir()
    altered_step.alter(home)
    target = altered_step.write(home)
    command = [sys.executable, "-m", "bnverify", "gate", target]
    command += ["--from", "installed", "--to", "installed"]
    rng = random.Random(0)
    for _ in range(3):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        time.sleep(rng.uniform(0.3, 6))
        process.send_signal(how)
        _, err = process.communicate()
        assert b"Traceback" not in err
        until = time.monotonic() + 10
        while (left := descendants(str(home))) and time.monotonic() < until:
            time.sleep(0.1)
        assert left == []
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "nothing changed; all values are bit-identical" in done.stdout
    assert not list((cache / "upgrade" / "work").iterdir())
