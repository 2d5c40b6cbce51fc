"""Random programs of primitives that occur in training steps, drawn by Hypothesis.

A program is a list of operations on arrays of one shape. Every operation is jitted once for the
test session, so running a program compiles nothing, and tracing it gives nested calls.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

if TYPE_CHECKING:
    from collections.abc import Callable

SHAPE = (4,)
INPUTS = 4
PLACES = np.array([2, 0, 0, 3])


@jax.custom_jvp
def _twice(x):
    return 2 * x


@_twice.defjvp
def _twice_jvp(primals, tangents):
    return _twice(*primals), 2 * tangents[0]


@jax.custom_vjp
def _thrice(x):
    return 3 * x


_thrice.defvjp(lambda x: (3 * x, None), lambda _, g: (3 * g,))


def _cumulate(body, x, y):
    return jax.lax.scan(lambda c, t: (body(c, jnp.full(SHAPE, t)), t), x, y)


def _swap(x, y):
    return jax.lax.fori_loop(0, 3, lambda _, pair: (pair[1], pair[0]), (x, y))[0]


def _count(body, x, y):
    # The number of iterations depends on y, the result on x.
    limit = jnp.clip(jnp.abs(y[0]), 0, 3)
    return jax.lax.while_loop(
        lambda state: state[0] < limit, lambda state: (state[0] + 1, body(state[1], x)), (0.0, x)
    )[1]


PLAIN: dict[str, Callable[..., Any]] = {
    "add": lambda x, y: x + y,
    "mul": lambda x, y: x * y,
    "first": lambda x, _: x,
    "zeros": lambda x, _: jnp.zeros_like(x),
    "shape": lambda x, y: x * y.shape[0],
    "stop": lambda x, y: jax.lax.stop_gradient(x) - y,
    "mean": lambda x, y: x - jnp.mean(y),
    "dot": lambda x, y: jnp.outer(x, y) @ x,
    "select": lambda x, y: jnp.where(x > y, x, -y),
    "gather": lambda x, y: x[PLACES] + y,
    "look_up": lambda x, y: x[jnp.clip(y.astype(jnp.int32), 0, 3)],
    "scatter": lambda x, y: x.at[PLACES].add(y),
    "slice": lambda x, y: jnp.concatenate([x[:2], y[2:]]),
    "sort": lambda x, y: jnp.sort(x) + jnp.argmax(y),
    "relu": lambda x, y: jax.nn.relu(x) + jax.nn.softmax(y),
}

WRAPPERS: dict[str, Callable[..., Any]] = {
    "jit": lambda body, x, y: jax.jit(body)(x, y),
    "remat": lambda body, x, y: jax.checkpoint(body)(x, y),
    "custom_jvp": lambda body, x, y: _twice(body(x, y)),
    "custom_vjp": lambda body, x, y: _thrice(body(x, y)),
    "grad": lambda body, x, y: jax.grad(lambda z: jnp.sum(body(z, y) ** 2))(x),
    "remat_grad": lambda body, x, y: jax.grad(
        lambda z: jnp.sum(jnp.sin(jax.checkpoint(body)(jnp.sin(z), y)))
    )(x),
    "cond": lambda body, x, y: jax.lax.cond(y[0] > 0, body, lambda x, _: x, x, y),
    "scan": lambda body, x, y: _cumulate(body, x, y)[0],
    "scan_outputs": lambda body, x, y: _cumulate(body, x, y)[1],
    "swap": lambda body, x, y: _swap(x, body(x, y)),
    "while": _count,
    "vmap": lambda body, x, y: jax.vmap(lambda t: body(x, jnp.full(SHAPE, t)))(y)[1],
}
SMOOTH = ("add", "mul", "dot", "first", "mean", "stop")  # twice differentiable


@cache
def operation(wrapper: str, name: str) -> Callable[..., Any]:
    """Return the named operation on two arrays, jitted within ``wrapper``."""
    if wrapper == "":
        return jax.jit(PLAIN[name])
    return jax.jit(lambda x, y: WRAPPERS[wrapper](PLAIN[name], x, y))


class Step(NamedTuple):
    """One line of a program: an operation applied to two earlier values."""

    wrapper: str
    name: str
    left: int
    right: int


Program = list[Step]


def run(program: Program, *inputs: Any) -> list[Any]:
    """Return every value that a program computes."""
    values = list(inputs)
    for step in program:
        values.append(operation(step.wrapper, step.name)(values[step.left], values[step.right]))
    return values[len(inputs) :]


@st.composite
def programs(draw: st.DrawFn) -> Program:
    """Generate programs of one to eight operations on four inputs; shrinks to a single addition."""
    program: Program = []
    for number in range(draw(st.integers(1, 8))):
        wrapper = draw(st.sampled_from(["", *WRAPPERS]))
        name = draw(st.sampled_from(SMOOTH if wrapper.endswith("grad") else list(PLAIN)))
        operands = st.integers(0, INPUTS + number - 1)
        program.append(Step(wrapper, name, draw(operands), draw(operands)))
    return program
