"""The nnx loop adapter: users' steps that change their arguments."""

import functools
import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from adapted_steps import CASE, NnxModel, one_step
from flax import nnx as flax_nnx

from bnverify.adapters.canonical import nnx
from bnverify.adapters.explain import SubjectError
from bnverify.adapters.loop import nnx_loop
from bnverify.errors import UsageError
from bnverify.model import State

HOLDS_MODEL = "model" not in inspect.signature(flax_nnx.Optimizer.update).parameters  # to flax 0.10


def make(din: int, rngs: Any, lr: float) -> Any:
    model = NnxModel(din, rngs)
    return model, flax_nnx.Optimizer(model, optax.adam(lr), wrt=flax_nnx.Param)


def loss_fn(model: Any, x: Any, y: Any) -> Any:
    return jnp.mean((model(x).reshape(-1) - y) ** 2)


def update(model: Any, optimizer: Any, grads: Any) -> None:
    optimizer.update(*([grads] if HOLDS_MODEL else [model, grads]))


@flax_nnx.jit
def train_step(model: Any, optimizer: Any, batch: Any) -> Any:
    loss, grads = flax_nnx.value_and_grad(loss_fn)(model, *batch)
    update(model, optimizer, grads)
    return loss


@flax_nnx.jit
def eval_step(model: Any, batch: Any) -> Any:
    return loss_fn(model, *batch)


def test_a_mutating_loop_is_the_canonical_step() -> None:
    """From the same initial values, the user's loop agrees with the canonical step for its model."""
    loop, canonical = nnx_loop(make, train_step, eval_step), nnx(NnxModel, optimizer=optax.adam)
    before, after, info = one_step(loop)
    start = State(before.params, before.batch_stats, before.opt_state)
    expected, expected_info = jax.jit(canonical.step)(start, CASE.x, CASE.y, CASE.lr)
    for actual, wanted in (
        (after.params, expected.params),
        (after.batch_stats, expected.batch_stats),
        (after.opt_state, expected.opt_state),
        (info, expected_info),
    ):
        jax.tree_util.tree_map(
            lambda a, e: np.testing.assert_allclose(a, e, rtol=1e-5, atol=1e-6), actual, wanted
        )
    assert jax.tree_util.tree_structure(before) == jax.tree_util.tree_structure(after)
    np.testing.assert_allclose(
        loop.evaluate(after, CASE.x, CASE.y),
        canonical.evaluate(expected, CASE.x, CASE.y),
        rtol=1e-5,
    )


def test_the_optimizers_state_is_optaxs() -> None:
    """The optimizer state has the structure of ``tx.init(params)``; the step counter is in extra."""
    subject = nnx_loop(make, train_step, eval_step)
    before, after, _ = one_step(subject)
    assert subject.optimizer is not None
    expected = jax.tree_util.tree_structure(subject.optimizer(0.1).init(before.params))
    assert jax.tree_util.tree_structure(after.opt_state) == expected
    assert after.extra["optimizer"] == {"step": 1}
    assert {"lr"} <= subject.capabilities


def of_a_key(din: int, key: Any) -> Any:
    return NnxModel(din, flax_nnx.Rngs(params=key, dropout=jax.random.fold_in(key, 1)))


def of_a_seed(din: int, seed: Any) -> Any:
    return NnxModel(din, flax_nnx.Rngs(jax.random.key(seed)))


def of_streams(din: int, noise: flax_nnx.Rngs) -> Any:
    return NnxModel(din, noise)


@pytest.mark.parametrize("make_module", [of_a_key, of_a_seed, of_streams])
def test_a_function_that_makes_a_model_may_take_a_key_or_a_seed(make_module: Any) -> None:
    """And streams under any name, if it is annotated so."""

    @functools.wraps(make_module)
    def made(*args: Any) -> Any:
        model = make_module(*args)
        return model, flax_nnx.Optimizer(model, optax.sgd(0.1), wrt=flax_nnx.Param)

    before, after, _ = one_step(nnx_loop(made, train_step, eval_step))
    assert np.any(before.params["first"]["kernel"] != after.params["first"]["kernel"])
    alone = nnx(make_module).init(0, CASE.x).params
    assert jax.tree_util.tree_structure(alone) == jax.tree_util.tree_structure(before.params)
    with pytest.raises(UsageError, match="returns a tuple, not an nnx module: return the model"):
        nnx(made)


def test_an_optimizer_over_statistics_keeps_its_own_tree() -> None:
    """If nnx.Optimizer also gets BatchStat, its state does not match the params, and laws say so."""

    def over_all(din: int, rngs: Any) -> Any:
        model = NnxModel(din, rngs)
        wrt = (flax_nnx.Param, flax_nnx.BatchStat)
        return model, flax_nnx.Optimizer(model, optax.adam(0.1), wrt=wrt)

    def step(model: Any, optimizer: Any, batch: Any) -> Any:
        return loss_fn(model, *batch) + 0 * jax.tree_util.tree_leaves(flax_nnx.state(optimizer))[0]

    subject = nnx_loop(over_all, step, eval_step)
    before = jax.eval_shape(subject.init, CASE.seed, CASE.x)
    paths = [
        "/".join(str(getattr(key, "key", key)) for key in path)
        for path, _ in jax.tree_util.tree_flatten_with_path(before.opt_state)[0]
    ]
    assert any(path.endswith("norm/mean") for path in paths)


