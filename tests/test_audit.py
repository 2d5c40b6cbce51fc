"""The audit: what a user's own tests would miss."""

import json
import os
import sys
from pathlib import Path
from xml.etree import ElementTree as ET

import jax
import numpy as np
import pytest

from bnverify import cli, reference
from bnverify.audit.faults import FAULTS, faulty, get, put
from bnverify.audit.run import Audit, Finding, Order, audit
from bnverify.errors import UsageError
from bnverify.mistakes import MISTAKES
from bnverify.report import formats
from bnverify.report.formats import FORMATS

EXAMPLE = Path(__file__).parents[1] / "examples" / "audited"
STEP = "training:train_step"
EVALUATE = "training:evaluate"

MISSED = {
    "statistics_reset",
    "statistics_folded_twice",
    "statistics_forget_ten_times_as_fast",
    "statistics_rounded_to_bfloat16",
    "update_doubled",
    "first_leaf_frozen",
    "params_decay",
    "optimizer_state_dropped",
    "optimizer_state_zeroed",
    "loss_doubled",
    "evaluates_initial_statistics",
    "evaluates_halved_params",
}
"""What the example's tests let through: they ask only that the loss falls and statistics move."""

X = np.array([[1.0, 2.0], [0.5, -1.0], [3.0, 0.0]], np.float32)
Y = np.array([1.0, 0.0, -1.0], np.float32)


def step_outcome(name: str) -> tuple[object, object, list[str]]:
    """The right and the faulty outcome of a second step of Adam, and what the fault said."""
    touched: list[str] = []
    subject = reference.adam()
    wrong = faulty(subject, FAULTS[name], lambda: touched.append(name))
    state, _ = subject.step(subject.init(0, X), X, Y, np.float32(0.1))
    right, faulted = (each.step(state, X, Y, np.float32(0.1)) for each in (subject, wrong))
    evaluated = [each.evaluate(state, X, Y) for each in (subject, wrong)]
    return (right, evaluated[0]), (faulted, evaluated[1]), touched


@pytest.mark.parametrize("name", sorted(FAULTS))
def test_each_fault_changes_its_part_and_nothing_else(name: str) -> None:
    """A fault changes what it says it changes, and all else is to the bit."""
    ((right, info), loss), ((wrong, wrong_info), wrong_loss), touched = step_outcome(name)
    assert touched
    part = FAULTS[name].part
    pairs = {
        "params": (right.params, wrong.params),
        "batch_stats": (right.batch_stats, wrong.batch_stats),
        "opt_state": (right.opt_state, wrong.opt_state),
        "loss": (info.loss, wrong_info.loss),
        "evaluation": (loss, wrong_loss),
    }
    changed = {
        each
        for each, trees in pairs.items()
        if any(
            not np.array_equal(a, b)
            for a, b in zip(*map(jax.tree_util.tree_leaves, trees), strict=True)
        )
    }
    assert changed == {part}
    assert FAULTS[name].mistake in MISTAKES
    assert FAULTS[name].sentence.endswith(".")


def test_states_of_every_kind_are_changed_alike() -> None:
    """A dictionary of variables and a named tuple both take new parts."""
    state = reference.sgd().init(0, X)
    as_dict = {"params": state.params, "batch_stats": state.batch_stats}
    assert get(put(as_dict, params=1), "params") == get(put(state, params=1), "params") == 1


def test_a_part_without_leaves_is_not_touched() -> None:
    """Plain SGD has no optimizer state to forget: the fault says it was not reached."""
    touched: list[int] = []
    fault = FAULTS["optimizer_state_dropped"]
    wrong = faulty(reference.sgd, fault, lambda: touched.append(1))()
    wrong.step(wrong.init(0, X), X, Y, np.float32(0.1))
    assert touched == []


def test_an_order_survives_the_environment() -> None:
    """What is ordered in one process is what another reads."""
    order = Order(("a:b", "c.py:d"), "update_dropped", "/somewhere")
    assert Order.load(order.dump()) == order


