"""The project around the package: its files tell one story."""

import ast
import configparser
import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DEPENDENCIES = {r.name: r for r in map(Requirement, PROJECT["dependencies"])}
TEST_FILES = sorted([*ROOT.glob("tests/**/test_*.py"), *ROOT.glob("properties/**/test_*.py")])


def tox_config() -> configparser.ConfigParser:
    config = configparser.ConfigParser(interpolation=None)
    config.read(ROOT / "tox.ini")
    return config


def pins_by_factor() -> dict[str, Path]:
    lines = tox_config()["testenv"]["deps"].split("\n")
    found = dict(re.findall(r"^(jax\d+): -r (\S+)$", "\n".join(lines), re.MULTILINE))
    return {factor: ROOT / path for factor, path in found.items()}


def pinned(path: Path) -> dict[str, str]:
    lines = path.read_text().splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def test_ci_runs_the_commands_of_the_readme() -> None:
    """What README.md tells a newcomer to type is what .ci/run runs, to the letter."""
    shell = re.findall(
        r"```(?:console|bash|sh)\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL
    )
    shown = [line.removeprefix("$ ") for block in shell for line in block.splitlines()]
    commands = [line.strip() for line in (ROOT / ".ci" / "run").read_text().splitlines()]
    for start in ("pip install -e . && bnverify check", "pytest -n"):
        (ours,) = [line for line in commands if line.startswith(start)]
        assert ours in shown


def test_each_factor_pins_the_release_it_names() -> None:
    """The factor jax0102 installs jax 0.10.2, with the jaxlib of that release."""
    factors = pins_by_factor()
    assert factors
    for factor, path in factors.items():
        pins = pinned(path)
        version = pins["jax"].replace(".", "")
        assert version in {factor.removeprefix("jax"), factor.removeprefix("jax") + "1"}, factor
        assert pins["jaxlib"] == pins["jax"], factor


@pytest.mark.parametrize("path", pins_by_factor().values(), ids=lambda path: path.stem)
def test_the_pins_satisfy_the_declared_bounds(path: Path) -> None:
    """Every release of the matrix is one the package metadata accepts."""
    pins = pinned(path)
    for name in ("jax", "flax", "optax", "numpy", "rich"):
        assert pins[name] in DEPENDENCIES[name].specifier, name


@pytest.mark.parametrize("name", DEPENDENCIES)
def test_the_floors_are_tested(name: str) -> None:
    """The lower bound of a dependency is the version the oldest environment installs."""
    (bound,) = DEPENDENCIES[name].specifier
    deps = tox_config()["testenv"]["deps"]
    oldest = pinned(pins_by_factor()["jax0430"]) | dict(
        re.findall(r"^jax0430: ([a-z0-9-]+)==(\S+)$", deps, re.MULTILINE)
    )
    assert oldest[name].startswith(bound.version)


def test_the_matrix_names_every_factor() -> None:
    """`tox -m matrix` forgets no release that has pins in tox.ini."""
    matrix = tox_config()["tox"]["labels"]
    for factor in pins_by_factor():
        assert re.search(rf"[{{,x]{factor.removeprefix('jax')}\b", matrix), factor


def test_the_matrix_runs_the_default_tier_and_the_newest_release_all() -> None:
    """Each release of the matrix runs what a contributor runs; `nightly` has the newest pins."""
    config = tox_config()
    assert config["testenv"]["commands"].strip() == "pytest -n 2 {posargs}"
    nightly = config["testenv:nightly"]
    assert nightly["commands"].strip() == 'pytest -n 2 -m "" {posargs}'
    newest = max(pins_by_factor().values(), key=lambda path: Version(pinned(path)["jax"]))
    assert f"-r pins/{newest.name}" in nightly["deps"]


def test_the_nightly_workflow_names_every_factor() -> None:
    """No supported release is left out of the nights on GitHub."""
    nightly = (ROOT / ".github" / "workflows" / "nightly.yml").read_text()
    for factor in pins_by_factor():
        assert re.search(rf"- py\d+-{factor}$", nightly, re.MULTILINE), factor


def test_a_citation_names_the_release() -> None:
    """CITATION.cff has the version, the licence and the authors of the package."""
    citation = (ROOT / "CITATION.cff").read_text()
    (author,) = PROJECT["authors"]
    for line in (f"version: {PROJECT['version']}", f"license: {PROJECT['license']}"):
        assert line in citation.splitlines()
    assert f"- name: {author['name']}" in citation


def test_every_test_states_its_claim() -> None:
    """Each test function's docstring says in one sentence what holds if it passes."""
    silent = [
        f"{path.relative_to(ROOT)}:{node.name}"
        for path in TEST_FILES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef)
        and node.name.startswith("test_")
        and not ast.get_docstring(node)
    ]
    assert silent == []
