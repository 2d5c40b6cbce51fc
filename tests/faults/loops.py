"""Faults of whole training loops, each with a correct twin.

A pair is one function, whose argument says whether to make the mistake.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax.training.train_state import TrainState

import bnverify
from bnverify import Subject
from bnverify.adapters.batches import rows
from tests.faults.catalogue import Fault
from tests.faults.steps import mapped

FEATURES = 2


class Net(nn.Module):
    """Two blocks of Dense, BatchNorm and tanh, and a Dense: x (N, 2) -> (N,).

    Attributes:
        rests: whether the first block uses its running statistics in training, too.
        dropout: the fraction of units that are dropped.
        axis_name: the mapped axis over which BatchNorm takes its moments.
    """

    rests: bool = False
    dropout: float = 0.0
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: Any, train: bool, mask: Any = None) -> Any:
        """Return the predictions; masked rows are not in the moments."""
        for name in ("backbone", "neck"):
            x = nn.Dense(3, use_bias=False, name=name)(x)
            norm = nn.BatchNorm(
                use_running_average=not train or (self.rests and name == "backbone"),
                momentum=0.9,
                axis_name=self.axis_name,
                name=f"{name}_norm",
            )
            x = norm(x) if mask is None else norm(x, mask=mask[:, None])
            x = nn.Dropout(self.dropout, deterministic=not train)(jnp.tanh(x))
        return nn.Dense(1, name="head")(x)[..., 0]


class Images(nn.Module):
    """Conv, BatchNorm, relu, and a Dense on images of 3 by 2: x (N, 2) -> (N,).

    Attributes:
        axis: the feature axis of BatchNorm.
        channels_first: whether the features are moved to axis 1 before it.
    """

    axis: int
    channels_first: bool = False

    @nn.compact
    def __call__(self, x: Any, train: bool) -> Any:
        """Return the predictions."""
        x = jnp.stack([x, x**2, jnp.sin(x)], 1)[..., None]
        x = nn.relu(nn.Conv(4, (2, 2), use_bias=False)(x))
        x = jnp.moveaxis(x, 3, 1) if self.channels_first else x
        norm = nn.BatchNorm(use_running_average=not train, momentum=0.9, axis=self.axis)
        return nn.Dense(1)(norm(x).reshape(len(x), -1))[:, 0]


class Sequence(nn.Module):
    """Dense, BatchNorm and tanh along a sequence of 3, and a Dense: x (N, 2) -> (N,).

    Attributes:
        axis: the feature axis of BatchNorm.
    """

    axis: int

    @nn.compact
    def __call__(self, x: Any, train: bool) -> Any:
        """Return the predictions."""
        x = nn.Dense(4)(jnp.stack([x, x**2, jnp.sin(x)], 1))
        norm = nn.BatchNorm(use_running_average=not train, momentum=0.9, axis=self.axis)
        return nn.Dense(1)(jnp.tanh(norm(x)).reshape(len(x), -1))[:, 0]


class LoopState(TrainState):
    """A train state with running statistics and other values of a loop."""

    batch_stats: Any
    kept: Any


Pass = Callable[..., tuple[Any, Any]]


def run(state: Any, params: Any, x: Any, *, stats: Any = None, **options: Any) -> Any:
    """Return the outputs of a training pass, and the new statistics."""
    given = {"params": params, "batch_stats": state.batch_stats if stats is None else stats}
    out, new = state.apply_fn(given, x, train=True, mutable=["batch_stats"], **options)
    return out, new["batch_stats"]


def squared(out: Any, y: Any) -> Any:
    """Return the squared errors of the rows, (N,)."""
    return (out - y) ** 2


def plain(state: Any, params: Any, x: Any, y: Any) -> Any:
    """Return the training loss of one pass, and the new statistics."""
    out, stats = run(state, params, x)
    return squared(out, y).mean(), stats


def evaluated(state: Any, x: Any, y: Any) -> Any:
    """Return the squared errors of the rows in eval mode, (N,)."""
    given = {"params": state.params, "batch_stats": state.batch_stats}
    return squared(state.apply_fn(given, x, train=False), y)


def by_gradient(state: Any, x: Any, y: Any, loss_of: Pass) -> Any:
    """Return the state after one update along the gradient of a loss, and the loss."""
    (loss, stats), grads = jax.value_and_grad(
        lambda params: loss_of(state, params, x, y), has_aux=True
    )(state.params)
    return state.apply_gradients(grads=grads, batch_stats=stats), loss


def loop(
    *,
    net: nn.Module | None = None,
    tx: Callable[[Any], Any] = optax.sgd,
    start: Callable[[Any, Any], Any] = lambda variables, key: variables,
    kept: Callable[[Any, Any], Any] = lambda variables, key: {},
    loss: Pass = plain,
    step: Callable[..., Any] = by_gradient,
    follow: Callable[[Any], Any] = lambda state: state,
    eval_loss: Callable[..., Any] = lambda state, x, y: evaluated(state, x, y).mean(),
    **options: Any,
) -> Subject:
    """Return a training loop as a Subject; a fault and its twin replace parts of it.

    Args:
        net: the model.
        tx: learning rate -> the optimizer.
        start: (the initial variables, their key) -> the variables to start from.
        kept: (the initial variables, another key) -> other values in the state.
        loss: (state, params, x, y) -> the training loss and the new statistics.
        step: (state, x, y, loss) -> the state after the update, and the loss.
        follow: the state after the update -> the state that the step returns.
        eval_loss: (state, x, y) -> the loss in eval mode.
        **options: see ``bnverify.train_state``.
    """
    model = net or Net()

    def create(rng: Any, lr: Any = 0.1) -> LoopState:
        first, second = jax.random.split(rng)
        variables = start(model.init(first, jnp.zeros((1, FEATURES)), train=False), first)
        return LoopState.create(  # type: ignore[no-any-return,no-untyped-call] # flax's
            apply_fn=model.apply,
            params=variables["params"],
            tx=tx(lr),
            batch_stats=variables["batch_stats"],
            kept=kept(variables, second),
        )

    def train_step(state: LoopState, x: Any, y: Any) -> Any:
        after, value = step(state, x, y, loss)
        return follow(after), value

    return bnverify.train_state(
        create, train_step, eval_loss, batch=rows, features=FEATURES, **options
    )


# The faults.

LOOP_FAULTS: dict[str, Fault] = {}
"""Name -> the wrong loop."""
LOOP_CONTROLS: dict[str, Callable[[], Subject]] = {}
"""Name -> its correct twin."""

Pair = Callable[[bool], Subject]


def pair(mistake: str, law: str) -> Callable[[Pair], Pair]:
    """Add the decorated function: with True it returns the fault, with False the twin.

    Args:
        mistake: a name in ``bnverify.mistakes``.
        law: the law that must detect the fault.
    """

    def entered(make: Pair) -> Pair:
        name, sentence = make.__name__, inspect.getdoc(make) or ""
        LOOP_FAULTS[name] = Fault(name, "loops", mistake, sentence, partial(make, True), law)
        LOOP_CONTROLS[name] = partial(make, False)
        return make

    return entered


# Random numbers.

draws = pair("same_key_in_each_step", "each_step_draws_anew")


def with_dropout(key_of: Callable[[Any], Any], **parts: Any) -> Subject:
    """Return a loop with dropout, whose key comes from the state."""

    def loss(state: Any, params: Any, x: Any, y: Any) -> Any:
        out, stats = run(state, params, x, rngs={"dropout": key_of(state)})
        return squared(out, y).mean(), stats

    kept = parts.pop("kept", lambda variables, key: {"key": key})
    return loop(net=Net(dropout=0.5), loss=loss, kept=kept, **parts)


@draws
def dropout_key_unsplit(wrong: bool) -> Subject:
    """The key in the state is never changed."""
    return with_dropout(
        lambda s: s.kept["key"] if wrong else jax.random.fold_in(s.kept["key"], s.step)
    )


@draws
def dropout_key_constant(wrong: bool) -> Subject:
    """The key is a constant in the code."""

    def key_of(state: Any) -> Any:
        key = jax.random.PRNGKey(0)
        return key if wrong else jax.random.fold_in(key, state.step)

    return with_dropout(key_of)


@draws
def key_split_and_not_kept(wrong: bool) -> Subject:
    """The key is split in each step, but the new key is not kept."""

    def follow(state: Any) -> Any:
        key = jax.random.split(state.kept["key"])[0]
        return state if wrong else state.replace(kept={"key": key})

    return with_dropout(lambda s: jax.random.split(s.kept["key"])[1], follow=follow)


@draws
def noise_of_the_key_of_init(wrong: bool) -> Subject:
    """The noise of the first step is drawn with the key of the initial params."""

    def kept(variables: Any, key: Any) -> Any:
        first, second = jax.random.split(key)
        offset = jax.random.normal(first, (FEATURES,))
        return {"key": first if wrong else second, "offset": offset}

    def loss(state: Any, params: Any, x: Any, y: Any) -> Any:
        noise = jax.random.normal(state.kept["key"], x.shape)
        return plain(state, params, x + state.kept["offset"] + 0.1 * noise, y)

    def follow(state: Any) -> Any:
        return state.replace(kept={**state.kept, "key": jax.random.split(state.kept["key"])[0]})

    return loop(kept=kept, loss=loss, follow=follow)


# Frozen layers.

moving = pair("frozen_statistics_move", "frozen_statistics_stay")


def labels(params: Any) -> Any:
    """Return the label of each param: trained or, in the backbone, frozen."""
    return {
        name: mapped(
            lambda _, name=name: "freeze" if name.startswith("backbone") else "train", tree
        )
        for name, tree in params.items()
    }


def is_frozen(params: Any) -> Any:
    """Return, for each param, whether it is in the backbone."""
    return mapped(lambda label: label == "freeze", labels(params))


def groups(lr: Any) -> Any:
    """Return SGD for everything except the backbone."""
    return optax.multi_transform({"train": optax.sgd(lr), "freeze": optax.set_to_zero()}, labels)


def stopped(state: Any, params: Any, x: Any, y: Any) -> Any:
    """Return the loss with the backbone's gradient stopped, and the new statistics."""
    still = {
        name: jax.lax.stop_gradient(tree) if name.startswith("backbone") else tree
        for name, tree in params.items()
    }
    return plain(state, still, x, y)


