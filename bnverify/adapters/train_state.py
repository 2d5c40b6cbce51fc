"""A user's own loop around flax's TrainState as a Subject, run as it is written."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from bnverify.adapters import arguments
from bnverify.adapters.batches import under_axis
from bnverify.adapters.calls import Caller, caller, plain
from bnverify.adapters.canonical import INITIAL_RATE, Optimizer, example_sizes
from bnverify.adapters.explain import explaining
from bnverify.adapters.flows import holds_tracers, reached
from bnverify.adapters.layers import Recording
from bnverify.adapters.linen_layers import Interceptor
from bnverify.adapters.loops import example, loop_subject
from bnverify.adapters.reports import (
    Reading,
    copied,
    inputs_and_targets,
    loss_of,
    state_and_report,
)
from bnverify.adapters.train_fields import Fields
from bnverify.subject import State, StepInfo, Subject

Batch = Callable[[Any, Any], Any]


def image_and_label(x: Any, y: Any) -> dict[str, Any]:
    """Return the batch that Flax's own examples take: {"image": x, "label": y}."""
    return {"image": x, "label": y}


def train_state(
    create: Callable[..., Any],
    train_step: Callable[..., Any],
    eval_step: Callable[..., Any],
    *,
    batch: Batch = image_and_label,
    optimizer: Optimizer = optax.sgd,
    loss: Reading = None,
    eval_loss: Reading = None,
    statistics: str = "batch_stats",
    axis_name: str | None = None,
    penalty: bool | None = None,
    same_loss: bool = False,
    features: int | Collection[int] | None = None,
    name: str | None = None,
    exempt: Mapping[str, str] | None = None,
) -> Subject:
    """Return a training loop written against ``flax.training.train_state`` as a Subject.

    The three functions are called as they are, whether or not they are compiled, donate their
    state or average over a mapped axis. Parameters are filled by their names (``rng``,
    ``batch``, ``learning_rate``, ...; see ``bnverify.adapters.calls.ROLES``); whatever else
    one needs, bind it: ``lambda rng: create_train_state(rng, config, model)``.

    Args:
        create: -> train state, called with a PRNG key unless its parameters say otherwise. One
            that takes the learning rate or the optimizer opens the laws about them.
        train_step: (state, batch) -> (state, report), perhaps with a key or the learning rate;
            (state, inputs, targets) likewise.
        eval_step: (state, batch) -> report, or (state, report).
        batch: (x (N, D) float32, y (N,) float32) -> the batch, traceable.
        optimizer: learning rate -> optax optimizer, for a ``create`` that takes ``tx``.
        loss: where the report of ``train_step`` has the loss: a key, or a function of (report,
            batch). None: "loss", or the scalar that is returned; if there is none the loss is
            hidden.
        eval_loss: likewise for ``eval_step``, which must report a loss.
        statistics: the field of the train state with the running statistics.
        axis_name: the mapped axis that the steps average over: they run under ``jax.vmap`` with
            one shard. None: found where JAX says that the axis is unbound.
        penalty: whether the loss that is differentiated has terms of params alone that the
            reported one lacks (weight decay written into the loss). None: found out by running
            two small batches.
        same_loss: whether both steps report one and the same formula of outputs and targets.
        features: the D that the model accepts, where not any will do.
        name: how reports call it; None: the name of ``train_step``.
        exempt: law name -> why it does not apply.

    Raises:
        ValueError: a parameter's meaning cannot be told, or a result cannot be read.
        SubjectError: the code raises what a common mistake raises.
    """
    arguments.functions(
        create=create, train_step=train_step, eval_step=eval_step, optimizer=optimizer, batch=batch
    )
    accepted = arguments.sizes(features)
    sizes = example_sizes(accepted)
    loop = _Loop(
        create=caller(
            create,
            "create",
            order=("key",),
            allowed=("key", "seed", "batch", "inputs", "targets", "lr", "tx"),
        ),
        train=_step_caller(train_step, "train_step"),
        evaluation=_step_caller(eval_step, "eval_step"),
        batch=batch,
        optimizer=optimizer,
        loss=loss,
        eval_loss=eval_loss,
        axis_name=axis_name,
        sizes=sizes,
    )
    with explaining("create"):
        loop = loop.with_fields(sizes, statistics)
    loop = loop.settled(sizes)
    label = getattr(plain(train_step), "__name__", None) or _inner_name(train_step)
    return _made(
        loop,
        sizes,
        name=name or f"train_state:{label}",
        features=accepted,
        penalty=penalty,
        same_loss=same_loss,
        exempt=dict(exempt or {}),
    )


