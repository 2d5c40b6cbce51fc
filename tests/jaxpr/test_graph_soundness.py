"""Soundness: an input that cannot reach an output according to ``Graph`` never changes it."""

from __future__ import annotations

import jax
import numpy as np
from hypothesis import find, given, note, settings
from hypothesis import strategies as st
from programs import INPUTS, SHAPE, Step, programs, run

from bnverify.jaxpr.graph import Graph
from bnverify.jaxpr.interpreter import read
from bnverify.jaxpr.tracing import Abstract, trace

ARRAY = Abstract(SHAPE, np.dtype(np.float32))


def reached(program) -> list[int]:
    """Return, for each value of ``program``, the bit set of the inputs that may reach it."""
    graph = Graph(INPUTS)
    outputs = read(
        trace(lambda *xs: run(program, *xs), *[ARRAY] * INPUTS).jaxpr, graph, graph.sources
    )
    labels = graph.labels()
    assert graph.unknown == set()
    return [labels[node] for node in outputs]


@settings(max_examples=2 * settings().max_examples)
@given(program=programs(), seed=st.integers(0, 2**32 - 1))
def test_an_unreachable_output_never_changes(program, seed):
    """Changing an input leaves every output bit-identical that it cannot reach in the graph."""
    rng = np.random.default_rng(seed)
    inputs = [rng.normal(size=SHAPE).astype(np.float32) * 2 for _ in range(INPUTS)]
    labels = reached(program)
    before = run(program, *inputs)
    for changed in range(INPUTS):
        for new in (rng.normal(size=SHAPE) * 9, -inputs[changed], np.full(SHAPE, np.nan)):
            others = list(inputs)
            others[changed] = new.astype(np.float32)
            for output, old, now in zip(labels, before, run(program, *others), strict=True):
                if not output >> changed & 1:
                    note(f"input {changed}, step {output}")
                    np.testing.assert_array_equal(old, now)


def test_random_programs_contain_independent_outputs():
    """The property above is not vacuous: long programs, too, have outputs free of some input."""

    def is_free(program) -> bool:
        return len(program) > 4 and any(
            label.bit_count() < INPUTS - 1 for label in reached(program)[4:]
        )

    find(programs(), is_free, settings=settings(max_examples=2000, database=None))


def test_the_graph_enters_bodies():
    """Loop invariants, zeros and shapes carry no flow."""
    free = {
        "zeros": 0b0000,
        "first": 0b0001,
        "shape": 0b0001,
    }
    for name, label in free.items():
        assert reached([Step("", name, 0, 1)]) == [label]
        for wrapper in ("jit", "remat", "custom_jvp", "custom_vjp", "vmap"):
            assert reached([Step(wrapper, name, 0, 1)]) == [label], wrapper
    assert reached([Step("scan", "first", 0, 1)]) == [0b01]
    assert reached([Step("scan_outputs", "first", 0, 1)]) == [0b10]
    assert reached([Step("while", "add", 0, 1)]) == [0b11]


def test_a_loop_that_swaps_its_carry_mixes_it():
    """The fixed point is reached: two values that swap places reach each other's output."""

    def swap(x, y):
        return jax.lax.fori_loop(0, 3, lambda _, pair: (pair[1], pair[0]), (x, y))

    graph = Graph(2)
    outputs = read(trace(swap, ARRAY, ARRAY).jaxpr, graph, graph.sources)
    assert [graph.labels()[node] for node in outputs] == [0b11, 0b11]
