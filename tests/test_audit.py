"""The audit: what the laws notice, and what a user's own tests would miss."""

import io
import json
import os
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import jax
import numpy as np
import pytest

from bnverify import cli, reference
from bnverify.errors import UsageError
from bnverify.mistakes import MISTAKES
from bnverify.mutants import MUTANTS, users_tests
from bnverify.mutants.audit import Audit, Finding
from bnverify.mutants.substitution import Order
from bnverify.mutants.transplant import TRANSPLANTS, faulty, get, put
from bnverify.mutants.users_tests import audit_tests
from bnverify.report import formats
from bnverify.report.audit import draw, killers, matrix, show
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


def finding(name: str, *laws: str, survives: str = "", refusal: str = "") -> Finding:
    return Finding(name, "family", laws, refusal, 1.0, (2, 1) if laws else None, True, survives)


AUDIT = Audit(
    (
        finding("one", "law_a", "law_b"),
        finding("two", "law_b"),
        finding("three", survives="equivalent: <nothing> differs"),
        finding("four", refusal="TypeError: no"),
        finding("five"),
    )
)


def parsed(picture: str) -> ET.Element:
    return ET.fromstring(picture)  # noqa: S314 - our own text, of a moment ago


def step_outcome(name: str) -> tuple[object, object, list[str]]:
    """The right and the faulty outcome of a second step of Adam, and what the fault said."""
    touched: list[str] = []
    subject = reference.adam()
    wrong = faulty(subject, TRANSPLANTS[name], lambda: touched.append(name))
    state, _ = subject.step(subject.init(0, X), X, Y, np.float32(0.1))
    right, faulted = (each.step(state, X, Y, np.float32(0.1)) for each in (subject, wrong))
    evaluated = [each.evaluate(state, X, Y) for each in (subject, wrong)]
    return (right, evaluated[0]), (faulted, evaluated[1]), touched


@pytest.mark.parametrize("name", sorted(TRANSPLANTS))
def test_each_fault_changes_its_part_and_nothing_else(name: str) -> None:
    """A transplanted fault changes what it says it changes, and all else is to the bit."""
    ((right, info), loss), ((wrong, wrong_info), wrong_loss), touched = step_outcome(name)
    assert touched
    part = TRANSPLANTS[name].part
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
    assert TRANSPLANTS[name].mistake in MISTAKES
    assert TRANSPLANTS[name].sentence.endswith(".")


def test_states_of_every_kind_are_changed_alike() -> None:
    """A dictionary of variables and a named tuple both take new parts."""
    state = reference.sgd().init(0, X)
    as_dict = {"params": state.params, "batch_stats": state.batch_stats}
    assert get(put(as_dict, params=1), "params") == get(put(state, params=1), "params") == 1


def test_a_part_without_leaves_is_not_touched() -> None:
    """Plain SGD has no optimizer state to forget: the fault says it was not reached."""
    touched: list[int] = []
    fault = TRANSPLANTS["optimizer_state_dropped"]
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
    found = audit_tests("pytest -q", [STEP, EVALUATE], [TRANSPLANTS[name] for name in names])
    assert [each.verdict for each in found.findings] == ["noticed", "missed"]
    assert sorted(os.listdir()) == before


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
        assert f"  {name}: {TRANSPLANTS[name].sentence}" in shown


@pytest.mark.parametrize("name", FORMATS)
def test_an_audit_comes_in_every_format(name: str) -> None:
    """What is missed without a reason fails the build, in the formats that machines read."""
    missed = users_tests.TestsFinding(
        "first_leaf_frozen", "update_dropped", "one stays", "missed", 1.0
    )
    for audit, fault in (
        (AUDIT, "five"),
        (users_tests.TestsAudit("pytest", ("steps.py:step",), 1.0, (missed,)), "first_leaf_frozen"),
    ):
        text = formats.render([audit], name)
        assert fault in text
        if name == "junit":
            cases = ET.fromstring(text).iter("testcase")  # noqa: S314 - our own output
            failed = [case.get("name") for case in cases if case.findall("failure")]
            assert failed == [fault]
        if name == "sarif":
            (run,) = json.loads(text)["runs"]
            assert [result["ruleId"] for result in run["results"]] == [fault]


@pytest.mark.parametrize(
    ("command", "target", "said"),
    [
        ("false", "a:b", "the tests fail without any fault"),
        (f"{sys.executable} -c pass", "nowhere:b", "the tests never import nowhere:b"),
        ("no-such-command-here", "a:b", "no command 'no-such-command-here'"),
        (f"{sys.executable} -c 'import string'", "string:b", "fail without any fault"),
    ],
)
def test_unusable_tests_are_refused(command: str, target: str, said: str) -> None:
    """Tests that fail by themselves, or meet no target, are refused in one line."""
    with pytest.raises(UsageError, match=said):
        audit_tests(command, [target], [])


