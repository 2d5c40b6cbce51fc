"""The workflows that users copy: valid, pinned, least privileged, and their shell is shell."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "docs" / "workflows").glob("*.yml"))
TOP = {"name", "on", "permissions", "concurrency", "env", "jobs"}
JOB = {"runs-on", "timeout-minutes", "strategy", "steps", "needs", "permissions", "env", "if"}
STEP = {"name", "uses", "with", "run", "env", "if", "id"}
CONTEXTS = {"github", "env", "matrix", "runner", "needs"}
FUNCTIONS = {"hashFiles", "cancelled", "always", "failure", "success"}


def load(path):
    document = yaml.safe_load(path.read_text(encoding="utf-8"))
    document["on"] = document.pop(True)  # YAML 1.1 reads the key as a truth value
    return document


@pytest.fixture(params=FILES, ids=lambda path: path.name)
def workflow(request):
    """Each workflow, parsed."""
    return load(request.param)


def steps(workflow):
    return [step for job in workflow["jobs"].values() for step in job["steps"]]


def test_there_are_workflows():
    """One for pull requests, one for every night."""
    assert [path.name for path in FILES] == ["upgrade-gate.yml", "upgrade-nightly.yml"]


def test_every_key_is_one_that_github_knows(workflow):
    """A misspelt key is ignored by nobody here."""
    assert set(workflow) <= TOP
    for job in workflow["jobs"].values():
        assert set(job) <= JOB
        assert {"runs-on", "timeout-minutes", "steps"} <= set(job)
        needs = job.get("needs", [])
        assert set([needs] if isinstance(needs, str) else needs) <= set(workflow["jobs"])
    for step in steps(workflow):
        assert set(step) <= STEP
        assert ("uses" in step) != ("run" in step)


def test_actions_are_of_a_version_and_the_token_may_only_read(workflow):
    """What writes says so in its own job."""
    assert workflow["permissions"] == {"contents": "read"}
    for step in steps(workflow):
        assert re.fullmatch(r"actions/[a-z-]+@v\d+", step.get("uses", "actions/x@v1"))


def test_expressions_name_what_exists(workflow):
    """Every ``${{ }}`` is closed and begins with a context or a function of GitHub's."""
    text = repr(workflow)
    found = re.findall(r"\$\{\{(.*?)\}\}", text)
    assert len(found) == text.count("${{")
    for expression in found:
        name = re.match(r"\s*!?\s*(\w+)", expression)
        assert name
        assert name[1] in CONTEXTS | FUNCTIONS


BASH = shutil.which("bash")


@pytest.mark.skipif(BASH is None, reason="no bash here to parse the scripts")
def test_scripts_are_shell_and_hold_no_expressions(workflow):
    """An expression in a script is an injection; values come by the environment."""
    for step in steps(workflow):
        if "run" in step:
            assert "${{" not in step["run"]
            subprocess.run([BASH, "-n", "-c", step["run"]], check=True)
