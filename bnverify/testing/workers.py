"""Share one check between the workers of a pytest-xdist run."""

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
    """A report shared by the workers of a pytest-xdist run, made by one of them."""

    def __init__(self, file: Path | None) -> None:
        self._file = file

    def load(self) -> Report | None:
        """Return the report, or None if no worker has made it yet."""
        if self._file is None or not self._file.exists():
            return None
        report: Report = pickle.loads(self._file.read_bytes())  # noqa: S301 - from this run's folder
        return report

    def save(self, report: Report) -> None:
        """Save the report for the other workers."""
        if self._file is not None:
            self._file.write_bytes(pickle.dumps(report))


@contextmanager
def shared(request: pytest.FixtureRequest) -> Iterator[Share]:
    """Yield the share of this test's suite, locked; without pytest-xdist it is not shared.

    If a worker dies, the kernel releases its lock, and the next worker makes the report.
    """
    run = os.environ.get("PYTEST_XDIST_TESTRUNUID")
    try:
        import fcntl
    except ImportError:  # not POSIX: every worker makes its own report
        run = None
    if run is None:
        yield Share(None)
        return
    nodeid = request.node.nodeid.partition("[")[0]
    name = hashlib.sha256(f"{run} {nodeid}".encode()).hexdigest()[:16]
    # Each worker has its own folder inside the run's folder.
    folder = request.getfixturevalue("tmp_path_factory").getbasetemp().parent
    with (folder / f"bnverify-{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield Share(folder / f"bnverify-{name}.report")
