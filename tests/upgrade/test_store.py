"""A directory in the store is whole or absent, whoever dies when."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from bnverify.upgrade.processes import CancelledError, Token
from bnverify.upgrade.store import Store

MAKER = """
import sys, time
from pathlib import Path
from bnverify.upgrade.processes import Token
from bnverify.upgrade.store import Store

def make(place):
    print("making", flush=True)
    for i in range(20):
        (place / str(i)).write_text(str(i))
        time.sleep(0.01)
    return {"files": 20}

store = Store(Path(sys.argv[1]))
with store.scratch() as work:
    (work / "something").touch()
    place, told = store.get("things", "abc", make, Token())
    print(len(list(place.iterdir())), told)
"""


@pytest.fixture
def store(tmp_path) -> Store:
    """Return an empty store."""
    return Store(tmp_path / "store")


def make(place):
    (place / "file").write_text("content")
    return {"told": 1}


def refuse(_place):
    raise AssertionError("it was there")


def contents(store: Store) -> list[str]:
    return sorted(str(p.relative_to(store.root)) for p in store.root.rglob("*") if p.is_file())


def test_it_is_made_once(store):
    """The second time it is found, with what was told about it."""
    place, told = store.get("things", "abc", make, Token())
    assert (place / "file").read_text() == "content"
    assert told == {"told": 1}
    assert store.get("things", "abc", refuse, Token()) == (place, told)


def test_a_failure_leaves_nothing(store):
    """The next attempt starts over."""

    def fail(place):
        (place / "half").touch()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.get("things", "abc", fail, Token())
    assert contents(store) == ["locks/things-abc"]
    assert store.get("things", "abc", make, Token())[1] == {"told": 1}


@pytest.mark.parametrize("damage", ["", "{", "[]"])
def test_what_has_no_whole_marker_is_made_anew(store, damage):
    """A clean-up that was interrupted, or a lost block, is not taken for a directory."""
    place, _ = store.get("things", "abc", make, Token())
    (place / "complete.json").write_text(damage)
    (place / "file").unlink()
    store.get("things", "abc", make, Token())
    assert (place / "file").read_text() == "content"


def test_of_two_threads_one_makes_it(store):
    """The other waits and finds it."""
    makers = []

    def slow(place):
        makers.append(1)
        time.sleep(0.3)
        return make(place)

    threads = [
        threading.Thread(target=store.get, args=("things", "abc", slow, Token())) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert makers == [1]


def test_waiting_can_be_given_up(store):
    """A cancelled token ends the wait for another maker."""
    token = Token()

    def nested(_place):
        token.cancel()
        store.get("things", "abc", refuse, token)

    with pytest.raises(CancelledError):
        store.get("things", "abc", nested, Token())


def test_killed_at_any_moment_it_is_made_whole_the_next_time(store):
    """What the killed makers left is cleared, and nobody sees a half."""
    command = [sys.executable, "-c", MAKER, str(store.root)]
    for delay in (0.0, 0.02, 0.05, 0.1, 0.15, 0.19):
        maker = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert maker.stdout.readline() == "making\n"
        time.sleep(delay)
        maker.send_signal(signal.SIGKILL)
        maker.communicate()
        if (store.root / "things" / "abc").exists():  # the last ones may have come to the end
            break
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "21 {'files': 20}"
    store.sweep()
    assert list((store.root / "building").iterdir()) == []
    assert [p.name for p in (store.root / "locks").iterdir()] == ["things-abc"]


def test_several_processes_at_once_agree(store):
    """Exactly one of them makes it."""
    command = [sys.executable, "-c", MAKER, str(store.root)]
    makers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    outputs = [maker.communicate()[0].splitlines() for maker in makers]
    assert [lines[-1] for lines in outputs] == ["21 {'files': 20}"] * 4
    assert sum(lines[0] == "making" for lines in outputs) == 1


def test_a_scratch_directory_goes_with_its_block(store):
    """Nothing of it remains, not even its lock."""
    with store.scratch() as work:
        (work / "file").touch()
    assert contents(store) == []


def test_sweeping_leaves_what_is_in_use(store):
    """What another process is making, or works in, stays."""
    with store.scratch() as work:
        Store(store.root).sweep()
        assert work.exists()

    def sweeping(place):
        Store(store.root).sweep()
        return make(place)

    store.get("things", "abc", sweeping, Token())
    assert (store.root / "things" / "abc" / "file").exists()


def test_what_nobody_asked_for_in_sixty_days_is_removed(store):
    """Asking for it starts the days anew."""
    kept, _ = store.get("things", "kept", make, Token())
    old, _ = store.get("things", "old", make, Token())
    long_ago = time.time() - 61 * 24 * 3600
    for place in (kept, old):
        os.utime(place / "complete.json", (long_ago, long_ago))
    store.get("things", "kept", refuse, Token())
    store.sweep()
    assert kept.exists()
    assert not old.exists()
    assert list((store.root / "building").iterdir()) == []


def test_others_may_not_write_there(store):
    """Who can write to the store can run code in whoever uses it."""
    store.get("things", "abc", make, Token())
    assert store.root.stat().st_mode & 0o077 == 0


def test_what_is_told_is_json(store):
    """It can be read without bnverify."""
    place, told = store.get("things", "abc", make, Token())
    assert json.loads((place / "complete.json").read_text()) == told
