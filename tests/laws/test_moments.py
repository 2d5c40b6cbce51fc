"""What rounding upstream of a layer does to its captured input is no fault of its moments."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from bnverify import compat, zoo
from bnverify.case import Case
from bnverify.laws import LAWS
from bnverify.observe import Calls, observe
from bnverify.pytree import stack
from bnverify.reruns import nudged_inputs

# The first normalisation cancels five of its input's seven digits: the second one's hangs on rounding.
CANCELLING = Case.of(
    seed=2006007858,
    x=[[-6.1558323], [-6.155734]],
    y=[1.2724654e-05, 0.0],
    lr=0.00087599974,
    warmup=1,
)


def test_an_input_that_hangs_on_rounding_is_no_wrong_moment():
    """The captured input and the step's differ in their first digit, and the law allows for it."""
    law = LAWS["batch_moments_are_the_layers_own"]
    t = observe(Calls(zoo.mlp(), "stacked"), stack([CANCELLING] * 512), law.needs)
    with compat.enable_x64():
        residuals = np.asarray(jax.jit(jax.vmap(law.check))(t))
    assert np.max(residuals) <= 1


@pytest.mark.parametrize("whole", [3.0, -3.0])
def test_nudged_inputs_keep_an_integer_in_one_direction(whole):
    """Half of the inputs move, each both ways; what is cut to an integer jumps one way at most."""
    case = Case.of(seed=0, x=np.full((4, 3), whole), y=np.zeros(4), lr=0.1)
    outer, inner = (near.x for near in nudged_inputs(case))
    for near in (outer, inner):
        assert np.sum(near != case.x) == case.x.size // 2
    np.testing.assert_array_equal(np.abs(outer) >= np.abs(case.x), True)
    np.testing.assert_array_equal(np.abs(inner) <= np.abs(case.x), True)
    np.testing.assert_array_equal(np.trunc(outer), whole)
