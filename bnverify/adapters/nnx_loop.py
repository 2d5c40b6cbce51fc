"""A user's own nnx loop, whose functions change their arguments, as a Subject."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import optax

from bnverify.adapters import arguments
from bnverify.adapters.batches import rows, under_axis
from bnverify.adapters.calls import ROLE_OF, plain
from bnverify.adapters.canonical import INITIAL_RATE, Optimizer, example_sizes
from bnverify.adapters.capture import evaluated
from bnverify.adapters.explain import explaining
from bnverify.adapters.layers import Recording
from bnverify.adapters.loops import loop_subject
from bnverify.adapters.nnx_held import Layout, gradients, marking
from bnverify.adapters.nnx_layers import noting
from bnverify.adapters.nnx_maker import Maker
from bnverify.adapters.reports import Reading, inputs_and_targets, loss_of
from bnverify.subject import State, StepInfo, Subject


def nnx_loop(
    make: Callable[..., Any],
    train_step: Callable[..., Any],
    eval_step: Callable[..., Any],
    *,
    batch: Callable[[Any, Any], Any] = rows,
    optimizer: Optimizer = optax.sgd,
    loss: Reading = None,
    eval_loss: Reading = None,
    switch: bool = True,
    axis_name: str | None = None,
    penalty: bool | None = None,
    same_loss: bool = False,
    features: int | Collection[int] | None = None,
    name: str | None = None,
    exempt: Mapping[str, str] | None = None,
) -> Subject:
    """Return an nnx training loop as a Subject, run as it is written.

    ``train_step`` changes the objects that it is given; here their variables go in and come out
    as a State. What the optimizer is given is seen, so the laws of the update apply.

    Args:
        make: makes the loop's objects: ``(model, optimizer)``, perhaps more that the steps
            change (metrics, random streams). Called as ``bnverify.nnx`` calls its
            ``make_module``; one that takes the learning rate (``lr``, ``learning_rate``) or
            the optimizer (``tx``) opens the laws about them.
        train_step: (model, optimizer, ..., batch) -> report: the loss, metrics with "loss", or
            nothing. Its first parameters are the objects, in the order of ``make``.
        eval_step: (model, batch) -> report with a loss; other objects by the names that they
            have in ``train_step``.
        batch: (x (N, D) float32, y (N,) float32) -> the batch, traceable.
        optimizer: learning rate -> optax optimizer, for a ``make`` that takes ``tx``.
        loss: where the report of ``train_step`` has the loss: a key, or a function of (report,
            batch). None: "loss", or the scalar that is returned.
        eval_loss: likewise for ``eval_step``.
        switch: whether ``model.train()`` and ``model.eval()`` are called before the steps, as
            Flax's own loops do outside of them.
        axis_name: the mapped axis that the steps average over.
        penalty: whether the loss that is differentiated has a term of params alone that the
            reported one lacks. None: found by running two small batches.
        same_loss: whether both steps report one and the same formula.
        features: the D that the model accepts, where not any will do.
        name: how reports call it; None: the name of ``train_step``.
        exempt: law name -> why it does not apply.

    Raises:
        ValueError: an object or parameter cannot be told.
        SubjectError: the code raises what a common mistake raises.
    """
    arguments.functions(
        make=make, train_step=train_step, eval_step=eval_step, optimizer=optimizer, batch=batch
    )
    sizes = arguments.sizes(features)
    maker = Maker(make, "make")
    if sizes is None and not maker.takes_features:
        raise ValueError(
            "make takes no number of features; pass features=D, the D that its model accepts, "
            "or give it a parameter for D: lambda din, rngs: ..."
        )
    at = example_sizes(sizes)
    loop = _Loop(maker, plain(train_step), plain(eval_step), batch, optimizer, at)
    loop = replace(loop, loss=loss, eval_loss=eval_loss, switch=switch, axis_name=axis_name)
    label = getattr(train_step, "__name__", type(train_step).__name__)
    with explaining("make"):
        loop.layout(at[1])
    return _made(
        loop,
        name=name or f"nnx_loop:{label}",
        features=sizes,
        penalty=penalty,
        same_loss=same_loss,
        exempt=dict(exempt or {}),
    )


def _made(loop: _Loop, **options: Any) -> Subject:
    def probed(optimizer: Optimizer) -> Subject:
        other = {**options, "name": f"{options['name']}, another optimizer"}
        return _made(replace(loop, optimizer=optimizer), **other)

    takes = loop.make.takes("tx")
    return loop_subject(loop, loop.sizes, **options, with_optimizer=probed if takes else None)


@dataclass(frozen=True, eq=False)
class _Loop:
    """A user's loop; see ``nnx_loop``.

    Attributes:
        sizes: (N, D) that its objects can be made for.
        Others: see ``nnx_loop``.
    """

    make: Maker
    train: Callable[..., Any]
    evaluation: Callable[..., Any]
    batch: Callable[[Any, Any], Any]
    optimizer: Optimizer
    sizes: tuple[int, int]
    loss: Reading = None
    eval_loss: Reading = None
    switch: bool = True
    axis_name: str | None = None

    @property
    def takes_rate(self) -> bool:
        """Whether the learning rate can be set from outside."""
        return self.make.takes_rate or "lr" in _roles(self.train)

    @property
    def optimizer_of(self) -> Optimizer | None:
        """Learning rate -> the user's optimizer."""
        return lambda lr: self.objects(jax.random.key(0), self.sizes[1], lr)[1].tx

    def objects(self, key: Any, features: Any, lr: Any) -> list[Any]:
        """Return the objects that the user's ``make`` makes.

        Raises:
            ValueError: they are no model and optimizer.
        """
        made = self.make(key, features, lr=lr, tx=self.optimizer(lr))
        if not isinstance(made, tuple | list) or len(made) < 2 or not hasattr(made[1], "tx"):
            raise ValueError(
                "make must return (model, optimizer), the optimizer an nnx.Optimizer, and then "
                f"whatever else the steps change; it returned {type(made).__name__}"
            )
        return list(made)

    def layout(self, features: Any, lr: Any = INITIAL_RATE) -> Layout:
        """Return where the objects' variables go; what is no array comes from this trace."""
        if self.make.takes_rate:  # the optimizer holds the rate of this very trace
            return Layout.of(self.objects(jax.random.key(0), features, lr))
        found: list[Layout] = []

        def build() -> None:
            found.append(Layout.of(self.objects(jax.random.key(0), features, lr)))

        jax.eval_shape(build)
        return found[0]

    def initial_opt_state(self, lr: Any, sizes: tuple[int, int]) -> Any:
        """Return the first optimizer state, made for a learning rate."""
        objects = self.objects(jax.random.key(0), sizes[1], lr)
        return Layout.of(objects).split(objects, {}).opt_state

    @explaining("make")
    def init(self, seed: Any, x: Any) -> State:
        """Return the state before the first step."""
        key = jax.random.key(seed)
        more = {}
        if "key" in _roles(self.train):
            more["key"] = jax.random.fold_in(jax.random.PRNGKey(seed), 0)
        layout = self.layout(x.shape[1])
        return layout.split(self.objects(key, x.shape[1], INITIAL_RATE), more)

    @explaining("train_step")
    def step(self, state: State, x: Any, y: Any, lr: Any) -> tuple[State, StepInfo]:
        """Take one training step."""
        (after, loss), found = evaluated(self._step, state, x, y, lr)
        return after, StepInfo(loss, gradients(found, state.params))

    @explaining("eval_step")
    def evaluate(self, state: State, x: Any, y: Any) -> Any:
        """Return the loss in eval mode, (1,)."""
        _, loss = self._evaluated(state, x, y)
        if loss is None:
            raise ValueError(
                "eval_step reports no loss: return it, or say where it is with eval_loss=, a "
                "key or a function of (report, batch)"
            )
        return loss.reshape(1)

    @explaining("eval_step")
    def after_eval(self, state: State, x: Any, y: Any) -> State:
        """Return the state that evaluation leaves."""
        return self._evaluated(state, x, y)[0]

    def noted(self, recording: Recording, state: State, x: Any, y: Any) -> Any:
        """Take a step and note its layers."""
        return self._step(state, x, y, INITIAL_RATE, recording)

    def _step(
        self, state: State, x: Any, y: Any, lr: Any, recording: Recording | None = None
    ) -> tuple[State, Any]:
        extra = dict(state.extra or {})
        more: dict[str, Any] = {}
        now = None
        if "key" in extra:
            more["key"], now = jax.random.split(extra["key"])
        layout = self.layout(x.shape[1], lr)

        def call(batch: Any) -> tuple[State, Any]:
            objects = layout.merge(state)
            if self.switch:
                objects[0].train()
            objects[1].tx = marking(objects[1].tx)
            run = partial(self._call, self.train, objects, batch, {"lr": lr, "key": now})
            if recording is None:
                report = run()
            else:
                with noting(objects[0], recording):
                    report = run()
            return layout.split(objects, more), loss_of(report, self.loss, batch)

        after: tuple[State, Any] = under_axis(self.axis_name, call, self.batch(x, y))
        return after

    def _evaluated(self, state: State, x: Any, y: Any) -> tuple[State, Any]:
        extra = dict(state.extra or {})
        more = {"key": extra["key"]} if "key" in extra else {}
        layout = self.layout(x.shape[1])

        def call(batch: Any) -> tuple[State, Any]:
            objects = layout.merge(state)
            if self.switch:
                objects[0].eval()
            values = {"lr": INITIAL_RATE, "key": extra.get("key")}
            report = self._call(self.evaluation, objects, batch, values)
            return layout.split(objects, more), loss_of(report, self.eval_loss, batch)

        done: tuple[State, Any] = under_axis(self.axis_name, call, self.batch(x, y))
        return done

    def _call(
        self,
        function: Callable[..., Any],
        objects: list[Any],
        batch: Any,
        values: Mapping[str, Any],
    ) -> Any:
        """Call a step with its objects, known by their names in ``train_step``, and the rest."""
        names = list(inspect.signature(self.train).parameters)[: len(objects)]
        known = dict(zip(names, objects, strict=False))
        inputs, targets = inputs_and_targets(batch)
        given = {**values, "batch": batch, "inputs": inputs, "targets": targets}
        arguments: list[Any] = []
        for index, parameter in enumerate(_required(function)):
            role = ROLE_OF.get(parameter, "batch")
            if parameter in known:
                arguments.append(known[parameter])
            elif function is self.train and index < len(objects):
                arguments.append(objects[index])
            elif index == 0:
                arguments.append(objects[0])
            else:
                arguments.append(given.get(role, batch))
        return function(*arguments)


def _required(function: Callable[..., Any]) -> list[str]:
    return [
        parameter.name
        for parameter in inspect.signature(function).parameters.values()
        if parameter.default is parameter.empty
    ]


def _roles(function: Callable[..., Any]) -> set[str]:
    return {ROLE_OF[name] for name in _required(function) if name in ROLE_OF}