def test_layers_are_seen_in_the_copies_that_nnx_makes() -> None:
    """The layers are found although ``nnx.jit`` and ``nnx.grad`` copy the model."""
    subject = nnx_loop(make, train_step, eval_step)
    assert subject.momentum == 0.99
    before, after, _ = one_step(subject)
    assert subject.layer_inputs is not None
    given = subject.layer_inputs(before, CASE.x, CASE.y)["norm"]
    mean = after.batch_stats["norm"]["mean"]
    np.testing.assert_allclose(mean, 0.01 * given.value.mean(0), rtol=1e-3, atol=1e-7)


def test_objects_are_passed_by_their_names() -> None:
    """A third object, a key, inputs and targets are passed to the matching parameters."""

    class Average(flax_nnx.Metric):
        def __init__(self) -> None:
            self.total = flax_nnx.metrics.MetricState(jnp.zeros(()))

        def add(self, value: Any) -> None:
            (total,) = jax.tree_util.tree_leaves(flax_nnx.state(self))
            self.total = flax_nnx.metrics.MetricState(total + value)

    def with_metric(din: int, rngs: Any, lr: float) -> Any:
        return *make(din, rngs, lr), Average()

    def step(model: Any, optimizer: Any, metrics: Any, x: Any, y: Any, rng: Any) -> Any:
        loss = train_step(model, optimizer, (x, y))
        metrics.add(loss + 0 * jax.random.normal(rng))
        return {"loss": loss}

    def judge(model: Any, metrics: Any, x: Any, y: Any) -> Any:
        return {"loss": eval_step(model, (x, y)), "seen": metrics.total}

    _, after, info = one_step(nnx_loop(with_metric, step, judge))
    assert after.extra["others"] == {"metrics": {"total": info.loss}}
    assert "key" in after.extra


def test_a_loop_that_switches_by_itself_is_left_to_it() -> None:
    """With ``switch=False``, a model that the steps do not put into eval mode stays in train mode."""
    _, after, _ = one_step(nnx_loop(make, train_step, eval_step))
    kept, left = (
        nnx_loop(make, train_step, eval_step, switch=switch).after_eval for switch in (True, False)
    )
    assert kept is not None
    assert left is not None
    mean = after.batch_stats["norm"]["mean"]
    assert np.all(kept(after, CASE.x, CASE.y).batch_stats["norm"]["mean"] == mean)
    assert np.any(left(after, CASE.x, CASE.y).batch_stats["norm"]["mean"] != mean)


def test_what_make_must_return_is_said() -> None:
    """``make`` must return an optimizer, too."""
    with pytest.raises(ValueError, match="make must return"):
        nnx_loop(NnxModel, train_step, eval_step)
    with pytest.raises(ValueError, match="pass features=D"):
        nnx_loop(lambda rngs: make(3, rngs, 0.1), train_step, eval_step)


def test_an_update_in_another_releases_form_is_explained() -> None:
    """Calling ``optimizer.update`` as in another Flax release is explained."""

    def other_form(model: Any, optimizer: Any, batch: Any) -> Any:
        loss, grads = flax_nnx.value_and_grad(loss_fn)(model, *batch)
        optimizer.update(*([model, grads] if HOLDS_MODEL else [grads]))
        return loss

    with pytest.raises(SubjectError) as caught:
        nnx_loop(make, other_form, eval_step)
    assert caught.value.mistake.name == "nnx_optimizer_form"


class Digits(flax_nnx.Module):
    """A smaller version of the model in Flax's MNIST example: convolution, BatchNorm, dropout."""

    def __init__(self, *, rngs: Any) -> None:
        self.conv = flax_nnx.Conv(1, 2, kernel_size=(3, 3), rngs=rngs)
        self.norm = flax_nnx.BatchNorm(2, rngs=rngs)
        self.dropout = flax_nnx.Dropout(rate=0.025)
        self.last = flax_nnx.Linear(2, 3, rngs=rngs)

    def __call__(self, x: Any, rngs: Any = None) -> Any:
        x = self.dropout(flax_nnx.relu(self.norm(self.conv(x))), rngs=rngs)
        return self.last(x.mean((1, 2)))


def digits_loss(model: Digits, rngs: Any, batch: Any) -> Any:
    logits = model(batch["image"], rngs)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()
    return loss, logits


@flax_nnx.jit
def digits_step(model: Any, optimizer: Any, metrics: Any, rngs: Any, batch: Any) -> None:
    grad_fn = flax_nnx.value_and_grad(digits_loss, has_aux=True)
    (loss, logits), grads = grad_fn(model, rngs, batch)
    metrics.update(loss=loss, logits=logits, labels=batch["label"])
    update(model, optimizer, grads)


@flax_nnx.jit
def digits_eval(model: Any, metrics: Any, batch: Any) -> None:
    loss, logits = digits_loss(model, None, batch)
    metrics.update(loss=loss, logits=logits, labels=batch["label"])


