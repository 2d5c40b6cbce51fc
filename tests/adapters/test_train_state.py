"""The TrainState adapter: users' loops, called unchanged."""

from functools import cache, partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from adapted_steps import CASE, one_step
from flax.training import dynamic_scale, train_state

from bnverify import reference
from bnverify.adapters.explain import SubjectError
from bnverify.adapters.loop import train_state as adapt
from bnverify.model import Subject


class TrainState(train_state.TrainState):
    batch_stats: Any


def create(rng: Any, lr: float) -> TrainState:
    model = reference.Model()
    variables = model.init(rng, jnp.ones((1, 3)), train=False)
    return TrainState.create(
        apply_fn=model.apply,
        params=variables["params"],
        batch_stats=variables["batch_stats"],
        tx=optax.sgd(lr),
    )


def loss_of(state: TrainState, batch: Any) -> Any:
    """Return a function of params that computes the training loss and the new statistics."""

    def loss_fn(params: Any) -> Any:
        out, updates = state.apply_fn(
            {"params": params, "batch_stats": state.batch_stats},
            batch["image"],
            train=True,
            mutable=["batch_stats"],
        )
        return jnp.mean((out.reshape(-1) - batch["label"]) ** 2), updates

    return loss_fn


def gradients(state: TrainState, batch: Any) -> Any:
    return jax.value_and_grad(loss_of(state, batch), has_aux=True)(state.params)


def train_step(state: TrainState, batch: Any) -> Any:
    (loss, updates), grads = gradients(state, batch)
    state = state.apply_gradients(grads=grads)
    return state.replace(batch_stats=updates["batch_stats"]), {"loss": loss}


def eval_step(state: TrainState, batch: Any) -> Any:
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    out = state.apply_fn(variables, batch["image"], train=False)
    return {"loss": jnp.mean((out.reshape(-1) - batch["label"]) ** 2)}


@cache
def reference_step() -> Any:
    """Return the state after the reference's step, its info and the loss evaluated then."""
    _, after, info = one_step(reference.sgd())
    return after, info, reference.sgd().evaluate(after, CASE.x, CASE.y)


def assert_is_the_reference_step(subject: Subject, rtol: float = 1e-6) -> None:
    """Fail unless ``subject`` agrees with the reference from the same initial state."""
    before, after, info = one_step(subject)
    expected, expected_info, expected_loss = reference_step()
    for actual, wanted in (
        (after.params, expected.params),
        (after.batch_stats, expected.batch_stats),
        (info.loss, expected_info.loss),
        (info.grads, expected_info.grads),
        (subject.evaluate(after, CASE.x, CASE.y), expected_loss),
    ):
        jax.tree_util.tree_map(
            lambda a, e: np.testing.assert_allclose(a, e, rtol=rtol, atol=rtol), actual, wanted
        )
    assert jax.tree_util.tree_structure(before) == jax.tree_util.tree_structure(after)


def test_a_loop_of_ones_own_is_seen_whole() -> None:
    """Loss, gradients, statistics and evaluation of the canonical loop equal the reference's."""
    subject = adapt(create, train_step, eval_step, features=3)
    assert_is_the_reference_step(subject)
    assert subject.momentum == reference.MOMENTUM
    assert "lr" in subject.capabilities
    assert subject.exempt == {}
    before, _, info = one_step(subject)
    assert subject.optimizer is not None
    updates, _ = subject.optimizer(0.5).update(info.grads, before.opt_state, before.params)
    kernel = updates["Dense_1"]["kernel"]
    np.testing.assert_allclose(kernel, -0.5 * info.grads["Dense_1"]["kernel"])


@pytest.mark.parametrize(
    "wrap",
    [jax.jit, partial(jax.jit, donate_argnums=0), partial(jax.pmap, axis_name="batch")],
    ids=["jit", "donating", "pmap"],
)
def test_compiled_steps_are_looked_into(wrap: Any) -> None:
    """A compiled step gives the same subject, also if it donates its state."""
    subject = adapt(create, wrap(train_step), wrap(eval_step), features=3)
    assert_is_the_reference_step(subject)
    before, _, _ = one_step(subject)
    for _ in range(2):
        subject.step(before, CASE.x, CASE.y, CASE.lr)
    assert subject.layer_inputs is not None


