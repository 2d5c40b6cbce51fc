"""An nnx module as a Subject, with a canonical training step around it."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any, Unpack

import jax
import optax
from flax import nnx as flax_nnx

from bnverify.adapters import calls
from bnverify.adapters.batches import mse, rows, under_axis
from bnverify.adapters.calls import Caller
from bnverify.adapters.canonical import Batch, Loss, Optimizer, Pass, subject
from bnverify.adapters.declared import Declarations
from bnverify.adapters.modes import Mode, call_mode
from bnverify.adapters.objects import Parts
from bnverify.adapters.watch import noting
from bnverify.errors import UsageError
from bnverify.model import State, Subject, Tree


def nnx(
    make_module: Callable[..., flax_nnx.Module],
    *,
    optimizer: Optimizer = optax.sgd,
    loss: Loss = mse,
    batch: Batch = rows,
    train_argument: str | Mode | None = None,
    axis_name: str | None = None,
    features: int | Collection[int] | None = None,
    name: str | None = None,
    **declared: Unpack[Declarations],
) -> Subject:
    """Return the canonical training step of an nnx module as a Subject.

    ``nnx.Param`` is trained, ``nnx.BatchStat`` are the running statistics, and all other variables
    (PRNG streams, counters, caches) are kept in ``State.extra``. The module is switched by ``train()``
    and ``eval()``, and by an argument of ``__call__`` if it has one.

    Args:
        make_module: a class or function that makes the module. It is called with the keyword
            ``rngs`` and, if it has another required parameter, with the number of features D.
        optimizer: learning rate -> Optax optimizer of the params.
        loss: (outputs, targets) -> scalar. The default, mean squared error, takes outputs (N, 1) or
            (N,).
        batch: (x (N, D) float32, y (N,) float32) -> (inputs, targets), traceable; see
            ``bnverify.linen``. Inputs that are a tuple are passed as several arguments.
        train_argument: the argument of ``__call__`` that selects train mode: its name, or a function
            from a bool to keyword arguments. None: found by its name.
        axis_name: the mapped axis over which the module synchronises; it runs under ``jax.vmap`` as
            its only shard.
        features: the values of D that the module accepts; None: any. Required if ``make_module`` has
            no parameter for it.
        name: its name in reports; None: the name of ``make_module``.
        **declared: ``targets``, ``row_losses``, ``online``, ``carried``, ``frozen``, ``passes``,
            ``weights``, ``pretrained``, ``exempt``: see ``bnverify.adapters.declared.Declared``.

    Returns:
        The step, with its momentum, layer inputs and exemptions if they are found.

    Raises:
        UsageError: an argument is invalid, or the module cannot be made.
        ValueError: ``train_argument`` is a name whose meaning is unknown.
    """
    calls.nnx_maker(make_module)
    calls.functions(optimizer=optimizer, loss=loss, batch=batch)
    sizes = calls.sizes(features)
    maker = calls.nnx_caller(make_module, "make_module")
    if sizes is None and not maker.takes("features"):
        raise UsageError(
            "make_module has no parameter for the number of features: pass features=D, the D that "
            "its module accepts, or add one, as in lambda din, rngs: Model(din, rngs=rngs)"
        )
    model = _Model(maker, batch, train_argument, axis_name)
    label = getattr(make_module, "__name__", type(make_module).__name__)
    return subject(
        model,
        name=name or f"nnx:{label}",
        optimizer=optimizer,
        loss=loss,
        batch=batch,
        features=sizes,
        declared=declared,
    )


FILTERS = (flax_nnx.Param, flax_nnx.BatchStat, flax_nnx.RngState, ...)


@dataclass(frozen=True, eq=False)
class _Model:
    """An nnx module whose variables are split into the parts of a State.

    Attributes:
        maker: the function that makes the module.
        batch: (x, y) -> (inputs, targets).
        train_argument: see ``nnx``.
        axis_name: the mapped axis to run under; None: none.
    """

    maker: Caller
    batch: Batch
    train_argument: str | Mode | None
    axis_name: str | None
    _known: dict[int, Parts] = field(default_factory=dict)

    def _make(self, seed: Any, features: Any) -> Any:
        rngs = flax_nnx.Rngs(jax.random.key(seed))
        # The canonical step has its own optimizer and learning rate.
        return self.maker({"rngs": rngs, "features": features, "lr": None, "tx": None})

    def init(self, seed: Any, x: Any) -> tuple[Tree, Tree, Tree]:
        """Return the initial params, statistics and extra."""
        features = x.shape[1]
        params, batch_stats, *rest = self._parts(features).split(self._make(seed, features))
        return params, batch_stats, _extra(*rest)

    def apply(self, state: State, x: Any, y: Any, *, train: bool) -> Pass:
        """Return one forward pass on the batch made from x and y."""
        parts = self._parts(x.shape[1])
        inputs, targets = self.batch(x, y)
        extra = dict(state.extra or {})

        def run(inputs: Any) -> Any:
            module = parts.merge(
                state.params, state.batch_stats, extra.get("streams", {}), extra.get("others", {})
            )
            module.train() if train else module.eval()
            mode = call_mode(type(module).__call__, self.train_argument)(train)
            with noting({"": module}):
                outputs = module(*(inputs if isinstance(inputs, tuple) else (inputs,)), **mode)
            _, batch_stats, *rest = parts.split(module)
            return outputs, batch_stats, _extra(*rest)

        outputs, batch_stats, extra_after = under_axis(self.axis_name, run, inputs)
        return Pass(outputs, targets, batch_stats, extra_after)

    def _parts(self, features: Any) -> Parts:
        # A symbolic size belongs to one trace, so nothing is cached for it.
        known = self._known.get(features) if isinstance(features, int) else None
        if known is None:
            known = Parts.of(lambda: self._make(0, features), FILTERS)
            if isinstance(features, int):
                self._known[features] = known
        return known


def _extra(streams: Tree, others: Tree) -> Tree:
    extra = {"streams": streams, "others": others}
    return {name: tree for name, tree in extra.items() if tree} or ()
