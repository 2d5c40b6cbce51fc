"""A subject's functions as one process has them, and as the next one will."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bnverify.compiled import quick_jit
from bnverify.subject import Subject


class Programs:
    """The functions of a subject, compiled once and traced twice, as by two processes."""

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self.steps = tuple(quick_jit(_afresh(subject.step)) for _ in range(2))
        self.init = quick_jit(_afresh(subject.init))
        self.evaluate = quick_jit(_afresh(subject.evaluate))
        after = subject.after_eval
        self.after_eval = quick_jit(_afresh(after)) if after is not None else None


def _afresh(function: Callable[..., Any]) -> Callable[..., Any]:
    # jax.jit keeps the trace of a function that it knows: each of these is one it does not.
    def again(*args: Any) -> Any:
        return function(*args)

    return again
