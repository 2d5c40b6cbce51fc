"""What compiling may do to 16-bit arithmetic is no wrong loss."""

from __future__ import annotations

import numpy as np

from bnverify import zoo
from bnverify.engine.judge import Judge
from bnverify.laws import LAWS
from bnverify.observe import Calls, observe
from bnverify.stacks import stacked_cases


def test_a_stack_rounds_to_16_bits_in_every_program_alike() -> None:
    """A row is its own mean: what is left of it is rounding, by which two programs may not differ."""
    law = LAWS["eval_at_the_batchs_own_moments_is_the_training_loss"]
    cases = stacked_cases(np.random.default_rng(0), (1, 1), 512)
    t = observe(Calls(zoo.bfloat16(), "stacked"), cases, law.needs)
    assert Judge(zoo.bfloat16(), {}, 512).residuals(t, [law])[law.name].max() <= 1