@moving
def backbone_frozen_but_for_its_norm(wrong: bool) -> Subject:
    """The optimizer does not change the backbone, but its BatchNorm updates its statistics."""
    return loop(net=Net(rests=not wrong), tx=groups)


@moving
def backbone_behind_a_stopped_gradient(wrong: bool) -> Subject:
    """The backbone's gradient is stopped, but its BatchNorm updates its statistics."""
    return loop(net=Net(rests=not wrong), loss=stopped)


@moving
def backbone_updates_masked_to_zero(wrong: bool) -> Subject:
    """The backbone's updates are set to 0, but its BatchNorm updates its statistics."""

    def tx(lr: Any) -> Any:
        return optax.chain(optax.adam(lr), optax.masked(optax.set_to_zero(), is_frozen))

    return loop(net=Net(rests=not wrong), tx=tx)


decaying = pair("frozen_params_move", "frozen_params_stay")


@decaying
def decay_of_a_stopped_gradient(wrong: bool) -> Subject:
    """The backbone's gradient is stopped, but AdamW's weight decay shrinks its params."""

    def tx(lr: Any) -> Any:
        trains = (
            None if wrong else lambda params: mapped(lambda frozen: not frozen, is_frozen(params))
        )
        return optax.adamw(lr, weight_decay=0.1, mask=trains)

    return loop(net=Net(rests=True), loss=stopped, tx=tx)


