"""``explanation``: what explains a change of a leaf, if it explains every value."""

from __future__ import annotations

import numpy as np
import pytest

from bnverify.upgrade.recording import Recording
from bnverify.upgrade.values import explanation

EPS = 2.0**-24
SHAPES = [[2, 1], [5, 3], [32, 8]]
MEAN, VAR, WEIGHT = "batch_stats/mean", "batch_stats/var", "params/w"
STATE = [[path, "float32", [4]] for path in (MEAN, VAR, WEIGHT)]


def recording(old=None, *, rounding=0, **how):
    """Three steps of three leaves, with rounding errors within the noise; a replay of ``old``."""
    batches, errors = np.random.default_rng(0), np.random.default_rng(rounding)
    trees = [{"state": {"leaves": STATE, "containers": ""}} for _ in SHAPES]
    made = Recording({"shapes": SHAPES, "steps": 3, "trees": trees}, {}, "made here")
    for index, (rows, _) in enumerate(SHAPES):
        first = {MEAN: np.zeros((6, 4)), VAR: np.ones((6, 4)), WEIGHT: np.full((6, 4), 0.5)}
        made.arrays.update({f"shape{index}/init/{path}": leaf for path, leaf in first.items()})
        for number in range(3):
            batch = {path: batches.gamma(2, size=(6, 4)) for path in first}
            after = moved((old or made).before(index, number), batch, rows, **how)
            for path, exact in after.items():
                home, error = f"shape{index}/step{number}", errors.uniform(-1, 1, exact.shape)
                made.arrays[f"{home}/value/{path}"] = exact * (1 + EPS * error)
                made.arrays[f"{home}/noise/{path}"] = 2 * EPS * np.abs(exact)
    return made


def moved(state, batch, rows, momentum=0.9, divisor=0, rate=0.1, shift=0.0):
    divided = {MEAN: batch[MEAN], VAR: batch[VAR] * rows / (rows - divisor)}
    averages = {
        path: momentum * state[path] + (1 - momentum) * new + shift for path, new in divided.items()
    }
    return {**averages, WEIGHT: state[WEIGHT] - rate * (batch[WEIGHT] + shift)}


@pytest.mark.parametrize(
    ("then", "now", "leaf", "words"),
    [
        (
            {},
            {"momentum": 0.99},
            MEAN,
            "the batch has 0.1 times the weight it had: another momentum",
        ),
        ({}, {"momentum": 0.1}, VAR, "the batch has 9 times the weight it had: another momentum"),
        ({}, {"momentum": 1.0}, VAR, "the step leaves it unchanged"),
        ({}, {"divisor": 1}, VAR, "as if the variance were divided by N - 1 instead of N"),
        ({"divisor": 1}, {}, VAR, "as if the variance were divided by N instead of N - 1"),
        ({}, {"rate": 0.2}, WEIGHT, "it moves 2 times as far as before"),
        (
            {},
            {"rate": -0.1},
            WEIGHT,
            "it moves 1 times as far as before, in the opposite direction",
        ),
    ],
)
def test_an_explanation_of_every_value_is_given(then, now, leaf, words):
    """Momentum, divisor and learning rate are recognised by the values alone."""
    old = recording(**then)
    assert explanation(old, recording(old, rounding=1, **now), leaf) == f"in every case {words}"


@pytest.mark.parametrize("leaf", [MEAN, VAR, WEIGHT])
def test_an_explanation_of_some_values_is_not_given(leaf):
    """Neither an added term nor two changes at once fit a hypothesis."""
    old = recording()
    assert explanation(old, recording(old, rounding=1, shift=1e-3), leaf) == ""
    if leaf == VAR:
        both = recording(old, rounding=1, divisor=1, momentum=0.8)
        assert explanation(old, both, leaf) == ""


def test_one_value_that_disagrees_rules_an_explanation_out():
    """It must explain every value."""
    old = recording()
    new = recording(old, rounding=1, momentum=0.99)
    assert explanation(old, new, MEAN)
    new.arrays[f"shape1/step2/value/{MEAN}"][3, 2] *= 1 + 1e-5
    assert explanation(old, new, MEAN) == ""


def test_noise_rules_an_explanation_out():
    """If rounding leaves no digits, or nothing changes, no explanation is given."""
    old = recording()
    new = recording(old, rounding=1, momentum=0.99)
    for name in [name for name in new.arrays if "/noise/" in name]:
        new.arrays[name] = np.full_like(new.arrays[name], 1e3)
    assert explanation(old, new, MEAN) == ""
    assert explanation(old, new, "params/absent") == ""
