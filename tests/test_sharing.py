"""Failing cases travel between machines in Hypothesis's own databases, each of them a real one."""

import shutil
import socket
import subprocess
import time
import unittest
import zipfile
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import Phase, given, settings
from hypothesis.database import (
    DirectoryBasedExampleDatabase,
    ExampleDatabase,
    GitHubArtifactDatabase,
    MultiplexedDatabase,
    ReadOnlyDatabase,
)

from bnverify import strategies
from bnverify.evidence import Counterexample, Evidence
from bnverify.model import Case
from bnverify.testing import memory

Machines = Callable[[str], ExampleDatabase]
"""From the name of a machine to the database it has there."""

SECONDS = 10.0  # for Redis to start in


@pytest.fixture
def directory(tmp_path: Path) -> Machines:
    """Two machines that see one directory."""
    return lambda machine: DirectoryBasedExampleDatabase(tmp_path / "shared")


@pytest.fixture
def github(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machines:
    """CI, which writes a directory, and a desk that reads the artifact made of it."""
    monkeypatch.chdir(tmp_path)
    local = {name: DirectoryBasedExampleDatabase(tmp_path / name) for name in ("ci", "desk")}

    def database(machine: str) -> ExampleDatabase:
        if machine == "ci":
            return local[machine]
        downloads = tmp_path / "github-artifacts"
        downloads.mkdir(exist_ok=True)
        name = datetime.now(UTC).isoformat().replace(":", "_")
        with zipfile.ZipFile(downloads / f"{name}.zip", "w") as artifact:
            for file in (tmp_path / "ci").rglob("*"):
                artifact.write(file, file.relative_to(tmp_path / "ci"))
        # Fresh as it is, the download is not made again: this test asks nobody.
        theirs = GitHubArtifactDatabase("owner", "repository", path=downloads)
        return MultiplexedDatabase(local[machine], ReadOnlyDatabase(theirs))

    return database


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[Machines]:
    """Two machines that reach one Redis, started here and stopped again."""
    server = shutil.which("redis-server")
    if server is None:
        pytest.skip("no redis-server here; Debian has it: apt-get install redis-server")
    client = pytest.importorskip("redis", reason="needs bnverify[redis]")
    from hypothesis.extra.redis import RedisExampleDatabase

    port = free_port()
    options = ["--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(tmp_path)]
    process = subprocess.Popen([server, *options], stdout=subprocess.DEVNULL)
    connections = []

    def database(machine: str) -> ExampleDatabase:
        connections.append(client.Redis("127.0.0.1", port))
        return RedisExampleDatabase(connections[-1])

    try:
        with client.Redis("127.0.0.1", port) as connection:
            wait_for(connection, client.ConnectionError)
        yield database
    finally:
        for connection in connections:
            connection.close()
        process.terminate()
        process.wait(SECONDS)


def wait_for(connection: object, refusal: type[Exception]) -> None:
    """Return once the server answers."""
    end = time.monotonic() + SECONDS
    while True:
        try:
            connection.ping()  # type: ignore[attr-defined] # a redis.Redis, where that is installed
        except refusal:
            if time.monotonic() > end:
                raise
            time.sleep(0.05)
        else:
            return


@pytest.fixture(params=["directory", "github", pytest.param("redis", marks=pytest.mark.nightly)])
def machines(request: pytest.FixtureRequest) -> Machines:
    made: Machines = request.getfixturevalue(request.param)
    return made


def small_batches_hold(database: ExampleDatabase, *phases: Phase) -> list[Case]:
    """Run a property that only a large batch breaks, and return the cases that broke it."""
    broken = []

    @settings(database=database, phases=phases, derandomize=False, max_examples=500)
    @given(strategies.cases())
    def property_of_cases(case: Case) -> None:
        if case.shape[0] > 20:
            broken.append(case)
            raise AssertionError(f"{case.shape[0]} rows")

    try:
        property_of_cases()
    except AssertionError:
        assert broken
    except unittest.SkipTest:  # how Hypothesis says that it had nothing to try
        assert phases == (Phase.reuse,)
    return broken


def test_a_case_found_on_one_machine_is_tried_first_on_another(machines: Machines) -> None:
    """The other machine generates nothing, and fails by the very case."""
    assert small_batches_hold(machines("desk"), Phase.reuse) == []
    found = small_batches_hold(machines("ci"), Phase.generate, Phase.shrink)
    again = small_batches_hold(machines("desk"), Phase.reuse)
    assert again[0].code() == found[-1].code()


def failure(reason: str) -> Evidence:
    law = "eval_loss_is_finite"
    return Evidence.of(law, "violated", reason=reason, counterexample=Counterexample(law))


def test_a_failed_law_is_known_on_the_other_machine(
    machines: Machines, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a suite keeps of a failure on one machine, it replays on another; no other test's."""

    def on(machine: str) -> None:
        named = settings(database=machines(machine), derandomize=False)
        monkeypatch.setattr(memory, "settings", lambda: named)

    test = "test_step.py::test_mine[eval_loss_is_finite]"
    on("ci")
    memory.Memory(test).keep(failure("older"))
    memory.Memory(test).keep(failure("off by 7"))
    on("desk")
    assert memory.Memory(test).recall() == failure("off by 7")
    assert memory.Memory("test_step.py::test_other").recall() is None


def test_what_is_mended_is_forgotten(machines: Machines, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the machine that keeps it, for all; what is not ours is left out of account."""
    named = settings(database=machines("ci"), derandomize=False)
    monkeypatch.setattr(memory, "settings", lambda: named)
    remembered = memory.Memory("test_step.py::test_mine")
    remembered.keep(failure("off by 7"))
    remembered.forget()
    assert remembered.recall() is None
    named.database.save(remembered._key, b"of another release")
    assert remembered.recall() is None
