"""Data-parallel faults and their correct twins; those on one device are in ``test_loops``."""

from __future__ import annotations

import pytest

from bnverify.parallel.devices import on_devices
from bnverify.profile import Profile
from tests.faults.libraries import PARALLEL_LAW, PARALLEL_RIGHT, PARALLEL_WRONG

FEW = Profile("few", tiny=1, shapes=0, block=64, examples=4)
HOME = "tests.faults.libraries:"


@pytest.mark.nightly
def test_a_clip_before_the_average_is_named_and_one_behind_it_is_not_accused() -> None:
    """On four devices, in one process."""
    names = [*PARALLEL_WRONG, *PARALLEL_RIGHT]
    found = on_devices([HOME + name for name in names], FEW, 0, [PARALLEL_LAW])
    for name in names:
        (evidence,) = (each for each in found[HOME + name][0] if each.law == PARALLEL_LAW)
        assert evidence.status == ("violated" if name in PARALLEL_WRONG else "held"), name
        if name in PARALLEL_WRONG:
            assert evidence.cause is not None
            assert evidence.cause.mistake == PARALLEL_WRONG[name].mistake, name
