"""What stacked runs seem to show is confirmed before it is said."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest

from bnverify import reference, verify
from bnverify.engine.noise import Known, Noise
from bnverify.engine.runs import CLEAR

LAW = "row_order_changes_nothing"


pytestmark = pytest.mark.once


@pytest.fixture
def shrunk(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that makes the noise smaller than it is, for the draws of some seeds."""
    read = Noise.__call__

    def shrink(*seeds: int) -> None:
        def call(self: Noise, *args: Any, **options: Any) -> Known:
            known = read(self, *args, **options)
            factor = 0.08 if self._seed in seeds else 1.0
            return known._replace(
                noise=jax.tree_util.tree_map(lambda leaf: np.asarray(leaf) * factor, known.noise)
            )

        monkeypatch.setattr(Noise, "__call__", call)

    return shrink


def test_other_draws_must_confirm_a_close_call(shrunk: Any) -> None:
    """A tolerance that is small by one seed's luck breaks no law: the report says what it saw."""
    shrunk(0)
    report = verify(reference.sgd(), "quick", select=[LAW])
    (evidence,) = report.results
    assert evidence.status == "held"
    assert evidence.reason.endswith("nothing confirms it")
    assert evidence.residual is None


def test_what_other_draws_confirm_is_violated(shrunk: Any) -> None:
    """The same residual stands where both readings show it, with a case of each judge's."""
    shrunk(0, 1)
    report = verify(reference.sgd(), "quick", select=[LAW])
    (evidence,) = report.results
    assert evidence.status == "violated"
    assert 1 < (evidence.residual or 0) < CLEAR
    assert evidence.counterexample