@pytest.mark.nightly
def test_the_example_misses_what_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """One fault that the example's tests notice, one that they miss, and nothing left on disk."""
    monkeypatch.chdir(EXAMPLE)
    before = sorted(os.listdir())
    names = ("statistics_dropped", "statistics_folded_twice")
    found = audit("pytest -q", [STEP, EVALUATE], [FAULTS[name] for name in names])
    assert [each.verdict for each in found.findings] == ["noticed", "missed"]
    assert sorted(os.listdir()) == before


@pytest.mark.nightly
def test_strict_settings_without_a_cache_are_no_obstacle(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The audit sets the option of a plugin that these settings switch off; it runs pytest, so nightly."""
    for name in ("training.py", "test_training.py"):
        (tmp_path / name).write_text((EXAMPLE / name).read_text())
    strict = "addopts = -p no:cacheprovider --strict-config --strict-markers"
    (tmp_path / "pytest.ini").write_text(f"[pytest]\n{strict}\nfilterwarnings = error\n")
    monkeypatch.chdir(tmp_path)
    found = audit("pytest -q", [STEP], [FAULTS["statistics_dropped"]])
    assert [each.verdict for each in found.findings] == ["noticed"]


@pytest.mark.nightly
def test_the_whole_list_of_what_the_example_misses_is_right(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The printed list names each fault that the example's tests let through, and no other."""
    monkeypatch.chdir(EXAMPLE)
    command = ["audit", "--tests", "pytest -q", "--target", STEP, "--target", EVALUATE]
    assert cli.main(command) == 1
    shown = capsys.readouterr().out
    listed = {line.split()[1] for line in shown.splitlines() if line.startswith(" missed ")}
    assert listed == MISSED
    for name in MISSED:
        assert f"  {name}: {FAULTS[name].sentence}" in shown


@pytest.mark.parametrize("name", FORMATS)
def test_an_audit_comes_in_every_format(name: str) -> None:
    """What is missed fails the build, in the formats that machines read."""
    missed = Finding("first_leaf_frozen", "update_dropped", "one stays", "missed", 1.0)
    text = formats.render([Audit("pytest", ("steps.py:step",), 1.0, (missed,))], name)
    assert missed.fault in text
    if name == "junit":
        cases = ET.fromstring(text).iter("testcase")  # noqa: S314 - our own output
        assert [case.get("name") for case in cases if case.findall("failure")] == [missed.fault]
    if name == "sarif":
        (run,) = json.loads(text)["runs"]
        assert [result["ruleId"] for result in run["results"]] == [missed.fault]


@pytest.mark.parametrize(
    ("command", "target", "said"),
    [
        ("false", "a:b", "the tests fail without any fault"),
        (f"{sys.executable} -c pass", "nowhere:b", "the tests never import nowhere:b"),
        ("no-such-command-here", "a:b", "the command 'no-such-command-here' is not found"),
        (f"{sys.executable} -c 'import string'", "string:b", "fail without any fault"),
    ],
)
def test_unusable_tests_are_refused(command: str, target: str, said: str) -> None:
    """Tests that fail by themselves, or meet no target, are refused in one line."""
    with pytest.raises(UsageError, match=said):
        audit(command, [target], [])


def test_a_file_target_is_found_by_its_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A target may be path/file.py:name, whatever name it is imported by."""
    (tmp_path / "mine.py").write_text("def step(state):\n    return state\n")
    monkeypatch.chdir(tmp_path)
    found = audit(f"{sys.executable} -c 'import mine'", ["mine.py:step"], [])
    assert found.targets == ("mine.py:step",)


def test_a_sitecustomize_of_the_users_still_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The user's own sitecustomize is run after the one that hides it."""
    (tmp_path / "sitecustomize.py").write_text("import os\nos.environ['SEEN'] = 'yes'\n")
    (tmp_path / "mine.py").write_text("import os\nstep = os.environ['SEEN']\n")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    assert audit(f"{sys.executable} -c 'import mine'", ["mine:step"], []).findings == ()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "the following arguments are required: --tests, --target"),
        (["--tests", "true"], "the following arguments are required: --target"),
        (["--tests", "true", "--target", "a"], "is not module:name"),
        (["--tests", "true", "--target", "a:b", "--select", "no"], "no fault is named 'no'"),
        (["--tests", "true", "--target", "a:b", "--shard", "60/60"], "no fault is left to audit"),
    ],
)
def test_unusable_arguments_are_refused(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A command line that means nothing ends with status 2 and one line that says why."""
    assert cli.main(["audit", *arguments]) == 2
    assert said in capsys.readouterr().err


STEP_OF_A_DICT = """
def step(state, x):
    return {"params": state["params"] + x, "batch_stats": state["batch_stats"] + x}
"""
ITS_TEST = """
import numpy as np
from mine import step

one = np.ones(2, np.float32)
assert np.all(step({"params": one, "batch_stats": one}, one)["params"] == 2)
"""


def test_the_command_tells_what_the_tests_miss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Tests that look at the params alone notice their fault, and miss that of the statistics."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(STEP_OF_A_DICT)
    (tmp_path / "check.py").write_text(ITS_TEST)
    command = ["audit", "--tests", f"{sys.executable} check.py", "--target", "mine:step"]
    options = ["--select", "update_dropped,statistics_dropped", "--json", "audit.json"]
    assert cli.main([*command, *options]) == 1
    assert "1 noticed, 1 missed, 0 not reached" in capsys.readouterr().out
    found = {
        each["fault"]: each["verdict"]
        for each in json.loads((tmp_path / "audit.json").read_text())["findings"]
    }
    assert found == {"statistics_dropped": "missed", "update_dropped": "noticed"}


@pytest.mark.parametrize(
    ("failure", "verdict", "ended"),
    [
        ("raise AssertionError('it differs')", "noticed", ""),
        ("sys.exit(3)", "noticed", "they ended with exit status 3"),
        ("os.kill(os.getpid(), 9)", "noticed", "signal 9 ended them"),
        ("", "missed", ""),
    ],
)
def test_how_a_run_ends_is_kept(
    failure: str,
    verdict: str,
    ended: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With what it printed last, unless the tests simply fail; the report shows both."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(STEP_OF_A_DICT)
    react = "import os, sys\nparams = step({'params': one, 'batch_stats': one}, one)['params']\n"
    react += f"print('looked', flush=True)\nif not np.all(params == 2):\n    {failure or 'pass'}\n"
    (tmp_path / "check.py").write_text(ITS_TEST.partition("assert")[0] + react)
    command = f"{sys.executable} check.py"
    found = audit(command, ["mine:step"], [FAULTS["update_dropped"]])
    (finding,) = found.findings
    assert (finding.verdict, finding.ended) == (verdict, ended)
    assert finding.printed == ("" if verdict == "noticed" and not ended else "looked")
    text = formats.render([found], "terminal")
    assert ("    | looked" in text) == bool(ended)
    assert ended in text


def test_tests_that_break_off_before_the_fault_say_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that fails without running the step has not noticed the fault."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(STEP_OF_A_DICT)
    once = "import os, sys, mine\nif os.path.exists('ran'):\n    sys.exit('no disk left')\n"
    (tmp_path / "check.py").write_text(once + "open('ran', 'w').close()\n")
    found = audit(f"{sys.executable} check.py", ["mine:step"], [FAULTS["update_dropped"]])
    (finding,) = found.findings
    assert (finding.verdict, finding.status) == ("not reached", 1)
    assert finding.printed == "no disk left"
    text = formats.render([found], "terminal")
    assert "they ended with exit status 1" in text
    assert "| no disk left" in text
