"""Steps that JAX cannot trace or vectorise: what can be seen without is checked, and nothing crashes."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import io_callback

import bnverify
from bnverify import reference
from bnverify.model import State
from bnverify.profile import Profile

SGD = reference.sgd()
FEW = Profile("few", tiny=1, shapes=0, block=16, examples=3)
NUMBER = jax.ShapeDtypeStruct((), jnp.float32)


def branching(state: Any, x: Any, y: Any, lr: Any) -> Any:
    """Decide in Python."""
    return SGD.step(state, x, y, lr if float(jnp.sum(x)) < 1e30 else 0 * lr)


def through_numpy(state: Any, x: Any, y: Any, lr: Any) -> Any:
    """Compute with NumPy."""
    return SGD.step(state, np.asarray(x) * np.float32(1), y, lr)


def asking_python(state: Any, x: Any, y: Any, lr: Any) -> Any:
    """Call back without saying how under vmap."""
    return SGD.step(state, x, y, jax.pure_callback(np.float32, NUMBER, lr))


def asking_the_world(state: Any, x: Any, y: Any, lr: Any) -> Any:
    """Call back for an effect."""
    return SGD.step(state, x, y, io_callback(np.float32, NUMBER, lr))


SEEN = (
    "gradients_match_params",
    "batch_stats_change_only_by_ema",
    "params_follow_the_optimizer",
    "eval_uses_the_running_statistics",
)
"""Laws that need no trace to be held."""


def checked(step: Callable[..., Any], laws: Collection[str] = ()) -> bnverify.Report:
    return bnverify.verify(replace(SGD, name=step.__name__, step=step), FEW, select=laws)


@pytest.mark.parametrize(
    ("step", "laws"),
    [
        (branching, (*SEEN, "vmap_equals_loop")),
        pytest.param(through_numpy, (), marks=pytest.mark.nightly),
    ],
)
def test_a_step_that_does_not_trace_is_run(step: Callable[..., Any], laws: Collection[str]) -> None:
    """Laws of structure are held to one run, the others to eager ones; the rest says why not."""
    report = checked(step, laws)
    status = {e.law: e.status for e in report.results}
    assert "violated" not in status.values()
    for law in SEEN:
        assert status[law] == "held", law
    assert status["vmap_equals_loop"] == "untriggered"
    assert all(e.reason for e in report.results if e.status in ("untriggered", "exempt"))
    assert any(note.startswith("not traced: ") for note in report.notes)


@pytest.mark.nightly
@pytest.mark.parametrize("step", [asking_python, asking_the_world])
def test_a_step_that_calls_back_is_checked(step: Callable[..., Any]) -> None:
    """Its program is read, what comes from outside conservatively; its rounding is not known."""
    report = checked(step)
    status = {e.law: e.status for e in report.results}
    assert "violated" not in status.values()
    assert status["gradients_match_params"] == "proved"
    assert status["batch_stats_change_only_by_ema"] == "held"


@pytest.mark.nightly
def test_a_fault_in_such_a_step_is_found() -> None:
    """Statistics that are dropped are, whether the step traces or not."""

    def dropping(state: State, x: Any, y: Any, lr: Any) -> Any:
        after, info = branching(state, x, y, lr)
        return after._replace(batch_stats=state.batch_stats), info

    subject = replace(SGD, name="dropping", step=dropping)
    report = bnverify.verify(
        subject, Profile("few", tiny=1, shapes=0, examples=40, eager=0), select=["influence"]
    )
    assert {e.law for e in report.results if e.status == "violated"} == {
        "inputs_reach_the_statistics",
        "step_moves_the_statistics",
    }