def make_digits(rngs: Any, learning_rate: float = 0.005) -> Any:
    model = Digits(rngs=rngs)
    metrics = flax_nnx.MultiMetric(
        accuracy=flax_nnx.metrics.Accuracy(), loss=flax_nnx.metrics.Average("loss")
    )
    optimizer = flax_nnx.Optimizer(model, optax.adamw(learning_rate, 0.9), wrt=flax_nnx.Param)
    return model, optimizer, metrics


def test_flaxs_own_loop_is_taken_as_it_is() -> None:
    """If steps return nothing, the loss is read from the metrics, which are not in the state."""

    def batch(x: Any, y: Any) -> Any:
        return {"image": x.reshape(-1, 4, 4, 1), "label": jnp.floor(y).astype(jnp.int32) % 3}

    subject = nnx_loop(make_digits, digits_step, digits_eval, batch=batch, features=16)
    x = jnp.linspace(-1, 1, 64).reshape(4, 16) ** 3
    y = jnp.arange(4.0)
    state = subject.init(0, x)
    assert set(state.extra) == {"optimizer", "key"}
    after, info = subject.step(state, x, y, 0.1)
    assert info.grads is not None
    assert subject.momentum == 0.99
    assert np.isfinite(info.loss)
    assert "random numbers" in subject.exempt["equal_steps_converge_geometrically"]
    assert subject.after_eval is not None
    left = subject.after_eval(after, x, y)
    jax.tree_util.tree_map(np.testing.assert_array_equal, left, after)
    assert subject.evaluate(after, x, y).shape == (1,)
    without = nnx_loop(make_digits, digits_step, batch=batch, features=16)
    np.testing.assert_allclose(
        without.evaluate(after, x, y), subject.evaluate(after, x, y), rtol=1e-6
    )


class Small(flax_nnx.Module):
    """Linear -> BatchNorm -> Linear."""

    def __init__(self, din: int, out: int, *, rngs: Any) -> None:
        self.first = flax_nnx.Linear(din, 4, rngs=rngs)
        self.norm = flax_nnx.BatchNorm(4, momentum=0.9, rngs=rngs)
        self.last = flax_nnx.Linear(4, out, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return self.last(flax_nnx.relu(self.norm(self.first(x))))


def test_several_models_and_optimizers() -> None:
    """Two networks in one step are told apart; if they have the same class, uncertain laws are exempt."""

    def two(din: int, rngs: Any) -> Any:
        models = Small(2, 3, rngs=rngs), Small(din, 1, rngs=rngs)
        return *models, *(
            flax_nnx.Optimizer(model, optax.adam(1e-3), wrt=flax_nnx.Param) for model in models
        )

    def step(gen: Any, disc: Any, g_opt: Any, d_opt: Any, batch: Any, rngs: Any) -> Any:
        fake = gen(jax.random.normal(rngs(), (batch[0].shape[0], 2)))
        loss, grads = flax_nnx.value_and_grad(
            lambda d: jnp.mean(flax_nnx.softplus(-d(batch[0])) + flax_nnx.softplus(d(fake)))
        )(disc)
        update(disc, d_opt, grads)
        z = jax.random.normal(rngs(), (batch[0].shape[0], 2))
        grad_fn = flax_nnx.grad(lambda g, d: jnp.mean(flax_nnx.softplus(-d(g(z)))))
        update(gen, g_opt, grad_fn(gen, disc))
        return loss

    def judge(disc: Any, batch: Any) -> Any:
        return jnp.mean(flax_nnx.softplus(-disc(batch[0])))

    subject = nnx_loop(two, step, judge, features=3)
    before, after, info = one_step(subject)
    assert set(after.params) == set(after.batch_stats) == set(after.opt_state) == {"gen", "disc"}
    assert info.grads is not None
    assert subject.optimizer is not None
    updates, _ = subject.optimizer(0.1).update(info.grads, before.opt_state, before.params)
    expected = optax.apply_updates(before.params, updates)
    jax.tree_util.tree_map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), after.params, expected
    )
    assert "cannot be counted" in subject.exempt["one_momentum_for_the_whole_model"]


def test_a_module_may_hold_model_and_optimizer() -> None:
    """A trainer that is an nnx module: the step takes and changes a single object."""

    class Trainer(flax_nnx.Module):
        def __init__(self, din: int, *, rngs: Any) -> None:
            self.model = Small(din, 1, rngs=rngs)
            self.optimizer = flax_nnx.Optimizer(self.model, optax.adam(0.1), wrt=flax_nnx.Param)

    def step(trainer: Any, batch: Any) -> Any:
        loss, grads = flax_nnx.value_and_grad(loss_fn)(trainer.model, *batch)
        update(trainer.model, trainer.optimizer, grads)
        return loss

    def judge(trainer: Any, batch: Any) -> Any:
        return loss_fn(trainer.model, *batch)

    subject = nnx_loop(Trainer, step, judge)
    _, after, info = one_step(subject)
    assert set(after.params) == {"first", "norm", "last"}
    assert info.grads is not None
    assert subject.momentum == 0.9