def test_compiled_methods_are_looked_into() -> None:
    """A trainer's method that is compiled with a static ``self`` gives the same subject."""

    class Trainer:
        @partial(jax.jit, static_argnums=0)
        def train_step(self, state: TrainState, batch: Any) -> Any:
            return train_step(state, batch)

        @partial(jax.jit, static_argnums=0)
        def eval_step(self, state: TrainState, batch: Any) -> Any:
            return eval_step(state, batch)

    trainer = Trainer()
    subject = adapt(create, trainer.train_step, trainer.eval_step, features=3)
    assert_is_the_reference_step(subject)
    assert subject.name == "train_state:train_step"


def test_an_average_over_devices_runs_as_one_shard() -> None:
    """The axis of a ``pmap`` is found from JAX's error about an unbound axis."""

    def averaged(state: TrainState, batch: Any) -> Any:
        (loss, updates), grads = gradients(state, batch)
        state = state.apply_gradients(grads=jax.lax.pmean(grads, axis_name="devices"))
        statistics = jax.lax.pmean(updates["batch_stats"], "devices")
        return state.replace(batch_stats=statistics), jax.lax.pmean({"loss": loss}, "devices")

    subject = adapt(create, averaged, eval_step, features=3)
    assert_is_the_reference_step(subject)
    before, _, _ = one_step(subject)
    assert subject.layer_inputs is not None
    shown = subject.layer_inputs(before, CASE.x, CASE.y)
    assert shown["BatchNorm_0"].value.shape == (5, reference.HIDDEN)


def test_parameters_are_filled_by_name() -> None:
    """A step may take inputs, targets and a key separately, and return only the loss."""

    def apart(state: TrainState, x: Any, y: Any, dropout_rng: Any) -> Any:
        state, metrics = train_step(state, {"image": x, "label": y})
        return metrics["loss"] + 0 * jax.random.normal(dropout_rng), state

    def judge(state: TrainState, x: Any, y: Any) -> Any:
        return eval_step(state, {"image": x, "label": y})["loss"]

    subject = adapt(create, apart, judge, features=3)
    assert_is_the_reference_step(subject)
    before, after, _ = one_step(subject)
    assert np.any(before.extra["key"] != after.extra["key"])


def test_what_cannot_be_told_is_asked_for() -> None:
    """A parameter of unknown meaning is refused, with the code to bind it."""

    def configured(rng: Any, config: Any) -> Any:
        return create(rng, config.lr)

    with pytest.raises(
        ValueError, match=r"what to pass as 'config'.*functools.partial\(create, config="
    ):
        adapt(configured, train_step, eval_step)


def test_a_loss_is_needed_in_evaluation_only() -> None:
    """Without a training loss its laws are exempt; without an eval loss there is an error."""

    def silent(state: TrainState, batch: Any) -> Any:
        return train_step(state, batch)[0]

    before, after, info = one_step(adapt(create, silent, eval_step, features=3))
    assert info.loss is None
    assert np.any(before.params["Dense_0"]["kernel"] != after.params["Dense_0"]["kernel"])
    with pytest.raises(ValueError, match="eval_step reports no loss"):
        adapt(create, train_step, lambda state, batch: {"accuracy": 1.0}, features=3)


def test_a_loss_by_another_name_is_read() -> None:
    """The loss is given by a key, or a function of (report, batch)."""

    def renamed(state: TrainState, batch: Any) -> Any:
        state, metrics = train_step(state, batch)
        return state, {"train_mse": metrics["loss"]}

    def predictions(state: TrainState, batch: Any) -> Any:
        variables = {"params": state.params, "batch_stats": state.batch_stats}
        return state.apply_fn(variables, batch["image"], train=False)

    subject = adapt(
        create,
        renamed,
        predictions,
        loss="train_mse",
        eval_loss=lambda out, batch: jnp.mean((out.reshape(-1) - batch["label"]) ** 2),
        features=3,
    )
    assert_is_the_reference_step(subject)
    with pytest.raises(ValueError, match="reports no 'mse'; it reports the keys 'train_mse'"):
        adapt(create, renamed, eval_step, loss="mse", features=3)


def test_an_eval_step_that_returns_a_state_shows_it() -> None:
    """The state after evaluation is known if eval_step returns it, as in Flax's guide."""

    def both(state: TrainState, batch: Any) -> Any:
        return state, eval_step(state, batch)

    shown = adapt(create, train_step, both, features=3)
    assert shown.after_eval is not None
    _, after, _ = one_step(shown)
    left = shown.after_eval(after, CASE.x, CASE.y)
    assert jax.tree_util.tree_all(jax.tree_util.tree_map(np.array_equal, left, after))
    assert adapt(create, train_step, eval_step, features=3).after_eval is None


