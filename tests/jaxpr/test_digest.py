"""The digest: equal for one program in any process, another for every other program."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bnverify
from bnverify import reference
from bnverify.jaxpr import trace
from bnverify.jaxpr.digest import digest

X = jax.ShapeDtypeStruct((3, 2), jnp.float32)
TABLE = np.arange(2, dtype=np.float32)
OTHER_TABLE = np.array([0, 2], np.float32)


def of(function: Callable[..., Any], *args: Any) -> str | None:
    return digest(trace(function, *(args or (X,))).jaxpr)


def loop(step: float, count: int = 3) -> Callable[[Any], Any]:
    return lambda x: jax.lax.scan(lambda c, _: (c * step, None), x, None, length=count)[0]


def branch(taken: float) -> Callable[[Any], Any]:
    return lambda x: jax.lax.cond(x[0, 0] > 0, lambda v: v * taken, lambda v: v, x)


def until(limit: float) -> Callable[[Any], Any]:
    return lambda x: jax.lax.while_loop(lambda v: v[0, 0] < limit, lambda v: v + 1, x)


PROGRAMS: dict[str, Callable[[Any], Any]] = {
    "sum": lambda x: x + 1,
    "another literal": lambda x: x + 2,
    "another operation": lambda x: x * 2,
    "operands": lambda x: x - x[0],
    "operands swapped": lambda x: x[0] - x,
    "another axis": lambda x: x.sum(0),
    "the other axis": lambda x: x.sum(1),
    "captured": lambda x: x + TABLE,
    "captured, other values": lambda x: x + OTHER_TABLE,
    "captured inside": jax.jit(lambda x: x + TABLE),
    "captured inside, other values": jax.jit(lambda x: x + OTHER_TABLE),
    "narrower": lambda x: x.astype(jnp.bfloat16),
    "called": jax.jit(jnp.sin),
    "called, otherwise": jax.jit(jnp.cos),
    "scan": loop(2),
    "scan of another body": loop(3),
    "longer scan": loop(2, 4),
    "cond": branch(2),
    "cond of another branch": branch(3),
    "while": until(2),
    "while, further": until(3),
    "relu": jax.nn.relu,
    "relu6": jax.nn.relu6,
    "remat": jax.checkpoint(lambda x: jnp.sin(jnp.sin(x))),
    "first output": lambda x: (jnp.sin(x), jnp.cos(x))[0],
    "both": lambda x: (jnp.sin(x), jnp.cos(x)),
    "both, swapped": lambda x: (jnp.sin(x), jnp.cos(x))[::-1],
    "random": lambda x: x + jax.random.normal(jax.random.PRNGKey(0), (3, 2)),
    "random, other seed": lambda x: x + jax.random.normal(jax.random.PRNGKey(1), (3, 2)),
}


def test_programs_that_differ_anywhere_have_other_digests() -> None:
    """In an operation, a literal, a captured array, a body: inside calls and loops as well."""
    found = {name: of(function) for name, function in PROGRAMS.items()}
    assert None not in found.values()
    assert len(set(found.values())) == len(found)
    shapes = [jax.ShapeDtypeStruct((4, 2), jnp.float32), jax.ShapeDtypeStruct((3, 2), jnp.int32)]
    assert len({of(jnp.square, x) for x in (X, *shapes)}) == 3


STEPS = """
import jax, jax.numpy as jnp
from bnverify import reference
from bnverify.jaxpr import trace
from bnverify.jaxpr.digest import digest
subject = reference.adam()
x, y, lr = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((3, 2), (3,), ()))
state = jax.eval_shape(subject.init, jax.ShapeDtypeStruct((), jnp.int32), x)
print(digest(trace(subject.step, state, x, y, lr).jaxpr))
print(digest(trace(subject.evaluate, state, x, y).jaxpr))
"""


def test_a_step_has_one_digest_in_every_process() -> None:
    """Whatever Python makes of hashes and addresses there."""
    environment = os.environ | {"PYTHONPATH": str(Path(bnverify.__file__).parents[1])}
    runs = [
        subprocess.run(
            [sys.executable, "-c", STEPS],
            env=environment | {"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert runs[0] == runs[1]
    assert "None" not in runs[0]


def test_two_steps_have_two() -> None:
    """One factor of one update is enough."""
    subject = reference.sgd()
    x, y, lr = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((3, 2), (3,), ()))
    state = jax.eval_shape(subject.init, jax.ShapeDtypeStruct((), jnp.int32), x)

    def slower(state: Any, x: Any, y: Any, lr: Any) -> Any:
        return subject.step(state, x, y, np.float32(0.999) * lr)

    assert of(subject.step, state, x, y, lr) == of(subject.step, state, x, y, lr)
    assert of(subject.step, state, x, y, lr) != of(slower, state, x, y, lr)


@pytest.mark.parametrize("inside", [False, True])
def test_what_calls_back_has_none(inside: bool) -> None:
    """What a Python function does is not written in the program."""

    def asking(x: Any) -> Any:
        return jax.pure_callback(lambda v: np.asarray(v) + 1, X, x)

    assert of(jax.jit(asking) if inside else asking) is None
