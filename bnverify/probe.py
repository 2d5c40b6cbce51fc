"""Check that what was passed as a subject is one, and explain what to pass if it is not."""

from __future__ import annotations

import inspect
import math
import sys
from typing import Any

import numpy as np

from bnverify.errors import UsageError
from bnverify.lazy import jax
from bnverify.model import CheckpointedSubject, Parallel, State, StepInfo, Subject, Target
from bnverify.pytree import is_key

CALLS = {
    "init": ("seed", "x"),
    "step": ("state", "x", "y", "lr"),
    "evaluate": ("state", "x", "y"),
}
ROWS = (4, 24)  # 24: a step may split its batch into 2, 3, 4, 6 or 8 parts
FEATURES = 3


class Unfit(Exception):
    """A function has the wrong signature or result for its field of Subject; the message is one line."""


def subject_of(what: Target) -> Subject:
    """Return the training step of ``what``, on one device.

    Raises:
        UsageError: ``what`` is not a Subject, CheckpointedSubject or Parallel.
    """
    if isinstance(what, Parallel):
        return what.single
    given: Any = what.subject if isinstance(what, CheckpointedSubject) else what
    if not isinstance(given, Subject):
        called = type(given).__name__
        raise UsageError(f"a bnverify.Subject is needed, got a {called}{advice(given)}")
    return given


def accepts(signature: inspect.Signature, *arguments: str) -> bool:
    """Return whether a function with this signature accepts these positional arguments."""
    try:
        signature.bind(*arguments)
    except TypeError:
        return False
    return True


def check(subject: Subject) -> None:
    """Trace ``init``, ``step`` and ``evaluate`` once, at one small shape.

    Functions that do not trace are run instead, because untraceable code may still be valid.

    Raises:
        Unfit: a function takes other arguments or returns something else.
        Exception: whatever a function raises both when traced and when run.
    """
    for name, arguments in CALLS.items():
        _check_call(name, getattr(subject, name), arguments)
    sizes = ROWS if subject.rows is None else (math.lcm(ROWS[0], subject.rows),)
    try:
        jax.eval_shape(lambda batch: _run(subject, *batch), _batch(subject, sizes[0]))
    except Unfit:
        raise
    except Exception:  # noqa: BLE001 - whatever a user's code raises
        _run_one_of(subject, sizes)


def _check_call(name: str, function: Any, arguments: tuple[str, ...]) -> None:
    expected = f"{name}({', '.join(arguments)})"
    if not callable(function):
        raise Unfit(f"{name} is {described(function)}, not a function {expected}")
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some callables have no signature; the call itself shows
        return
    if not accepts(signature, *arguments):
        raise Unfit(f"{name}{signature} cannot be called as {expected}")


def _batch(subject: Subject, rows: int) -> tuple[Any, ...]:
    features = subject.width(FEATURES)
    # Distinct values: an init that inspects its batch must not meet a special case.
    x = np.linspace(-1, 1, rows * features, dtype=np.float32).reshape(rows, features)
    return np.int32(0), x, x[:, 0].copy(), np.float32(0.1)


def _run_one_of(subject: Subject, sizes: tuple[int, ...]) -> None:
    """Run the subject at the first of ``sizes`` that it accepts; raise the error of the last."""
    for rows in sizes:
        try:
            _run(subject, *_batch(subject, rows))
        except Unfit:
            raise
        except Exception:
            if rows == sizes[-1]:
                raise
        else:
            return


def _run(subject: Subject, seed: Any, x: Any, y: Any, lr: Any) -> None:
    state = _state("init", subject.init(seed, x))
    after: Any = subject.step(state, x, y, lr)
    if not isinstance(after, tuple) or len(after) != 2 or not isinstance(after[1], StepInfo):
        raise Unfit(f"step must return (State, StepInfo), got {described(after)}")
    _arrays("step", "StepInfo", after[1])
    loss = subject.evaluate(_state("step", after[0]), x, y)
    if not hasattr(loss, "shape"):
        raise Unfit(f"evaluate must return an array of shape (1,), got {described(loss)}")


def _state(name: str, value: Any) -> State:
    if not isinstance(value, State):
        raise Unfit(f"{name} must return a bnverify.State, got {described(value)}")
    _arrays(name, "State", value)
    return value


def _arrays(name: str, kind: str, value: State | StepInfo) -> None:
    for field, tree in zip(value._fields, value, strict=True):
        for leaf in jax.tree_util.tree_leaves(tree):
            if not hasattr(leaf, "dtype") and not isinstance(leaf, int | float | complex):
                raise Unfit(f"{name} returns a {kind} whose {field} holds {described(leaf)}")
            if is_key(leaf):
                raise Unfit(
                    f"{name} returns a {kind} whose {field} holds a typed PRNG key, which NumPy cannot "
                    "hold: keep jax.random.key_data(key) there, and make it a key again with "
                    "jax.random.wrap_key_data"
                )


def described(value: Any) -> str:
    """Return a description of ``value`` for a message."""
    if isinstance(value, tuple):
        return "(" + ", ".join(type(part).__name__ for part in value) + ")"
    return "None" if value is None else f"a value of type {type(value).__name__}"


# A Flax module on its own, which is easily passed by mistake.


def flax_kind(value: Any) -> str | None:
    """Return "linen" or "nnx" for a Flax module or module class; None for anything else."""
    for name in ("linen", "nnx"):
        flax = sys.modules.get(f"flax.{name}")  # if it is not imported, nothing is a module of it
        if flax is not None and issubclass(_class(value), flax.Module):
            return name
    return None


def wrapped(module: Any) -> str:
    """Return the code that makes a Subject from a Flax module or module class."""
    name = _class(module).__name__
    if flax_kind(module) == "nnx":
        return f"bnverify.nnx({name})"
    try:
        inspect.signature(_class(module)).bind()
    except TypeError:
        return f"bnverify.linen({name}(...))"
    return f"bnverify.linen({name}())"


def advice(value: Any) -> str:
    """Return "; " and how to make a Subject from a Flax module; "" for anything else."""
    if flax_kind(value) is None:
        return ""
    return f"; to check a training step with a Flax module, write subject = {wrapped(value)}"


def _class(value: Any) -> type[Any]:
    return value if isinstance(value, type) else type(value)
