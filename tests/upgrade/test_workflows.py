"""Workflows, the action and the hook: valid, pinned, least privilege, and their commands parse.

actionlint and zizmor check more, see tox.ini; this test needs neither.
"""

from __future__ import annotations

import configparser
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from bnverify.cli import build_parser

ROOT = Path(__file__).parents[2]
COPIED = sorted((ROOT / "docs" / "workflows").glob("*.yml"))
OURS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
TOP = {"name", "on", "permissions", "concurrency", "env", "jobs"}
JOB = {"runs-on", "timeout-minutes", "strategy", "steps", "needs", "permissions", "env", "if"}
JOB |= {"name", "environment"}
STEP = {"name", "uses", "with", "run", "env", "if", "id"}
CONTEXTS = {"github", "env", "matrix", "runner", "needs", "steps"}
FUNCTIONS = {"hashFiles", "cancelled", "always", "failure", "success"}


def load(path):
    document = yaml.safe_load(path.read_text(encoding="utf-8"))
    document["on"] = document.pop(True)  # YAML 1.1 parses the key as a boolean
    return document


@pytest.fixture(params=COPIED + OURS, ids=lambda path: path.name)
def workflow(request):
    """Each workflow, parsed."""
    return load(request.param)


def steps(workflow):
    return [step for job in workflow["jobs"].values() for step in job["steps"]]


def test_there_are_workflows():
    """Users' workflows for pull requests and nightly runs, and our own."""
    assert [path.name for path in COPIED] == ["upgrade-gate.yml", "upgrade-nightly.yml"]
    assert [path.stem for path in OURS] == ["docs", "nightly", "release", "test"]


def test_every_key_is_known_to_github(workflow):
    """GitHub would ignore a misspelt key."""
    assert set(workflow) <= TOP
    for job in workflow["jobs"].values():
        assert set(job) <= JOB
        assert {"runs-on", "timeout-minutes", "steps"} <= set(job)
        needs = job.get("needs", [])
        assert set([needs] if isinstance(needs, str) else needs) <= set(workflow["jobs"])
    for step in steps(workflow):
        assert set(step) <= STEP
        assert ("uses" in step) != ("run" in step)


def test_actions_are_pinned_and_the_token_is_read_only(workflow):
    """A job that writes declares it."""
    assert workflow["permissions"] == {"contents": "read"}
    version = r"actions/[a-z-]+@(v\d+|[0-9a-f]{40})|pypa/gh-action-pypi-publish@release/v1"
    for step in steps(workflow):
        assert re.fullmatch(version, step.get("uses", "actions/x@v1"))


def test_our_workflows_run_existing_tox_environments():
    """Every environment in a matrix is in tox.ini, or is composed of its factors."""
    config = configparser.ConfigParser(interpolation=None)
    config.read(ROOT / "tox.ini")
    named = {section.removeprefix("testenv:") for section in config.sections()}
    factors = set(re.findall(r"^(jax\d+): -r", config["testenv"]["deps"], re.MULTILINE))
    for workflow in map(load, OURS):
        for job in workflow["jobs"].values():
            for env in job.get("strategy", {}).get("matrix", {}).get("env", []):
                assert env in named or env.rpartition("-")[2] in factors, env
        for step in steps(workflow):
            for env in re.findall(r"tox run -e (\w+)", step.get("run", "")):
                assert env in named


def test_bnverify_commands_parse():
    """Every command in the workflows, the action and the hook is accepted by the parser."""
    action = yaml.safe_load((ROOT / "action.yml").read_text(encoding="utf-8"))
    hooks = yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text(encoding="utf-8"))
    scripts = [step["run"] for path in COPIED for step in steps(load(path)) if "run" in step]
    scripts += [step["run"] for step in action["runs"]["steps"]]
    scripts += [hook["entry"] for hook in hooks]
    commands = [
        command
        for script in scripts
        for command in re.findall(
            r"(?m)(?:^| )bnverify ((?:check|gate) .*)", script.replace("\\\n", " ")
        )
    ]
    assert len(commands) == 4
    for command in commands:
        words = shlex.split(re.split(r" (?:\d?>|\|\|)", command)[0].replace('"${args[@]}"', ""))
        build_parser().parse_args([word.replace("$PROFILE", "ci") for word in words])


def test_the_action_passes_its_inputs_through_the_environment():
    """An expression in a script would be an injection."""
    action = yaml.safe_load((ROOT / "action.yml").read_text(encoding="utf-8"))
    used = set(re.findall(r"inputs\.([\w-]+)", repr(action["runs"])))
    assert used == set(action["inputs"])
    for step in action["runs"]["steps"]:
        assert "${{" not in step["run"]


def test_expressions_are_valid(workflow):
    """Every ``${{ }}`` is closed and begins with a known context or function."""
    text = repr(workflow)
    found = re.findall(r"\$\{\{(.*?)\}\}", text)
    assert len(found) == text.count("${{")
    for expression in found:
        name = re.match(r"\s*!?\s*(\w+)", expression)
        assert name
        assert name[1] in CONTEXTS | FUNCTIONS


BASH = shutil.which("bash")


@pytest.mark.skipif(BASH is None, reason="no bash here to parse the scripts")
def test_scripts_are_shell_without_expressions(workflow):
    """An expression in a script would be an injection; values come from the environment."""
    for step in steps(workflow):
        if "run" in step:
            assert "${{" not in step["run"]
            subprocess.run([BASH, "-n", "-c", step["run"]], check=True)
