"""The gate: two environments, a verdict, and nothing left behind, whatever interrupts it."""

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
    """A cache of this test alone."""
    monkeypatch.setenv("BNVERIFY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def target(tmp_path):
    """The small step in a file; each side imports how it behaves from a directory of its own."""
    home = tmp_path / "home"
    home.mkdir()
    return altered_step.write(home)


@pytest.fixture
def sides(tmp_path, cache, monkeypatch):
    """Two environments around the running interpreter, which differ in what `side` says."""

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


def test_the_gate_tells_a_changed_step_and_then_answers_from_its_cache(
    target, sides, cache, monkeypatch
):
    """Changed: not ok, with the leaf. Again: the same, and no environment is run."""
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

    (old_file, *_) = (cache / "upgrade" / "recordings").iterdir()
    old_file.write_bytes(old_file.read_bytes()[:-10])  # damaged where it lies: made again
    mended = gate(target)
    assert mended.comparison.differences == first.comparison.differences


@pytest.mark.nightly
def test_a_step_that_kills_its_process_is_an_api_change(target, sides):
    """On the new side it is the upgrade's doing, with the releases that it happened on."""
    sides(dies=True)
    judgement = gate(target)
    (difference,) = judgement.verdict.failing
    assert difference.kind == "api"
    assert "died of signal 9" in difference.text
    sides = [judgement.comparison.old, judgement.comparison.new]
    assert sides[0]["versions"] == sides[1]["versions"]


def test_releases_that_do_not_import_are_refused(target, sides, tmp_path):
    """They resolve, they install, and they do not work: that is said, with what may help."""
    altered_step.alter(tmp_path / OLD)
    (tmp_path / OLD / "optax.py").write_text("import numpy.absent_module")
    with pytest.raises(UsageError, match=r"(?s)old.* do not import.*absent_module.*same months"):
        gate(target)


def test_a_recording_that_takes_too_long_is_given_up(target, sides, tmp_path):
    """A hanging import is no hanging gate."""
    (tmp_path / OLD / "optax.py").write_text("import time; time.sleep(600)")
    with pytest.raises(UsageError, match="with old takes longer than 3 s"):
        gates.gate(target, OLD, NEW, Policy(), time_limit=3.0)


def test_what_cannot_be_had_is_told_in_one_line(cache, target, capsys):
    """A requirement that names nothing, a target that is not there: status 2, no traceback."""
    assert main(["gate", target, "--from", "nonsense !", "--to", "installed"]) == 2
    assert "names no environment" in capsys.readouterr().err
    assert main(["gate", "--from", "installed", "--to", "installed", "--project", "none"]) == 2
    assert main(["gate", "--from", "installed", "--to", "installed", "--seed", "-1"]) == 2
    assert main(["gate", "--from", "installed", "--to", "installed", "--time-limit", "0"]) == 2


def test_a_target_that_does_not_run_in_the_old_environment_is_refused(sides, cache, tmp_path):
    """Nothing can be compared with it."""
    with pytest.raises(UsageError, match="no file"):
        gate(f"{tmp_path / 'nowhere.py'}:make")
    (tmp_path / "empty.py").touch()
    with pytest.raises(UsageError, match=r"with old: .*empty\.py has no 'make'"):
        gate(f"{tmp_path / 'empty.py'}:make")


@pytest.fixture(scope="module")
def judgement(tmp_path_factory):
    """A judgement with a hostile leaf and a failing difference, made without any recording."""
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


def test_junit_is_xml_whatever_a_leaf_is_called(judgement):
    """One case for each class; the failing one has its text and witness."""
    from bnverify.report.findings import findings
    from bnverify.report.junit import junit

    root = ET.fromstring(junit([findings(judgement)]))  # noqa: S314 - our own output
    (suite,) = root
    assert (suite.get("tests"), suite.get("failures")) == ("7", "1")
    (failure,) = suite.iter("failure")
    assert "</pre>" in (failure.text or "")


def test_github_commands_are_one_line_each(judgement):
    """A leaf or a message with line breaks or colons injects no command of its own."""
    from bnverify.report.findings import findings
    from bnverify.report.github import messages, summary

    found = [findings(judgement)]
    lines = messages(found).splitlines()
    assert len(lines) == 2
    assert all(line.startswith("::error title=") for line in lines)
    assert "%0A" in lines[0]
    page = summary(found)
    assert "<script>" not in page.split("````")[0]


def test_formats_go_where_they_are_asked_to(judgement, tmp_path, capsys, monkeypatch):
    """One to the screen, the others to files; GitHub's summary page beside its messages."""
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
    """Return the command lines of living processes that hold a marker, but for this one."""
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
def test_killed_at_any_moment_it_leaves_nothing_and_can_be_run_again(tmp_path, cache, how):
    """No process goes on, no half-written recording is taken for one, the verdict is the same."""
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
