"""A linen module as a Subject: its training step written the canonical way around it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import flax.linen as nn
import optax

from bnverify.adapters import arguments
from bnverify.adapters.batches import mse, rows, under_axis
from bnverify.adapters.canonical import Loss, Optimizer, example_sizes, subject
from bnverify.adapters.explain import explaining
from bnverify.adapters.linen_variables import look
from bnverify.adapters.modes import Mode, call_mode, known_names, named
from bnverify.subject import Subject


def linen(
    module: nn.Module,
    *,
    optimizer: Optimizer = optax.sgd,
    loss: Loss = mse,
    batch: Callable[[Any, Any], tuple[Any, Any]] = rows,
    train_argument: str | Mode | None = None,
    rngs: Sequence[str] = ("dropout",),
    mutable: bool | Sequence[str] | None = None,
    statistics: str = "batch_stats",
    carried: Sequence[str] = (),
    axis_name: str | None = None,
    online: bool = False,
    features: int | Collection[int] | None = None,
    name: str | None = None,
    exempt: Mapping[str, str] | None = None,
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
        online: whether it normalises by the running values in training too (online
            normalisation), and so breaks the laws that rest on the batch's own moments.
        features: the D that it accepts, where not any will do.
        name: how reports call it; None: the module's class.
        exempt: law name -> why it does not apply.

    Returns:
        A Subject whose ``State.extra`` holds what the model carries besides params and
        statistics: "key" where it draws random numbers, "collections" and "carried".

    Raises:
        ValueError: an argument is not what it must be, or no mode can be made of
            ``train_argument``.
    """
    arguments.linen_module(module)
    arguments.functions(optimizer=optimizer, loss=loss, batch=batch)
    sizes = arguments.sizes(features)
    bound = _Module(module, _mode(module, train_argument), batch, axis_name, statistics)
    with explaining("the model"):
        model = look(bound, example_sizes(sizes), tuple(rngs), mutable, tuple(carried))
    return subject(
        model,
        name=name or f"linen:{type(module).__name__}",
        optimizer=optimizer,
        loss=loss,
        features=sizes,
        online=online,
        exempt=dict(exempt or {}),
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


@dataclass(frozen=True, eq=False)
class _Module:
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
        return under_axis(
            self.axis_name, lambda i: self._call("init", train=False)(rngs, *_positional(i)), inputs
        )

    def apply(
        self, variables: Any, inputs: Any, *, train: bool, mutable: Any, rngs: Any
    ) -> tuple[Any, Any]:
        """Return the outputs and the updated collections."""

        def run(inputs: Any) -> Any:
            apply = self._call("apply", train=train)
            out = apply(variables, *_positional(inputs), mutable=mutable, rngs=rngs)
            return out if mutable is not False else (out, {})

        outputs, updated = under_axis(self.axis_name, run, inputs)
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


def _positional(inputs: Any) -> tuple[Any, ...]:
    return inputs if isinstance(inputs, tuple) else (inputs,)
