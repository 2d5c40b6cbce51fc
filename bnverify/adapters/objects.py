"""nnx objects that a loop changes in place: splitting them into trees, and merging them again.

Differences between Flax releases in nnx are handled here; comments say which releases need them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from bnverify.adapters.batches import is_metrics
from bnverify.adapters.trees import extra_of
from bnverify.errors import UsageError
from bnverify.model import State
from bnverify.pytree import is_key, key_name
from bnverify.statistic_names import moments_among

Tree = Any
Path = tuple[str, ...]

# The last segment of the path of a Variable's array: ``raw_value`` up to flax 0.10, ``value`` from
# 0.11 on.
HOLDERS = ("raw_value", "value")


def variable_path(path: Any) -> Path:
    """Return the path of a State's leaf in the module: ("layers", "0", "mean")."""
    names = [key_name(entry) for entry in path]
    # In flax 0.8 the optimizer's copies of Variables are dicts of their arrays.
    is_holder = names[-1:] == [HOLDERS[0]] or (hasattr(path[-1], "name") and names[-1] in HOLDERS)
    if len(path) > 1 and is_holder:
        names.pop()
    return tuple(names)


def by_variable_path(tree: Any) -> dict[Path, Any]:
    """Return the leaves of a tree, such as gradients, by the paths of their variables."""
    return {variable_path(p): leaf for p, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def modules_of(node: Any) -> Iterator[tuple[str, nnx.Module]]:
    """Yield (path, module) for every module in ``node``, including itself with the path "".

    ``iter_modules`` is a method of Module up to flax 0.11, and a function from 0.12 on.
    """
    found = nnx.iter_modules(node) if hasattr(nnx, "iter_modules") else node.iter_modules()
    for path, module in found:
        yield "/".join(str(part) for part in path), module


def statistics_of(module: Any) -> dict[str, Any]:
    """Return the Variables of a module that hold its running statistics, by name.

    These are its ``nnx.BatchStat``, and a running mean and variance, by their names, of another type
    that is not trained.
    """
    held = {n: v for n, v in vars(module).items() if isinstance(v, nnx.Variable)}
    untrained = {n: v for n, v in held.items() if not isinstance(v, nnx.Param | nnx.RngState)}
    own = moments_among({n: n for n in untrained})
    pair = set(own.values()) if len(own) == 2 else set()
    return {n: v for n, v in untrained.items() if isinstance(v, nnx.BatchStat) or n in pair}


def kinds_of_variables(node: Any) -> tuple[Any, ...]:
    """Return nnx filters for params, running statistics, PRNG streams, and the rest of ``node``."""
    named = {
        (*filter(None, path.split("/")), name)
        for path, module in modules_of(node)
        if kind_of(module) == "model"
        for name in statistics_of(module)
    }
    # An array that replaced a Variable has its path, but is none.
    by_name = nnx.All(nnx.Variable, lambda path, _: tuple(map(str, path)) in named)
    statistics = (nnx.BatchStat, by_name)  # either; flax 0.8.5 has no nnx.Any
    return (nnx.Param, statistics, nnx.RngState, ...)


def of_seed(seed: Any) -> dict[str, Any]:
    """Return role -> what a function that makes objects may take to draw their initial values."""
    return {
        "key": jax.random.PRNGKey(seed),
        "rngs": nnx.Rngs(jax.random.key(seed)),
        "seed": seed,
    }


def is_object(value: Any) -> bool:
    """Return whether a value is an nnx object, which is changed in place."""
    return isinstance(value, nnx.Module | nnx.Optimizer | nnx.Rngs) or (
        is_metrics(value) and type(value).__module__.startswith("flax.nnx")
    )


def kind_of(value: Any) -> str:
    """Return the kind of an nnx object, a value in ``calls.KIND_OF``."""
    if isinstance(value, nnx.Optimizer) or (hasattr(value, "tx") and hasattr(value, "update")):
        return "optimizer"
    if isinstance(value, nnx.Metric) or is_metrics(value):
        return "metrics"
    return "rngs" if isinstance(value, nnx.Rngs) else "model"


def _begins_anew(value: Any) -> bool:
    """Return whether an object is a metric with its own ``reset``, and so not part of a State."""
    own = getattr(type(value), "reset", None)
    return kind_of(value) == "metrics" and own is not getattr(nnx.Metric, "reset", None)


@dataclass(frozen=True)
class Part:
    """A template for one nnx State of a split object.

    Attributes:
        treedef: the treedef of the State.
        paths: the paths of its leaves, in order.
        impls: for each leaf the implementation of a typed PRNG key; None for a plain array.
    """

    treedef: Any
    paths: tuple[Path, ...]
    impls: tuple[Any, ...]

    @classmethod
    def of(cls, state: Any) -> Part:
        """Return the template of a State whose leaves are arrays or tracers."""
        found = by_variable_path(state)
        impls = [jax.random.key_impl(leaf) if is_key(leaf) else None for leaf in found.values()]
        return cls(jax.tree_util.tree_structure(state), tuple(found), tuple(impls))

    def state(self, tree: Tree) -> Any:
        """Return the State with the values of a tree that ``tree`` gave."""
        leaves = [
            _at(tree, path)
            if impl is None
            else jax.random.wrap_key_data(_at(tree, path), impl=impl)
            for path, impl in zip(self.paths, self.impls, strict=True)
        ]
        # Variables made here belong to the trace that is running, so nnx lets them be written.
        return jax.tree_util.tree_unflatten(self.treedef, leaves)

    def tree(self, state: Any) -> Tree:
        """Return the values of a State as nested dicts of arrays, only the leaves of this template.

        Variables that a forward pass adds (``sow``) are outputs, not state.

        Raises:
            UsageError: a leaf is missing from the State.
        """
        found = by_variable_path(state)
        tree: dict[str, Any] = {}
        for path in self.paths:
            if path not in found:
                raise UsageError(_replaced_variable(path))
            leaf, inner = found[path], tree
            for name in path[:-1]:
                inner = inner.setdefault(name, {})
            inner[path[-1]] = jax.random.key_data(leaf) if is_key(leaf) else leaf
        return tree


def _replaced_variable(path: Path) -> str:
    name = path[-1]
    return (
        f"after the step {'/'.join(path)} is no longer an nnx.Variable: assigning an array to the "
        f"attribute replaces it. Assign its value instead, self.{name}[...] = ..., or "
        f"self.{name}.value = ... before flax 0.11"
    )


def _at(tree: Tree, path: Path) -> Any:
    for name in path:
        tree = tree[name]
    # A Variable with a NumPy array is written in place, which would change the caller's array.
    return jnp.asarray(tree)


@dataclass(frozen=True)
class Parts:
    """An nnx object, split into its graphdef and several parts of its variables.

    Attributes:
        graphdef: the graphdef of the object.
        filters: the filter for each part; the last is ``...``, the rest.
        parts: a template for each part.
    """

    graphdef: Any
    filters: tuple[Any, ...]
    parts: tuple[Part, ...]

    @classmethod
    def of_object(cls, node: Any, filters: Sequence[Any]) -> Parts:
        """Return the parts of an object whose variables may be tracers."""
        graphdef, *states = nnx.split(node, *filters)
        return cls(graphdef, tuple(filters), tuple(Part.of(state) for state in states))

    @classmethod
    def of(cls, make: Callable[[], Any], filters_of: Callable[[Any], Sequence[Any]]) -> Parts:
        """Return the parts of the object that ``make`` returns, traced for shapes only."""
        found: list[Parts] = []

        def build() -> None:
            node = make()
            found.append(cls.of_object(node, filters_of(node)))

        jax.eval_shape(build)
        return found[0]

    def split(self, node: Any) -> tuple[Tree, ...]:
        """Return the values of ``node``, a tree for each part."""
        _, *states = nnx.split(node, *self.filters)
        return tuple(part.tree(state) for part, state in zip(self.parts, states, strict=True))

    def merge(self, *trees: Tree) -> Any:
        """Return the object with these values, as ``split`` gave them."""
        states = (part.state(tree) for part, tree in zip(self.parts, trees, strict=True))
        return nnx.merge(self.graphdef, *states)


class Held(nnx.Module):
    """Several nnx objects in one module, so that shared variables stay shared.

    Args:
        objects: name -> object.
    """

    def __init__(self, objects: Mapping[str, Any]) -> None:
        for name, each in objects.items():
            setattr(self, _held(name), each)

    def objects(self, names: Sequence[str]) -> dict[str, Any]:
        """Return the objects by name."""
        return {name: getattr(self, _held(name)) for name in names}


def _held(name: str) -> str:
    return f"object_{name}"


@dataclass(frozen=True, eq=False)
class Layout:
    """The places of the variables of a loop's nnx objects in a State.

    Attributes:
        parts: the objects, split into optimizer variables, metric variables, params, statistics,
            PRNG streams, and the rest.
        kinds: name of an object -> its kind.
        names: name of an object -> its name in the State.
        models: network -> the path of the module with its params. A single network is called "".
        optimizers: network -> (the path of its optimizer, the structure of ``tx.init(params)`` with
            the names of its leaves). The structure is None if the optimizer's variables do not
            match it.
        metrics: the shapes and dtypes of the variables of metrics, which are reset before each call.
    """

    parts: Parts
    kinds: Mapping[str, str]
    names: Mapping[str, str]
    models: Mapping[str, Path]
    optimizers: Mapping[str, tuple[Path, tuple[Any, tuple[Path, ...]] | None]]
    metrics: Tree

    @classmethod
    def of(cls, objects: Mapping[str, Any], names: Mapping[str, str]) -> Layout:
        """Return the layout of a loop's objects, whose variables may be tracers.

        Args:
            objects: name -> object.
            names: name -> its name in the State, if there are several networks.

        Raises:
            UsageError: none of them has an ``nnx.Param``.
        """
        kinds = {name: kind_of(each) for name, each in objects.items()}
        found = dict(_optimizers(objects))
        measured = {_held(name) for name, each in objects.items() if _begins_anew(each)}

        def kept_by_optimizer(path: Any, _: Any) -> bool:
            names = tuple(map(str, path))
            return any(
                names[: len(at)] == at
                and names[len(at) : len(at) + 1] in (("opt_state",), ("step",))
                for at in found
            )

        def kept_by_metrics(path: Any, _: Any) -> bool:
            return bool(path) and str(path[0]) in measured

        held = Held(objects)
        filters = (kept_by_optimizer, kept_by_metrics, *kinds_of_variables(held))
        parts = Parts.of_object(held, filters)
        trees = parts.split(held)
        around = {at[:1] for at in found}  # an object that holds its model, and more
        paths = [path[: 2 if path[:1] in around else 1] for path in parts.parts[2].paths]
        holders = list(dict.fromkeys(paths))
        if not holders:
            raise UsageError(
                "make returns no object with an nnx.Param; it returns "
                + ", ".join(f"a {type(each).__name__}" for each in objects.values())
            )
        models = {_called(holder, names): holder for holder in holders}
        if len(holders) == 1:
            models = {"": holders[0]}
        params = {net: _inner(trees[2], path) for net, path in models.items()}
        optimizers: dict[str, Any] = {}
        for at, optimizer in found.items():
            kept = {n for n in flatten_dict(_inner(trees[0], at)) if n[0] == "opt_state"}
            free = [net for net in params if net not in optimizers]
            forms = {net: _optax_form(optimizer.tx, params[net], kept) for net in free}
            own = next((net for net in free if forms[net] is not None), None)
            key = own if own is not None else free[0] if free else _called(at, names)
            optimizers[key] = (at, forms.get(key))
        shapes = jax.tree_util.tree_map(lambda leaf: (leaf.shape, leaf.dtype), trees[1])
        return cls(parts, kinds, names, models, optimizers, shapes)

    def split(self, objects: Mapping[str, Any], more: Tree) -> State:
        """Return a loop's objects as a State.

        Args:
            objects: the objects, as from ``merge``.
            more: further entries of ``State.extra``.
        """
        kept, _, params, statistics, streams, others = self.parts.split(Held(objects))
        opt_states, rest = {}, {}
        for net, (at, form) in self.optimizers.items():
            flat = flatten_dict(_inner(kept, at))
            own = {name: leaf for name, leaf in flat.items() if name[0] == "opt_state"}
            rest[net] = unflatten_dict({n: leaf for n, leaf in flat.items() if n not in own})
            opt_states[net] = unflatten_dict(own).get("opt_state", {})
            if form is not None:
                opt_states[net] = jax.tree_util.tree_unflatten(form[0], [own[n] for n in form[1]])
        extra = {
            "optimizer": _single(rest),
            "streams": {self._called(head): tree for head, tree in streams.items()},
            "others": {self._called(head): tree for head, tree in others.items()},
            **more,
        }
        return State(
            self._by_network(params),
            self._by_network(statistics),
            _single(opt_states) if opt_states else (),
            {name: tree for name, tree in extra.items() if jax.tree_util.tree_leaves(tree)} or (),
        )

    def merge(self, state: State) -> dict[str, Any]:
        """Return the loop's objects with the values of ``state`` and reset metrics."""
        extra = extra_of(state)
        kept: dict[Path, Any] = {}
        for net, (at, form) in self.optimizers.items():
            own = state.opt_state if net == "" else state.opt_state[net]
            rest = extra.get("optimizer", {})
            rest = rest if net == "" else rest.get(net, {})
            if form is None:
                kept |= {(*at, "opt_state", *n): leaf for n, leaf in flatten_dict(own).items()}
            else:
                leaves = jax.tree_util.tree_leaves(own)
                kept |= {(*at, *n): leaf for n, leaf in zip(form[1], leaves, strict=True)}
            kept |= {(*at, *n): leaf for n, leaf in flatten_dict(rest).items()}
        metrics = {n: jnp.zeros(*form) for n, form in flatten_dict(self.metrics).items()}
        held = self.parts.merge(
            unflatten_dict(kept),
            unflatten_dict(metrics),
            self._together(state.params),
            self._together(state.batch_stats),
            self._held(extra.get("streams", {})),
            self._held(extra.get("others", {})),
        )
        objects: dict[str, Any] = held.objects(list(self.kinds))
        for each in objects.values():
            if _begins_anew(each):
                each.reset()
        return objects

    def _called(self, head: str) -> str:
        return self.names.get(head.removeprefix("object_"), head)

    def _held(self, trees: Mapping[str, Tree]) -> Tree:
        heads = {self._called(_held(name)): _held(name) for name in self.kinds}
        return {heads[name]: tree for name, tree in trees.items()}

    def _by_network(self, tree: Tree) -> Tree:
        return _single({net: _inner(tree, path) for net, path in self.models.items()})

    def _together(self, tree: Tree) -> Tree:
        whole: dict[Path, Any] = {}
        for net, path in self.models.items():
            inner = tree if net == "" else tree.get(net, {})
            whole |= {(*path, *name): leaf for name, leaf in flatten_dict(inner).items()}
        return unflatten_dict(whole)


def _single(trees: Mapping[str, Tree]) -> Tree:
    return trees[""] if set(trees) == {""} else dict(trees)


def _inner(tree: Tree, path: Path) -> Tree:
    for name in path:
        tree = tree.get(name, {})
    return tree


def _called(path: Path, names: Mapping[str, str]) -> str:
    head = path[0].removeprefix("object_")
    return "/".join((names.get(head, head), *path[1:]))


def _optimizers(objects: Mapping[str, Any]) -> Iterator[tuple[Path, Any]]:
    """Yield (path, optimizer) for every optimizer among objects or in their attributes."""
    for name, each in objects.items():
        if kind_of(each) == "optimizer":
            yield (_held(name),), each
        elif isinstance(each, nnx.Module):
            for attribute, value in vars(each).items():
                if isinstance(value, nnx.Optimizer):
                    yield (_held(name), attribute), value


def optimizers_of(objects: Mapping[str, Any]) -> list[Any]:
    """Return the optimizers among objects and in their attributes."""
    return [optimizer for _, optimizer in _optimizers(objects)]


def _optax_form(tx: Any, params: Tree, kept: set[Path]) -> tuple[Any, tuple[Path, ...]] | None:
    """Return (the treedef of ``tx.init(params)``, the names of its leaves) if they match ``kept``."""
    expected = jax.eval_shape(tx.init, params)
    leaves, treedef = jax.tree_util.tree_flatten_with_path(expected)
    names = tuple(("opt_state", *variable_path(path)) for path, _ in leaves)
    return (treedef, names) if kept == set(names) else None
