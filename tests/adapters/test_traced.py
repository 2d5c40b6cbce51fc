"""Marks and dependencies in a traced step."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from bnverify.adapters.traced import (
    DRAWS,
    Flows,
    evaluated,
    holds_tracers,
    labels,
    labels_anywhere,
    layer_input,
    links,
    mark,
    marked,
    rows_first,
)

X = jnp.arange(6.0).reshape(2, 3)


def test_a_mark_changes_nothing() -> None:
    """Marks do not change the result of a program."""
    result, found = evaluated(lambda x: {"out": mark(x + 1, "a") * 2}, X)
    np.testing.assert_array_equal(result["out"], (X + 1) * 2)
    np.testing.assert_array_equal(found["a"][0], X + 1)


@pytest.mark.parametrize("wrap", [jax.jit, jax.checkpoint, jax.grad], ids=["jit", "remat", "grad"])
def test_marks_are_read_inside_calls(wrap: Any) -> None:
    """A mark under jit, remat or differentiation has a single value."""

    def inner(x: Any) -> Any:
        return jnp.sum(mark(x * 3, "a") ** 2)

    (found,) = marked(wrap(inner), X)["a"]
    np.testing.assert_array_equal(found, X * 3)


def test_the_second_run_of_remat_is_not_read() -> None:
    """A mark has one value although the backward pass of remat repeats the forward pass."""

    @jax.checkpoint
    def inner(x: Any) -> Any:
        return jnp.sum(jnp.sin(mark(jnp.sin(x), "a")))

    assert len(marked(jax.value_and_grad(inner), X)["a"]) == 1


@pytest.mark.parametrize("transform", [jax.jit, jax.vmap], ids=["jit", "vmap"])
def test_marks_are_read_under_a_transformation(transform: Any) -> None:
    """Reading marks works under JAX transformations."""
    found = transform(lambda x: marked(lambda x: mark(x + 1, "a"), x)["a"][0])(X)
    np.testing.assert_array_equal(found, X + 1)


def test_marks_in_loops_and_branches_are_known_and_not_read() -> None:
    """A mark in a loop or branch has no single value."""

    def function(x: Any) -> Any:
        total, _ = jax.lax.scan(lambda c, row: (c + mark(row, "loop"), None), x[0], x)
        return jax.lax.cond(x[0, 0] > 0, lambda t: mark(t, "branch"), lambda t: t, total)

    jaxpr = jax.make_jaxpr(function)(X)
    assert marked(function, X) == {}
    assert not labels(jaxpr)
    assert labels_anywhere(jaxpr) == {"loop": 1, "branch": 1}
    np.testing.assert_array_equal(evaluated(function, X)[0], X[0] + X.sum(0))


def test_links_are_values_used_once() -> None:
    """Two marks are linked if the second is the only use of the first."""

    def once(x: Any) -> Any:
        return mark(mark(x + 1, "a"), "b") * 2

    def twice(x: Any) -> Any:
        a = mark(x + 1, "a")
        return mark(a, "b") + a

    def returned(x: Any) -> Any:
        a = mark(x + 1, "a")
        return mark(a, "b"), a

    assert links(jax.make_jaxpr(once)(X)) == {("a", "b")}
    assert links(jax.make_jaxpr(twice)(X)) == set()
    assert links(jax.make_jaxpr(returned)(X)) == set()


def test_rows_come_first() -> None:
    """The reduced axes are flattened in order, the kept ones stay last."""
    value = jnp.arange(24).reshape(2, 3, 4)
    assert rows_first(value, (-1,)).shape == (6, 4)
    np.testing.assert_array_equal(rows_first(value, (1,)), value.transpose(0, 2, 1).reshape(8, 3))
    assert rows_first(value, (1, 2)).shape == (2, 3, 4)


def test_a_value_with_another_axis_is_not_shown() -> None:
    """An extra axis of size 1 is removed; otherwise the input is unknown."""
    assert layer_input(X[None], None, (2, 3), (1,)) is not None
    assert layer_input(jnp.stack([X, X]), None, (2, 3), (1,)) is None


def test_what_reaches_an_output_is_told() -> None:
    """Each output depends on exactly its inputs, also through calls."""

    def function(x: Any, y: Any, key: Any) -> Any:
        a, b = jax.jit(lambda x, y: (x + 1, y * 2))(x, y)
        return a, b, x, jax.random.normal(key) + b

    flows = Flows(jax.make_jaxpr(function)(1.0, 2.0, jax.random.PRNGKey(0)))

    def reached(nodes: Any) -> list[bool]:
        return [node in flows.reached(nodes) for node in flows.outputs]

    assert reached(flows.inputs[:1]) == [True, False, True, False]
    assert reached(flows.inputs[1:2]) == [False, True, False, True]
    assert reached(flows.of_primitives(DRAWS)) == [False, False, False, True]
    assert flows.outputs[2] == flows.inputs[0]


def test_values_computed_alike_have_one_number() -> None:
    """Equal expressions of equal values share a number, marked or not; others do not."""

    def function(x: Any) -> Any:
        return jnp.sin(x / 2), jnp.sin(mark(x, "a") / 2), jnp.sin(x / 3)

    flows = Flows(jax.make_jaxpr(function)(X))
    one, same, other = map(flows.number, flows.outputs)
    assert one == same != other


def new_keys(key: Any) -> list[Any]:
    """Return keys that users derive from one."""
    rngs = nnx.Rngs(params=key, dropout=jax.random.fold_in(key, 7))
    return [
        *jax.random.split(key),
        *jax.random.split(key, 3),
        jax.random.split(key, (2, 2))[1, 0],
        jax.random.fold_in(key, 0),
        jax.random.fold_in(key, 1),
        rngs.params(),
        rngs.params(),
        rngs.dropout(),
    ]


@pytest.mark.parametrize("make", [jax.random.PRNGKey, jax.random.key], ids=["raw", "typed"])
@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["plain", "jit"])
def test_keys_derived_alike_have_one_number(make: Any, wrap: Any) -> None:
    """Keys derived twice in one way share a number, and keys of different values never do."""

    def twice(key: Any) -> Any:
        return [*wrap(new_keys)(key), *wrap(new_keys)(key)]

    key = make(3)
    flows = Flows(jax.make_jaxpr(twice)(key))
    numbers = list(map(flows.number, flows.outputs))
    keys = [
        jax.random.wrap_key_data(each) if each.dtype == np.uint32 else each for each in twice(key)
    ]
    values = [np.asarray(jax.random.key_data(each)).tobytes() for each in keys]
    assert numbers[:11] == numbers[11:]
    assert len(set(zip(numbers, values, strict=True))) == len(set(numbers))
    assert len(set(numbers[:2])) == 2
    assert len(set(numbers[2:5])) == 3


def test_values_computed_from_others_have_other_numbers() -> None:
    """The outputs of one equation differ, as do orders of operands and captured arrays."""

    @partial(jax.jit, static_argnums=1)
    def plus(x: Any, order: int) -> Any:
        return x + np.arange(3.0, dtype=np.float32)[::order]

    def function(x: Any, y: Any) -> Any:
        order, place = jax.lax.sort_key_val(x[0], y[0]), jax.lax.top_k(x, 1)
        joined = jnp.concatenate([x, x, y]), jnp.concatenate([x, y, y])
        return *order, *place, *joined, plus(x, 1), plus(x, -1)

    flows = Flows(jax.make_jaxpr(function)(X, X))
    assert len(set(map(flows.number, flows.outputs))) == len(flows.outputs) == 8


def test_values_in_a_loop_have_other_numbers_than_its_results() -> None:
    """A slice of the input of a scan, and its stacked output, are no equal values."""

    def function(x: Any) -> Any:
        def body(carry: Any, row: Any) -> Any:
            return carry + row, (row * 2, row * 3, carry)

        return jax.lax.scan(body, jnp.zeros(3), x)

    flows = Flows(jax.make_jaxpr(function)(X))
    assert len(set(map(flows.number, flows.outputs))) == len(flows.outputs) == 4
    assert list(map(flows.shape, flows.outputs)) == [(3,), (2, 3), (2, 3), (2, 3)]


def test_a_value_of_a_trace_that_is_gone_is_found() -> None:
    """A program that closes over a tracer is recognised."""
    kept: list[Any] = []
    jax.eval_shape(lambda: kept.append(jnp.float32(1) * 2))
    assert not holds_tracers(jax.make_jaxpr(lambda x: x + 1)(1.0))
    try:
        jaxpr = jax.make_jaxpr(lambda x: x + kept[0])(1.0)
    except jax.errors.UnexpectedTracerError:  # jax 0.4 refuses by itself
        return
    assert holds_tracers(jaxpr)
