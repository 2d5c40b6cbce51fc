"""How many numbers a program adds up on the way from each of its results to its outputs.

Errors that agree show where elements are added: n of them make n times one, where independent ones
make sqrt(n). What is added to nothing any more, as in most of an optimizer, errs as well by itself.
"""

from __future__ import annotations

import math
from collections import defaultdict
from typing import TYPE_CHECKING, Any

from bnverify.jaxpr import arithmetic
from bnverify.jaxpr.interpreter import called_jaxpr, inner_jaxprs, open_jaxpr

if TYPE_CHECKING:
    from collections.abc import Sequence


def added(jaxpr: Any) -> dict[int, float]:
    """Return how many numbers are added to what each equation makes, itself among them, at most.

    Args:
        jaxpr: closed or open, as ``jax.make_jaxpr`` gives it.

    Returns:
        For the ``id`` of each equation, also of those within calls, loops and branches: the largest
        product of the terms of the sums that its result passes through, and one more for each
        addition of two; 1 where there are none;
        infinity within a loop and ahead of one, which may add from turn to turn, and ahead of a
        primitive that is not known to leave elements apart.
    """
    found: dict[int, float] = {}
    _walk(jaxpr, [1.0] * len(open_jaxpr(jaxpr)[0].outvars), found)
    return found


def _walk(jaxpr: Any, ends: Sequence[float], found: dict[int, float]) -> list[float]:
    """Return the count at each input, where it is ``ends`` at the outputs; fill ``found``."""
    inner, _ = open_jaxpr(jaxpr)
    most: defaultdict[int, float] = defaultdict(lambda: 1.0)
    for atom, end in zip(inner.outvars, ends, strict=True):
        most[id(atom)] = max(most[id(atom)], end)
    for eqn in reversed(inner.eqns):
        after = [most[id(var)] for var in eqn.outvars]
        # One program may be called from several places.
        found[id(eqn)] = max([found.get(id(eqn), 1.0), *after])
        for atom, count in zip(eqn.invars, _before(eqn, after, found), strict=True):
            most[id(atom)] = max(most[id(atom)], count)
    return [most[id(var)] for var in inner.invars]


def _before(eqn: Any, after: list[float], found: dict[int, float]) -> list[float]:
    """Return the count at each of an equation's inputs, where it is ``after`` at its outputs."""
    if eqn.primitive.name == "cond":
        branches = [_walk(branch, after, found) for branch in eqn.params["branches"]]
        return [math.inf, *(max(counts) for counts in zip(*branches, strict=True))]
    called = called_jaxpr(eqn)
    if called is not None:
        return _walk(called, after, found)
    for body in inner_jaxprs(eqn):
        _walk(body, [math.inf] * len(open_jaxpr(body)[0].outvars), found)
    most = max(after, default=1.0)
    name, terms = eqn.primitive.name, arithmetic.terms(eqn)
    if terms > 1:
        most *= terms
    elif name in arithmetic.ADDITIONS:
        most += 1
    elif name not in arithmetic.BY_ELEMENT:
        most = math.inf
    return [most] * len(eqn.invars)