@decaying
def declared_frozen_and_trained(wrong: bool) -> Subject:
    """The backbone is declared frozen, but the optimizer trains all params."""
    return loop(net=Net(rests=True), tx=optax.sgd if wrong else groups, frozen=["backbone*"])


@decaying
def decay_added_after_the_groups(wrong: bool) -> Subject:
    """The backbone's updates are set to 0, but weight decay is added to all params afterwards."""

    def tx(lr: Any) -> Any:
        decay = optax.add_decayed_weights(-0.01)
        return optax.chain(groups(lr), decay) if wrong else groups(lr)

    return loop(net=Net(rests=True), tx=tx, frozen=["backbone*"])


@pair("frozen_gradients_scale_others", "frozen_gradients_scale_nothing")
def clip_around_the_groups(wrong: bool) -> Subject:
    """Gradients are clipped by the norm of all of them, including the frozen backbone's."""

    def tx(lr: Any) -> Any:
        clip = optax.clip_by_global_norm(1.0)
        trains = optax.sgd(lr) if wrong else optax.chain(clip, optax.sgd(lr))
        both = optax.multi_transform({"train": trains, "freeze": optax.set_to_zero()}, labels)
        return optax.chain(clip, both) if wrong else both

    return loop(net=Net(rests=True), tx=tx)


# Copies of the params.

following = pair("stale_statistics", "a_copy_of_the_params_takes_their_statistics")


def with_a_copy(name: str, follow: Callable[[Any], Any]) -> Subject:
    """Return a loop whose targets are averaged with the outputs of a copy of the model."""

    def kept(variables: Any, key: Any) -> Any:
        del key
        return {
            f"{name}_params": variables["params"],
            f"{name}_batch_stats": variables["batch_stats"],
        }

    def loss(state: Any, params: Any, x: Any, y: Any) -> Any:
        held = [state.kept[f"{name}_{part}"] for part in ("params", "batch_stats")]
        goal = state.apply_fn(
            dict(zip(("params", "batch_stats"), held, strict=True)), x, train=False
        )
        out, stats = run(state, params, x)
        return squared(out, 0.5 * y + 0.5 * jax.lax.stop_gradient(goal)).mean(), stats

    return loop(kept=kept, loss=loss, follow=follow)


@following
def target_params_averaged_alone(wrong: bool) -> Subject:
    """A target network's params are averaged, but its statistics remain the initial ones."""

    def follow(state: Any) -> Any:
        held = state.kept
        params = optax.incremental_update(state.params, held["target_params"], 0.1)
        stats = held["target_batch_stats"] if wrong else state.batch_stats
        return state.replace(kept={"target_params": params, "target_batch_stats": stats})

    return with_a_copy("target", follow)


