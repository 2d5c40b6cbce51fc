"""A linen module as a Subject: its training step written the canonical way around it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import optax

from bnverify.adapters import reasons
from bnverify.adapters.batches import mse, rows
from bnverify.adapters.linen_layers import Recorder, Survey, layer_inputs, survey
from bnverify.adapters.linen_variables import Variables, look
from bnverify.adapters.modes import Mode, call_mode, known_names, named
from bnverify.subject import State, StepInfo, Subject

EXAMPLE = (4, 6)  # the rows and, where any D will do, the features of the traces made at the start

Optimizer = Callable[[Any], optax.GradientTransformation]
Exempt = Mapping[str, str]


def linen(
    module: nn.Module,
    *,
    optimizer: Optimizer = optax.sgd,
    loss: Callable[[Any, Any], Any] = mse,
    batch: Callable[[Any, Any], tuple[Any, Any]] = rows,
    train_argument: str | Mode | None = None,
    rngs: Sequence[str] = ("dropout",),
    mutable: bool | Sequence[str] | None = None,
    statistics: str = "batch_stats",
    carried: Sequence[str] = (),
    axis_name: str | None = None,
    features: int | Collection[int] | None = None,
    name: str | None = None,
    exempt: Exempt | None = None,
) -> Subject:
    """Return the canonical training step of ``module`` as a Subject.

    The module is traced a few times, for shapes only: nothing is compiled.

    Args:
        module: any linen module. It is called as ``module(inputs)``, as ``module(*inputs)``
            where the batch's inputs are a tuple, with the training argument by keyword.
        optimizer: learning rate -> optax optimizer, of ``params`` alone.
        loss: (outputs, targets) -> scalar. The default takes outputs (N, 1) or (N,).
        batch: (x (N, D) float32, y (N,) float32) -> (inputs, targets), traceable: how the
            model's batch is made from a case. Images: reshape x; labels:
            ``bnverify.adapters.batches.classes``.
        train_argument: the argument that says whether the model trains: its name, or a function
            from "it trains" to keyword arguments. None: found in the signature of
            ``__call__``, else among the module's fields (``train``, ``is_training``,
            ``deterministic``, ``use_running_average`` and their like).
        rngs: names of the random streams that the model may draw from, besides "params".
        mutable: as in ``module.apply``, for the training pass. None: every collection that the
            module makes, but ``params``.
        statistics: the collection that holds the running statistics.
        carried: patterns (``fnmatch``) of paths in that collection that are no moving averages,
            or frozen ones: they are carried in ``State.extra``, and no law of averages is
            asked of them. Those of ``nn.SpectralNorm`` are found.
        axis_name: the mapped axis over which the model synchronises: it is run under
            ``jax.vmap`` with one shard.
        features: the D that it accepts, where not any will do.
        name: how reports call it; None: the module's class.
        exempt: law name -> why it does not apply.

    Returns:
        A Subject whose ``State.extra`` holds what the model carries besides params and
        statistics: "key" where it draws random numbers, "collections" and "carried".

    Raises:
        ValueError: no mode can be made of ``train_argument``.
    """
    accepted = (features,) if isinstance(features, int) else features
    sizes = (EXAMPLE[0], next(iter(accepted)) if accepted else EXAMPLE[1])
    model = _Model(module, _mode(module, train_argument), batch, axis_name, statistics)
    variables = look(model, sizes, tuple(rngs), mutable, tuple(carried))
    step = _Step(model, variables, optimizer, loss)
    seen = step.survey(sizes)
    momenta = set(seen.momenta.values())
    known = {m for m in momenta if m is not None}
    found = variables.exempt()
    if len(known) > 1:
        found |= reasons.several_momenta(known)
    return Subject(
        name=name or f"linen:{type(module).__name__}",
        init=step.init,
        step=step.step,
        evaluate=step.evaluate,
        features=tuple(accepted) if accepted else None,
        optimizer=optimizer,
        exempt=found | dict(exempt or {}),
        momentum=known.pop() if len(known) == 1 and None not in momenta else None,
        layer_inputs=step.layer_inputs if step.shows_inputs(sizes) else None,
        after_eval=step.after_eval,
        with_optimizer=lambda other: linen(
            module,
            optimizer=other,
            loss=loss,
            batch=batch,
            train_argument=train_argument,
            rngs=rngs,
            mutable=mutable,
            statistics=statistics,
            carried=carried,
            axis_name=axis_name,
            features=features,
            name=f"{name or type(module).__name__}, another optimizer",
            exempt=exempt,
        ),
        biases_before_norm=seen.biases,
    )


def _mode(module: nn.Module, given: str | Mode | None) -> Mode:
    """Return how the module is told that it trains: by the call, or else by its own fields."""
    mode = call_mode(_call_of(module), given)
    if given is None and not mode(True):
        return named(known_names(vars(module)))
    return mode


def _call_of(module: nn.Module) -> Callable[..., Any]:
    call: Callable[..., Any] = type(module).__call__
    return call


@dataclass(frozen=True)
class _Model:
    """The module with its batch and its mode: how it is initialised and applied.

    Attributes:
        module: the user's.
        mode: see ``bnverify.adapters.modes``.
        batch: (x, y) -> (inputs, targets).
        axis_name: the mapped axis to run under; None: none.
        statistics: the collection that holds the running statistics.
    """

    module: nn.Module
    mode: Mode
    batch: Callable[[Any, Any], tuple[Any, Any]]
    axis_name: str | None
    statistics: str

    def init(self, rngs: Any, inputs: Any) -> Any:
        """Return the initial variables, as ``module.init`` gives them in eval mode."""
        return self._run(lambda i: self._call("init", train=False)(rngs, *_positional(i)), inputs)

    def apply(
        self, variables: Any, inputs: Any, *, train: bool, mutable: Any, rngs: Any
    ) -> tuple[Any, Any]:
        """Return the outputs and the updated collections."""

        def run(inputs: Any) -> Any:
            apply = self._call("apply", train=train)
            out = apply(variables, *_positional(inputs), mutable=mutable, rngs=rngs)
            return out if mutable is not False else (out, {})

        outputs, updated = self._run(run, inputs)
        return outputs, updated

    def _call(self, method: str, *, train: bool) -> Callable[..., Any]:
        arguments = self.mode(train)
        parameters = inspect.signature(_call_of(self.module)).parameters
        # What is no parameter of the call is a field of the module, fixed when it is made.
        fields: dict[str, Any] = {
            name: value
            for name, value in arguments.items()
            if name not in parameters and name in vars(self.module)
        }
        module = self.module.clone(**fields) if fields else self.module
        rest = {name: value for name, value in arguments.items() if name not in fields}
        return partial(getattr(module, method), **rest)

    def _run(self, function: Callable[[Any], Any], inputs: Any) -> Any:
        if self.axis_name is None:
            return function(inputs)
        one = jax.tree_util.tree_map(lambda leaf: leaf[None], inputs)
        out = jax.vmap(function, axis_name=self.axis_name)(one)
        return jax.tree_util.tree_map(lambda leaf: leaf[0], out)


def _positional(inputs: Any) -> tuple[Any, ...]:
    return inputs if isinstance(inputs, tuple) else (inputs,)


@dataclass(frozen=True)
class _Step:
    """The canonical step around a model; see ``bnverify.reference`` for each of its lines."""

    model: _Model
    variables: Variables
    optimizer: Optimizer
    loss: Callable[[Any, Any], Any]

    def init(self, seed: Any, x: Any) -> State:
        """Return the state before the first step."""
        params, batch_stats, extra = self.variables.init(seed, x)
        return State(params, batch_stats, self.optimizer(0.0).init(params), extra)

    def step(self, state: State, x: Any, y: Any, lr: Any) -> tuple[State, StepInfo]:
        """Take one training step."""
        inputs, targets = self.model.batch(x, y)

        def loss_fn(params: Any) -> tuple[Any, Any]:
            outputs, new = self.variables.apply(state._replace(params=params), inputs, train=True)
            return self.loss(outputs, targets), new

        (loss, new), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
        tx = self.optimizer(lr)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        batch_stats, extra = new
        return State(params, batch_stats, opt_state, extra), StepInfo(loss, grads)

    def evaluate(self, state: State, x: Any, y: Any) -> Any:
        """Return the loss in eval mode, (1,)."""
        inputs, targets = self.model.batch(x, y)
        outputs, _ = self.variables.apply(state, inputs, train=False)
        return self.loss(outputs, targets).reshape(1)

    def after_eval(self, state: State, x: Any, y: Any) -> State:
        """Return the state that evaluation leaves."""
        inputs, _ = self.model.batch(x, y)
        _, (batch_stats, extra) = self.variables.apply(state, inputs, train=False)
        return state._replace(batch_stats=batch_stats, extra=extra)

    def layer_inputs(self, state: State, x: Any, y: Any) -> Any:
        """Return what each normalisation layer is given in the training pass."""
        recorder = Recorder(self.model.statistics)
        return layer_inputs(partial(self._observed, recorder), recorder, (state, x, y))

    def shows_inputs(self, sizes: tuple[int, int]) -> bool:
        """Return whether the input of any normalisation layer can be told."""
        x, y, seed = _example(sizes)
        return bool(jax.eval_shape(self.layer_inputs, jax.eval_shape(self.init, seed, x), x, y))

    def survey(self, sizes: tuple[int, int]) -> Survey:
        """Return what one abstract trace of the training pass shows."""
        x, y, seed = _example(sizes)
        state = jax.eval_shape(self.init, seed, x)
        recorder = Recorder(self.model.statistics)
        jaxpr = jax.make_jaxpr(partial(self._observed, recorder))(state, x, y)
        return survey(jaxpr, recorder, state)

    def _observed(self, recorder: Recorder, state: State, x: Any, y: Any) -> Any:
        inputs, targets = self.model.batch(x, y)
        with nn.intercept_methods(recorder):
            outputs, _ = self.variables.apply(state, inputs, train=True)
        return self.loss(outputs, targets)  # so that a second use of a value is seen


def _example(sizes: tuple[int, int]) -> tuple[Any, Any, Any]:
    shape: Any = jax.ShapeDtypeStruct
    return shape(sizes, "float32"), shape(sizes[:1], "float32"), shape((), "int32")
