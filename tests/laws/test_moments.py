"""What rounding upstream of a layer does to its captured input is no fault of its moments."""

from __future__ import annotations

import pytest

from bnverify import zoo
from bnverify.case import Case
from bnverify.engine.judge import Judge
from bnverify.laws import LAWS
from bnverify.observe import Calls, observe
from bnverify.pytree import stack

LAW = LAWS["batch_moments_are_the_layers_own"]


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(
            Case.of(
                seed=2006007858,
                x=[[-6.1558323], [-6.155734]],
                y=[1.2724654e-05, 0.0],
                lr=0.00087599974,
                warmup=1,
            ),
            id="cancels five of seven digits",
        ),
        pytest.param(
            Case.of(
                seed=770,
                x=[[0.09446116], [0.09434591]],
                y=[-0.00029228, -0.00034617],
                lr=0.023110375,
                warmup=2,
            ),
            id="a fast variance of a few quanta",
        ),
    ],
)
def test_an_input_that_hangs_on_rounding_is_no_wrong_moment(case):
    """The first layer cancels: the second one's input, captured and the step's, differ by much."""
    t = observe(Calls(zoo.mlp(), "stacked"), stack([case] * 512), LAW.needs)
    assert Judge(zoo.mlp(), {}, 512).residuals(t, [LAW])[LAW.name].max() <= 1
