"""A program: runs one command, and ends it and all it started when nobody waits for it any more.

    python -I -S supervisor.py COMMAND ARG...

Standard input is a pipe that whoever asked holds open. When it closes, be it on purpose, by Ctrl-C
or because the asker was killed by a signal that no program can handle, the command's process group
is killed. PR_SET_PDEATHSIG would do it on Linux alone, and from a fork hook, which is unsafe beside
threads. Runs on any Python 3 and imports nothing of bnverify.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading


def main(command: list[str]) -> int:
    """Return the command's exit status, 128 + n where signal n ended it, 127 where none ran."""
    try:
        # In a session of its own: a signal from the terminal reaches the asker only, who decides.
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)  # noqa: S603 -- the asker's own command
    except OSError as error:
        sys.stderr.write(f"cannot run {command[0]}: {error}\n")
        return 127

    def end(*_: object) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(child.pid, signal.SIGKILL)

    def end_when_alone() -> None:
        os.read(0, 1)
        if child.returncode is None:  # afterwards its number may be another's
            end()

    signal.signal(signal.SIGTERM, end)
    threading.Thread(target=end_when_alone, daemon=True).start()
    status = child.wait()
    end()  # what the command left running in its group
    return status if status >= 0 else 128 - status


if __name__ == "__main__":  # pragma: no cover -- -I -S leaves no way in for the measurement
    # Not sys.exit: the thread may sit in read, and there is nothing to clean up.
    code = main(sys.argv[1:])
    sys.stderr.flush()
    os._exit(code)
