"""``trace_subject``: which sizes a subject is traced for, and what ``scope`` says."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bnverify import reference
from bnverify.jaxpr import Abstract, TraceError, leaf_names, trace_subject
from bnverify.jaxpr.shapes import CORNERS
from bnverify.model import State, StepInfo, Subject


def linear(features=None, shape=lambda d: (d,), step=None) -> Subject:
    """Return linear regression in plain JAX, which traces with any symbolic size."""

    def init(seed, x):
        params = {"w": jax.random.normal(jax.random.PRNGKey(seed), shape(x.shape[1]))}
        return State(params, {}, optax.sgd(0.0).init(params))

    def loss_fn(params, x, y):
        return jnp.mean((x @ params["w"].reshape(-1)[: x.shape[1]] - y) ** 2)

    def plain(state, x, y, lr):
        loss, grads = jax.value_and_grad(loss_fn)(state.params, x, y)
        params = jax.tree_util.tree_map(lambda p, g: p - lr * g, state.params, grads)
        return state._replace(params=params), StepInfo(loss, grads)

    def evaluate(state, x, y):
        return loss_fn(state.params, x, y).reshape(1)

    return Subject("linear", init, step or plain, evaluate, features=features)


def takes_symbolic_features() -> bool:
    """Return whether Flax's default initialiser accepts a symbolic size (jax < 0.11)."""
    return tuple(map(int, jax.__version__.split(".")[:2])) < (0, 11)


def test_the_reference_is_traced_for_every_batch_size():
    """Scope is every N and D; from jax 0.11, where initialisers reject a symbolic D, every N."""
    traces = trace_subject(reference.adam())
    assert traces.proved
    if takes_symbolic_features():
        assert traces.scope == "every N and D"
        assert traces.narrowed == ""
    else:
        assert traces.scope == "every N, D in (1, 3, 8)"
        assert "init does not trace" in traces.narrowed
    assert len(traces.runs) == (1 if takes_symbolic_features() else 3) + len(CORNERS)


def test_the_structure_of_the_reference():
    """The step keeps the structure, shapes, dtypes and weak types of the state."""
    for run in trace_subject(reference.adam()).runs:
        assert run.after == run.before
        assert run.info.grads == run.before.params
        assert run.info.loss == Abstract((), np.dtype(np.float32))
        assert run.eval_loss == Abstract((1,), np.dtype(np.float32))
        kernel = run.before.params["Dense_0"]["kernel"]
        assert kernel.shape[0] == run.d
        assert run.after_eval == run.before


def test_plain_code_is_traced_for_every_size_on_every_release():
    """A step that does not depend on sizes traces with both sizes symbolic."""
    traces = trace_subject(linear())
    assert traces.scope == "every N and D"
    assert str(traces.runs[0].before.params["w"]) == "float32[d]"


def test_a_declared_feature_size_is_used():
    """A subject that declares D = 5 is traced for every N."""
    traces = trace_subject(linear(features=(5,)))
    assert traces.scope == "every N, D = 5"
    assert traces.proved
    assert traces.runs[0].before.params["w"].shape == (5,)


def test_the_state_is_extrapolated_if_only_init_needs_concrete_sizes():
    """If init needs a concrete D, step and evaluation are still traced for every D."""

    def init(seed, x):
        if x.shape[1] > 2**20:  # undecidable for a symbolic size
            raise ValueError("too wide")
        return linear().init(seed, x)

    traces = trace_subject(replace(linear(shape=lambda d: (2 * d + 1,)), init=init))
    assert traces.scope.startswith("every N and D, with the state's shapes extrapolated from D in")
    assert "init" not in traces.runs[0].programs
    assert "init does not trace: " in traces.narrowed


@pytest.mark.parametrize(
    "shape", [lambda d: (d * d,), lambda d: (d,) * (1 if d < 4 else 2)], ids=["square", "rank"]
)
def test_the_state_is_not_extrapolated_if_sizes_are_not_affine(shape):
    """A size that is not affine in D, or a rank that changes, narrows the scope."""

    def init(seed, x):
        if x.shape[1] > 2**20:
            raise ValueError("too wide")
        return linear(shape=shape).init(seed, x)

    traces = trace_subject(replace(linear(), init=init))
    assert traces.scope == "every N, D in (1, 3, 8)"
    assert traces.proved


def test_a_split_batch_is_traced_for_every_multiple():
    """A step that accumulates gradients over quarter batches is traced for N divisible by 24."""

    def step(state, x, y, lr):
        if x.shape[0] % 4 != 0:
            raise ValueError("the batch does not split in four")
        return linear().step(state, x, y, lr)

    traces = trace_subject(linear(step=step))
    assert traces.scope == "every N divisible by 24, every D"
    assert traces.proved


def test_shape_dependent_code_falls_back_to_one_shape_and_says_so():
    """Python code that loops over the rows is traced at one shape and proves nothing for others."""

    def step(state, x, y, lr):
        for _ in range(int(x.shape[0])):
            state, info = linear().step(state, x, y, lr)
        return state, info

    traces = trace_subject(linear(step=step), concrete=(2, 3))
    assert traces.scope == "N = 2, D = 3 only"
    assert not traces.proved
    assert "step does not trace" in traces.narrowed


def test_a_subject_that_does_not_trace_raises():
    """The error names the function and the reason."""

    def step(state, x, y, lr):
        if float(lr) > 0:
            return linear().step(state, x, y, lr)
        raise AssertionError

    with pytest.raises(TraceError, match=r"^step does not trace: ConcretizationTypeError"):
        trace_subject(linear(step=step))


def test_weak_types_are_recorded():
    """A statistic computed from a Python scalar alone becomes weakly typed."""

    def step(state, x, y, lr):
        after, info = linear().step(state, x, y, lr)
        return after._replace(batch_stats={"count": jnp.asarray(1.0)}), info

    def init(seed, x):
        return linear().init(seed, x)._replace(batch_stats={"count": jnp.float32(1)})

    run = trace_subject(replace(linear(step=step), init=init)).runs[0]
    assert str(run.before.batch_stats["count"]) == "float32[]"
    assert str(run.after.batch_stats["count"]) == "float32[] weak"


def test_leaf_names_are_paths():
    """Paths through dicts, tuples and named tuples look the same."""
    tree = {"a": (1, {"b": 2}), "c": StepInfo(3, None)}
    assert leaf_names(tree, "t") == ["t/a/0", "t/a/1/b", "t/c/loss"]
    assert leaf_names(1, "t") == ["t"]


def test_a_branch_on_a_size_of_one_is_traced():
    """``n == 1`` is false for a symbolic N, so the smallest sizes are traced separately."""

    def step(state, x, y, lr):
        after, info = linear().step(state, x, y, lr)
        if x.shape[0] == 1:
            after = after._replace(params={"w": after.params["w"].astype(jnp.bfloat16)})
        return after, info

    runs = trace_subject(replace(linear(), step=step)).runs
    assert any(run.after.params["w"].dtype == jnp.bfloat16 for run in runs)
