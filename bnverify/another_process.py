"""Run a function in another Python process, which has an environment of its own."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class NoAnswer(Exception):
    """The process wrote no file.

    Attributes:
        status: its exit status; None: it exceeded the time limit.
        said: the last line of its stderr; "" if there is none.
    """

    def __init__(self, status: int | None, said: str = "") -> None:
        super().__init__(said)
        self.status = status
        self.said = said


@contextmanager
def answer(
    module: str, asked: Any, *, environment: Mapping[str, str], time_limit: float
) -> Iterator[Path]:
    """Call the function ``answer(asked, file)`` of a module in another process, and yield the file.

    Args:
        module: its dotted name.
        asked: the question, which the function receives as JSON.
        environment: the environment variables of the process.
        time_limit: in seconds.

    Raises:
        NoAnswer: the process wrote no file.
    """
    code = f"import sys; from {module} import answer; answer(*sys.argv[1:])"
    with tempfile.TemporaryDirectory(prefix="bnverify-") as folder:
        file = Path(folder) / "answer"
        try:
            done = subprocess.run(  # noqa: S603 - this interpreter, a module of this package
                [sys.executable, "-c", code, json.dumps(asked), str(file)],
                env=environment,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=time_limit,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise NoAnswer(None) from None
        if not file.exists():
            raise NoAnswer(done.returncode, (done.stderr.strip().splitlines() or [""])[-1])
        yield file
