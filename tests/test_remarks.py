"""Remarks: choices that break no law, told by the name of the mistake they usually are."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest

import bnverify
from bnverify import zoo
from bnverify.model import Subject
from bnverify.proof import read
from bnverify.remarks import remarks
from tests.faults import CONTROLS


class Model(nn.Module):
    """A layer with BatchNorm of some momentum: x (N, D) -> (N, 1)."""

    momentum: float = 0.9

    @nn.compact
    def __call__(self, x: Any, train: bool) -> Any:
        x = nn.BatchNorm(use_running_average=not train, momentum=self.momentum)(nn.Dense(4)(x))
        return nn.Dense(1)(x)


class StatisticsAsParams(nn.Module):
    """A normalisation whose running mean is a param: evaluation reads it, training does not."""

    @nn.compact
    def __call__(self, x: Any, train: bool) -> Any:
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(4)(x))
        running = self.param("running_mean", nn.initializers.zeros, (4,))
        x = x - (jnp.mean(x, 0) if train else running)
        return nn.Dense(1)(x)


class OwnNorm(nn.Module):
    """A normalisation that keeps its statistics in a collection of another name."""

    @nn.compact
    def __call__(self, x: Any, train: bool) -> Any:
        mean = self.variable("moments", "centre", jnp.zeros, x.shape[-1:])
        if train and not self.is_initializing():
            mean.value = 0.9 * mean.value + 0.1 * x.mean(0)
        return nn.Dense(1)(x - (x.mean(0) if train else mean.value))[:, 0]


def is_kernel(params: Any) -> Any:
    return jax.tree_util.tree_map(lambda leaf: leaf.ndim > 1, params)


def is_not_kernel(params: Any) -> Any:
    return jax.tree_util.tree_map(lambda leaf: leaf.ndim <= 1, params)


def kernels_decayed() -> Any:
    return optax.add_decayed_weights(1e-2, mask=is_kernel)


def around(optimizer: Callable[[Any], Any]) -> Subject:
    return bnverify.linen(Model(), optimizer=optimizer)


def told(subject: Subject) -> list[str]:
    """Return the names of the mistakes that are remarked upon."""
    return [line.split(":")[0] for line in remarks(subject, read(subject).influence)]


MEANT = {
    "sgd": optax.sgd,
    "a clip first": lambda lr: optax.chain(optax.clip_by_global_norm(1.0), optax.adam(lr)),
    "adafactor": lambda lr: optax.adafactor(lr, min_dim_size_to_factor=2),
    "a masked decay": lambda lr: optax.adamw(lr, mask=is_kernel),
    "an L2 penalty under SGD": lambda lr: optax.chain(kernels_decayed(), optax.sgd(lr)),
    "a decay behind adam's scaling": lambda lr: optax.chain(
        optax.scale_by_adam(), kernels_decayed(), optax.scale_by_learning_rate(lr)
    ),
    "lamb": lambda lr: optax.lamb(lr, weight_decay=1e-2, mask=is_kernel),
    "a decay that has the rate, too": lambda lr: optax.chain(
        optax.add_decayed_weights(1e-2 * lr, mask=is_kernel), optax.sgd(lr)
    ),
    "steps gathered": lambda lr: optax.MultiSteps(optax.sgd(lr), 4).gradient_transformation(),
    "two optimizers": lambda lr: optax.multi_transform(
        {True: optax.adam(lr), False: optax.sgd(lr)}, is_kernel
    ),
}


@pytest.mark.parametrize("optimizer", MEANT.values(), ids=MEANT)
def test_nothing_is_said_of_a_usual_optimizer(optimizer: Callable[[Any], Any]) -> None:
    """Where all params are trained downhill and the normalisation's decay by nothing, silence."""
    assert told(around(optimizer)) == []


