"""The objects of a user's nnx loop, held together and taken apart into a State."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
from flax import nnx as flax_nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from bnverify.adapters.capture import mark
from bnverify.adapters.nnx_compat import variable_path
from bnverify.adapters.nnx_parts import Parts
from bnverify.subject import State, Tree

GRADIENT = "gradient of "


class Held(flax_nnx.Module):
    """Several nnx objects as one, so that what they share stays shared.

    Args:
        objects: the model first, the optimizer second, whatever else the loop changes.
    """

    def __init__(self, objects: Sequence[Any]) -> None:
        for index, each in enumerate(objects):
            setattr(self, _name(index), each)

    def objects(self, count: int) -> list[Any]:
        """Return the objects in order."""
        return [getattr(self, _name(index)) for index in range(count)]


def _name(index: int) -> str:
    return f"object{index}"


MODEL, OPTIMIZER = _name(0), _name(1)


def _of_optimizer(path: Any, _: Any) -> bool:
    return bool(path) and path[0] == OPTIMIZER


FILTERS = (_of_optimizer, flax_nnx.Param, flax_nnx.BatchStat, flax_nnx.RngState, ...)


@dataclass(frozen=True, eq=False)
class Layout:
    """Where the variables of held objects go in a State.

    Attributes:
        parts: the held objects, split by ``FILTERS``.
        count: how many objects there are.
        opt_state: of the optimizer's state as Optax has it, or None where the variables of the
            user's optimizer are not those of ``tx.init(params)``.
        names: of its leaves, in order.
    """

    parts: Parts
    count: int
    opt_state: Any
    names: tuple[tuple[str, ...], ...]

    @classmethod
    def of(cls, objects: Sequence[Any]) -> Layout:
        """Return the layout of a loop's objects, whose variables may be tracers."""
        parts, count = Parts.of_object(Held(objects), FILTERS), len(objects)
        optimizer, params, *_ = parts.split(Held(objects))
        expected = jax.eval_shape(objects[1].tx.init, params.get(MODEL, {}))
        leaves, treedef = jax.tree_util.tree_flatten_with_path(expected)
        names = tuple(("opt_state", *variable_path(path)) for path, _ in leaves)
        kept = {name for name in flatten_dict(optimizer[OPTIMIZER]) if name[0] == "opt_state"}
        alike = kept == set(names)
        return cls(parts, count, treedef if alike else None, names if alike else ())

    def split(self, objects: Sequence[Any], more: Tree) -> State:
        """Return the State of a loop's objects.

        Args:
            objects: as ``merge`` made them.
            more: what else is carried.
        """
        optimizer, params, batch_stats, streams, others = self.parts.split(Held(objects))
        flat = flatten_dict(optimizer[OPTIMIZER])
        kept = {name: leaf for name, leaf in flat.items() if name[0] == "opt_state"}
        rest = {name: leaf for name, leaf in flat.items() if name[0] != "opt_state"}
        opt_state: Any = unflatten_dict(kept).get("opt_state", {})
        if self.opt_state is not None:
            opt_state = jax.tree_util.tree_unflatten(self.opt_state, [kept[n] for n in self.names])
        extra = {"optimizer": unflatten_dict(rest), "streams": streams, "others": others, **more}
        return State(
            params.get(MODEL, {}),
            batch_stats.get(MODEL, {}),
            opt_state,
            {name: tree for name, tree in extra.items() if jax.tree_util.tree_leaves(tree)} or (),
        )

    def merge(self, state: State) -> list[Any]:
        """Return the loop's objects with the values of ``state``."""
        extra = dict(state.extra or {})
        kept = {"opt_state": state.opt_state}
        if self.opt_state is not None:
            kept = unflatten_dict(
                dict(zip(self.names, jax.tree_util.tree_leaves(state.opt_state), strict=True))
            )
        held = self.parts.merge(
            {OPTIMIZER: {**kept, **extra.get("optimizer", {})}},
            {MODEL: state.params},
            {MODEL: state.batch_stats},
            extra.get("streams", {}),
            extra.get("others", {}),
        )
        objects: list[Any] = held.objects(self.count)
        return objects


def marking(tx: Any) -> Any:
    """Return the optimizer, marking the gradients that it is given."""

    def update(grads: Tree, *args: Any, **kwargs: Any) -> Any:
        leaves, treedef = jax.tree_util.tree_flatten_with_path(grads)
        marks = [mark(leaf, GRADIENT + "/".join(variable_path(path))) for path, leaf in leaves]
        return tx.update(jax.tree_util.tree_unflatten(treedef, marks), *args, **kwargs)

    return tx._replace(update=update)


def gradients(found: dict[str, list[Any]], params: Tree) -> Tree:
    """Return the gradients among marked values, a tree like ``params``; None: not all, once.

    Args:
        found: label -> values, see ``bnverify.adapters.capture``.
        params: nested dicts.
    """
    grads = {}
    for path, param in flatten_dict(params).items():
        values = found.get(GRADIENT + "/".join(path), [])
        if len(values) != 1 or values[0].size != param.size:
            return None
        grads[path] = values[0].reshape(param.shape)  # one shard's axis of a vmap around
    return unflatten_dict(grads)
