"""An end to Python code that does not come to one by itself.

A signal interrupts Python between two of its instructions, so a compiled program that runs for
long is not cut short; that is meant. Signals reach the main thread of a POSIX process alone:
elsewhere there is no limit.
"""

from __future__ import annotations

import functools
import math
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from bnverify.subject import Subject

DEFAULT = 60.0
"""Seconds: importing a large model takes ten, tracing one takes a few."""


class OverTime(BaseException):
    """Code ran past its limit; the message says which.

    Not an Exception, since the code that hangs may well catch those and go on.
    """


@contextmanager
def limit(seconds: float, doing: str) -> Iterator[None]:
    """End the block with OverTime once ``seconds`` have passed.

    Args:
        seconds: more than 0; infinity: no limit.
        doing: what the message calls it.
    """
    possible = (
        hasattr(signal, "setitimer") and threading.current_thread() is threading.main_thread()
    )
    if not possible or math.isinf(seconds):
        yield
        return

    def ring(number: int, frame: object) -> None:
        raise OverTime(f"{doing} took more than {seconds:g} s; --time-limit gives it longer")

    previous = signal.signal(signal.SIGALRM, ring)
    # Again every second: a bare `except:` in a loop swallows the first.
    rest, _ = signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, rest, 1.0 if rest else 0.0)
        signal.signal(signal.SIGALRM, previous)


def guard(subject: Subject, seconds: float) -> Subject:
    """Return ``subject`` with a limit on each call of its functions.

    Under ``jax.jit`` they run once a shape, to be traced, so it is that which is limited.
    """

    def timed(name: str, function: Callable[..., Any] | None) -> Any:
        if function is None:
            return None

        @functools.wraps(function)
        def call(*args: Any, **options: Any) -> Any:
            with limit(seconds, f"{name} of {subject.name}"):
                return function(*args, **options)

        return call

    names = ("init", "step", "evaluate", "layer_inputs", "after_eval", "solution")
    timed_functions = {name: timed(name, getattr(subject, name)) for name in names}
    around = subject.with_optimizer
    if around is not None:
        timed_functions["with_optimizer"] = lambda optimizer: guard(around(optimizer), seconds)
    return replace(subject, **timed_functions)
