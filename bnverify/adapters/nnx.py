"""An nnx module as a Subject: its training step written the canonical way around it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import jax
import optax
from flax import nnx as flax_nnx

from bnverify.adapters import arguments
from bnverify.adapters.batches import mse, rows, under_axis
from bnverify.adapters.canonical import Loss, Optimizer, Pass, subject
from bnverify.adapters.layers import Recording
from bnverify.adapters.modes import Mode, call_mode
from bnverify.adapters.nnx_layers import noting
from bnverify.adapters.nnx_maker import Maker
from bnverify.adapters.nnx_parts import Parts
from bnverify.adapters.trees import partition, union
from bnverify.subject import State, Subject, Tree


def nnx(
    make_module: Callable[..., flax_nnx.Module],
    *,
    optimizer: Optimizer = optax.sgd,
    loss: Loss = mse,
    batch: Callable[[Any, Any], tuple[Any, Any]] = rows,
    train_argument: str | Mode | None = None,
    carried: Sequence[str] = (),
    axis_name: str | None = None,
    online: bool = False,
    features: int | Collection[int] | None = None,
    name: str | None = None,
    exempt: Mapping[str, str] | None = None,
) -> Subject:
    """Return the canonical training step of an nnx module as a Subject.

    ``nnx.Param`` is trained, ``nnx.BatchStat`` are the running statistics, everything else
    (random streams, counters, caches) is carried. The module is switched by ``train()`` and
    ``eval()``, and by an argument of its call where it has one.

    Args:
        make_module: makes the module: a class or function called with ``rngs``, by name, and,
            where it has another required parameter, with the number of features D as that.
        optimizer: learning rate -> optax optimizer, of the params alone.
        loss: (outputs, targets) -> scalar. The default takes outputs (N, 1) or (N,).
        batch: (x (N, D) float32, y (N,) float32) -> (inputs, targets), traceable; see
            ``bnverify.linen``. Inputs that are a tuple are passed as several arguments.
        train_argument: the argument of the module's call that says whether it trains: its
            name, or a function from "it trains" to keyword arguments. None: found.
        carried: patterns (``fnmatch``) of paths of ``nnx.BatchStat`` that are no moving
            averages, or frozen ones: they go to ``State.extra``.
        axis_name: the mapped axis over which the module synchronises: it is run under
            ``jax.vmap`` with one shard.
        online: whether it normalises by the running values in training too (online
            normalisation), and so breaks the laws that rest on the batch's own moments.
        features: the D that it accepts, where not any will do. Needed where ``make_module``
            takes no number of features.
        name: how reports call it; None: the name of ``make_module``.
        exempt: law name -> why it does not apply.

    Raises:
        ValueError: an argument is not what it must be, no module can be made, or no mode of
            ``train_argument``.
    """
    arguments.nnx_maker(make_module)
    arguments.functions(optimizer=optimizer, loss=loss, batch=batch)
    sizes = arguments.sizes(features)
    maker = Maker(make_module, "make_module")
    if sizes is None and not maker.takes_features:
        raise ValueError(
            "make_module takes no number of features; pass features=D, the D that its module "
            "accepts, or give it a parameter for D: lambda din, rngs: Model(din, rngs=rngs)"
        )
    model = _Model(maker, batch, train_argument, axis_name, tuple(carried))
    label = getattr(make_module, "__name__", type(make_module).__name__)
    return subject(
        model,
        name=name or f"nnx:{label}",
        optimizer=optimizer,
        loss=loss,
        features=sizes,
        online=online,
        exempt=dict(exempt or {}),
    )


@dataclass(frozen=True, eq=False)
class _Model:
    """An nnx module whose variables are split into the parts of a State.

    Attributes:
        make: (key, D) -> module.
        batch: (x, y) -> (inputs, targets).
        train_argument: see ``nnx``.
        axis_name: the mapped axis to run under; None: none.
        carried: patterns of paths of BatchStat that are no averages.
    """

    make: Maker
    batch: Callable[[Any, Any], tuple[Any, Any]]
    train_argument: str | Mode | None
    axis_name: str | None
    carried: tuple[str, ...]
    _known: dict[int, Parts] = field(default_factory=dict)

    def init(self, seed: Any, x: Any) -> tuple[Tree, Tree, Tree]:
        """Return the initial params, statistics and extra."""
        features = x.shape[1]
        trees = self._parts(features).split(self.make(jax.random.key(seed), features))
        return self._sort(*trees)

    def apply(
        self, state: State, x: Any, y: Any, *, train: bool, recording: Recording | None = None
    ) -> Pass:
        """Return one forward pass on the batch made from x and y."""
        parts = self._parts(x.shape[1])
        inputs, targets = self.batch(x, y)

        def run(inputs: Any) -> Any:
            module = parts.merge(*self._join(state))
            module.train() if train else module.eval()
            mode = call_mode(type(module).__call__, self.train_argument)(train)
            with noting(module, recording) if recording is not None else nullcontext():
                outputs = module(*(inputs if isinstance(inputs, tuple) else (inputs,)), **mode)
            return outputs, self._sort(*parts.split(module))[1:]

        outputs, (batch_stats, extra) = under_axis(self.axis_name, run, inputs)
        return Pass(outputs, targets, batch_stats, extra)

    def _parts(self, features: Any) -> Parts:
        # A symbolic size belongs to one tracing, so nothing made with it is kept.
        known = self._known.get(features) if isinstance(features, int) else None
        if known is None:
            filters = (flax_nnx.Param, flax_nnx.BatchStat, flax_nnx.RngState, ...)
            known = Parts.of(lambda: self.make(jax.random.key(0), features), filters)
            if isinstance(features, int):
                self._known[features] = known
        return known

    def _sort(
        self, params: Tree, batch_stats: Tree, streams: Tree, others: Tree
    ) -> tuple[Tree, Tree, Tree]:
        """Return params, the averages among the statistics, and all else."""
        averages, carried = partition(batch_stats, self.carried)
        extra = {"streams": streams, "others": others, "carried": carried}
        return params, averages, {name: tree for name, tree in extra.items() if tree} or ()

    def _join(self, state: State) -> tuple[Tree, Tree, Tree, Tree]:
        extra = dict(state.extra or {})
        batch_stats = union(state.batch_stats, extra.get("carried", {}))
        return state.params, batch_stats, extra.get("streams", {}), extra.get("others", {})
