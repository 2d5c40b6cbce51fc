"""Our own programs: compiled once for a signature, and not kept for ever."""

from __future__ import annotations

import gc

import numpy as np
import pytest

from bnverify import compiled
from bnverify.compiled import Compiled


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let four programs be kept; return the sizes for which ``doubling`` was traced."""
    monkeypatch.setattr(compiled, "MOST", 4)
    compiled._RECENT.clear()
    return []


def doubling(traced: list[int]) -> Compiled:
    """Return a program that doubles, and notes in ``traced`` each size it is traced for."""

    def double(x: np.ndarray) -> np.ndarray:
        traced.append(x.size)
        return 2 * x

    return Compiled(double)


def test_a_signature_is_compiled_once(few: list[int]) -> None:
    """What has the same shape and dtype finds its program."""
    double = doubling(few)
    for x in (np.ones(2, np.float32), np.zeros(2, np.float32), np.ones(2, np.int32)):
        np.testing.assert_array_equal(double(x), 2 * x)
    assert few == [2, 2]


def test_what_was_not_used_for_long_is_compiled_again(few: list[int]) -> None:
    """Of five programs where four are kept, the two used last stay."""
    double = doubling(few)
    for size in (1, 2, 3, 4, 1, 5):
        double(np.ones(size))
    assert few == [1, 2, 3, 4, 5]
    for size in (1, 4, 5, 2):
        np.testing.assert_array_equal(double(np.ones(size)), 2 * np.ones(size))
    assert few == [1, 2, 3, 4, 5, 2]


def test_programs_of_what_is_gone_make_room_too(few: list[int]) -> None:
    """A process that checks one subject after another fills up all the same."""
    for _ in range(3):
        double = doubling(few)
        double(np.ones(1))
        double(np.ones(2))
        del double
        gc.collect()
        assert len(compiled._RECENT) <= 4
    assert few == [1, 2] * 3
