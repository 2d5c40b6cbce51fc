"""Whether a step reports the loss that it differentiates.

Some steps compute metrics from the outputs once more, beside the differentiated loss: without its label
smoothing or its penalty. The reported loss is then another function, and its slope is not the gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from bnverify.adapters.programs import RATE, ROWS, Programs, under
from bnverify.compat import transformations
from bnverify.jaxpr.rounding import RoundingReading, evaluate
from bnverify.jaxpr.tracing import trace
from bnverify.jaxpr.values import Array

SAME = 1e-9
"""In float64, two ways to compute one loss differ by less, relatively."""


def computed_beside(programs: Programs) -> str | None:
    """Return where the reported loss is computed, if it is another one than the differentiated one.

    None: they are the same, or it is unknown.
    """
    flows, loss = programs.flows, programs.loss
    if loss is None or not programs.gradients:
        return None
    params = flows.reached(under(programs.inputs, "params/"))
    reduced = [
        node
        for node in sorted(flows.origins([loss]) & params)
        if _sums_rows(flows.equation(node)) and not _is_of_gradient(flows.equation(node))
    ]
    if not reduced or not any(map(_is_differentiated, map(flows.equation, params))):
        return None
    try:
        same = _is_differentiated_loss(programs)
    except Exception:  # noqa: BLE001 - whatever a user's code raises
        return None
    return None if same else flows.where(reduced[-1])


def _is_of_gradient(eqn: Any) -> bool:
    return bool({"jvp", "transpose"}.intersection(transformations(eqn)))


def _is_differentiated(eqn: Any) -> bool:
    """Return whether an equation computes a number in the forward pass of ``jax.grad``."""
    if eqn is None or "jvp" not in transformations(eqn) or "transpose" in transformations(eqn):
        return False
    (made, *_) = eqn.outvars
    return bool(made.aval.shape == () and jnp.issubdtype(made.aval.dtype, jnp.floating))


def _sums_rows(eqn: Any) -> bool:
    if eqn is None or eqn.primitive.name != "reduce_sum":
        return False
    shape = eqn.invars[0].aval.shape
    return any(shape[axis] % ROWS == 0 for axis in eqn.params["axes"])


class _Numbers(RoundingReading):
    """Evaluates a program and keeps every number that it computes in a differentiated function."""

    def __init__(self) -> None:
        super().__init__(count=1)
        self.found: list[float] = []

    def equation(self, eqn: Any, inputs: Sequence[Array]) -> Sequence[Array]:
        """Evaluate it."""
        outputs = super().equation(eqn, inputs)
        if _is_differentiated(eqn):
            self.found.append(float(np.ravel(outputs[0])[0]))
        return outputs


def _is_differentiated_loss(programs: Programs) -> bool:
    """Return whether the reported loss has the value of a differentiated number on a random batch."""
    subject, rng = programs.subject, np.random.default_rng(0)
    x, y = (rng.normal(size=leaf.shape).astype(np.float32) for leaf in (programs.x, programs.y))
    start = np.int32(0), x
    state = evaluate(trace(subject.init, *start), *start)
    types = programs.state, programs.x, programs.y, np.float32(RATE)
    program = trace(subject.step, *types)
    reading = _Numbers()
    _, info = evaluate(program, state, x, y, np.float32(RATE), reading=reading)
    reported = float(np.ravel(info.loss)[0])
    return any(abs(number - reported) <= SAME * abs(reported) for number in reading.found)