@pytest.mark.parametrize("share", [0.01, 5e-5])
def test_a_penalty_is_told_from_a_wrong_gradient(share: float) -> None:
    """Weight decay in the loss, strong or weak, excuses the law of the gradient.

    A wrong gradient does not.
    """

    def penalised(state: TrainState, batch: Any) -> Any:
        (loss, updates), grads = gradients(state, batch)
        decay = jax.grad(lambda p: share * sum(jnp.sum(w**2) for w in jax.tree_util.tree_leaves(p)))
        grads = jax.tree_util.tree_map(jnp.add, grads, decay(state.params))
        state = state.apply_gradients(grads=grads)
        return state.replace(batch_stats=updates["batch_stats"]), {"loss": loss}

    def reversed_step(state: TrainState, batch: Any) -> Any:
        (loss, updates), grads = gradients(state, batch)
        state = state.apply_gradients(grads=jax.tree_util.tree_map(jnp.negative, grads))
        return state.replace(batch_stats=updates["batch_stats"]), {"loss": loss}

    law = "gradients_are_gradients_of_the_loss"
    assert "penalty" in adapt(create, penalised, eval_step, features=3).exempt[law]
    assert law not in adapt(create, reversed_step, eval_step, features=3).exempt


def test_a_schedule_inside_leaves_no_rate_to_set() -> None:
    """The step counter is in extra, and the laws about the learning rate are exempt."""

    def scheduled(rng: Any) -> TrainState:
        state = create(rng, 0.1)
        # Arrays in the schedule, as users have them: made while create runs.
        base = jnp.float32(0.1) * 2
        tx = optax.sgd(lambda step: base / (1 + step))
        return state.replace(tx=tx, opt_state=tx.init(state.params))

    subject = adapt(scheduled, train_step, eval_step, features=3)
    assert "lr" not in subject.capabilities
    _, after, info = one_step(subject)
    assert after.extra["fields"] == {"step": 1}
    assert info.grads is not None


def test_a_rate_kept_in_the_optimizers_state_is_not_set_from_outside() -> None:
    """``inject_hyperparams`` uses the learning rate with which the state was created."""

    def injected(rng: Any, lr: float) -> TrainState:
        state = create(rng, lr)
        tx = optax.inject_hyperparams(optax.sgd)(learning_rate=lr)
        return state.replace(tx=tx, opt_state=tx.init(state.params))

    assert "lr" not in adapt(injected, train_step, eval_step, features=3).capabilities


def test_an_optimizer_of_ones_own_choice_can_be_probed() -> None:
    """A ``create`` that takes the optimizer can be called with another one."""

    def chosen(rng: Any, tx: Any) -> TrainState:
        state = create(rng, 0.0)
        return state.replace(tx=tx, opt_state=tx.init(state.params))

    subject = adapt(chosen, train_step, eval_step, features=3)
    assert_is_the_reference_step(subject)
    assert subject.with_optimizer is not None
    probed = subject.with_optimizer(lambda lr: optax.sgd(lr, momentum=0.9))
    assert jax.tree_util.tree_leaves(one_step(probed)[0].opt_state)


def test_a_step_may_look_into_the_optimizers_state() -> None:
    """A step may read opt_state: opt_state and gradients are found all the same."""

    def momentum(rng: Any) -> TrainState:
        state = create(rng, 0.1)
        tx = optax.sgd(0.1, momentum=0.9)
        return state.replace(tx=tx, opt_state=tx.init(state.params))

    def looking(state: TrainState, batch: Any) -> Any:
        state, metrics = train_step(state, batch)
        return state, {**metrics, "trace": jnp.sum(state.opt_state[0].trace["Dense_1"]["kernel"])}

    subject = adapt(momentum, looking, eval_step, features=3)
    _, after, info = one_step(subject)
    np.testing.assert_array_equal(
        info.grads["Dense_1"]["kernel"], after.opt_state[0].trace["Dense_1"]["kernel"]
    )
    assert subject.optimizer is not None