@following
def target_params_copied_alone(wrong: bool) -> Subject:
    """Every second step, only the params are copied to the target network."""

    def follow(state: Any) -> Any:
        def copied(held: Any) -> Any:
            stats = held["target_batch_stats"] if wrong else state.batch_stats
            return {"target_params": state.params, "target_batch_stats": stats}

        now = state.step % 2 == 0
        return state.replace(kept=jax.lax.cond(now, copied, lambda held: held, state.kept))

    return with_a_copy("target", follow)


@following
def average_of_the_params_alone(wrong: bool) -> Subject:
    """The params are averaged, but not the statistics kept with the average."""

    def follow(state: Any) -> Any:
        def averaged(old: Any, new: Any) -> Any:
            return mapped(lambda a, b: 0.99 * a + 0.01 * b, old, new)

        held = state.kept
        params = averaged(held["teacher_params"], state.params)
        old = held["teacher_batch_stats"]
        stats = old if wrong else averaged(old, state.batch_stats)
        return state.replace(kept={"teacher_params": params, "teacher_batch_stats": stats})

    return with_a_copy("teacher", follow)


@following
def average_kept_as_variables(wrong: bool) -> Subject:
    """The average is a dict of variables, whose statistics remain the initial ones."""

    def kept(variables: Any, key: Any) -> Any:
        del key
        return {"average": dict(variables)}

    def follow(state: Any) -> Any:
        old = state.kept["average"]
        new = {"params": state.params, "batch_stats": state.batch_stats}
        average = mapped(lambda a, b: 0.9 * a + 0.1 * b, old, new)
        if wrong:
            average = {**average, "batch_stats": old["batch_stats"]}
        return state.replace(kept={"average": average})

    def loss(state: Any, params: Any, x: Any, y: Any) -> Any:
        goal = jax.lax.stop_gradient(state.apply_fn(state.kept["average"], x, train=False))
        out, stats = run(state, params, x)
        return squared(out, 0.5 * y + 0.5 * goal).mean(), stats

    return loop(kept=kept, loss=loss, follow=follow)


# A pretrained start.

starting = pair("fresh_statistics", "trained_params_come_with_their_statistics")


def trained() -> Any:
    """Return the variables of a trained model, as arrays."""
    variables = Net().init(jax.random.PRNGKey(7), jnp.zeros((1, FEATURES)), train=False)
    return mapped(lambda leaf: jnp.asarray(leaf) * 0.5 + 0.25, variables)


@starting
def params_restored_alone(wrong: bool) -> Subject:
    """The params are those of a trained model, the statistics are the initial ones."""
    old = trained()
    return loop(
        start=lambda variables, key: {**variables, "params": old["params"]} if wrong else old
    )


@starting
def backbone_restored_alone(wrong: bool) -> Subject:
    """The backbone's params are those of a trained model, its statistics are the initial ones."""
    old = trained()

    def start(variables: Any, key: Any) -> Any:
        del key
        parts = ("params",) if wrong else ("params", "batch_stats")
        taken = {part: {k: v for k, v in old[part].items() if "backbone" in k} for part in parts}
        return {part: {**tree, **taken.get(part, {})} for part, tree in variables.items()}

    return loop(start=start)


# Several passes.

dropping = pair("pass_dropped", "every_pass_reaches_the_statistics")
repeating = pair("ema_applied_twice", "each_batch_is_folded_in_once")


@dropping
def second_view_overwrites(wrong: bool) -> Subject:
    """Two views of the rows both start from the old statistics; the second's are kept."""

    def loss(state: Any, params: Any, x: Any, y: Any) -> Any:
        one, first = run(state, params, x)
        two, second = run(state, params, x[:, ::-1], stats=None if wrong else first)
        return (squared(one, y) + squared(one, two)).mean(), second

    return loop(loss=loss)


@dropping
def second_batch_forgotten(wrong: bool) -> Subject:
    """The statistics of an unlabelled batch, which follows a labelled one, are dropped."""

    def loss(state: Any, params: Any, x: Any, y: Any) -> Any:
        one, first = run(state, params, x)
        two, second = run(state, params, 2.0 * x + 1.0, stats=first)  # stands for other rows
        return squared(one, y).mean() + (two**2).mean(), first if wrong else second

    return loop(loss=loss)


@dropping
def parts_from_old_statistics(wrong: bool) -> Subject:
    """Gradients are accumulated in a Python loop; each part starts from the statistics before the step."""

    def step(state: Any, x: Any, y: Any, loss: Any) -> Any:
        half, stats, found = x.shape[0] // 2, state.batch_stats, []
        for part in (slice(half), slice(half, None)):
            start = state.batch_stats if wrong else stats
            (value, stats), grads = part_of(state, state.params, start, x[part], y[part])
            found.append((value, grads))
        value, grads = mapped(lambda one, two: (one + two) / 2, *found)
        return state.apply_gradients(grads=grads, batch_stats=stats), value

    return loop(step=step, rows=2)