@pytest.mark.parametrize(
    ("optimizer", "mistake"),
    [
        (lambda lr: optax.adamw(lr, weight_decay=1e-2), "decay_of_norm_parameters"),
        (lambda lr: optax.adamw(lr, mask=is_not_kernel), "decay_of_norm_parameters"),
        (
            lambda lr: optax.chain(optax.sgd(lr), optax.add_decayed_weights(1e-2)),
            "decay_grows_params",
        ),
        (lambda lr: optax.masked(optax.sgd(lr), is_kernel), "mask_hands_gradients_on"),
        (lambda lr: optax.chain(optax.adam(lr), optax.clip_by_global_norm(1.0)), "updates_clipped"),
        (lambda lr: optax.chain(kernels_decayed(), optax.adam(lr)), "decay_coupled"),
        (lambda lr: optax.chain(kernels_decayed(), optax.rmsprop(lr)), "decay_coupled"),
        (
            lambda lr: optax.chain(kernels_decayed(), optax.lion(lr, weight_decay=0.0)),
            "decay_coupled",
        ),
        (lambda lr: optax.chain(optax.adam(lr), optax.scale(-lr)), "learning_rate_applied_twice"),
        (lambda lr: optax.chain(optax.sgd(lr), optax.scale(lr)), "learning_rate_applied_twice"),
        (
            lambda lr: optax.chain(optax.adam(lr), optax.scale_by_learning_rate(lr)),
            "learning_rate_applied_twice",
        ),
    ],
    ids=[
        "decay of all",
        "mask flipped",
        "decay after the rate",
        "masked around all",
        "clip last",
        "decay before adam",
        "decay before rmsprop",
        "decay before lion",
        "rate again, negative",
        "rate again",
        "rate twice",
    ],
)
def test_an_optimizer_seldom_meant_is_named(optimizer: Callable[[Any], Any], mistake: str) -> None:
    """An optimizer is its own declaration, so no law objects: a remark does."""
    assert told(around(optimizer)) == [mistake]


def test_a_momentum_in_the_other_sense_is_named() -> None:
    """0.1 is what 0.9 is called elsewhere; 0 is a choice that nobody makes by mistake."""
    assert told(bnverify.linen(Model(momentum=0.1))) == ["momentum_reversed"]
    assert told(bnverify.linen(Model(momentum=0.0))) == []


def test_statistics_among_the_params_are_named() -> None:
    """A param that only evaluation reads is trained by nothing."""
    (line,) = remarks(subject := bnverify.linen(StatisticsAsParams()), read(subject).influence)
    assert line.startswith("statistics_trained_as_params")
    assert "params/running_mean" in line


@pytest.mark.parametrize(
    ("trained", "named"),
    [("params/fast/Dense_0/bias", False), ("params/fast/Dense_1/bias", True)],
)
def test_a_copy_of_trained_params_is_no_statistic(trained: str, *, named: bool) -> None:
    """Evaluation may use the slow params of a lookahead optimizer, which no training loss reads."""
    leaves = {
        "loss": frozenset({trained}),
        "eval_loss": frozenset({"params/slow/Dense_0/bias"}),
    }
    subject = bnverify.linen(Model())
    influence = read(subject).influence
    assert influence is not None
    lines = remarks(subject, replace(influence, leaves=leaves))
    assert [line.startswith("statistics_trained_as_params") for line in lines] == [True] * named


@pytest.mark.parametrize("name", ["canonical", "momentum", "nnx", "train_state", "handwritten"])
def test_nothing_is_said_of_a_correct_step(name: str) -> None:
    """Controls keep every law and have nothing to explain."""
    assert told(CONTROLS[name].make()) == []


@pytest.mark.nightly
@pytest.mark.parametrize("name", ["mlp", "shared_nnx", "masked", "averaged_params", "scanned"])
def test_nothing_is_said_of_the_zoo(name: str) -> None:
    """Nor have these."""
    assert told(getattr(zoo, name)()) == []


def test_a_report_carries_them() -> None:
    """They are notes: the report is as good as its laws."""
    subject = around(lambda lr: optax.adamw(lr, weight_decay=1e-2))
    report = bnverify.verify(subject, "quick", select=["params_keep_their_tree"])
    assert report.ok
    assert any(note.startswith("decay_of_norm_parameters") for note in report.notes)


def test_statistics_that_are_not_found_are_remarked_upon() -> None:
    """With statistics under an unknown name, the note gives the path to declare, which is accepted."""
    tx = optax.sgd(0.1)

    def create(rng: Any) -> Any:
        variables = OwnNorm().init(rng, jnp.ones((1, 3)), train=False)
        params = variables["params"]
        return {"params": params, "rest": {"moments": variables["moments"]}, "opt": tx.init(params)}

    def train_step(state: Any, batch: Any) -> Any:
        def loss_fn(params: Any) -> Any:
            variables = {"params": params, **state["rest"]}
            out, rest = OwnNorm().apply(variables, batch[0], train=True, mutable=["moments"])
            return jnp.mean((out - batch[1]) ** 2), rest

        (loss, rest), grads = jax.value_and_grad(loss_fn, has_aux=True)(state["params"])
        updates, opt = tx.update(grads, state["opt"])
        return {
            "params": optax.apply_updates(state["params"], updates),
            "rest": rest,
            "opt": opt,
        }, loss

    subject = bnverify.loop(create, train_step, features=3)
    (line,) = (note for note in subject.notes if "statistics=" in note)
    assert "were not found as running statistics" in line
    assert line.endswith('statistics="rest/moments"')
    declared = bnverify.loop(create, train_step, features=3, statistics="rest/moments")
    assert told(declared) == []
