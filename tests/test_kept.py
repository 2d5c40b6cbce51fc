"""Programs kept on disk: found by another process, and by nothing that computes something else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bnverify
from bnverify import compile_cache, kept, reference
from bnverify.compiled import Compiled
from bnverify.engine import judge
from bnverify.kept import Identity
from bnverify.mutants import MUTANTS
from bnverify.profile import Profile

ONE = jax.tree_util.tree_structure({"out": 0})
FEW = Profile("few", tiny=1, shapes=0, block=32, examples=3)
LAWS = (
    "batch_moments_are_the_layers_own",  # reads the rounding of the step and of the layers' inputs
    "gradients_are_gradients_of_the_loss",  # and the slope of the loss
    "row_order_changes_nothing",
    "vmap_equals_loop",  # judged on single calls
)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty place to keep programs in."""
    monkeypatch.setattr(compile_cache, "home", lambda: tmp_path)
    return tmp_path


def files(home: Path) -> list[Path]:
    return sorted((home / "lowered").iterdir())


def doubling(traced: list[Any], name: str = "twice", factor: int = 2) -> Compiled:
    """Return a program that notes in ``traced`` what it is traced for, as another process makes it."""

    def double(x: Any) -> Any:
        traced.append(x.shape)
        return {"out": factor * x}

    return Compiled(double, identity=Identity(name, ONE))


def test_another_process_need_not_trace(home: Path) -> None:
    """The result is the same, and is in the same tree."""
    traced: list[Any] = []
    x = np.arange(3, dtype=np.float32)
    for _ in range(2):
        np.testing.assert_array_equal(doubling(traced)(x)["out"], 2 * x)
    assert traced == [(3,)]
    assert len(files(home)) == 1


def test_how_jax_is_configured_counts(home: Path) -> None:
    """A random generator is lowered as a setting says."""
    traced: list[Any] = []
    x = np.arange(3, dtype=np.float32)
    before = jax.config.jax_threefry_partitionable
    try:
        for value in (True, False, True):
            jax.config.update("jax_threefry_partitionable", value)
            doubling(traced)(x)
    finally:
        jax.config.update("jax_threefry_partitionable", before)
    assert len(traced) == 2


def test_what_differs_is_not_found(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another function, another type, another state of this package's code."""
    traced: list[Any] = []
    x = np.arange(3, dtype=np.float32)
    doubling(traced)(x)
    assert doubling(traced, "thrice", 3)(x)["out"][1] == 3
    doubling(traced)(x.astype(np.int32))
    doubling(traced)(np.zeros((1, 3), np.float32))
    assert len(traced) == 4
    monkeypatch.setattr(kept, "_package", lambda: "other code")
    doubling(traced)(x)
    assert len(traced) == 5
    assert len(files(home)) == 5


def flipped(data: bytes) -> bytes:
    """Return ``data`` with a bit changed in its middle, where the program's constants are."""
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


@pytest.mark.parametrize("damage", [lambda data: data[:100], lambda data: b"", flipped])
def test_a_damaged_file_is_written_again(home: Path, damage: Callable[[bytes], bytes]) -> None:
    """Nobody notices but by the time it takes."""
    traced: list[Any] = []
    x = np.arange(3, dtype=np.float32)
    doubling(traced)(x)
    (path,) = files(home)
    path.write_bytes(damage(path.read_bytes()))
    for _ in range(2):
        np.testing.assert_array_equal(doubling(traced)(x)["out"], 2 * x)
    assert len(traced) == 2
    assert files(home) == [path]


def test_what_cannot_be_kept_is_run(home: Path) -> None:
    """A program that calls back belongs to its process."""

    def asking(x: Any) -> Any:
        return {"out": jax.pure_callback(lambda v: np.asarray(v) + 1, x, x)}

    x = np.arange(3, dtype=np.float32)
    program = Compiled(lambda x: asking(jnp.asarray(x)), identity=Identity("asking", ONE))
    np.testing.assert_array_equal(program(x)["out"], x + 1)
    assert not (home / "lowered").exists()


def test_without_a_cache_nothing_is_kept(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is anything looked for."""
    monkeypatch.setattr(compile_cache, "home", lambda: None)
    traced: list[Any] = []
    for _ in range(2):
        doubling(traced)(np.arange(3, dtype=np.float32))
    assert len(traced) == 2
    assert not (home / "lowered").exists()


@pytest.mark.slow
def test_a_check_says_the_same_by_what_was_kept(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing kept, all of it new, all of it found: one report; and a fault is seen beside it."""
    monkeypatch.setattr(judge, "_PROGRAMS", {})

    def check(subject: bnverify.Subject) -> Any:
        judge._PROGRAMS.clear()
        return bnverify.verify(subject, FEW, seed=3, select=LAWS).results

    new = check(reference.adam())
    count = len(files(home))
    assert count == 3  # the rounding, and the laws by what they need
    assert check(reference.adam()) == new
    assert len(files(home)) == count
    fault = check(MUTANTS["sample_variance"].make())
    assert any(evidence.status == "violated" for evidence in fault)
    monkeypatch.setattr(compile_cache, "home", lambda: None)
    assert check(reference.adam()) == new
