"""Invalid arguments of adapters are refused, with a message that says what to pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import numpy as np
import optax
import pytest
from flax import nnx

import bnverify
from bnverify.adapters import calls
from bnverify.adapters.batches import loss_of
from bnverify.adapters.loop import nnx_loop
from bnverify.errors import UsageError


class Net(nn.Module):
    """A linen module."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        """Return x (N, D) mapped to (N, 1)."""
        return nn.Dense(1)(x)


class Wide(Net):
    """A linen module with a required field."""

    width: int


class Linear(nnx.Linear):
    """An nnx module that takes four features."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        super().__init__(4, 1, rngs=rngs)


def nothing(*args: Any) -> Any:
    """A function that is never called."""


OPTIMIZER = r"optimizer must be a function of the learning rate, like .*, got a Gradient\w+$"


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: bnverify.linen(Net), r"not its class: bnverify.linen\(Net\(\)\)"),  # type: ignore[arg-type]
        (lambda: bnverify.linen(Wide), r"not its class: bnverify.linen\(Wide\(\.\.\.\)\)"),  # type: ignore[arg-type]
        (lambda: bnverify.linen(Linear), r"that is an nnx module: bnverify.nnx\(Linear\)"),  # type: ignore[arg-type]
        (lambda: bnverify.linen("Net"), "takes a flax.linen module, got 'Net'"),  # type: ignore[arg-type]
        (lambda: bnverify.nnx(Net), r"that is a linen module: bnverify.linen\(Net\(\)\)"),
        (lambda: bnverify.nnx(Linear(nnx.Rngs(0))), r"needs the class, .*: bnverify.nnx\(Linear\)"),
        (lambda: bnverify.nnx(3), "makes an nnx module, got 3"),  # type: ignore[arg-type]
        (lambda: bnverify.linen(Net(), optimizer=optax.sgd(0.1)), OPTIMIZER),  # type: ignore[arg-type]
        (lambda: bnverify.nnx(Linear, optimizer=optax.adam(0.1)), OPTIMIZER),  # type: ignore[arg-type]
        (
            lambda: bnverify.train_state(nothing, nothing, nothing, optimizer=optax.sgd(0.1)),  # type: ignore[arg-type]
            OPTIMIZER,
        ),
        (lambda: nnx_loop(nothing, nothing, nothing, optimizer=optax.sgd(0.1)), OPTIMIZER),  # type: ignore[arg-type]
        (
            lambda: bnverify.train_state({"step": 0}, nothing, nothing),  # type: ignore[arg-type]
            "create must be a function that makes the train state, got a dict",
        ),
        (lambda: bnverify.train_state(nothing, nothing, 3), "eval_step must be .*, got 3"),  # type: ignore[arg-type]
        (lambda: nnx_loop(nothing, 3, nothing), "train_step must be .*, got 3"),  # type: ignore[arg-type]
        (lambda: bnverify.linen(Net(), loss="mse"), r"loss must be .* -> scalar, got 'mse'"),  # type: ignore[arg-type]
        (
            lambda: bnverify.linen(Net(), loss=lambda outputs: outputs),  # type: ignore[misc, arg-type]
            "loss must be .*; <lambda> takes other arguments",
        ),
        (lambda: bnverify.linen(Net(), batch=(1, 2)), "batch must be .*, got a tuple"),  # type: ignore[arg-type]
        (lambda: bnverify.linen(Net(), features="4"), "features must be the D .*, got '4'"),  # type: ignore[arg-type]
        (
            lambda: bnverify.train_state(nothing, nothing, rows=0),
            "rows must be a number that divides N, got 0",
        ),
        (lambda: bnverify.linen(Net(), features=0), "features must be the D .*, got 0"),
        (lambda: bnverify.linen(Net(), features=()), r"features must be the D .*, got \(\)"),
    ],
)
def test_what_is_refused_says_what_to_pass(make: Callable[[], Any], said: str) -> None:
    """The message is one line, and nothing is traced before."""
    with pytest.raises(UsageError, match=said) as caught:
        make()
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("features", [4, np.int64(4), [4], (4,), {4}, range(4, 5)])
def test_sizes_come_in_any_collection(features: Any) -> None:
    """``features`` is an integer of any type, or a collection of integers."""
    assert calls.sizes(features) == (4,)


def test_functions_of_any_kind_are_taken() -> None:
    """Functions with optional parameters, classes, and builtins without a signature are accepted."""
    calls.functions(optimizer=optax.adam, loss=max, batch=lambda x, y, scale=1: (x, y))
    calls.functions(loss=lambda *args: args[0])


def _roles(function: Callable[..., Any], things: int, **asked: Any) -> dict[str, str]:
    """Return what each parameter of a step is, with so many things of one kind carried."""
    carried = [calls.Thing(str(number), "model") for number in range(things)]
    allowed, order = ("batch", "inputs", "targets"), ("batch", "inputs", "targets")
    asked = {"allowed": allowed, "order": order, "things": carried, **asked}
    return dict(calls.caller(function, "train_step", **asked).roles)


def test_target_is_a_network_where_one_is_left_for_it() -> None:
    """A network that follows another is called so as often as what a row should be."""
    followed = _roles(lambda model, target, batch: None, 2)
    assert followed == {"model": "thing:0", "target": "thing:1", "batch": "batch"}
    beside = _roles(lambda model, target, x, y: None, 2)
    assert beside == {"model": "thing:0", "target": "thing:1", "x": "inputs", "y": "targets"}
    unnamed = _roles(lambda model, target, transitions: None, 2)
    assert unnamed == {"model": "thing:0", "target": "thing:1", "transitions": "batch"}


def test_target_is_the_targets_where_all_networks_have_a_parameter() -> None:
    """And where it is the other half of some inputs; or where the user says so."""
    half = {"model": "thing:0", "x": "inputs", "target": "targets"}
    assert _roles(lambda model, x, target: None, 1) == half
    assert _roles(lambda model, x, target: None, 2) == half
    assert _roles(lambda model, features_in, target: None, 1)["features_in"] == "inputs"
    told = _roles(lambda model, target, batch: None, 2, told={"target": "targets"})
    assert told["target"] == "targets"


@pytest.mark.parametrize(
    ("report", "expected"),
    [
        ({"train_loss": np.float32(2), "accuracy": np.float32(1)}, 2),
        ({"train/loss": np.float32(2)}, 2),
        ({"loss": np.float32(2), "total_loss": np.float32(3)}, 2),
        ({"train_loss": np.float32(2), "total_loss": np.float32(3)}, None),
        ({"actor_loss": np.float32(2)}, None),
        ({"lossy": np.float32(2)}, None),
    ],
)
def test_the_only_loss_of_a_report_is_found(report: dict[str, Any], expected: float | None) -> None:
    """A key may say which loss it is; one of several, or one of a part of the model, is not guessed."""
    assert loss_of(report, None, None) == expected
