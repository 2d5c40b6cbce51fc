"""Reading a program with its random numbers held equal.

A step with dropout gives another result for a batch with every row twice, because it draws a mask for each
row. Here every random bit is 0, so all rows are treated alike: a uniform number is the smallest, dropout
keeps every unit, a permutation stays as it is, a random index is the first. What such a step does with a
batch of repeated rows can be compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from bnverify.jaxpr.interpreter import inner_jaxprs, open_jaxpr
from bnverify.jaxpr.rounding import RoundingReading
from bnverify.jaxpr.values import Array

_BITS = "random_bits"
_OTHER_DRAWS = frozenset(
    {"random_gamma", "rng_bit_generator", "rng_uniform", "threefry2x32", "binomial"}
)


class UndrawnReading(RoundingReading):
    """Evaluates a program like ``RoundingReading``, with 0 for all random bits."""

    def equation(self, eqn: Any, inputs: Sequence[Array]) -> Sequence[Array]:
        """Return zeros for random bits; evaluate every other equation."""
        if eqn.primitive.name == _BITS:
            (made,) = eqn.outvars
            return [np.zeros((1, 1, *made.aval.shape), made.aval.dtype)]
        return super().equation(eqn, inputs)


def draws_can_be_equal(jaxpr: Any, *, repeats: bool = False) -> bool:
    """Return whether a program with 0 for all random bits treats all rows alike, and ends.

    Some generators draw until they accept a number.

    Args:
        jaxpr: closed or open.
        repeats: whether it is the body of such a loop.
    """
    inner, _ = open_jaxpr(jaxpr)
    for eqn in inner.eqns:
        name = eqn.primitive.name
        if name in _OTHER_DRAWS or (name == _BITS and repeats):
            return False
        within = repeats or name == "while"
        if not all(draws_can_be_equal(body, repeats=within) for body in inner_jaxprs(eqn)):
            return False
    return True
