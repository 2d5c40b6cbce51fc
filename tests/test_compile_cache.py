"""The cache of compiled programs: found again, keyed by machine, safe between processes."""

import importlib.metadata
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bnverify import compile_cache

COMPILE_SOME = """
import sys
import jax, jax.numpy as jnp
from bnverify import compile_cache
compile_cache.enable(sys.argv[1])
for n in range(1, 9):
    jax.jit(lambda x: jnp.tanh(x @ x.T).sum(0) + n)(jnp.ones((n, 3))).block_until_ready()
"""


LOOP = """
import sys
import jax, jax.numpy as jnp
from bnverify import compile_cache
compile_cache.enable(sys.argv[1])
for _ in range(2):  # compiled, and taken from the cache
    end = jax.jit(lambda x: jax.lax.while_loop(lambda s: s[0, 0] < 8, lambda s: 2 * s, x))
    assert float(end(jnp.ones((800, 800)))[0, 0]) == 8
"""


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(Path(compile_cache.__file__).parents[1])}


def start(directory: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", COMPILE_SOME, str(directory)], env=environment())


WRONG = importlib.metadata.version("jaxlib").startswith(compile_cache.WRONG)


def test_a_program_from_the_cache_is_the_one_that_was_compiled(tmp_path: Path) -> None:
    """A loop over a large array turns as often; with some releases it would not."""
    subprocess.run([sys.executable, "-c", LOOP, str(tmp_path)], env=environment(), check=True)
    assert compile_cache.location(tmp_path).exists() != WRONG


trusted = pytest.mark.skipif(WRONG, reason="this jaxlib is not trusted with a cache")


@trusted
def test_processes_share_one_cache_at_the_same_time(tmp_path: Path) -> None:
    """Two cold processes at once succeed, and a third finds everything compiled."""
    processes = [start(tmp_path) for _ in range(2)]
    assert [process.wait(120) for process in processes] == [0, 0]
    programs = compile_cache.location(tmp_path)
    kept = {entry.name for entry in programs.iterdir() if "atime" not in entry.name}
    assert len(kept) >= 8
    assert start(tmp_path).wait(120) == 0
    assert kept == {entry.name for entry in programs.iterdir() if "atime" not in entry.name}


def test_what_nobody_used_for_a_month_is_removed(tmp_path: Path) -> None:
    """The programs of every release; what was read or written since stays. It is looked once a day."""
    lowered = tmp_path / "jaxlib-0.1.2-name" / "lowered"
    lowered.mkdir(parents=True)
    now, month = time.time(), compile_cache.UNUSED

    def keep(name: str, read: float, written: float) -> None:
        (lowered / name).write_bytes(b"program")
        os.utime(lowered / name, (now - read, now - written))

    def kept() -> list[str]:
        return sorted(path.name for path in lowered.iterdir())

    keep("unused", month + 60, 2 * month)
    keep("read", month - 60, 2 * month)
    keep("written", 2 * month, month - 60)
    compile_cache.remove_unused(tmp_path)
    assert kept() == ["read", "written"]
    keep("unused", 2 * month, 2 * month)
    compile_cache.remove_unused(tmp_path)
    assert kept() == ["read", "unused", "written"]
    yesterday = now - compile_cache.DAY - 60
    os.utime(tmp_path / "looked-through", (yesterday, yesterday))
    compile_cache.remove_unused(tmp_path)
    assert kept() == ["read", "written"]
    compile_cache.remove_unused(tmp_path / "missing")


def test_the_directory_is_the_users_to_choose(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """BNVERIFY_CACHE comes before XDG_CACHE_HOME, and that before the home directory."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("BNVERIFY_CACHE", raising=False)
    assert compile_cache.cache_root() == tmp_path / "home" / ".cache" / "bnverify"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert compile_cache.cache_root() == tmp_path / "xdg" / "bnverify"
    monkeypatch.setenv("BNVERIFY_CACHE", str(tmp_path / "mine"))
    assert compile_cache.cache_root() == tmp_path / "mine"


def test_another_processor_gets_another_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs compiled for one processor are never offered to a different one."""
    here = compile_cache.location()
    monkeypatch.setattr(compile_cache.platform, "machine", lambda: "something-else")
    assert compile_cache.location() != here


def test_the_features_of_the_processor_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two processors of one model, one with more instructions is another one."""
    names = set()
    for features in ("fma avx2", "fma avx2 avx512f"):
        cpuinfo = tmp_path / "cpuinfo"
        cpuinfo.write_text(f"model name : one\nflags : {features}\ncpu MHz : 1\n")
        monkeypatch.setattr(compile_cache, "CPUINFO", cpuinfo)
        names.add(compile_cache.machine())
    monkeypatch.setattr(compile_cache, "CPUINFO", tmp_path / "missing")  # not Linux
    names.add(compile_cache.machine())
    assert len(names) == 3


def test_a_directory_that_cannot_be_made_is_no_error(tmp_path: Path) -> None:
    """Where nothing can be written, the answer is None and JAX compiles as ever."""
    obstacle = tmp_path / "file"
    obstacle.write_text("")
    assert compile_cache.enable(obstacle) is None


def test_a_directory_that_cannot_be_written_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same where the directory is there but belongs to somebody else."""
    monkeypatch.setattr(compile_cache.os, "access", lambda path, mode: False)
    assert compile_cache.enable(tmp_path) is None