def _made(loop: _Loop, sizes: tuple[int, int], **options: Any) -> Subject:
    def probed(optimizer: Optimizer) -> Subject:
        other = {**options, "name": f"{options['name']}, another optimizer"}
        return _made(replace(loop, optimizer=optimizer).settled(sizes), sizes, **other)

    takes = loop.create.takes("tx")
    return loop_subject(loop, sizes, **options, with_optimizer=probed if takes else None)


def _inner_name(function: Callable[..., Any]) -> str:
    inner = plain(function)
    while isinstance(inner, partial):
        inner = inner.func
    return getattr(inner, "__name__", type(inner).__name__)


def _step_caller(function: Callable[..., Any], what: str) -> Caller:
    roles = ("state", "batch", "inputs", "targets", "key", "lr")
    raw = caller(function, what, order=("state", "batch"), allowed=roles)
    if raw.takes("inputs") or raw.takes("targets"):
        return caller(function, what, order=("state", "inputs", "targets"), allowed=roles)
    return raw


@dataclass(frozen=True, eq=False)
class _Loop:
    """A user's three functions, with what is known about them.

    Attributes:
        sizes: (N, D) that it can be created for.
        fields: of the train state; None until it was looked at.
        Others: see ``train_state``.
    """

    create: Caller
    train: Caller
    evaluation: Caller
    batch: Batch
    optimizer: Optimizer
    loss: Reading
    eval_loss: Reading
    axis_name: str | None
    sizes: tuple[int, int]
    fields: Any = None

    @property
    def takes_rate(self) -> bool:
        """Whether the learning rate can be set from outside."""
        return self.train.takes("lr") or self._made_for_a_rate

    @property
    def optimizer_of(self) -> Optimizer | None:
        """Learning rate -> the user's optimizer; None where its gradients are not shown."""
        if not self._fields.shown:
            return None
        x = jnp.zeros(self.sizes, jnp.float32)
        return lambda lr: self.template(x, lr).tx

    @property
    def _made_for_a_rate(self) -> bool:
        return self.create.takes("lr") or self.create.takes("tx")

    def created(self, seed: Any, x: Any, lr: Any) -> Any:
        """Return the train state that the user's ``create`` makes."""
        batch = self.batch(x, jnp.zeros(x.shape[:1], jnp.float32))
        inputs, targets = inputs_and_targets(batch)
        return self.create(
            {
                "key": jax.random.PRNGKey(seed),
                "seed": seed,
                "batch": batch,
                "inputs": inputs,
                "targets": targets,
                "lr": lr,
                "tx": self.optimizer(lr),
            }
        )

    @explaining("create")
    def init(self, seed: Any, x: Any) -> State:
        """Return the state before the first step."""
        key = jax.random.fold_in(jax.random.PRNGKey(seed), 0)
        extra = {"key": key} if self.train.takes("key") else {}
        return self._fields.first(self.created(seed, x, INITIAL_RATE), extra)  # type: ignore[no-any-return]

    def template(self, x: Any, lr: Any) -> Any:
        """Return a train state for all of it that is no array: the model and the optimizer."""
        if self._made_for_a_rate:
            return self.created(0, x, lr)
        return self._fields.empty()

    @explaining("train_step")
    def step(self, state: State, x: Any, y: Any, lr: Any) -> tuple[State, StepInfo]:
        """Take one training step."""
        extra = dict(state.extra or {})
        extra.pop("fields", None)
        now = None
        if "key" in extra:
            extra["key"], now = jax.random.split(extra["key"])
        template = self.template(x, lr)
        given = self._fields.join(copied(state), template)
        after, report, batch = self._run(self.train, given, x, y, {"lr": lr, "key": now})
        if after is None:
            raise ValueError(
                f"train_step returns no {type(given).__name__}: return the new state, first or "
                "in a tuple with the metrics"
            )
        new, grads = self._fields.split(after, extra)
        return new, StepInfo(loss_of(report, self.loss, batch), grads)

    @explaining("eval_step")
    def evaluate(self, state: State, x: Any, y: Any) -> Any:
        """Return the loss in eval mode, (1,)."""
        _, report, batch = self._evaluated(state, x, y)
        loss = loss_of(report, self.eval_loss, batch)
        if loss is None:
            raise ValueError(
                "eval_step reports no loss: return metrics with the key 'loss', or say where it "
                "is with eval_loss=, a key or a function of (report, batch)"
            )
        return loss.reshape(1)

    @explaining("eval_step")
    def after_eval(self, state: State, x: Any, y: Any) -> State | None:
        """Return the state that evaluation leaves; None: ``eval_step`` returns none."""
        after, _, _ = self._evaluated(state, x, y)
        if after is None:
            return None
        extra = dict(state.extra or {})
        extra.pop("fields", None)
        return replace(self._fields, shown=False).split(after, extra)[0]  # type: ignore[no-any-return]

    def initial_opt_state(self, lr: Any, sizes: tuple[int, int]) -> Any:
        """Return the first optimizer state, made for a learning rate."""
        return self.created(0, jnp.zeros(sizes, jnp.float32), lr).opt_state

    def noted(self, recording: Recording, state: State, x: Any, y: Any) -> Any:
        """Take a step and note its layers."""
        with nn.intercept_methods(Interceptor(recording)):
            return self.step(state, x, y, INITIAL_RATE)

    def with_fields(self, sizes: tuple[int, int], statistics: str, *, run: bool = False) -> _Loop:
        """Return this loop with the fields of its train state.

        Args:
            sizes: (N, D) to create it for.
            statistics: the field with the running statistics.
            run: create it in earnest, not only for shapes.
        """
        found: list[Fields] = []

        def build(seed: Any, x: Any) -> None:
            found.append(Fields.of(self.created(seed, x, INITIAL_RATE), statistics))

        if run:
            build(0, jnp.zeros(sizes, jnp.float32))
        else:
            shape: Any = jax.ShapeDtypeStruct
            jax.eval_shape(build, shape((), "int32"), shape(sizes, "float32"))
        return replace(self, fields=found[0])

    def settled(self, sizes: tuple[int, int]) -> _Loop:
        """Return this loop with the axis that it needs, showing its gradients where it can."""
        loop = self
        for _ in range(4):  # each turn mends one thing, or raises
            try:
                shown = loop.shows_gradients(sizes)
            except Exception as error:  # noqa: BLE001 - whatever a user's code raises
                loop = loop.mended(error, sizes)
            else:
                return loop if shown else replace(loop, fields=replace(loop.fields, shown=False))
        raise RuntimeError("unreachable: there are three things to mend")

    def mended(self, error: Exception, sizes: tuple[int, int]) -> _Loop:
        """Return this loop without what made it raise ``error``, or raise it again."""
        cause = error.__cause__ or error
        axis = re.search(r"unbound axis name: (\w+)", str(cause))
        if axis and self.axis_name is None:
            return replace(self, axis_name=axis[1])
        if isinstance(cause, jax.errors.UnexpectedTracerError) and not self._made_for_a_rate:
            # create computes with arrays that its optimizer or model keeps.
            return self.with_fields(sizes, self._fields.statistics or "", run=True)
        if self._fields.shown:
            # Code that looks into the optimizer's state finds another one than its own.
            return replace(self, fields=replace(self._fields, shown=False))
        raise error

    def shows_gradients(self, sizes: tuple[int, int]) -> bool:
        """Trace one step; return whether the optimizer was given gradients of the batch."""
        state, x, y = example(self, sizes)
        if not self._fields.shown:
            jax.eval_shape(self.step, state, x, y, INITIAL_RATE)
            return False
        start = len(jax.tree_util.tree_leaves(state))
        jaxpr = jax.make_jaxpr(lambda s, x, y: self.step(s, x, y, INITIAL_RATE)[1].grads)(
            state, x, y
        )
        if holds_tracers(jaxpr):
            raise jax.errors.UnexpectedTracerError("create keeps arrays that it computes")
        return any(reached(jaxpr, {start, start + 1}))

    @property
    def _fields(self) -> Any:
        assert self.fields is not None
        return self.fields

    def _evaluated(self, state: State, x: Any, y: Any) -> tuple[Any, Any, Any]:
        fields = replace(self._fields, shown=False)
        given = fields.join(copied(state), self.template(x, INITIAL_RATE))
        key = dict(state.extra or {}).get("key")
        return self._run(self.evaluation, given, x, y, {"lr": INITIAL_RATE, "key": key})

    def _run(
        self, function: Caller, given: Any, x: Any, y: Any, more: Mapping[str, Any]
    ) -> tuple[Any, Any, Any]:
        """Return the state, the report and the batch of one call."""
        batch = self.batch(x, y)

        def call(batch: Any) -> Any:
            inputs, targets = inputs_and_targets(batch)
            parts = {"state": given, "batch": batch, "inputs": inputs, "targets": targets}
            return function({**parts, **more})

        returned = under_axis(self.axis_name, call, batch)
        return *state_and_report(returned, type(given)), batch
