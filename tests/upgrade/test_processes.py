"""``processes.run``: commands end with bnverify, however it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from bnverify.upgrade import processes

# A command that starts another, as uv starts builds, and waits for it.
NEST = [
    *(sys.executable, "-c"),
    "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(600)'])",
]


def alive(mark: str) -> list[str]:
    """Return the processes whose environment contains the mark."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            status = (entry / "stat").read_text().rpartition(")")[2].split()[0]
            if status != "Z" and f"MARK={mark}".encode() in (entry / "environ").read_bytes():
                found.append(entry.name)
        except OSError:  # it has ended, or is another user's
            continue
    return found


@pytest.fixture
def mark(request) -> str:
    """A mark in the environment of one test's commands."""
    if not Path("/proc/self/environ").exists():
        pytest.skip("processes are told by /proc, which only Linux has")
    return f"{os.getpid()}-{request.node.name}"


def until(condition, seconds=10.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_the_status_and_the_output_are_returned():
    """Output may exceed the pipe's buffer, and may be invalid text."""
    code = r"import os; os.write(1, b'x' * 200_000 + b'\xff'); os.write(2, b'words'); os._exit(3)"
    done = processes.run([sys.executable, "-c", code], env={})
    assert done.returncode == 3
    assert done.stdout == "x" * 200_000 + "\ufffd"
    assert done.stderr == "words"


def test_a_signal_gives_the_status_of_a_shell():
    """It is 128 plus the signal's number."""
    code = "import os; os.kill(os.getpid(), 9)"
    assert processes.run([sys.executable, "-c", code], env={}).returncode == 128 + 9


def test_a_missing_command_gives_the_status_of_a_shell():
    """It is 127, with a line on stderr."""
    done = processes.run(["/absent/program"], env={})
    assert done.returncode == 127
    assert "cannot run /absent/program" in done.stderr


def test_stdin_is_empty():
    """A command cannot wait for input."""
    done = processes.run([sys.executable, "-c", "print(repr(input()))"], env={})
    assert "EOFError" in done.stderr


def test_a_timeout_ends_the_command_and_its_children(mark):
    """Nothing keeps running."""
    with pytest.raises(subprocess.TimeoutExpired):
        processes.run(NEST, env={"MARK": mark}, timeout=0.5)
    until(lambda: not alive(mark))


def test_processes_left_behind_are_ended(mark):
    """A daemon in the command's process group ends with the command."""
    code = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])"
    processes.run([sys.executable, "-c", code], env={"MARK": mark})
    until(lambda: not alive(mark))


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_the_command_ends_with_its_caller(mark, how):
    """No signal to bnverify leaves a command running, not even SIGKILL."""
    code = (
        "import os, sys; from bnverify.upgrade import processes;"
        f"processes.run({NEST!r}, env={{'MARK': {mark!r}}})"
    )
    asker = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    until(lambda: len(alive(mark)) == 3)  # the supervisor, the command and its child
    asker.send_signal(how)
    asker.wait()
    until(lambda: not alive(mark))


def test_a_terminated_supervisor_ends_its_command(mark):
    """SIGTERM to the supervisor ends the command and its children."""
    results = []
    thread = threading.Thread(
        target=lambda: results.append(processes.run(NEST, env={"MARK": mark}).returncode)
    )
    thread.start()
    until(lambda: len(alive(mark)) == 3)
    supervisor = min(map(int, alive(mark)))
    os.kill(supervisor, signal.SIGTERM)
    thread.join()
    assert results == [128 + signal.SIGTERM]
    until(lambda: not alive(mark))


def test_a_command_that_ignores_sigterm_is_killed(mark):
    """SIGTERM comes first, so that uv can clean up, then SIGKILL."""
    code = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
        "print('deaf', flush=True); time.sleep(600)"
    )
    with pytest.raises(subprocess.TimeoutExpired):
        processes.run([sys.executable, "-c", code], env={"MARK": mark}, timeout=1)
    assert alive(mark) == []
