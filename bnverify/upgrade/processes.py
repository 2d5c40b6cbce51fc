"""Run a command that never outlives bnverify, however bnverify ends.

`run` starts this file as a program, the supervisor, which starts the command in its own session.
The supervisor's stdin is a pipe that `run` keeps open. When the pipe closes (time limit, Ctrl-C, or
bnverify was killed by SIGKILL), the supervisor ends the command and everything it started. uv does
not do this for the commands it runs.
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

_GRACE = 3.0  # seconds between SIGTERM, on which uv removes its temporary files, and SIGKILL


def run(
    command: Sequence[str],
    *,
    env: Mapping[str, str],
    cwd: Path | None = None,
    timeout: float | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a command; return its status and output.

    The status is the command's own, 128 + n if it was killed by signal n, or 127 if it cannot be
    run. The command's stdin is empty.

    Args:
        command: the program and its arguments.
        env: the complete environment.
        cwd: the working directory.
        timeout: the limit in seconds.

    Raises:
        subprocess.TimeoutExpired: the command took longer, and was ended.
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
            start_new_session=True,  # so that Ctrl-C reaches only bnverify
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
        threading.Timer(_GRACE, end, [signal.SIGKILL]).start()

    signal.signal(signal.SIGTERM, lambda *_: end(signal.SIGTERM))
    threading.Thread(target=end_when_input_closes, daemon=True).start()
    status = child.wait()
    end(signal.SIGKILL)  # what the command left running in its process group
    return status if status >= 0 else 128 - status


if __name__ == "__main__":
    code = _supervise(sys.argv[1:])
    sys.stderr.flush()
    os._exit(code)  # sys.exit would wait for the thread that reads stdin
