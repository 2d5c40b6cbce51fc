"""The training loop behind the faults of whole loops; imported when one of them is made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax.training.train_state import TrainState

import bnverify
from bnverify.adapters.batches import rows
from bnverify.model import Subject

FEATURES = 2


class Net(nn.Module):
    """Two blocks of Dense, BatchNorm and tanh, and a Dense: x (N, 2) -> (N,).

    Attributes:
        rests: whether the first block normalises by its running values in training, too.
        dropout: how many of the units are dropped.
        axis_name: over which BatchNorm takes its moments.
    """

    rests: bool = False
    dropout: float = 0.0
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: Any, train: bool, mask: Any = None) -> Any:
        """Return the predictions; rows that are masked stay out of the moments."""
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
        axis: that BatchNorm keeps.
        channels_first: whether the features are moved to axis 1 before.
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
        axis: that BatchNorm keeps.
    """

    axis: int

    @nn.compact
    def __call__(self, x: Any, train: bool) -> Any:
        """Return the predictions."""
        x = nn.Dense(4)(jnp.stack([x, x**2, jnp.sin(x)], 1))
        norm = nn.BatchNorm(use_running_average=not train, momentum=0.9, axis=self.axis)
        return nn.Dense(1)(jnp.tanh(norm(x)).reshape(len(x), -1))[:, 0]


class LoopState(TrainState):
    """A train state with running statistics, and with whatever else a loop keeps."""

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
    """Return a training loop as a Subject; a fault, or its correct twin, replaces a part.

    Args:
        net: the model.
        tx: learning rate -> the optimizer.
        start: (the initial variables, the key they were made with) -> those to start from.
        kept: (the initial variables, another key) -> what else the state keeps.
        loss: (state, params, x, y) -> the training loss and the new statistics.
        step: (state, x, y, loss) -> the state after it, and the loss.
        follow: the state after an update -> the state that is carried on.
        eval_loss: (state, x, y) -> the loss in eval mode.
        **options: see ``bnverify.train_state``.
    """
    model = net or Net()

    def create(rng: Any, lr: Any = 0.1) -> LoopState:
        first, second = jax.random.split(rng)
        variables = start(model.init(first, jnp.zeros((1, FEATURES)), train=False), first)
        made: LoopState = LoopState.create(  # type: ignore[no-untyped-call]  # flax's
            apply_fn=model.apply,
            params=variables["params"],
            tx=tx(lr),
            batch_stats=variables["batch_stats"],
            kept=kept(variables, second),
        )
        return made

    def train_step(state: LoopState, x: Any, y: Any) -> Any:
        after, value = step(state, x, y, loss)
        return follow(after), value

    return bnverify.train_state(
        create, train_step, eval_loss, batch=rows, features=FEATURES, **options
    )
