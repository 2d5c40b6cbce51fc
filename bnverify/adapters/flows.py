"""What reaches what in one traced pass, coarsely: enough to tell which laws cannot be asked."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import jax

from bnverify.jaxpr.interpreter import called_jaxpr, inner_jaxprs, open_jaxpr

DRAWS = frozenset({"random_bits", "threefry2x32", "rng_bit_generator", "rng_uniform"})


def reached(
    jaxpr: Any, sources: Collection[int] = (), primitives: Collection[str] = ()
) -> list[bool]:
    """Return for each output whether it may depend on a source.

    Args:
        jaxpr: a traced program.
        sources: indices of inputs.
        primitives: names of equations whose results are sources as well.
    """
    inner, _ = open_jaxpr(jaxpr)
    given = [index in sources for index in range(len(inner.invars))]
    return _reached(inner, given, frozenset(primitives))


def _reached(jaxpr: Any, given: list[bool], primitives: frozenset[str]) -> list[bool]:
    marked = {var for var, is_source in zip(jaxpr.invars, given, strict=True) if is_source}

    def holds(atom: Any) -> bool:
        return not hasattr(atom, "val") and atom in marked  # a literal comes from nowhere

    for eqn in jaxpr.eqns:
        inputs = [holds(atom) for atom in eqn.invars]
        called = called_jaxpr(eqn)
        if called is not None:
            outputs = _reached(open_jaxpr(called)[0], inputs, primitives)
        else:
            outputs = [any(inputs) or _holds_one_of(eqn, primitives)] * len(eqn.outvars)
        marked.update(var for var, is_marked in zip(eqn.outvars, outputs, strict=True) if is_marked)
    return [holds(atom) for atom in jaxpr.outvars]


def _holds_one_of(eqn: Any, primitives: frozenset[str]) -> bool:
    if eqn.primitive.name in primitives:
        return True
    bodies = (open_jaxpr(each)[0] for each in inner_jaxprs(eqn))
    return any(_holds_one_of(inner, primitives) for body in bodies for inner in body.eqns)


def holds_tracers(jaxpr: Any) -> bool:
    """Return whether a program closes over a value of some other trace, which cannot be run."""
    inner, consts = open_jaxpr(jaxpr)
    if any(isinstance(const, jax.core.Tracer) for const in consts):
        return True
    return any(holds_tracers(each) for eqn in inner.eqns for each in inner_jaxprs(eqn))


def changed(jaxpr: Any, inputs: int, outputs: int, count: int) -> list[int]:
    """Return which of ``count`` leaves do not come out as they went in.

    Args:
        jaxpr: a traced program.
        inputs: the index of the first leaf among its inputs.
        outputs: likewise among its outputs.
        count: how many leaves there are.
    """
    inner, _ = open_jaxpr(jaxpr)
    pairs = zip(
        inner.invars[inputs : inputs + count], inner.outvars[outputs : outputs + count], strict=True
    )
    # An unchanged leaf is one and the same variable of the program.
    return [index for index, (given, left) in enumerate(pairs) if given is not left]