@repeating
def sharpness_pass_folded_in(wrong: bool) -> Subject:
    """Both passes of sharpness-aware minimisation update the statistics."""

    def step(state: Any, x: Any, y: Any, loss: Any) -> Any:
        def passed(params: Any, stats: Any) -> Any:
            out, new = run(state, params, x, stats=stats)
            return squared(out, y).mean(), new

        gradient = jax.value_and_grad(passed, has_aux=True)
        (value, first), grads = gradient(state.params, state.batch_stats)
        there = mapped(lambda p, g: p + 0.05 * g, state.params, grads)
        (_, second), grads = gradient(there, first)
        stats = second if wrong else first
        return state.apply_gradients(grads=grads, batch_stats=stats), value

    return loop(step=step)


@repeating
def two_dropout_masks_folded_in(wrong: bool) -> Subject:
    """Two passes over one batch, with different dropout masks, both update the statistics."""

    def loss(state: Any, params: Any, x: Any, y: Any) -> Any:
        key = jax.random.fold_in(state.kept["key"], state.step)
        one, two = ({"dropout": each} for each in jax.random.split(key))
        left, first = run(state, params, x, rngs=one)
        right, second = run(state, params, x, stats=first, rngs=two)
        value = squared(left, y) + squared(right, y) + squared(left, right)
        return value.mean(), second if wrong else first

    return loop(net=Net(dropout=0.5), loss=loss, kept=lambda variables, key: {"key": key})


alone = pair("rows_normalised_alone", "unlike_rows_have_a_variance")


def row_by_row(wrong: bool, joined: Callable[[Any], Any]) -> Subject:
    """Return a loop that maps its model over the rows of a batch."""
    axis = None if wrong else "batch"

    def loss(state: Any, params: Any, x: Any, y: Any) -> Any:
        out, stats = jax.vmap(partial(run, state, params), axis_name=axis)(x)
        return squared(out, y).mean(), mapped(joined, stats)

    def eval_loss(state: Any, x: Any, y: Any) -> Any:
        given = {"params": state.params, "batch_stats": state.batch_stats}
        out = jax.vmap(lambda row: state.apply_fn(given, row, train=False))(x)
        return squared(out, y).mean()

    return loop(net=Net(axis_name=axis), loss=loss, eval_loss=eval_loss)


@alone
def rows_mapped_and_averaged(wrong: bool) -> Subject:
    """BatchNorm sees one row under vmap, and the rows' statistics are averaged."""
    return row_by_row(wrong, lambda leaf: leaf.mean(0))


@alone
def rows_mapped_and_the_first_kept(wrong: bool) -> Subject:
    """BatchNorm sees one row under vmap, and the first row's statistics are kept."""
    return row_by_row(wrong, lambda leaf: leaf[0])


@pair("statistics_over_the_wrong_axis", "layers_keep_the_feature_axis")
def height_normalised(wrong: bool) -> Subject:
    """BatchNorm after a convolution has axis 1, as for channels-first inputs."""
    return loop(net=Images(axis=1 if wrong else -1))


@pair("statistics_over_the_wrong_axis", "layers_keep_the_feature_axis")
def width_normalised_behind_a_transpose(wrong: bool) -> Subject:
    """Channels are moved to axis 1, but BatchNorm keeps its default axis, the last."""
    return loop(net=Images(axis=-1 if wrong else 1, channels_first=True))


@pair("statistics_over_the_wrong_axis", "layers_keep_the_feature_axis")
def time_normalised(wrong: bool) -> Subject:
    """BatchNorm after a Dense over a sequence has the time axis as its feature axis."""
    return loop(net=Sequence(axis=1 if wrong else 2))


# Masks of rows.

counting = pair("padding_in_the_denominator", "only_rows_that_count_are_counted")


def real_rows(y: Any) -> Any:
    """Return which rows are no padding; at least one row is real."""
    return (y > 0) | ~jnp.any(y > 0)


def masked(wrong: bool, of_all: Callable[[Any, Any], Any], **options: Any) -> Subject:
    """Return a loop whose loss masks some rows."""

    def reduced(losses: Any, y: Any) -> Any:
        mask = real_rows(y)
        right = jnp.sum(mask * losses) / jnp.maximum(mask.sum(), 1)
        return of_all(mask, losses) if wrong else right

    def loss(state: Any, params: Any, x: Any, y: Any) -> Any:
        out, stats = run(state, params, x, mask=real_rows(y))
        return reduced(squared(out, y), y), stats

    return loop(loss=loss, eval_loss=lambda s, x, y: reduced(evaluated(s, x, y), y), **options)


@counting
def mean_of_masked_losses(wrong: bool) -> Subject:
    """The losses of padding rows are multiplied by 0, but the mean is over all rows."""
    return masked(wrong, lambda mask, losses: jnp.mean(mask * losses))


@counting
def mean_of_selected_losses(wrong: bool) -> Subject:
    """The losses of padding rows are replaced by 0, but the mean is over all rows."""
    return masked(wrong, lambda mask, losses: jnp.where(mask, losses, 0.0).mean())


