"""The arithmetic that laws share: what counts as an error, and what cannot be compared."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from bnverify.laws.law import UNTRIGGERED
from bnverify.laws.residuals import residual, same, trees, unit, when, wide, within_noise, worst_of


@pytest.mark.parametrize(
    ("actual", "expected", "allowed", "value"),
    [
        (1.0, 1.0, 0.0, 0.0),
        (1.5, 1.0, 1.0, 0.5),
        (3.0, 1.0, 1.0, 2.0),
        (1.5, 1.0, 0.0, np.inf),
        (np.nan, 1.0, 1.0, np.inf),
        (np.inf, 1.0, 1.0, np.inf),
        (1.0, np.nan, 1.0, UNTRIGGERED),
        (1.0, np.inf, 1.0, UNTRIGGERED),
        (5.0, 1.0, np.inf, UNTRIGGERED),
    ],
)
def test_a_residual_is_the_error_over_the_error_allowed(
    actual: float, expected: float, allowed: float, value: float
) -> None:
    """A value that should be finite and is not is infinitely wrong; what has no bound is not compared."""
    assert float(residual(actual, expected, allowed)) == value


def test_the_worst_element_counts() -> None:
    """Elements that cannot be compared do not hide those that can."""
    actual, expected = jnp.array([1.0, 9.0, 2.0]), jnp.array([1.0, jnp.nan, 1.0])
    assert float(residual(actual, expected, jnp.ones(3))) == 1.0


def test_no_residual_is_untriggered() -> None:
    """Nothing compared is nothing held."""
    assert float(worst_of([])) == UNTRIGGERED
    assert float(same({}, {})) == UNTRIGGERED
    assert float(when(False, 0.0)) == UNTRIGGERED


def test_trees_that_are_not_alike_cannot_hold() -> None:
    """A missing leaf, or one of another shape, is infinitely wrong."""
    one = {"a": jnp.zeros(2)}
    assert float(trees(lambda a, b: residual(a, b, 1.0), one, {})) == np.inf
    assert float(trees(lambda a, b: residual(a, b, 1.0), one, {"a": jnp.zeros(3)})) == np.inf


def test_leaves_judged_at_once_are_judged_as_one_by_one() -> None:
    """Leaves of several shapes and dtypes: each is held to the unit of its own dtype."""
    rng = np.random.default_rng(0)
    types = {"w": ((2, 3), "float32"), "b": ((), "float32"), "h": ((4,), "bfloat16")}
    tree = {name: jnp.asarray(rng.normal(size=of), dtype) for name, (of, dtype) in types.items()}
    tree["count"] = jnp.arange(2)
    for worst, value in tree.items():
        other = {**tree, worst: value + 1}

        def leaf(a: Any, b: Any) -> Any:
            return residual(a, b, (unit(a) or 1.0) * jnp.ones_like(wide(a)))

        joined, single = (trees(leaf, other, tree, elementwise=each) for each in (True, False))
        assert float(joined) == float(single) > 0


def test_two_runs_may_each_err_by_the_noise() -> None:
    """Twice the noise is allowed between two float32 runs, no more."""
    a, b = {"w": jnp.float32(1.0)}, {"w": jnp.float32(1.5)}
    assert float(within_noise(a, b, {"w": jnp.float32(0.25)})) == pytest.approx(1.0)
    assert float(within_noise(a, b, {"w": jnp.float32(0.1)})) == pytest.approx(2.5)
