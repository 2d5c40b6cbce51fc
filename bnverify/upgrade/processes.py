"""Running a command that never outlives bnverify, however bnverify ends.

`run` starts this file as a program, the supervisor, which starts the command in a session of its
own. The supervisor's standard input is a pipe that `run` holds open. When the pipe closes (the
command took too long, Ctrl-C, or bnverify was killed by a signal that no program can handle), the
supervisor ends the command and everything it started. uv does not do this for what it runs.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

_POLITE = 3.0  # seconds between SIGTERM, on which uv removes its temporary files, and SIGKILL


def run(
    command: Sequence[str],
    *,
    env: Mapping[str, str],
    cwd: Path | None = None,
    timeout: float | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, and return its status and what it printed.

    The status is the command's own, 128 + n where signal n ended it, or 127 where there is no such
    command. The command reads nothing: its standard input is empty.

    Args:
        command: the program and its arguments.
        env: its whole environment.
        cwd: the directory to run it in.
        timeout: seconds.

    Raises:
        subprocess.TimeoutExpired: it ran for longer, and was ended.
    """
    read, write = os.pipe()
    with (
        os.fdopen(read, "rb") as its_input,
        os.fdopen(write, "wb") as held_open,
        subprocess.Popen(  # noqa: S603 -- the caller's own command, as a list
            [sys.executable, "-I", "-S", __file__, *command],
            env=dict(env),
            cwd=cwd,
            stdin=its_input,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,  # Ctrl-C in a terminal reaches bnverify alone, which decides
        ) as supervisor,
    ):
        try:
            out, err = supervisor.communicate(timeout=timeout)
        finally:
            held_open.close()
            supervisor.wait()
    return subprocess.CompletedProcess(list(command), supervisor.returncode, out, err)


def _supervise(command: list[str]) -> int:
    """Run the command until it ends or standard input closes; return its status as `run` does."""
    try:
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)  # noqa: S603 -- as above
    except OSError as error:
        sys.stderr.write(f"cannot run {command[0]}: {error}\n")
        return 127

    def end(how: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(child.pid, how)

    def end_when_input_closes() -> None:
        os.read(0, 1)
        end(signal.SIGTERM)
        threading.Timer(_POLITE, end, [signal.SIGKILL]).start()

    signal.signal(signal.SIGTERM, lambda *_: end(signal.SIGTERM))
    threading.Thread(target=end_when_input_closes, daemon=True).start()
    status = child.wait()
    end(signal.SIGKILL)  # whatever the command left running in its group
    return status if status >= 0 else 128 - status


if __name__ == "__main__":
    code = _supervise(sys.argv[1:])
    sys.stderr.flush()
    os._exit(code)  # not sys.exit: the thread may still be reading