@counting
def sum_over_the_batch_size(wrong: bool) -> Subject:
    """The sum over the unmasked rows is divided by the batch size."""
    return masked(wrong, lambda mask, losses: (losses * mask).sum() / len(losses))


@pair("sum_instead_of_mean", "doubling_changes_nothing_if_draws_are_equal")
def summed_over_a_constant_under_dropout(wrong: bool) -> Subject:
    """The sum of the losses is divided by a constant, the usual batch size; the model has dropout."""

    def loss(state: Any, params: Any, x: Any, y: Any) -> Any:
        key = jax.random.fold_in(state.kept["key"], state.step)
        out, stats = run(state, params, x, rngs={"dropout": key})
        errors = squared(out, y)
        return errors.sum() / 32 if wrong else errors.mean(), stats

    return loop(net=Net(dropout=0.5), loss=loss, kept=lambda variables, key: {"key": key})


# A loss scale.


class Half(nn.Module):
    """Dense in float16, BatchNorm, relu, Dense in float16: x (N, D) -> (N,)."""

    @nn.compact
    def __call__(self, x: Any, train: bool) -> Any:
        """Return the predictions, in float32."""
        x = nn.Dense(8, dtype=jnp.float16)(x)
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9, dtype=jnp.float32)(x)
        return nn.Dense(1, dtype=jnp.float16)(nn.relu(x)).astype(jnp.float32)[:, 0]


@pair("wrong_gradient", "gradients_are_gradients_of_the_loss")
def loss_scale_not_divided_out(wrong: bool) -> Subject:
    """The loss is scaled for float16, and so is its gradient; a step with an infinite one is skipped."""

    def step(state: Any, x: Any, y: Any, loss_of: Pass) -> Any:
        scale = state.kept["scale"]

        def scaled(params: Any) -> Any:
            value, stats = loss_of(state, params, x, y)
            return value * scale, (value, stats)

        grads, (value, stats) = jax.grad(scaled, has_aux=True)(state.params)
        grads = grads if wrong else mapped(lambda g: g / scale, grads)
        leaves = jax.tree_util.tree_leaves(grads)
        finite = jnp.all(jnp.array([jnp.all(jnp.isfinite(g)) for g in leaves]))
        kept = {"scale": jnp.where(finite, scale, scale / 2)}
        after = state.apply_gradients(grads=grads, batch_stats=stats)

        def chosen(new: Any, old: Any) -> Any:
            return jnp.where(finite, new, old)

        return jax.tree_util.tree_map(chosen, after, state).replace(kept=kept), value

    def start(_variables: Any, _key: Any) -> Any:
        return {"scale": jnp.float32(2.0**10)}

    return loop(net=Half(), step=step, kept=start)


# Rows with other rows.


class Critic(nn.Module):
    """Dense, BatchNorm, relu, Dense: x (N, D) -> (N, 1)."""

    @nn.compact
    def __call__(self, x: Any, train: bool) -> Any:
        """Return the values."""
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(nn.Dense(4)(x))
        return nn.Dense(1)(nn.relu(x))


@pair("broadcast_loss", "predictions_meet_their_own_targets")
def critic_not_squeezed(wrong: bool) -> Subject:
    """Values (N, 1) minus returns (N,) broadcast, beside a ranking loss that compares all rows by design."""

    def reduced(values: Any, y: Any) -> Any:
        returns = (y - y.mean()) / (y.std() + 1)
        flat = values[:, 0]
        above = jnp.sign(returns[:, None] - returns[None, :])
        ranking = nn.softplus(-above * (flat[:, None] - flat[None, :])).mean()
        return jnp.square((values if wrong else flat) - returns).mean() + ranking

    def loss(state: Any, params: Any, x: Any, y: Any) -> Any:
        values, stats = run(state, params, x)
        return reduced(values, y), stats

    def eval_loss(state: Any, x: Any, y: Any) -> Any:
        given = {"params": state.params, "batch_stats": state.batch_stats}
        return reduced(state.apply_fn(given, x, train=False), y)

    return loop(net=Critic(), loss=loss, eval_loss=eval_loss)


@pair("padding_enters", "rows_of_weight_zero_change_nothing")
def padding_in_the_moments(wrong: bool) -> Subject:
    """Padding is masked in the loss but not in BatchNorm."""

    def reduced(losses: Any, mask: Any) -> Any:
        return jnp.sum(mask * losses) / jnp.maximum(mask.sum(), 1)

    def loss(state: Any, params: Any, x: Any, y: Any) -> Any:
        # A batch of only padding has no moments, so all its rows count.
        mask = real_rows(y)
        out, stats = run(state, params, x, mask=None if wrong else mask)
        return reduced(squared(out, y), mask), stats

    return loop(
        loss=loss,
        eval_loss=lambda s, x, y: reduced(evaluated(s, x, y), (y > 0) | ~jnp.any(y > 0)),
        weights=lambda x, y: (y > 0) | ~jnp.any(y > 0),
    )


# Batches in parts.

