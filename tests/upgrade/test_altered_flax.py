"""The gate finds one altered line in the installed BatchNorm, although the versions are equal."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bnverify.cli import main
from bnverify.upgrade import uv

PINS = Path(__file__).parents[2] / "pins" / "jax-0.10.2.txt"

pytestmark = pytest.mark.nightly

TARGET = '''
"""Dense, BatchNorm, ReLU, Dense, in ordinary user code."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx
from types import SimpleNamespace


class Model(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.Dense(4)(x)
        x = nn.BatchNorm(use_running_average=not train)(x)
        return nn.Dense(1)(nn.relu(x))


def make_linen():
    from bnverify.adapters.canonical import linen

    return linen(Model())


class Loop(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(3, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.last = nnx.Linear(4, 1, rngs=rngs)

    def __call__(self, x):
        return self.last(nnx.relu(self.norm(self.first(x))))


def make_nnx():
    from bnverify.adapters.canonical import nnx as adapt

    return adapt(Loop, features=3)
'''

LINEN, NNX = "linen/normalization.py", "nnx/nn/normalization.py"
MEAN = "mu, mu2 = maybe_distributed_mean(x, _abs_sq(x), mask=mask)"
STOPPED = f"{MEAN}; mu = jax.lax.stop_gradient(mu)"
VARIANCE = "var = jnp.maximum(0.0, mu2 - _abs_sq(mu))"
UNBIASED = f"n = x.size // mu.size; {VARIANCE[:-1]} * (n / max(n - 1, 1)))"


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A virtual environment with pinned releases, created as a user would; its directory."""
    place = tmp_path_factory.mktemp("installed") / "venv"
    exe, python = uv.program(), sys.executable
    env = {**os.environ, "UV_PYTHON_DOWNLOADS": "never"}
    subprocess.run([exe, "venv", "--quiet", "--python", python, place], check=True, env=env)
    command = [exe, "pip", "install", "--quiet", "--python", place / "bin" / "python", "-r", PINS]
    subprocess.run(command, check=True, env=env)
    return place


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """One cache for all tests, because the unaltered side is the same."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def alter(installed):
    """A function that edits one file of the installed flax for the duration of the test."""
    kept = {}
    (flax,) = installed.glob("lib/python3*/site-packages/flax")

    def edit(file, old, new):
        path = flax / file
        text = kept.setdefault(path, path.read_text(encoding="utf-8"))
        assert old in text
        write(path, text.replace(old, new))

    def write(path, text):
        path.unlink()  # it is a hard link into uv's cache
        path.write_text(text, encoding="utf-8")

    yield edit
    for path, text in kept.items():
        write(path, text)


@pytest.fixture
def gate(installed, cache, tmp_path, monkeypatch, capsys):
    """A function from a model's name and two sides to the exit status and the JSON report."""
    monkeypatch.setenv("BNVERIFY_CACHE", str(cache))
    target = cache / "steps.py"  # the same file for all tests, so that recordings are reused
    target.write_text(TARGET, encoding="utf-8")

    def judged(make, old=str(PINS), new=str(installed)):
        sides = ["--from", old, "--to", new]
        status = main(["gate", f"{target}:{make}", *sides, "--format", "json"])
        return status, json.loads(capsys.readouterr().out)

    return judged


def witnessed(difference, python, tmp_path):
    """Run a difference's witness script in an environment, and return its exit status."""
    script = tmp_path / "witness.py"
    script.write_text(difference["witness"], encoding="utf-8")
    env = uv.variables([Path(__file__).parents[2]])
    return subprocess.run([python, script], env=env, check=False).returncode


@pytest.mark.parametrize(
    ("make", "file", "old", "new", "leaf"),
    [
        ("make_linen", LINEN, "epsilon: float = 1e-5", "epsilon: float = 1e-4", "loss"),
        ("make_linen", LINEN, "momentum: float = 0.99", "momentum: float = 0.9", "/mean"),
        ("make_linen", LINEN, VARIANCE, UNBIASED, "/var"),
        ("make_linen", LINEN, MEAN, STOPPED, "grads/"),
        ("make_nnx", NNX, "epsilon: float = 1e-5", "epsilon: float = 1e-4", "loss"),
    ],
    ids=["epsilon", "momentum", "divisor", "stop_gradient", "nnx epsilon"],
)
def test_one_altered_line_is_found(gate, alter, installed, tmp_path, make, file, old, new, leaf):
    """It is a change of meaning, at the right leaf, with a script that fails only there."""
    alter(file, old, new)
    status, told = gate(make)
    assert status == 1
    assert told["from"]["versions"] == told["to"]["versions"]
    found = [d for d in told["differences"] if d["mark"] == "failing"]
    assert {d["class"] for d in found} == {"meaning"}
    shown = next(d for d in found if d["witness"] and leaf in d["leaf"])
    python = installed / "bin" / "python"
    assert witnessed(shown, python, tmp_path) == 1
    alter(file, "", "")  # undo
    assert witnessed(shown, python, tmp_path) == 0


def test_a_gradient_no_longer_stopped_is_found(gate, alter, installed):
    """Upgrading from a BatchNorm that stops the gradient of the mean changes the gradients."""
    alter(LINEN, MEAN, STOPPED)
    status, told = gate("make_linen", old=str(installed), new=str(PINS))
    assert status == 1
    leaves = {d["leaf"] for d in told["differences"] if d["class"] == "meaning"}
    assert any(leaf and leaf.startswith("grads/") for leaf in leaves)
    assert "loss" not in leaves


def test_a_line_without_effect_is_no_difference(gate, alter):
    """In nnx the gradient of the statistics is only stopped for array references."""
    alter(NNX, "stop_gradient = jax.lax.stop_gradient", "stop_gradient = lambda x: x")
    status, told = gate("make_nnx")
    # The recordings of earlier tests must not be reused, although the versions are equal.
    assert (status, told["differences"]) == (0, [])