def test_dynamic_loss_scaling_is_carried() -> None:
    """The loss scale is in extra, and the observed gradients are unscaled."""

    class Scaled(TrainState):
        scale: Any

    def scaled(rng: Any, lr: float) -> Scaled:
        state = create(rng, lr)
        return Scaled.create(
            apply_fn=state.apply_fn,
            params=state.params,
            batch_stats=state.batch_stats,
            tx=state.tx,
            scale=dynamic_scale.DynamicScale(),
        )

    def step(state: Scaled, batch: Any) -> Any:
        grad_fn = state.scale.value_and_grad(loss_of(state, batch), has_aux=True)
        scale, finite, (loss, updates), grads = grad_fn(state.params)
        after = state.apply_gradients(grads=grads)
        keep = partial(jax.tree_util.tree_map, partial(jnp.where, finite))
        after = after.replace(
            params=keep(after.params, state.params),
            opt_state=keep(after.opt_state, state.opt_state),
        )
        return after.replace(batch_stats=updates["batch_stats"], scale=scale), {"loss": loss}

    subject = adapt(scaled, step, eval_step, features=3)
    assert_is_the_reference_step(subject, rtol=1e-5)
    before, _, _ = one_step(subject)
    assert set(before.extra["fields"]) == {"step", "scale"}


def test_dropout_is_known_by_what_the_step_draws() -> None:
    """If the training step draws random numbers, the laws about rows are exempt."""

    class Noisy(nn.Module):
        @nn.compact
        def __call__(self, x: Any, train: bool) -> Any:
            x = nn.BatchNorm(use_running_average=not train)(nn.Dense(4)(x))
            return nn.Dense(1)(nn.Dropout(0.5, deterministic=not train)(x))

    def noisy(rng: Any, lr: float) -> TrainState:
        model = Noisy()
        variables = model.init(rng, jnp.ones((1, 3)), train=False)
        return TrainState.create(
            apply_fn=model.apply,
            params=variables["params"],
            batch_stats=variables["batch_stats"],
            tx=optax.sgd(lr),
        )

    def step(state: TrainState, batch: Any, rng: Any) -> Any:
        drawing = state.replace(apply_fn=partial(state.apply_fn, rngs={"dropout": rng}))
        (loss, updates), grads = gradients(drawing, batch)
        state = state.apply_gradients(grads=grads)
        return state.replace(batch_stats=updates["batch_stats"]), {"loss": loss}

    exempt = adapt(noisy, step, eval_step, features=3).exempt
    assert "row_order_changes_nothing" in exempt
    assert "eval_rows_are_independent" not in exempt


class TestMistakes:
    def test_a_second_mutable_pass_is_no_declared_sharing(self) -> None:
        """A layer that two forward passes of a step update has the declared momentum once."""

        def twice(state: TrainState, batch: Any) -> Any:
            state, metrics = train_step(state, batch)
            return train_step(state, batch)[0], metrics

        assert adapt(create, twice, eval_step, features=3).momentum == reference.MOMENTUM

    def test_a_forgotten_mutable_is_named_with_the_users_line(self) -> None:
        """The message has the mistake, its fix and the line in this file."""

        def forgetful(state: TrainState, batch: Any) -> Any:
            variables = {"params": state.params, "batch_stats": state.batch_stats}
            out = state.apply_fn(variables, batch["image"], train=True)  # here
            return state, {"loss": jnp.mean((out.reshape(-1) - batch["label"]) ** 2)}

        with pytest.raises(SubjectError, match="batch_stats was not declared mutable") as caught:
            adapt(create, forgetful, eval_step, features=3)
        path, _, line = caught.value.where.rpartition(":")
        assert path == __file__
        with open(path) as source:
            assert source.readlines()[int(line) - 1].endswith("# here\n")

    def test_a_step_without_a_state_is_refused(self) -> None:
        """A step that returns no state is refused."""
        with pytest.raises(ValueError, match="train_step does not return a TrainState"):
            adapt(create, lambda state, batch: {"loss": 0.0}, eval_step, features=3)

    def test_a_state_without_the_field_has_no_statistics(self) -> None:
        """Flax's own TrainState has no field for statistics; the message says so."""

        def bare(rng: Any, lr: float) -> Any:
            state = create(rng, lr)
            return train_state.TrainState.create(
                apply_fn=state.apply_fn, params=state.params, tx=state.tx
            )

        with pytest.raises(SubjectError, match="no field for the running statistics"):
            adapt(bare, train_step, eval_step, features=3)
