"""The arithmetic of laws: which differences are errors, and which values are not compared."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from bnverify import compat
from bnverify.laws.arithmetic import (
    UNTRIGGERED,
    alike,
    all_finite,
    all_over,
    any_over,
    apart_by,
    array_namespace,
    differs,
    folded,
    measurable,
    moments,
    momentum,
    numbers,
    per_case,
    residual,
    same,
    smallest,
    sum_over,
    trees,
    unit,
    when,
    wide,
    widest,
    within_noise,
    worst_of,
    xp,
)
from bnverify.model import LayerInput
from bnverify.reruns import huge

INF, NAN = math.inf, math.nan


@pytest.fixture(autouse=True)
def _as_laws_run() -> Iterator[None]:
    with np.errstate(all="ignore"):
        yield


def float32(*values: Any) -> Any:
    return np.array(values, np.float32)


def test_a_residual_is_the_error_over_the_error_allowed() -> None:
    """A value that should be finite but is not has an infinite residual; without a bound it is skipped."""
    rows = [
        # actual, expected, allowed, residual
        (1.0, 1.0, 0.0, 0.0),
        (1.5, 1.0, 1.0, 0.5),
        (3.0, 1.0, 1.0, 2.0),
        (1.5, 1.0, 0.0, INF),
        (NAN, 1.0, 1.0, INF),
        (INF, 1.0, 1.0, INF),
        (1.0, NAN, 1.0, UNTRIGGERED),
        (1.0, INF, 1.0, UNTRIGGERED),
        (1.0, 3e38, 3e38, UNTRIGGERED),
        (5.0, 1.0, INF, UNTRIGGERED),
        (5.0, 1.0, NAN, UNTRIGGERED),
    ]
    actual, expected, allowed, value = (np.array(column) for column in zip(*rows, strict=True))
    found = residual(actual.astype(np.float32), expected, allowed)
    np.testing.assert_array_equal(found, value)


def test_what_is_compared_goes_by_the_range_of_the_actual_dtype() -> None:
    """70,000 exceeds float16: a float16 result is not compared with it, but a float32 result is."""
    for dtype, value in ((np.float16, UNTRIGGERED), (np.float32, 1e4)):
        found = residual(np.full(1, 6e4, dtype), np.array([7e4]), 1.0)
        np.testing.assert_array_equal(found, [value])


def test_the_worst_element_of_each_case_counts() -> None:
    """Elements that are not compared do not hide others, and cases are independent."""
    actual = float32([1, 9, 2], [1, 1, 1], [5, 1, 1])
    expected = np.array([[1, NAN, 1], [NAN, NAN, NAN], [1, 1, 1]])
    np.testing.assert_array_equal(residual(actual, expected, 1.0), [1.0, UNTRIGGERED, 4.0])


def test_one_number_for_each_case_goes_with_each_of_its_elements() -> None:
    """A (K,) operand is aligned with axis 0, where NumPy would align it with the last axis."""
    actual = np.zeros((2, 2, 2), np.float32)
    np.testing.assert_array_equal(residual(actual, np.array([1.0, 2.0]), 1.0), [1.0, 2.0])
    np.testing.assert_array_equal(residual(actual, 1.0, np.array([1.0, 2.0])), [1.0, 0.5])
    np.testing.assert_array_equal(residual(actual + 1, np.ones((1, 2, 2)), 0.0), [0.0, 0.0])
    assert per_case(np.arange(2), actual).shape == (2, 1, 1)


def test_shapes_that_do_not_fit_are_refused() -> None:
    """(K, F) and (K, R, F) could be aligned in two ways, so they are refused."""
    with pytest.raises(ValueError, match="cannot compare shapes"):
        residual(np.zeros((2, 2, 2), np.float32), np.zeros((2, 2)), 0.0)


def test_reductions_leave_the_cases_alone() -> None:
    """Each reduction returns one value per case, for any rank, even without elements."""
    for shape in ((3,), (3, 2), (3, 2, 2)):
        values = np.arange(np.prod(shape)).reshape(shape)
        flat = values.reshape(3, -1)
        np.testing.assert_array_equal(sum_over(values), flat.sum(1))
        np.testing.assert_array_equal(any_over(values > 2), (flat > 2).any(1))
        np.testing.assert_array_equal(all_over(values > 2), (flat > 2).all(1))
    np.testing.assert_array_equal(
        residual(np.zeros((3, 0), np.float32), 0.0, 0.0), [UNTRIGGERED] * 3
    )


def test_no_residual_is_untriggered() -> None:
    """If nothing was compared, the result is untriggered."""
    np.testing.assert_array_equal(worst_of([]), [UNTRIGGERED])
    np.testing.assert_array_equal(same({}, {}), [UNTRIGGERED])
    np.testing.assert_array_equal(when(np.array([False, True]), 0.5), [UNTRIGGERED, 0.5])


def test_the_worst_residual_is_taken_case_by_case() -> None:
    """A residual of shape (1,) counts for every case."""
    found = worst_of([np.array([0.5, 3.0]), np.array([2.0, 1.0]), np.array([1.5])])
    np.testing.assert_array_equal(found, [2.0, 3.0])


@pytest.mark.parametrize(
    "other",
    [
        pytest.param({}, id="a leaf is missing"),
        pytest.param({"b": np.zeros((4, 2))}, id="a leaf has another name"),
        pytest.param({"a": np.zeros((4, 3))}, id="a leaf has another shape"),
        pytest.param({"a": np.zeros((4, 1))}, id="a leaf of a shape that NumPy would broadcast"),
    ],
)
def test_trees_that_are_not_alike_cannot_hold(other: Any) -> None:
    """A missing leaf, or one of another shape, gives an infinite residual in every case."""
    one = {"a": np.zeros((4, 2))}
    assert alike(one, other) is None
    np.testing.assert_array_equal(trees(lambda a, b: residual(a, b, 1.0), one, other), [INF])


def test_a_leaf_may_be_the_same_for_all_cases() -> None:
    """A direction of shape (1, ...) matches a stack of gradients (K, ...)."""
    stack, once = {"a": np.ones((4, 2))}, {"a": np.ones((1, 2))}
    assert alike(stack, once) is not None
    np.testing.assert_array_equal(same(stack, once), np.zeros(4))


def test_the_worst_leaf_counts() -> None:
    """The tolerance of each leaf depends on its own dtype."""
    tree = {
        "w": np.ones((2, 3), np.float32),
        "b": np.ones(2, np.float32),
        "h": np.ones((2, 4), ml_dtypes.bfloat16),
        "count": np.arange(4).reshape(2, 2),
    }

    def leaf(a: Any, b: Any) -> Any:
        return residual(a, b, unit(b) or 1.0)

    for name, units in (("w", 2.0**24), ("b", 2.0**24), ("h", 2.0**8), ("count", 1.0)):
        value = tree[name].copy()
        value[1] += 1
        np.testing.assert_array_equal(trees(leaf, {**tree, name: value}, tree), [0.0, units])


def test_two_runs_may_each_err_by_the_noise() -> None:
    """Two float32 runs may differ by twice the noise, but no more."""
    a, b = {"w": float32(1, 1, 1)}, {"w": float32(1.5, 1.5, 1.5)}
    noise = {"w": np.array([0.25, 0.1, INF])}
    expected = [1.0, 2.5, UNTRIGGERED]
    np.testing.assert_allclose(within_noise(a, b, noise), expected, rtol=1e-12)


def test_equal_to_the_bit_means_every_bit() -> None:
    """A difference of one unit in the last place, or of 1, gives an infinite residual in its case."""
    tree = {"w": float32([1, 2], [1, 2]), "n": np.array([2**31 - 1, 2**31 - 1], np.int32)}
    other = {**tree, "w": float32([1, 2], [1, np.nextafter(np.float32(2), np.float32(3))])}
    np.testing.assert_array_equal(same(other, tree), [0.0, INF])
    np.testing.assert_array_equal(
        same({**tree, "n": tree["n"] - np.int32([1, 0])}, tree), [INF, 0.0]
    )


def test_a_difference_is_seen_in_the_case_that_has_it() -> None:
    """NaN equals NaN but no number; trees of different shapes differ in every case."""
    a = {"w": float32([1, NAN], [1, NAN], [1, 1]), "n": np.arange(3)}
    b = {"w": float32([1, NAN], [NAN, NAN], [1, 1]), "n": np.array([0, 1, 3])}
    np.testing.assert_array_equal(differs(a, b), [False, True, True])
    np.testing.assert_array_equal(differs(a, a), [False, False, False])
    np.testing.assert_array_equal(differs(np.ones((2, 1)), np.ones((2, 2))), [True])
    np.testing.assert_array_equal(differs((), ()), [False])


def test_magnitudes_and_finiteness_are_of_each_case() -> None:
    """Integers and signs are ignored."""
    tree = {"w": float32([1, -3], [2, 1]), "h": float32(0, INF), "n": np.array([9, 9])}
    np.testing.assert_array_equal(widest(tree), [3.0, INF])
    np.testing.assert_array_equal(all_finite(tree), [True, False])
    np.testing.assert_array_equal(widest({"n": np.array([9])}), [0.0])
    np.testing.assert_array_equal(all_finite(()), [True])


@pytest.mark.parametrize("dtype", [np.float16, np.float32, ml_dtypes.bfloat16])
def test_precision_is_that_of_the_dtype(dtype: Any) -> None:
    """1 + 2 u is the next number after 1; half the smallest normal number is subnormal."""
    value = np.ones(1, dtype)
    assert wide((value + dtype(2 * unit(value))).astype(dtype)) == 1 + 2 * unit(value)
    assert smallest(value) == float(jnp.finfo(dtype).tiny)
    assert unit(np.arange(2)) == smallest(np.arange(2)) == 0


def test_a_loss_is_one_number_for_each_case() -> None:
    """Shapes (K,) and (K, 1) are accepted, (K, 2) is refused."""
    assert numbers(np.zeros(3)).shape == numbers(np.zeros((3, 1))).shape == (3,)
    with pytest.raises(ValueError, match="one number for each case"):
        numbers(np.zeros((3, 2)))


def average(m: Any, old: Any, batch: Any) -> Any:
    """Return a moving average as a float32 step computes it."""
    m = np.float32(m)
    return (m * old + (1 - m) * batch).astype(np.float32)


def test_a_moving_average_is_measured_from_outside() -> None:
    """The momentum is measured within rounding, and a batch applied twice is detected in its case."""
    batch, old = float32([1, -2], [3, 0], [0.1, 5]), float32([4, 4], [-1, 2], [0, 0])
    m = float32([0.9], [0.99], [0.5])
    zero, high = average(m, 0 * old, batch), average(m, np.float32(huge(np.float32)), batch)
    np.testing.assert_allclose(momentum(zero, high), np.broadcast_to(m, (3, 2)), rtol=2.0**-22)
    assert measurable(zero).all()
    new = average(m, old, batch)
    assert folded(old, new, zero, high).max() <= 1
    wrong = new.copy()
    wrong[1] = average(m[1], new[1], batch[1])
    found = folded(old, wrong, zero, high)
    assert found[1] > 1000
    assert max(found[0], found[2]) <= 1


def test_a_counter_is_no_average() -> None:
    """Integer statistics are not compared: the residual is untriggered."""
    count = np.arange(3)
    np.testing.assert_array_equal(folded(count, count + 1, count, count), [UNTRIGGERED])


def layer(rows: int, *features: int, masked: bool = False, seed: int = 0) -> LayerInput:
    rng = np.random.default_rng(seed)
    value = 10 + rng.normal(size=(4, rows, *features))
    if not masked:
        return LayerInput(value)
    weights = np.arange(rows).reshape(1, rows, *[1] * len(features)) % 3 > 0
    return LayerInput(np.where(weights, value, np.inf), weights)


def kept(given: LayerInput, case: int) -> Any:
    value = given.value[case]
    if given.weights is None:
        return value
    return value[np.broadcast_to(given.weights, given.value.shape)[case].all(axis=-1)]


@pytest.mark.parametrize("masked", [False, True])
def test_moments_are_of_the_rows_that_count(masked: bool) -> None:
    """Moments are computed for each case and feature; masked rows may be anything, even infinite."""
    given = layer(7, 3, masked=masked)
    own = moments(given)
    for case in range(4):
        rows = kept(given, case)
        np.testing.assert_allclose(own.mean[case], rows.mean(0), rtol=1e-14)
        np.testing.assert_allclose(own.var[case], rows.var(0), rtol=1e-12)
        np.testing.assert_array_equal(own.count[case], len(rows))


@pytest.mark.parametrize("masked", [False, True])
def test_moments_move_no_further_than_the_bound(masked: bool) -> None:
    """With each element moved by its noise, up or down, the bound is never exceeded but nearly reached."""
    given = layer(6, 2, masked=masked)
    moved = np.random.default_rng(1).random(given.value.shape)
    own = moments(given)
    of_mean, of_var = apart_by(given, own, moved)
    nearest = 0.0
    for seed in range(200):
        signs = np.random.default_rng(seed).choice([-1, 1], moved.shape)
        other = moments(given._replace(value=given.value + signs * moved))
        assert (np.abs(other.mean - own.mean) <= of_mean * (1 + 1e-12)).all()
        assert (np.abs(other.var - own.var) <= of_var * (1 + 1e-12)).all()
        nearest = max(nearest, float((np.abs(other.mean - own.mean) / of_mean).max()))
    assert nearest > 0.9


def test_the_namespace_is_numpy_unless_told_otherwise() -> None:
    """The same code uses JAX inside the context, and NumPy after it."""
    case = float32([1.5, NAN]), np.ones((1, 2)), 0.25
    with compat.enable_x64(), array_namespace(jnp):
        assert xp.zeros is jnp.zeros
        by_jax = residual(*(jnp.asarray(value) for value in case))
        assert not isinstance(by_jax, np.ndarray)
    assert xp.zeros is np.zeros
    np.testing.assert_array_equal(residual(*map(np.asarray, case)), by_jax)