def test_a_file_target_is_found_by_its_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A target may be path/file.py:name, whatever name it is imported by."""
    (tmp_path / "mine.py").write_text("def step(state):\n    return state\n")
    monkeypatch.chdir(tmp_path)
    found = audit_tests(f"{sys.executable} -c 'import mine'", ["mine.py:step"], [])
    assert found.targets == ("mine.py:step",)


def test_a_sitecustomize_of_the_users_still_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The user's own sitecustomize is run after the one that hides it."""
    (tmp_path / "sitecustomize.py").write_text("import os\nos.environ['SEEN'] = 'yes'\n")
    (tmp_path / "mine.py").write_text("import os\nstep = os.environ['SEEN']\n")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    assert audit_tests(f"{sys.executable} -c 'import mine'", ["mine:step"], []).findings == ()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--select", "no_such_fault"], "no fault is named 'no_such_fault'"),
        (["--target", "a:b"], "--target needs --tests"),
        (["--tests", "true"], "--tests needs --target"),
        (["--tests", "true", "--target", "a"], "is not module:name"),
        (["--tests", "true", "--target", "a:b", "--picture", "x.svg"], "--picture cannot be used with --tests"),
    ],
)
def test_unusable_arguments_are_refused(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A command line that means nothing ends with status 2 and one line that says why."""
    assert cli.main(["audit", *arguments]) == 2
    assert said in capsys.readouterr().err


def test_one_fault_of_the_catalogue_is_audited(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command prints the matrix and writes JSON and picture."""
    files = tmp_path / "audit.json", tmp_path / "audit.svg"
    command = ["audit", "--select", "new_statistics_dropped", "--profile", "quick"]
    assert cli.main([*command, "--json", str(files[0]), "--picture", str(files[1])]) == 0
    assert "1 of 1 faults killed, 0 survive" in capsys.readouterr().out
    assert json.loads(files[0].read_text())["killed"] == 1
    assert parsed(files[1].read_text()).tag.endswith("svg")


def test_the_command_selects_shards_and_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A shard of a family is audited; what was found is shown, written and drawn; gaps give 1."""
    seen: list[str] = []

    def audited(mutants: Any, profile: str, **_: Any) -> Audit:
        seen.extend(mutant.name for mutant in mutants)
        return AUDIT

    monkeypatch.setattr("bnverify.mutants.audit.audit", audited)
    files = tmp_path / "audit.json", tmp_path / "audit.svg"
    command = ["audit", "--select", "two_steps", "--shard", "2/3"]
    assert cli.main([*command, "--json", str(files[0]), "--picture", str(files[1])]) == 1
    family = [name for name, mutant in MUTANTS.items() if mutant.family == "two_steps"]
    assert seen == family[1::3]
    assert json.loads(files[0].read_text())["killed"] == 3
    assert files[1].read_text() == draw(AUDIT)
    capsys.readouterr()
    assert cli.main([*command, "--json", "-"]) == 1
    assert json.loads(capsys.readouterr().out)["faults"] == 5


def test_the_matrix_reads_without_colour() -> None:
    """Each row has one sign for each law that notices anything, survivors and refusals say so."""
    assert killers(AUDIT) == ["law_b", "law_a"]
    lines = list(matrix(AUDIT, killers(AUDIT), hit="x", miss="."))
    rows = {line.split()[0]: line.split()[1:] for line in lines[3:]}
    assert rows["one"][0] == "xx"
    assert rows["two"][0] == "x."
    assert rows["five"][0] == "survives"
    assert rows["four"][:2] == ["refused:", "TypeError:"]


def test_survivors_are_shown_with_their_reason() -> None:
    """A survivor without a reason is unexplained, and the faults that only one law kills are listed."""
    file = io.StringIO()
    show(AUDIT, file)
    shown = file.getvalue()
    assert "survives: three: equivalent: <nothing> differs" in shown
    assert "survives: five: unexplained" in shown
    assert "law_b alone kills: two" in shown
    assert "3 of 5 faults killed, 2 survive, 1 of them unexplained" in shown


def test_the_picture_is_whole_and_escaped() -> None:
    """The picture is one well-formed document with a row for every fault, and loads nothing."""
    text = draw(AUDIT)
    root = parsed(text)
    names = {node.text for node in root.iter("{http://www.w3.org/2000/svg}text")}
    assert {"one", "two", "three", "four", "five", "law_a", "law_b"} <= names
    assert "href" not in text