accumulating = pair("pass_dropped", "every_part_reaches_the_statistics")


def part_of(state: Any, params: Any, stats: Any, x: Any, y: Any) -> Any:
    """Return the loss and the new statistics of one part of a batch, and the gradient."""

    def loss(params: Any) -> Any:
        out, new = run(state, params, x, stats=stats)
        return squared(out, y).mean(), new

    return jax.value_and_grad(loss, has_aux=True)(params)


@accumulating
def accumulated_from_old_statistics(wrong: bool) -> Subject:
    """Each part of a fori_loop starts from the statistics before the step; the last part's are kept."""

    def step(state: Any, x: Any, y: Any, loss: Any) -> Any:
        half = x.shape[0] // 2
        (value, stats), grads = part_of(state, state.params, state.batch_stats, x[:half], y[:half])

        def body(i: Any, carry: Any) -> Any:
            value, stats, grads = carry
            given = (jax.lax.dynamic_slice_in_dim(each, i * half, half) for each in (x, y))
            (more, stats), other = part_of(
                state, state.params, state.batch_stats if wrong else stats, *given
            )
            return value + more, stats, mapped(jnp.add, grads, other)

        value, stats, grads = jax.lax.fori_loop(1, 2, body, (value, stats, grads))
        grads = mapped(lambda g: g / 2, grads)
        return state.apply_gradients(grads=grads, batch_stats=stats), value / 2

    return loop(step=step, rows=2)


@accumulating
def last_of_the_stacked_statistics(wrong: bool) -> Subject:
    """A scan stacks the statistics of each part, and the step keeps the last instead of their mean."""

    def step(state: Any, x: Any, y: Any, loss: Any) -> Any:
        def body(carry: Any, given: Any) -> Any:
            (value, stats), grads = part_of(state, state.params, state.batch_stats, *given)
            return mapped(jnp.add, carry, grads), (value, stats)

        zeros = mapped(jnp.zeros_like, state.params)
        split = x.reshape(3, -1, FEATURES), y.reshape(3, -1)
        grads, (values, stats) = jax.lax.scan(body, zeros, split)
        stats = (
            mapped(lambda leaf: leaf[-1], stats)
            if wrong
            else mapped(lambda leaf: leaf.mean(0), stats)
        )
        grads = mapped(lambda g: g / 3, grads)
        return state.apply_gradients(grads=grads, batch_stats=stats), values.mean()

    return loop(step=step, rows=3)


@accumulating
def first_of_the_strided_parts(wrong: bool) -> Subject:
    """Of two parts, every other row each, the scan hands on the statistics of the first."""

    def step(state: Any, x: Any, y: Any, loss: Any) -> Any:
        def body(carry: Any, given: Any) -> Any:
            stats, total, first = carry
            (value, new), grads = part_of(state, state.params, stats, *given)
            if wrong:
                new = mapped(lambda n, o: jnp.where(first, n, o), new, stats)
            return (new, mapped(jnp.add, total, grads), False), value

        start = state.batch_stats, mapped(jnp.zeros_like, state.params), True
        split = jnp.stack([x[::2], x[1::2]]), jnp.stack([y[::2], y[1::2]])
        (stats, grads, _), values = jax.lax.scan(body, start, split)
        grads = mapped(lambda g: g / 2, grads)
        return state.apply_gradients(grads=grads, batch_stats=stats), values.mean()

    return loop(step=step, rows=2)


# Teachers.

teaching = pair("teacher_in_train_mode", "teachers_predict_in_eval_mode")


def taught(teacher: Any, variables: Any, x: Any, wrong: bool) -> Any:
    """Return the predictions of a teacher, in train mode if ``wrong``."""
    if not wrong:
        return teacher.apply(variables, x, train=False)
    return teacher.apply(variables, x, train=True, mutable=["batch_stats"])[0]


@teaching
def teacher_of_the_same_class(wrong: bool) -> Subject:
    """A trained teacher in a closure, of the same class as its student, is called in train mode."""
    variables = trained()

    def loss(state: Any, params: Any, x: Any, y: Any) -> Any:
        goal = taught(Net(), variables, x, wrong)
        out, stats = run(state, params, x)
        return squared(out, 0.5 * y + 0.5 * goal).mean(), stats

    return loop(loss=loss)


@teaching
def teacher_in_the_state(wrong: bool) -> Subject:
    """A teacher of another class is in the state, which no step changes; it is called in train mode."""

    def kept(variables: Any, key: Any) -> Any:
        del variables
        return {"teacher": Critic().init(key, jnp.zeros((1, FEATURES)), train=False)}

    def step(state: Any, x: Any, y: Any, loss_of: Pass) -> Any:
        goal = taught(Critic(), state.kept["teacher"], x, wrong)[:, 0]
        return by_gradient(state, x, 0.5 * y + 0.5 * goal, loss_of)

    return loop(kept=kept, step=step)


