"""A user's TrainState taken apart into a State, and put together again."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bnverify.subject import State, Tree

OWN = ("params", "opt_state")


class Shown(NamedTuple):
    """An optimizer state that also carries the gradients that were last given to the optimizer.

    It goes wherever the optimizer state goes, through jit, vmap and loops, so the gradients
    come out without a change to the step.
    """

    inner: Tree
    grads: Tree


def showing(tx: Any) -> Any:
    """Return the optimizer, with its state as :class:`Shown`."""

    def update(grads: Tree, state: Shown, params: Tree = None, **more: Any) -> Any:
        updates, inner = tx.update(grads, state.inner, params, **more)
        return updates, Shown(inner, grads)

    return tx._replace(update=update)


@dataclass(frozen=True, eq=False)
class Fields:
    """Which fields a train state has.

    Attributes:
        treedef: of the state; it holds what is no array: the model, the optimizer.
        statistics: the field with the running statistics; None where there is none.
        others: the further fields that hold arrays.
        shown: whether the optimizer's state carries the gradients out.
    """

    treedef: Any
    statistics: str | None
    others: tuple[str, ...]
    shown: bool = True

    @classmethod
    def of(cls, state: Any, statistics: str) -> Fields:
        """Return the fields of ``state``.

        Args:
            state: the train state; its leaves may be tracers.
            statistics: the name of the field with the running statistics.
        """
        names = [
            field.name
            for field in dataclasses.fields(state)
            if field.metadata.get("pytree_node", True)
        ]
        return cls(
            jax.tree_util.tree_structure(state),
            statistics if statistics in names else None,
            tuple(name for name in names if name not in (*OWN, statistics)),
        )

    def empty(self) -> Any:
        """Return a state of the right type without arrays in it."""
        return jax.tree_util.tree_unflatten(self.treedef, [None] * self.treedef.num_leaves)

    def join(self, state: State, template: Any) -> Any:
        """Return the train state with the values of ``state``.

        Args:
            state: the values.
            template: a train state, for everything that is no array.
        """
        parts: dict[str, Any] = {"params": state.params, "opt_state": state.opt_state}
        if self.statistics is not None:
            parts[self.statistics] = state.batch_stats
        parts |= dict(state.extra or {}).get("fields", {})
        if self.shown:
            zeros = jax.tree_util.tree_map(jnp.zeros_like, state.params)
            parts["opt_state"] = Shown(state.opt_state, zeros)
            parts["tx"] = showing(template.tx)
        return template.replace(**parts)

    def split(self, train_state: Any, extra: Tree) -> tuple[State, Tree]:
        """Return the State of a train state that ``join`` made, and the gradients.

        Args:
            train_state: after a step.
            extra: what else is carried besides fields.
        """
        opt_state, grads = train_state.opt_state, None
        if self.shown:
            opt_state, grads = opt_state.inner, opt_state.grads
        return self._state(train_state, opt_state, extra), grads

    def first(self, train_state: Any, extra: Tree) -> State:
        """Return the State of a train state as the user's ``create`` made it."""
        return self._state(train_state, train_state.opt_state, extra)

    def _state(self, train_state: Any, opt_state: Tree, extra: Tree) -> State:
        fields = {name: getattr(train_state, name) for name in self.others}
        fields = {name: tree for name, tree in fields.items() if jax.tree_util.tree_leaves(tree)}
        statistics = getattr(train_state, self.statistics) if self.statistics else {}
        more = {"fields": fields} if fields else {}
        parts = (train_state.params, statistics, opt_state, {**more, **extra} or ())
        # A step counter starts as a Python int, which would be another type than its successor.
        return State(*(jax.tree_util.tree_map(_array, part) for part in parts))


def _array(leaf: Any) -> Any:
    return leaf if hasattr(leaf, "dtype") else jnp.array(leaf)
