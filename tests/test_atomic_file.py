"""A file that is there whole, or not at all."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from bnverify import atomic_file

WRITER = """
import sys
from pathlib import Path
from bnverify import atomic_file
path = Path(sys.argv[1])
for i in range(10**9):
    atomic_file.write(path, b"%d" % (i % 10) * 300_000)
"""


def test_killed_at_any_moment_it_leaves_a_whole_file(tmp_path):
    """A reader never sees half a file, and the next writer clears what the killed one left."""
    path = tmp_path / "r"
    for delay in (0.0, 0.003, 0.009, 0.02, 0.031):
        path.unlink(missing_ok=True)
        writer = subprocess.Popen([sys.executable, "-c", WRITER, path])
        while not path.exists():
            assert writer.poll() is None
            time.sleep(0.001)
        time.sleep(delay)
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        data = path.read_bytes()
        assert len(data) == 300_000
        assert len(set(data)) == 1
    atomic_file.write(path, b"last")
    assert [entry.name for entry in tmp_path.iterdir()] == ["r"]
    assert path.read_bytes() == b"last"


def test_a_living_writer_is_left_to_finish(tmp_path):
    """Only what dead processes of this machine left is cleared."""
    host = "".join(c if c.isascii() and c.isalnum() else "_" for c in socket.gethostname())
    mine = tmp_path / f".r.{host}-{os.getpid()}-00000000.tmp"
    init = tmp_path / f".r.{host}-1-00000000.tmp"
    elsewhere = tmp_path / ".r.another-999999999-00000000.tmp"
    dead = tmp_path / f".r.{host}-999999999-00000000.tmp"
    for leftover in (mine, init, elsewhere, dead):
        leftover.touch()
    atomic_file.write(tmp_path / "r", b"")
    assert mine.exists()
    assert init.exists()
    assert elsewhere.exists()
    assert not dead.exists()


def test_another_users_process_is_alive(monkeypatch):
    """Not being allowed to ask is an answer."""

    def refuse(_process: int, _signal: int) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "kill", refuse)
    assert atomic_file._alive(1)


def test_a_write_that_fails_leaves_nothing(tmp_path, monkeypatch):
    """A full disk leaves the old file and no other."""
    path = tmp_path / "r"
    path.write_bytes(b"old")

    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        atomic_file.write(path, b"new")
    assert [entry.name for entry in tmp_path.iterdir()] == ["r"]
    assert path.read_bytes() == b"old"


def test_a_link_to_the_file_stays_a_link(tmp_path):
    """The file that the link names is replaced, not the link."""
    (tmp_path / "target").write_bytes(b"old")
    (tmp_path / "link").symlink_to("target")
    atomic_file.write(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target").read_bytes() == b"new"


def test_the_file_has_the_rights_of_any_other(tmp_path):
    """It is readable by whoever may read its neighbours."""
    (tmp_path / "plain").touch()
    atomic_file.write(tmp_path / "r", b"")
    assert (tmp_path / "r").stat().st_mode == (tmp_path / "plain").stat().st_mode
