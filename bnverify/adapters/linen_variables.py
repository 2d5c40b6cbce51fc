"""The variables of a linen module, split into the parts of a State and joined again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import errors

from bnverify.adapters.canonical import Pass
from bnverify.adapters.layers import Recording
from bnverify.adapters.linen_layers import Interceptor
from bnverify.adapters.trees import partition, union
from bnverify.subject import State

Tree = Any


class Module(Protocol):
    """A linen module with its mode and its batch; see ``bnverify.adapters.linen``."""

    @property
    def statistics(self) -> str:
        """The collection that holds the running statistics."""

    def init(self, rngs: Any, inputs: Any) -> Any:
        """Return the initial variables."""

    def batch(self, x: Any, y: Any) -> tuple[Any, Any]:
        """Return (inputs, targets)."""

    def apply(
        self, variables: Any, inputs: Any, *, train: bool, mutable: Any, rngs: Any
    ) -> tuple[Any, Any]:
        """Return the outputs and the updated collections."""


@dataclass(frozen=True, eq=False)
class Variables:
    """Which variables a model has and where a State keeps them.

    Attributes:
        module: the module.
        mutable: what the training pass may write, as ``module.apply`` takes it.
        rngs: the random streams that it may draw from, besides "params".
        others: the collections carried besides ``params`` and the statistics.
        carried: patterns of paths in the statistics that are no averages.
        random: whether the training pass draws random numbers.
        random_eval: whether evaluation does.
    """

    module: Module
    mutable: Any
    rngs: tuple[str, ...]
    others: tuple[str, ...] = ()
    carried: tuple[str, ...] = ()
    random: bool = False
    random_eval: bool = False

    def init(self, seed: Any, x: Any) -> tuple[Tree, Tree, Tree]:
        """Return the initial params, statistics and extra."""
        key = jax.random.PRNGKey(seed)
        inputs, _ = self.module.batch(x, jnp.zeros(x.shape[:1], jnp.float32))
        variables = self.module.init({"params": key, **self._streams(key)}, inputs)
        averages, carried = partition(variables.get(self.module.statistics, {}), self.carried)
        # The names of streams are folded in from 1, so 0 is free for the steps' own key.
        return (
            variables.get("params", {}),
            averages,
            self._extra(variables, carried, jax.random.fold_in(key, 0)),
        )

    def apply(
        self, state: State, x: Any, y: Any, *, train: bool, recording: Recording | None = None
    ) -> Pass:
        """Return one forward pass on the batch made from x and y.

        The key of the random streams moves on in training only.
        """
        inputs, targets = self.module.batch(x, y)
        extra = dict(state.extra or {})
        key = extra.get("key")
        rngs = None
        if key is not None and (train or self.random_eval):
            key, now = jax.random.split(key)
            rngs = self._streams(now)
        collections = dict(extra.get("collections", {}))
        variables = {"params": state.params, **collections}
        statistics = self.module.statistics
        joined = union(state.batch_stats, extra.get("carried", {}))
        if joined:
            variables[statistics] = joined
        with _noting(recording, statistics):
            outputs, updated = self.module.apply(
                variables, inputs, train=train, mutable=self.mutable, rngs=rngs
            )
        averages, carried = partition(updated.get(statistics, joined), self.carried)
        after = {name: updated.get(name, old) for name, old in collections.items()}
        new_key = key if train else extra.get("key")
        return Pass(outputs, targets, averages, self._extra(after, carried, new_key))

    def _streams(self, key: Any) -> dict[str, Any]:
        return {name: jax.random.fold_in(key, i + 1) for i, name in enumerate(self.rngs)}

    def _extra(self, collections: Mapping[str, Any], carried: Tree, key: Any) -> Tree:
        parts = {
            "collections": {name: collections[name] for name in self.others},
            "carried": carried,
        }
        extra = {name: tree for name, tree in parts.items() if tree}
        if (self.random or self.random_eval) and key is not None:
            extra["key"] = key
        return extra or ()


def _noting(recording: Recording | None, statistics: str) -> AbstractContextManager[Any]:
    if recording is None:
        return nullcontext()
    return nn.intercept_methods(Interceptor(recording, statistics))


def look(
    module: Module,
    sizes: tuple[int, int],
    rngs: tuple[str, ...],
    mutable: bool | Sequence[str] | None,
    carried: tuple[str, ...],
) -> Variables:
    """Return the variables of a model, found by tracing it for shapes.

    Args:
        module: the module.
        sizes: (N, D) to trace it at.
        rngs: names of random streams.
        mutable: the user's choice; None: every collection but ``params``.
        carried: the user's patterns.
    """
    seed = jax.ShapeDtypeStruct((), "int32")
    x = jax.ShapeDtypeStruct(sizes, "float32")
    y = jax.ShapeDtypeStruct(sizes[:1], "float32")
    recording = Recording()

    def initial(seed: Any, x: Any) -> Any:
        key = jax.random.PRNGKey(seed)
        streams = dict.fromkeys(("params", *rngs), key)
        inputs, _ = module.batch(x, jnp.zeros(x.shape[:1], jnp.float32))
        with nn.intercept_methods(Interceptor(recording, module.statistics)):
            return module.init(streams, inputs)

    variables = jax.eval_shape(initial, seed, x)
    others = tuple(name for name in variables if name not in ("params", module.statistics))
    everything = [module.statistics, *others]
    chosen = everything if mutable is None else mutable
    chosen = chosen if isinstance(chosen, bool) else list(chosen)

    def after(mutable: Any, streams: Any, train: bool) -> Any:
        def run(variables: Any, x: Any, y: Any) -> Any:
            inputs, _ = module.batch(x, y)
            return module.apply(variables, inputs, train=train, mutable=mutable, rngs=streams)[1]

        return jax.eval_shape(run, variables, x, y)

    def draws(*, train: bool) -> bool:
        try:
            after(chosen, None, train)
        except errors.InvalidRngError:
            return True
        return False

    updated = after(everything, dict.fromkeys(rngs, jax.random.PRNGKey(0)), True)
    # What a pass makes longer (``sow``) is a report of that pass, not a state to carry on.
    kept = tuple(
        name
        for name in others
        if name not in updated or _shapes(updated[name]) == _shapes(variables[name])
    )
    return Variables(
        module,
        chosen,
        rngs,
        others=kept,
        carried=(*carried, *(f"{path}/*" for path in sorted(recording.power_iterated))),
        random=draws(train=True),
        random_eval=draws(train=False),
    )


def _shapes(tree: Any) -> Any:
    return jax.tree_util.tree_map(lambda leaf: (tuple(leaf.shape), str(leaf.dtype)), tree)
