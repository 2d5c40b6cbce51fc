"""Errors of JAX, Flax and Optax are explained; each mistake is really made."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training import train_state

from bnverify.adapters import explain
from bnverify.adapters.explain import SubjectError, explaining
from bnverify.errors import UsageError
from bnverify.mistakes import MISTAKES
from bnverify.reference import MODEL

X = jnp.ones((4, 3))
BATCH: Any = {"image": X}
VARIABLES = MODEL.init(jax.random.PRNGKey(0), X, train=False)
PARAMS = VARIABLES["params"]


def loss_fn(params: Any) -> Any:
    variables = {"params": params, "batch_stats": VARIABLES["batch_stats"]}
    out, updated = MODEL.apply(variables, X, train=True, mutable=["batch_stats"])
    return jnp.mean(out**2), updated


def step_with_all_variables() -> None:
    tx = optax.adam(0.1)
    tx.update(jax.tree_util.tree_map(jnp.ones_like, PARAMS), tx.init(VARIABLES), PARAMS)


def leak() -> Any:
    kept: list[Any] = []
    jax.jit(kept.append)(1.0)
    return kept[0] + 1


def use_after_delete() -> Any:
    value = jnp.ones(3)
    value.delete()
    return value + 1


def assign() -> None:
    state = train_state.TrainState.create(apply_fn=None, params=PARAMS, tx=optax.sgd(0.1))
    state.params = PARAMS


def no_field() -> Any:
    return train_state.TrainState.create(
        apply_fn=None, params=PARAMS, tx=optax.sgd(0.1)
    ).batch_stats


REFUSED: dict[str, list[Callable[[], Any]]] = {
    "mutable_forgotten": [lambda: MODEL.apply(VARIABLES, X, train=True)],
    "has_aux_forgotten": [lambda: jax.value_and_grad(loss_fn)(PARAMS)],
    "aux_missing": [lambda: jax.value_and_grad(lambda p: loss_fn(p)[0], has_aux=True)(PARAMS)],
    "loss_not_reduced": [lambda: jax.grad(lambda p: loss_fn(p)[0][None])(PARAMS)],
    "statistics_not_passed": [lambda: MODEL.apply({"params": PARAMS}, X, train=False)],
    "random_stream_not_passed": [lambda: nn.Dropout(0.5, deterministic=False).apply({}, X)],
    "other_input_shape": [lambda: MODEL.apply(VARIABLES, jnp.ones((4, 5)), train=False)],
    "shapes_do_not_broadcast": [lambda: jnp.ones((4, 3)) - jnp.ones(4)],
    "labels_not_integers": [
        lambda: optax.softmax_cross_entropy_with_integer_labels(X, X[:, 0]),
        lambda: jnp.take_along_axis(X, X, axis=1),
    ],
    "optimizer_on_all_variables": [step_with_all_variables],
    "buffer_donated": [use_after_delete],
    "value_leaks": [leak],
    "not_traceable": [
        lambda: jax.jit(lambda a: 1 if a > 0 else 2)(1.0),
        lambda: jax.jit(float)(1.0),
        lambda: jax.jit(lambda a: jax.random.PRNGKey(int(a)))(1),
        lambda: jax.jit(np.asarray)(1.0),
    ],
    "axis_not_bound": [lambda: jax.lax.pmean(X, "batch")],
    "unknown_argument": [
        lambda: MODEL.apply(VARIABLES, X, training=True),
        lambda: MODEL.apply(VARIABLES, X),
    ],
    "state_assigned": [assign],
    "no_statistics_field": [no_field],
    "batch_key": [
        lambda: BATCH["label"],
        lambda: BATCH[0],
        lambda: tuple(BATCH.values())["image"],
    ],
    "whole_batch_as_a_half": [lambda: X["image"]],
    "input_without_axes": [lambda: MODEL.apply(VARIABLES, next(iter(BATCH)), train=False)],
}
CASES = [(name, run) for name, runs in REFUSED.items() for run in runs]


@pytest.mark.parametrize(("name", "run"), CASES, ids=[name for name, _ in CASES])
def test_a_refused_mistake_has_its_name(name: str, run: Callable[[], Any]) -> None:
    """The error names the mistake, its fix and the line in this file."""
    with pytest.raises(SubjectError) as caught, explaining("the step"):
        run()
    assert caught.value.mistake.name == name
    assert caught.value.where.startswith(__file__)
    assert caught.value.mistake.fix in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is not None


def test_what_no_mistake_raises_passes() -> None:
    """Other errors are not changed."""
    with pytest.raises(ZeroDivisionError), explaining("the step"):
        _ = 1 / 0


def test_what_is_explained_is_not_explained_again() -> None:
    """A UsageError is not changed."""
    with pytest.raises(UsageError, match=r"^as it is$"), explaining("the step"):
        raise UsageError("as it is")


def test_every_symptom_has_a_mistake() -> None:
    """Each symptom names a known mistake, no name is in both tables, and every mistake is tested."""
    names = {symptom.mistake for symptom in explain.SYMPTOMS}
    assert names <= set(MISTAKES) | set(explain.REFUSED)
    assert not set(MISTAKES) & set(explain.REFUSED)
    nnx_only = {  # see test_nnx_loop.py and test_cases.py
        "nnx_variable_from_outside",
        "nnx_optimizer_form",
        "nnx_object_by_closure",
        "nnx_object_broadcast",
        "seed_not_a_key",
        "train_flag_traced",
    }
    assert names == set(REFUSED) | nnx_only
