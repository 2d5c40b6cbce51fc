"""Running a command so that it never outlives the wish for it."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

_SUPERVISOR = str(Path(__file__).with_name("supervisor.py"))
_POLL = 0.05  # seconds between looks at the token, beside seconds of the command's own


class CancelledError(Exception):
    """The work was given up, for another part of it failed or the user interrupted."""


class Token:
    """Lets one thread tell the others to give up: threads cannot be interrupted, but can ask."""

    def __init__(self) -> None:
        self._event = threading.Event()

    def cancel(self) -> None:
        """Let every command that runs under this token end, and no other start."""
        self._event.set()

    def check(self) -> None:
        """Raise CancelledError where the work was given up."""
        if self._event.is_set():
            raise CancelledError

    def sleep(self, seconds: float) -> None:
        """Sleep, but no longer than until the work is given up."""
        self._event.wait(seconds)
        self.check()


def run(
    command: Sequence[str],
    *,
    env: Mapping[str, str],
    cwd: Path | None = None,
    timeout: float | None = None,
    token: Token | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, and return its status and what it printed.

    However this ends (a time-out, Ctrl-C, SIGKILL to this process) the command and what it started
    end with it; see `supervisor`.

    Args:
        command: the program and its arguments.
        env: its whole environment.
        cwd: its directory.
        timeout: seconds.
        token: looked at while waiting.

    Raises:
        subprocess.TimeoutExpired: it ran for longer; what it printed is in the exception.
        CancelledError: the token was cancelled.
    """
    token = token or Token()
    token.check()
    until = time.monotonic() + timeout if timeout is not None else float("inf")
    # Files, not pipes: nobody has to read them while the command runs.
    with tempfile.TemporaryFile("w+b") as out, tempfile.TemporaryFile("w+b") as err:

        def text(file: BinaryIO) -> str:
            file.seek(0)
            return file.read().decode(errors="replace")

        with _supervised(command, env, cwd, out.fileno(), err.fileno()) as process:
            while process.poll() is None:
                if time.monotonic() > until:
                    assert timeout is not None
                    raise subprocess.TimeoutExpired(list(command), timeout, text(out), text(err))
                token.check()
                try:
                    process.wait(_POLL)
                except subprocess.TimeoutExpired:
                    continue
        return subprocess.CompletedProcess(list(command), process.returncode, text(out), text(err))


@contextmanager
def _supervised(
    command: Sequence[str], env: Mapping[str, str], cwd: Path | None, out: int, err: int
) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(  # noqa: S603 -- the caller's own command, as a list
        [sys.executable, "-I", "-S", _SUPERVISOR, *command],
        env=dict(env),
        cwd=cwd,
        stdin=subprocess.PIPE,
        stdout=out,
        stderr=err,
        start_new_session=True,
    )
    assert process.stdin is not None
    try:
        yield process
    finally:
        process.stdin.close()
        process.wait()
