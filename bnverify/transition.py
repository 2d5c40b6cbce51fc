"""What one observed step did: what every law is a function of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from bnverify.case import Case
from bnverify.subject import State, StepInfo


class Outcome(NamedTuple):
    """What one call of ``step`` gave, and the loss evaluated after it where it was asked for."""

    state: State
    info: StepInfo
    eval_loss: Any = None


class Transition(NamedTuple):
    """One observed step. Every leaf may carry a leading stack axis.

    Attributes:
        case: the input.
        before: the state before the step.
        after: the state after it.
        info: its loss and gradients.
        eval_loss: (1,), evaluated on the same batch in the state after.
        reruns: name of a re-run -> its outcome; see ``bnverify.reruns``.
        evals: name of a re-evaluation -> (1,), see ``bnverify.reruns``; "rows" -> (N, 1), each row alone.
        facts: what else was observed of the subject, by name.
        exact: the outcome in float64; None where no rounding was read.
        noise: the error that rounding allows each value of ``exact``; an Outcome. Infinite where
            rounding leaves no digits to compare.
    """

    case: Case
    before: State
    after: State
    info: StepInfo
    eval_loss: Any
    reruns: Mapping[str, Outcome]
    evals: Mapping[str, Any]
    facts: Mapping[str, Any]
    exact: Any = None
    noise: Any = None
