"""One check for all workers of a pytest-xdist run."""

from __future__ import annotations

import hashlib
import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pytest

    from bnverify.evidence import Report


class Share:
    """A report that the workers of one pytest-xdist run share, so that one of them makes it."""

    def __init__(self, file: Path | None) -> None:
        self._file = file

    def load(self) -> Report | None:
        """Return the report if a worker has made it."""
        if self._file is None or not self._file.exists():
            return None
        report: Report = pickle.loads(self._file.read_bytes())  # noqa: S301 - this run's own folder
        return report

    def save(self, report: Report) -> None:
        """Let the other workers have it."""
        if self._file is not None:
            self._file.write_bytes(pickle.dumps(report))


@contextmanager
def shared(request: pytest.FixtureRequest) -> Iterator[Share]:
    """Hold the lock on the report of this test's suite; outside pytest-xdist there is none.

    The kernel gives the lock of a worker that dies to the next, which finds no report and makes it.
    """
    run = os.environ.get("PYTEST_XDIST_TESTRUNUID")
    try:
        import fcntl
    except ImportError:  # not POSIX: every worker makes its own
        run = None
    if run is None:
        yield Share(None)
        return
    nodeid = request.node.nodeid.partition("[")[0]
    name = hashlib.sha256(f"{run} {nodeid}".encode()).hexdigest()[:16]
    # Each worker has a folder of its own in the one of the run.
    folder = request.getfixturevalue("tmp_path_factory").getbasetemp().parent
    with (folder / f"bnverify-{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield Share(folder / f"bnverify-{name}.report")