@teaching
def two_teachers_averaged(wrong: bool) -> Subject:
    """One of two teachers, whose predictions are averaged, is called in train mode, under jit."""
    one, two = trained(), mapped(lambda leaf: 0.5 * leaf, trained())

    @jax.jit
    def goal(x: Any) -> Any:
        return 0.5 * (taught(Net(), one, x, False) + taught(Net(), two, x, wrong))

    def loss(state: Any, params: Any, x: Any, y: Any) -> Any:
        out, stats = run(state, params, x)
        return (squared(out, y) + squared(out, goal(x))).mean(), stats

    return loop(loss=loss)


# The params of optax.lookahead.

looking = pair("gradient_at_the_slow_params", "lookahead_takes_the_gradient_at_the_fast_params")


def lookahead(gradient: Callable[..., Any], inner: Callable[[Any], Any] = optax.sgd) -> Subject:
    """Return a loop with Lookahead.

    Args:
        gradient: (loss of params, params) -> the loss, the new statistics, and the gradient.
        inner: learning rate -> the optimizer of the fast params.
    """

    def start(variables: Any, key: Any) -> Any:
        del key
        return {**variables, "params": optax.LookaheadParams.init_synced(variables["params"])}

    def step(state: Any, x: Any, y: Any, loss_of: Pass) -> Any:
        (value, stats), grads = gradient(lambda p: loss_of(state, p, x, y), state.params)
        return state.apply_gradients(grads=grads, batch_stats=stats), value

    def eval_loss(state: Any, x: Any, y: Any) -> Any:
        return evaluated(state.replace(params=state.params.slow), x, y).mean()

    def tx(lr: Any) -> Any:
        return optax.lookahead(inner(lr), sync_period=3, slow_step_size=0.5)

    return loop(start=start, step=step, eval_loss=eval_loss, tx=tx)


@looking
def gradient_at_the_slow_params(wrong: bool) -> Subject:
    """The gradient is taken at the params that are used for evaluation."""

    def gradient(loss: Any, params: Any) -> Any:
        return jax.value_and_grad(loss, has_aux=True)(params.slow if wrong else params.fast)

    return lookahead(gradient)


@looking
def gradient_of_the_wrong_one_of_a_pair(wrong: bool) -> Subject:
    """The loss is differentiated with respect to the pair, but depends on its second half."""

    def gradient(loss: Any, params: Any) -> Any:
        def of_pair(pair: Any) -> Any:
            return loss(pair[1] if wrong else pair[0])

        value, grads = jax.value_and_grad(of_pair, has_aux=True)(tuple(params))
        return value, grads[1] if wrong else grads[0]

    return lookahead(gradient, optax.adam)


@looking
def gradient_at_the_slow_backbone_and_head(wrong: bool) -> Subject:
    """Both halves of the network are taken from the slow params, in a compiled function."""

    @partial(jax.jit, static_argnums=0)
    def gradient(loss: Any, params: Any) -> Any:
        at = params.slow if wrong else params.fast
        head = {name: at[name] for name in at if name == "head"}
        rest = {name: at[name] for name in at if name != "head"}

        def joined(parts: Any) -> Any:
            return loss({**parts[0], **parts[1]})

        value, grads = jax.value_and_grad(joined, has_aux=True)((rest, head))
        return value, {**grads[0], **grads[1]}

    return lookahead(gradient)


# Schedules with gradient accumulation.

scheduled = pair("schedule_counts_batches", "schedule_counts_updates")
EVERY = 2


@dataclass(frozen=True)
class Settings:
    """The settings of a training script."""

    num_batches: int = 12


@scheduled
def schedule_over_all_batches(wrong: bool) -> Subject:
    """A cosine decay has the number of batches, which is declared, as its number of updates."""
    length = 12 if wrong else 12 // EVERY

    def tx(lr: Any) -> Any:
        inner = optax.sgd(optax.cosine_decay_schedule(lr, length), momentum=0.9)
        return optax.MultiSteps(inner, EVERY)

    return loop(tx=tx, batches=12)


@scheduled
def schedule_of_the_settings(wrong: bool) -> Subject:
    """A linear decay has the number of batches in the settings as its number of updates."""
    settings = Settings()

    def tx(lr: Any) -> Any:
        length = settings.num_batches if wrong else settings.num_batches // EVERY
        inner = optax.adam(optax.linear_schedule(lr, 0.0, length))
        return optax.MultiSteps(inner, EVERY).gradient_transformation()

    return loop(tx=tx)


@scheduled
def schedule_injected(wrong: bool) -> Subject:
    """A schedule in inject_hyperparams has the number of batches as its number of updates."""
    settings = SimpleNamespace(train_batches=12)

    def tx(lr: Any) -> Any:
        length = settings.train_batches if wrong else settings.train_batches // EVERY
        rate = optax.linear_schedule(lr, 0.0, length)
        return optax.MultiSteps(optax.inject_hyperparams(optax.sgd)(learning_rate=rate), EVERY)

    return loop(tx=tx)
