"""The projects in examples/ violate no law, and their commented-out mistake is detected."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import bnverify
from bnverify.profile import Profile

FEW = Profile("few", tiny=1, shapes=0, block=64, examples=4)
ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
PLANTED = "  # the mistake"

# Project -> the laws to run for it, the mistake that is planted, and a law that it breaks.
PROJECTS = {
    "linen_regression": (
        ("eval_rows_are_independent", "targets_belong_to_their_rows"),
        "broadcast_loss",
        "eval_rows_are_independent",
    ),
    "nnx_loop": (
        ("eval_uses_the_running_statistics", "eval_writes_nothing"),
        "eval_in_train_mode",
        "eval_writes_nothing",
    ),
    "train_state": (
        ("structure", "influence", "step_moves_the_statistics", "momentum_is_as_declared"),
        "new_statistics_dropped",
        "step_moves_the_statistics",
    ),
}


def planted(source: str) -> str:
    """Return the source with the line above the mistake replaced by the mistake."""
    lines = source.splitlines()
    (index,) = [i for i, line in enumerate(lines) if PLANTED in line]
    wrong = re.sub(rf"^(\s*)# (.*?){PLANTED}.*$", r"\1\2", lines[index])
    return "\n".join([*lines[: index - 1], wrong, *lines[index + 1 :], ""])


def checked(project: Path, laws: tuple[str, ...]) -> bnverify.Report:
    """Return the report on a copy of a project."""
    subject = bnverify.load(f"{project / 'check.py'}:subject")
    report = bnverify.verify(subject, FEW, select=laws)
    for name in ("model", "train"):  # the next copy has modules of the same names
        sys.modules.pop(name, None)
    return report


@pytest.mark.parametrize(
    "name",
    # The README shows what the first one prints: tests/test_docs.py checks it with its mistake.
    [pytest.param("linen_regression", marks=pytest.mark.nightly), "nnx_loop", "train_state"],
)
def test_a_project_is_right_until_its_mistake_is_planted(name: str, tmp_path: Path) -> None:
    """Unchanged, a project violates no law; with the mistake it violates one, and the cause is named."""
    laws, mistake, broken = PROJECTS[name]
    right, wrong = tmp_path / "right", tmp_path / "wrong"
    for copy in (right, wrong):
        shutil.copytree(EXAMPLES / name, copy)
    (path,) = [path for path in wrong.glob("*.py") if PLANTED in path.read_text()]
    path.write_text(planted(path.read_text()))
    assert [e for e in checked(right, laws).results if e.status == "violated"] == []
    violated = {e.law: e for e in checked(wrong, laws).results if e.status == "violated"}
    assert broken in violated
    assert (violated[broken].diagnosis or "").startswith(f"{mistake}:")


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("name", "script"),
    [("linen_regression", "model.py"), ("nnx_loop", "train.py"), ("train_state", "train.py")],
)
def test_a_project_trains(name: str, script: str) -> None:
    """When a project runs as a script, its last loss is smaller than its first."""
    out = subprocess.run(
        [sys.executable, script],
        cwd=EXAMPLES / name,
        env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    losses = [float(number) for number in re.findall(r"loss (\d+\.\d+)", out)]
    assert len(losses) == 3
    assert losses[-1] < losses[0]
