"""Faults that leave something out: inputs, params or targets that never reach a result."""

from __future__ import annotations

from functools import partial
from typing import Any

from bnverify.lazy import jnp
from bnverify.model import State, StepInfo
from bnverify.mutants.canonical import CanonicalStep
from bnverify.mutants.catalogue import mutant

fault = partial(mutant, family="ignoring")


def baked_in(x: Any) -> Any:
    """Return the batch that was there when the step was traced, of the shape of ``x``."""
    return jnp.sin(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape)


@fault(mistake="inputs_ignored")
class BatchBakedIn(CanonicalStep):
    """The training step closes over the first inputs, which the tracing bakes in."""

    def batch(self, x: Any, y: Any) -> tuple[Any, Any]:
        """Take the old inputs."""
        return baked_in(x), y


@fault(mistake="inputs_ignored")
class BatchBakedIntoTheEvaluation(CanonicalStep):
    """Evaluation closes over the first inputs, which the tracing bakes in."""

    def evaluate(self, state: State, x: Any, y: Any) -> Any:
        """Evaluate the old inputs."""
        return super().evaluate(state, baked_in(x), y)


@fault(mistake="gradient_of_another_loss")
class LossOfTheTargetsAlone(CanonicalStep):
    """The reported training loss is the targets' mean square: the predictions were forgotten."""

    def step(self, state: State, x: Any, y: Any, lr: Any) -> tuple[State, StepInfo]:
        """Report another loss."""
        after, info = super().step(state, x, y, lr)
        return after, info._replace(loss=jnp.mean(y**2))


@fault(mistake="targets_ignored")
class EvaluationOfThePredictionsAlone(CanonicalStep):
    """The eval loss is the predictions' mean square: the targets were forgotten."""

    def evaluate(self, state: State, x: Any, y: Any) -> Any:
        """Compare with nothing."""
        return super().evaluate(state, x, jnp.zeros_like(y))
