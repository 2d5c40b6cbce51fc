"""The properties: every law is bound in one, and they tell a wrong step from a right one."""

import ast
import os
import re
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from bnverify.laws import STEP_LAWS

ROOT = Path(__file__).parents[1]
WRONG = """
from dataclasses import replace
from bnverify import reference

sgd = reference.sgd()

def rising(state, x, y, lr):
    return sgd.step(state, x, y, -lr)

def frozen(state, x, y, lr):
    after, info = sgd.step(state, x, y, lr)
    return after._replace(params=state.params), info

wrong_sign = replace(sgd, step=rising)
no_update = replace(sgd, step=frozen)
wrong_shape = replace(sgd, evaluate=lambda s, x, y: sgd.evaluate(s, x, y).reshape(1, 1))
two_wide = replace(sgd, features=(2,))
"""


def bindings() -> dict[str, tuple[str, list[str]]]:
    """Return test name -> its module, and the laws its body names."""
    found = {}
    for path in sorted((ROOT / "properties").glob("test_*.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef):
                named = [
                    call.args[0].value
                    for call in ast.walk(node)
                    if isinstance(call, ast.Call)
                    and isinstance(call.func, ast.Attribute)
                    and call.func.attr in {"keeps", "shows", "proves"}
                    and isinstance(call.args[0], ast.Constant)
                ]
                found[node.name] = (path.stem, named)
    return found


def test_every_law_is_bound() -> None:
    """Each law has the property of its name, in the file of its family; none is over.

    But those about whole loops: tests/faults/test_loops.py has subjects that they apply to.
    """
    expected = {
        f"test_{law.name}": (f"test_{law.family}", [law.name])
        for law in STEP_LAWS.values()
        if not {"look", "row_weights"}.intersection(law.capabilities)
    }
    assert bindings() == expected


def properties(folder: Path, *args: str) -> "subprocess.CompletedProcess[str]":
    """Run the properties in their own process, with the same few examples each time."""
    installed = any(entry.name == "bnverify" for entry in entry_points(group="pytest11"))
    ours = () if installed else ("-p", "bnverify.testing.plugin")
    return subprocess.run(
        [sys.executable, "-m", "pytest", *ours, "--rootdir", str(ROOT), "-c",
         str(ROOT / "pyproject.toml"), "--hypothesis-profile", "quick", "--hypothesis-seed", "0",
         "-p", "no:cacheprovider",
         "-q", *args, str(ROOT / "properties")],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
    )  # fmt: skip


@pytest.fixture
def steps(tmp_path: Path) -> Path:
    (tmp_path / "steps.py").write_text(WRONG)
    return tmp_path


@pytest.mark.parametrize(
    ("target", "law"),
    [
        pytest.param("wrong_sign", "params_follow_the_optimizer", marks=pytest.mark.nightly),
        pytest.param("no_update", "step_moves_the_params", marks=pytest.mark.nightly),
        ("wrong_shape", "eval_loss_has_shape_one"),
    ],
)
def test_a_wrong_step_fails_the_property_of_the_law(steps: Path, target: str, law: str) -> None:
    """Whether the law bounds an error, wants a witness or is proved, the failure names it."""
    done = properties(steps, "--bnverify-target", f"steps.py:{target}", "-k", f"test_{law}")
    assert done.returncode == 1, done.stdout + done.stderr
    assert f"FAILED properties/test_{STEP_LAWS[law].family}.py::test_{law}[steps.py:{target}]" in (
        done.stdout.replace(os.path.relpath(ROOT, steps) + os.sep, "")
    )
    assert f"bnverify.replay(subject, case, law='{law}')" in done.stdout


ORDER = """
import os, random

def pytest_collection_modifyitems(items):
    if os.environ["ORDER"] == "backwards":
        items.reverse()
    elif os.environ["ORDER"] != "as written":
        random.Random(os.environ["ORDER"]).shuffle(items)
"""
SOME = (
    "test_structure or params_follow_the_optimizer or optimizer_state_follows_the_optimizer or "
    "step_moves_the_params or variance_is_never_negative or same_input_repeats_to_the_bit"
)


@pytest.mark.nightly
def test_workers_and_orders_give_the_same_verdicts(
    steps: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With -n 0, with -n 2, backwards and in any other order the same properties pass and fail.

    The seed is the same: with five random examples each, one run may find a violation that another
    does not.
    """
    (steps / "order.py").write_text(ORDER)
    verdicts = []
    for workers, order in (("0", "as written"), ("2", "backwards"), ("0", "7")):
        monkeypatch.setenv("ORDER", order)
        monkeypatch.setenv("PYTHONPATH", str(steps))
        done = properties(
            steps, "--bnverify-target", "steps.py:wrong_sign", "-k", SOME, "-n", workers,
            "-p", "order", "-rA", "--tb=no",
        )  # fmt: skip
        assert done.returncode == 1, done.stdout + done.stderr
        found = re.findall(r"^(PASSED|FAILED|ERROR) \S*::(\w+)", done.stdout, re.MULTILINE)
        skipped = re.findall(r"^SKIPPED \[(\d+)\]", done.stdout, re.MULTILINE)
        verdicts.append((sorted(found), sum(map(int, skipped))))
    assert [name for verdict, name in verdicts[0][0] if verdict == "FAILED"] == [
        "test_params_follow_the_optimizer"
    ]
    assert len(verdicts[0][0]) >= 10
    assert verdicts == verdicts[:1] * 3


@pytest.mark.nightly
def test_a_step_that_takes_one_width_gets_that(steps: Path) -> None:
    """The inputs have the sizes that the target accepts."""
    done = properties(
        steps, "--bnverify-target", "steps.py:two_wide", "-k", "test_variance_is_never_negative"
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_target_that_is_none_is_refused(steps: Path) -> None:
    """One line, before any property, with pytest's status for wrong use."""
    done = properties(steps, "--bnverify-target", "steps.py:wrong_sing")
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert "ERROR: steps.py has no 'wrong_sing'; did you mean 'wrong_sign'?" in done.stderr
