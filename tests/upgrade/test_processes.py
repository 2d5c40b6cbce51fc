"""A command never outlives the wish for it, however that ends."""

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

# A command that starts another, as uv starts a build, and waits for it.
NEST = [
    *(sys.executable, "-c"),
    "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(600)'])",
]


def alive(mark: str) -> list[str]:
    """Return the processes whose environment holds the mark."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            status = (entry / "stat").read_text().rpartition(")")[2].split()[0]
            if status != "Z" and f"MARK={mark}".encode() in (entry / "environ").read_bytes():
                found.append(entry.name)
        except OSError:  # it is gone, or not ours
            continue
    return found


@pytest.fixture
def mark(request) -> str:
    """Mark the environment of the commands of one test."""
    if not Path("/proc/self/environ").exists():
        pytest.skip("processes are told by /proc, which only Linux has")
    return f"{os.getpid()}-{request.node.name}"


def until(condition, seconds=10.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_the_status_and_the_output_come_back():
    """Output longer than a pipe holds, too, and what is no text."""
    code = r"import os; os.write(1, b'x' * 200_000 + b'\xff'); os.write(2, b'words'); os._exit(3)"
    done = processes.run([sys.executable, "-c", code], env={})
    assert done.returncode == 3
    assert done.stdout == "x" * 200_000 + "\ufffd"
    assert done.stderr == "words"


def test_a_signal_is_told_as_a_shell_tells_it():
    """128 and the signal's number."""
    code = "import os; os.kill(os.getpid(), 9)"
    assert processes.run([sys.executable, "-c", code], env={}).returncode == 128 + 9


def test_a_command_that_is_not_there_is_told():
    """As a shell tells it: 127, and a line."""
    done = processes.run(["/absent/program"], env={})
    assert done.returncode == 127
    assert "cannot run /absent/program" in done.stderr


def test_the_command_reads_nothing():
    """It cannot wait for an answer that nobody gives."""
    done = processes.run([sys.executable, "-c", "print(repr(input()))"], env={})
    assert "EOFError" in done.stderr


def test_a_timeout_ends_the_command_and_what_it_started(mark):
    """Nothing of it goes on running."""
    with pytest.raises(subprocess.TimeoutExpired):
        processes.run(NEST, env={"MARK": mark}, timeout=0.5)
    until(lambda: not alive(mark))


def test_what_the_command_left_behind_is_ended(mark):
    """A daemon in its group does not stay when the command is done."""
    code = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])"
    processes.run([sys.executable, "-c", code], env={"MARK": mark})
    until(lambda: not alive(mark))


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_the_command_dies_with_whoever_asked(mark, how):
    """No signal to bnverify leaves a command running, not even the one that no program handles."""
    code = (
        "import os, sys; from bnverify.upgrade import processes;"
        f"processes.run({NEST!r}, env={{'MARK': {mark!r}}})"
    )
    asker = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    until(lambda: len(alive(mark)) == 3)  # the supervisor, the command, what it started
    asker.send_signal(how)
    asker.wait()
    until(lambda: not alive(mark))


def test_a_terminated_supervisor_takes_its_command_along(mark):
    """Whoever ends the supervisor politely ends all of it."""
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


def test_a_command_that_ignores_polite_requests_is_ended(mark):
    """SIGTERM first, so that uv can clean up; SIGKILL where that does not help."""
    code = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
        "print('deaf', flush=True); time.sleep(600)"
    )
    with pytest.raises(subprocess.TimeoutExpired):
        processes.run([sys.executable, "-c", code], env={"MARK": mark}, timeout=1)
    assert alive(mark) == []
