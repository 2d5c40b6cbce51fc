"""``Graph``: callbacks, unknown primitives, Refs, and ``live``."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import io_callback

from bnverify.jaxpr.graph import Graph
from bnverify.jaxpr.interpreter import live, read
from bnverify.jaxpr.tracing import Abstract, trace

NUMBER = Abstract((), np.dtype(np.float32))
FLOAT = jax.ShapeDtypeStruct((), jnp.float32)


def graph_of(function, inputs):
    """Return the graph of ``function`` and the labels of its outputs."""
    graph = Graph(inputs)
    outputs = read(trace(function, *[NUMBER] * inputs).jaxpr, graph, graph.sources)
    labels = graph.labels()
    return graph, [labels[node] for node in outputs]


def test_a_pure_callback_depends_on_its_inputs_only():
    """The outputs of ``pure_callback`` depend on its inputs; the primitive is listed as unknown."""
    graph, labels = graph_of(lambda x, y: (jax.pure_callback(np.sin, FLOAT, x), y), 2)
    assert labels == [0b01, 0b10]
    assert graph.unknown == {"pure_callback"}


def test_a_callback_with_effects_depends_on_everything():
    """An ``io_callback`` may return data that it received earlier, so every source reaches it."""
    graph, labels = graph_of(lambda x, y: (io_callback(np.sin, FLOAT, x), y), 2)
    assert labels == [0b11, 0b10]
    assert graph.unknown == {"io_callback"}


def test_debug_print_is_not_a_flow():
    """``jax.debug.print`` receives values and returns none."""

    def function(x, y):
        jax.debug.print("{}", x)
        return y

    graph, labels = graph_of(function, 2)
    assert labels == [0b10]
    assert graph.unknown == set()


def test_an_unknown_primitive_with_a_jaxpr_is_not_entered():
    """A primitive that may run its jaxpr several times mixes all its inputs and is listed as unknown."""
    from jax.extend.core import Primitive

    strange = Primitive("run_until_stable")
    strange.multiple_results = True
    strange.def_abstract_eval(lambda *avals, jaxpr: avals)
    swap = jax.make_jaxpr(lambda x, y: (y, x))(1.0, 2.0)
    graph, labels = graph_of(lambda x, y: strange.bind(x, y, jaxpr=swap), 2)
    assert labels == [0b11, 0b11]
    assert graph.unknown == {"run_until_stable"}


def test_lax_reduce_is_known():
    """``lax.reduce`` carries its combining jaxpr and is not listed as unknown."""
    add = lambda x, y: x + y  # noqa: E731  reduce needs a Python function

    def function(x, y):
        return jax.lax.reduce(jnp.stack([x, y]), jnp.float32(0), add, (0,))

    graph, labels = graph_of(function, 2)
    assert labels == [0b11]
    assert graph.unknown == set()


def test_values_written_to_a_ref_reach_its_readers():
    """Data flows through a Ref although the write has no output."""
    make = getattr(jax, "new_ref", None) or getattr(jax.extend.core, "mutable_array", None)
    if make is None:
        pytest.skip("no public mutable arrays in this release")

    def function(x, y):
        ref = make(y)
        ref[...] = x * 2
        return ref[...], y

    _, labels = graph_of(function, 2)
    assert labels[0] & 0b01
    assert labels[1] == 0b10


def test_a_wrong_number_of_inputs_raises():
    """``read`` raises for two inputs of a jaxpr with one."""
    jaxpr = trace(lambda x: x, NUMBER).jaxpr
    with pytest.raises(ValueError, match="takes 1 inputs, got 2"):
        read(jaxpr, Graph(2), [0, 1])


@pytest.mark.parametrize(("output", "left"), [(0, ["sin"]), (1, ["cos", "add"])])
def test_live_keeps_only_what_an_output_needs(output, left):
    """Only equations that the output depends on are left, and it is the only output."""
    jaxpr = trace(lambda x: (jnp.sin(x), jnp.cos(x) + 1), NUMBER).jaxpr
    kept = live(jaxpr, output).jaxpr
    assert [eqn.primitive.name for eqn in kept.eqns] == left
    assert len(kept.outvars) == 1
