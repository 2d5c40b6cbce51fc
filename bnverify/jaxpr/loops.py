"""Loops and branches over all rows of ``bnverify.jaxpr.noise`` at once, without unrolling.

A body is traced twice or more: first abstractly, to learn which of its results have rows, then
for good. Where a decision that steers all rows (how often a loop runs, which branch is taken)
comes out differently among them, the results have no known error.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from bnverify.jaxpr.values import Value, is_float

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from bnverify.jaxpr.interpreter import Body
    from bnverify.jaxpr.noise import Rows


def _arrays(values: Sequence[Value]) -> list[Any]:
    return [value.array for value in values]


def _like(rows: Rows, values: Sequence[Value], flags: Sequence[bool]) -> list[Any]:
    """Return the arrays, those with a flag spread over the rows."""
    return [
        rows.spread(value) if flag else value.array
        for value, flag in zip(values, flags, strict=True)
    ]


def _flags(run: Callable[[list[Any]], Sequence[Value]], arrays: list[Any]) -> list[bool]:
    """Return which results of ``run`` have rows, without running it."""
    found: list[bool] = []

    def trace(arrays: list[Any]) -> None:
        found.extend(value.rows for value in run(arrays))

    jax.eval_shape(trace, arrays)
    return found


def _agree(rows: Rows, value: Value) -> tuple[Any, Any]:
    """Return the exact row of a decision, and whether all rows share it."""
    array = jnp.asarray(value.array)
    if not value.rows:
        return array, True
    exact = array[0] > 0.5 if is_float(array.dtype) else array[0]  # a truth value may be NaN
    return exact, jnp.all(array == array[:1])


def _with_flags(
    step: Callable[[list[Any], list[bool]], Sequence[Value]], flags: list[bool], arrays: list[Any]
) -> Sequence[Value]:
    return step(arrays, flags)


def _closed_carry(
    rows: Rows,
    start: Sequence[Value],
    step: Callable[[list[Any], list[bool]], Sequence[Value]],
) -> list[bool]:
    """Return which carried values have rows, before or after a turn of the loop."""
    flags = [value.rows for value in start]
    while True:
        after = _flags(partial(_with_flags, step, flags), _like(rows, start, flags))
        merged = [old or new for old, new in zip(flags, after, strict=False)]
        if merged == flags:
            return flags
        flags = merged


def scan(
    rows: Rows, eqn: Any, split: tuple[int, int], inputs: Sequence[Value], body: Body[Value]
) -> list[Value]:
    """Run ``eqn``, a scan; ``split`` counts its consts and its carry."""
    consts, rest = split[0], sum(split)
    start, xs = list(inputs[consts:rest]), inputs[rest:]
    # A slice is taken along the scanned axis, so that axis goes before the rows.
    slices = [jnp.moveaxis(x.array, 1, 0) if x.rows else x.array for x in xs]

    def turn(carry: list[Any], each: list[Any], flags: Sequence[bool]) -> list[Value]:
        carried = [Value(array, flag) for array, flag in zip(carry, flags, strict=True)]
        sliced = [Value(array, x.rows) for array, x in zip(each, xs, strict=True)]
        return body([*inputs[:consts], *carried, *sliced])

    firsts = [jax.ShapeDtypeStruct(array.shape[1:], array.dtype) for array in slices]

    def first_turn(carry: list[Any], flags: list[bool]) -> Sequence[Value]:
        return turn(carry, [jnp.zeros(each.shape, each.dtype) for each in firsts], flags)

    flags = _closed_carry(rows, start, first_turn)
    ends = _flags(lambda carry: first_turn(carry, flags), _like(rows, start, flags))

    def step(carry: list[Any], each: list[Any]) -> tuple[list[Any], list[Any]]:
        after = turn(carry, each, flags)
        return _like(rows, after[: len(flags)], flags), _arrays(after[len(flags) :])

    end, stacked = jax.lax.scan(
        step,
        _like(rows, start, flags),
        slices,
        length=eqn.params["length"],
        reverse=eqn.params["reverse"],
    )
    return [
        *(Value(array, flag) for array, flag in zip(end, flags, strict=True)),
        *(
            Value(jnp.moveaxis(array, 1, 0) if flag else array, flag)
            for array, flag in zip(stacked, ends[len(flags) :], strict=True)
        ),
    ]


def while_loop(
    rows: Rows, eqn: Any, inputs: Sequence[Value], predicate: Body[Value], body: Body[Value]
) -> list[Value]:
    """Run ``eqn``, a while loop, as often as the exact row asks."""
    first, second = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    start = list(inputs[first + second :])

    def wrap(carry: list[Any], flags: Sequence[bool]) -> list[Value]:
        return [Value(array, flag) for array, flag in zip(carry, flags, strict=True)]

    def turn(carry: list[Any], flags: Sequence[bool]) -> list[Value]:
        return body([*inputs[first : first + second], *wrap(carry, flags)])

    flags = _closed_carry(rows, start, turn)

    def go_on(carry: list[Any]) -> tuple[Any, Any]:
        return _agree(rows, predicate([*inputs[:first], *wrap(carry, flags)])[0])

    def step(state: tuple[list[Any], Any]) -> tuple[list[Any], Any]:
        carry, agreed = state
        return _like(rows, turn(carry, flags), flags), agreed & go_on(carry)[1]

    end, agreed = jax.lax.while_loop(
        lambda state: go_on(state[0])[0], step, (_like(rows, start, flags), jnp.asarray(True))
    )
    known = agreed & go_on(end)[1]
    return [rows.void(value, known) if value.rows else value for value in wrap(end, flags)]


def cond(
    rows: Rows, eqn: Any, inputs: Sequence[Value], branches: Sequence[Body[Value]]
) -> list[Value]:
    """Run ``eqn``, a branch, as the exact row asks."""
    index, agreed = _agree(rows, inputs[0])
    operands, have = _arrays(inputs[1:]), [value.rows for value in inputs[1:]]

    def take(branch: Body[Value], arrays: list[Any]) -> list[Value]:
        return branch([Value(array, flag) for array, flag in zip(arrays, have, strict=True)])

    found = [_flags(partial(take, branch), operands) for branch in branches]
    flags = [inputs[0].rows or any(each) for each in zip(*found, strict=True)]
    if not flags:
        return []
    number = jnp.asarray(index).astype(jnp.int32)  # a boolean picks, too

    def taken(branch: Body[Value], arrays: list[Any]) -> list[Any]:
        return _like(rows, take(branch, arrays), flags)

    results = jax.lax.switch(number, [partial(taken, branch) for branch in branches], operands)
    outputs = [Value(array, flag) for array, flag in zip(results, flags, strict=True)]
    return [rows.void(value, agreed) if inputs[0].rows else value for value in outputs]
