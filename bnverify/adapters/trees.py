"""Finding params, running statistics and optimizer state in the state of a loop.

The state may be any pytree: a train state, a tuple of several, a dict of trees. Its parts are found by
the names that Flax and Optax use, or by paths that the user gives; everything else goes to
``State.extra``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from bnverify.adapters.batches import is_metrics
from bnverify.errors import UsageError, did_you_mean
from bnverify.jaxpr.tracing import leaf_names
from bnverify.model import State, Tree
from bnverify.pytree import by_path, is_key, path_name
from bnverify.statistic_names import moment_of

Path = tuple[str, ...]

PARAMS, STATISTICS, OPTIMIZER, METRICS = "params", "batch_stats", "opt_state", "metrics"
_NAMES = {
    "params": PARAMS,
    "batch_stats": STATISTICS,
    "opt_state": OPTIMIZER,
    "optimizer_state": OPTIMIZER,
    "optim_state": OPTIMIZER,
}
# Trees of several networks side by side: g_params, g_batch_stats and g_opt_state, or params_g.
_OF_NETWORK = re.compile(r"^(?P<network>.+)_(?P<part>params|batch_stats|stats|opt_state)$")
_OF_NETWORK_LAST = re.compile(
    r"^(?P<part>params|variables|batch_stats|stats|opt_state|optimizer_state)_(?P<network>.+)$"
)


@dataclass(frozen=True)
class Layout:
    """The paths of the parts of a State in the things of a loop.

    Attributes:
        parts: part -> network -> path. A single network is called "".
        rest: the paths of the leaves that belong to no part.
        metrics: the paths of metrics objects, which are reset before each call and not in the State.
        names: thing -> its name in the State, if there are several.
    """

    parts: Mapping[str, Mapping[str, Path]]
    rest: tuple[Path, ...]
    metrics: tuple[Path, ...]
    names: Mapping[str, str]

    def split(self, things: Mapping[str, Any], more: Tree) -> State:
        """Return the things as a State.

        Args:
            things: name -> tree.
            more: further entries of ``State.extra``.
        """
        parts = {}
        for part in (PARAMS, STATISTICS, OPTIMIZER):
            found = {net: at(things, path) for net, path in self.parts.get(part, {}).items()}
            parts[part] = found[""] if set(found) == {""} else found
        fields: dict[str, Any] = {}
        for path in self.rest:
            inner = fields
            for name in self._named(path)[:-1]:
                inner = inner.setdefault(name, {})
            inner[self._named(path)[-1]] = at(things, path)
        extra = {**({"fields": fields} if fields else {}), **more}
        trees = (
            parts[PARAMS],
            parts[STATISTICS] if parts[STATISTICS] is not None else {},
            parts[OPTIMIZER] or (),
            extra or (),
        )
        return State(*(jax.tree_util.tree_map(_array, tree) for tree in trees))

    def join(self, state: State, template: Mapping[str, Any]) -> dict[str, Any]:
        """Return the things with the values of ``state``.

        Args:
            state: the values.
            template: the things as ``create`` returned them, for everything that is not an array.
        """
        values: dict[Path, Any] = {}
        trees = {PARAMS: state.params, STATISTICS: state.batch_stats, OPTIMIZER: state.opt_state}
        for part, nets in self.parts.items():
            for net, path in nets.items():
                values[path] = trees[part] if set(nets) == {""} else trees[part][net]
        fields = extra_of(state).get("fields", {})
        for path in self.rest:
            values[path] = at(fields, self._named(path))
        return {name: _replaced(tree, values, (name,)) for name, tree in template.items()}

    def _named(self, path: Path) -> Path:
        """Return the path in ``State.extra`` of a leaf that belongs to no part."""
        names = self.names
        head = (names.get(path[0], path[0]),) if len(names) > 1 or len(path) == 1 else ()
        return (*head, *path[1:])

    def networks(self) -> tuple[str, ...]:
        """Return the names of the networks in the State."""
        return tuple(self.parts.get(PARAMS, {}))


def extra_of(state: State) -> dict[str, Any]:
    """Return ``State.extra`` as a new dict; {} if it is not a mapping."""
    return dict(state.extra) if isinstance(state.extra, Mapping) else {}


def layout(
    things: Mapping[str, Any],
    names: Mapping[str, str],
    *,
    params: str | None = None,
    statistics: str | None = None,
    opt_state: str | None = None,
) -> Layout:
    """Find the parts of a State in the things of a loop.

    Args:
        things: name -> tree; the leaves may be tracers.
        names: thing -> its name in the State, if there are several.
        params: the path of the params, joined by "/", with or without the name of the thing; None:
            anything called "params".
        statistics: the path of the running statistics, as for params; None: anything called
            "batch_stats".
        opt_state: the path of the optimizer's state, as for params; None: "opt_state" and similar
            names, or a state made by Optax.

    Raises:
        UsageError: there is nothing at a path, or no params are found.
    """
    told = {PARAMS: params, STATISTICS: statistics, OPTIMIZER: opt_state}
    paths = {part: tuple(path.split("/")) for part, path in told.items() if path}
    found: dict[str, list[Path]] = {PARAMS: [], STATISTICS: [], OPTIMIZER: [], METRICS: []}
    rest: list[Path] = []
    for path, part in _walk(things, paths, names):
        if part is None:
            rest.append(path)
        else:
            found[part].append(path)
    for copy in _copies(found, things):
        for part in (PARAMS, STATISTICS):
            inside = [path for path in found[part] if path[:-1] == copy]
            found[part] = [path for path in found[part] if path not in inside]
            rest += [leaf for path in inside for leaf in _leaves(path, at(things, path))]
    for part, wanted in paths.items():
        if not found[part] and part != STATISTICS:
            near = did_you_mean("/".join(wanted), map(str, _places(things)))
            raise UsageError(
                f"there is nothing at {'/'.join(wanted)!r}; there are {_listed(things)}{near}"
            )
    if not found[PARAMS]:
        raise UsageError(
            f"no params are found in the state: there are {_listed(things)}. Give their path, as in "
            'params="variables/params"; statistics= and opt_state= work the same way'
        )
    parts = {
        part: _by_network(found[part], names, len(found[PARAMS]) > 1)
        for part in (PARAMS, STATISTICS, OPTIMIZER)
    }
    parts[OPTIMIZER] = _optimizers_by_network(parts, things)
    return Layout(parts, tuple(rest), tuple(found[METRICS]), dict(names))


def _walk(
    things: Mapping[str, Any], told: Mapping[str, Path], names: Mapping[str, str]
) -> Iterator[tuple[Path, str | None]]:
    """Yield (path, part) for every part, and (path, None) for every leaf in none."""
    heads = {name: names.get(name, name) for name in things}
    pending: list[tuple[Path, Any, str | None]] = []
    for name, tree in reversed(list(things.items())):
        hint = None if tree is None else _prefixed(heads[name], set(heads.values()), told)
        pending.append(((name,), tree, hint))
    while pending:
        path, node, part = pending.pop()
        children, _ = _children(node)
        if node is not None and part is None:
            part = _part((heads[path[0]], *path[1:]), node, told)
        if part == STATISTICS and "batch_stats" in dict(
            children
        ):  # the path of the field around it
            part = None
        if part is not None:
            yield path, part
        elif children:
            siblings = {name for name, _ in children}
            for name, child in reversed(children):
                hint = None if child is None else _prefixed(name, siblings, told)
                pending.append(((*path, name), child, hint))
        elif not _is_empty(node):
            yield path, None


def _copies(found: Mapping[str, Sequence[Path]], things: Mapping[str, Any]) -> Iterator[Path]:
    """Yield the path of each copy of a network's variables that no optimizer trains.

    The network has its optimizer's state beside its params. The copy is deeper in the same state, as
    ``ema`` in ``(params, batch_stats, opt_state, ema)``, and its params have the same names and shapes.
    """
    trained = {path[:-1] for path in found[OPTIMIZER]}
    for path in found[PARAMS]:
        for own in found[PARAMS]:
            deeper = len(path) > len(own) and path[: len(own) - 1] == own[:-1]
            alone = own[:-1] in trained and path[:-1] not in trained
            if deeper and alone and _shapes(at(things, path)) == _shapes(at(things, own)):
                yield path[:-1]


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    return {name: jnp.shape(leaf) for name, leaf in by_path(tree).items()}


def _leaves(path: Path, node: Any) -> Iterator[Path]:
    """Yield the paths of the leaves of a node."""
    children, _ = _children(node)
    for name, child in children:
        yield from _leaves((*path, name), child)
    if not children and not _is_empty(node):
        yield path


def _part(path: Path, node: Any, told: Mapping[str, Path]) -> str | None:
    for part, wanted in told.items():
        if path[-len(wanted) :] != wanted or len(path) > len(wanted) + 1:
            continue
        if path != wanted or not _has(node, wanted):  # the entry "state" of a thing called "state"
            return part
    by_name = _NAMES.get(path[-1])
    if by_name is not None and by_name not in told:
        return by_name
    if is_metrics(node):
        return METRICS
    return OPTIMIZER if OPTIMIZER not in told and _is_optax(node) else None


def _has(node: Any, path: Path) -> bool:
    """Return whether there is something at a path in a node."""
    inside = dict(_children(node)[0])
    return path[0] in inside and (len(path) == 1 or _has(inside[path[0]], path[1:]))


def _prefixed(name: str, siblings: set[str], told: Mapping[str, Path]) -> str | None:
    """Return the part of a name like ``g_params`` or ``params_g``, if the network has an opt_state too."""
    part, network = _network_in(name)
    if not network or not {f"{network}_opt_state", f"opt_state_{network}"} & siblings:
        return None
    part = {"stats": STATISTICS, "optimizer_state": OPTIMIZER}.get(part, part)
    return None if part in told or part == "variables" else part


def _network_in(name: str) -> tuple[str, str]:
    """Return the part and the network in the name of a tree: "params", "g" of g_params; "" for neither."""
    match = None if name in _NAMES else _OF_NETWORK.match(name) or _OF_NETWORK_LAST.match(name)
    return (match["part"], match["network"]) if match else ("", "")


def _is_optax(node: Any) -> bool:
    if hasattr(node, "_fields") and type(node).__module__.split(".")[0] == "optax":
        return True
    if type(node) is not tuple or not node:
        return False
    return all(_is_optax(part) for part in node)


def _by_network(paths: Sequence[Path], names: Mapping[str, str], several: bool) -> dict[str, Path]:
    if not several:
        return {"": paths[0]} if len(paths) == 1 else {_joined(p, names): p for p in paths}
    return {_joined(path, names): path for path in paths}


def _joined(path: Path, names: Mapping[str, str]) -> str:
    """Return the name of the network in a path: everything except the name of the part."""
    called = (names.get(path[0], path[0]), *path[1:])
    last = _network_in(called[-1])[1]
    inner = (*called[1:-1], *([last] if last else []))
    outer = _network_in(called[0])[1] or called[0]
    head = (outer,) if len(path) > 1 and (len(names) > 1 or not inner) else ()
    return "/".join((*head, *inner)) or called[0]


def _optimizers_by_network(
    parts: dict[str, dict[str, Path]], things: Mapping[str, Any]
) -> dict[str, Path]:
    """Return network -> path of its optimizer's state, if these have other names than the params.

    A state belongs to the params that it has copies of, or else to those in the same position.
    """
    networks, found = parts[PARAMS], parts[OPTIMIZER]
    if len(networks) != len(found) or set(networks) == set(found):
        return found
    left, matched = list(found.values()), {}
    for network, params in networks.items():
        fitting = [path for path in left if _has_copies(at(things, path), at(things, params))]
        matched[network] = (fitting or left)[0]
        left.remove(matched[network])
    return matched


def _has_copies(state: Any, params: Any) -> bool:
    """Return whether an optimizer's state has a leaf like each of some params, under the same path."""
    kept, own = (
        [(f"/{path}", jnp.shape(leaf)) for path, leaf in by_path(tree).items()]
        for tree in (state, params)
    )
    return all(
        any(there.endswith(path) and size == shape for there, size in kept) for path, shape in own
    )


def _children(node: Any) -> tuple[list[tuple[str, Any]], Any]:
    """Return (the children of a node by name, the treedef to rebuild it)."""
    if node is None:
        return [], None
    pairs, treedef = jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda n: n is not node)
    if jax.tree_util.treedef_is_leaf(treedef):
        return [], None
    return [(path_name(path), child) for path, child in pairs], treedef


def _is_empty(node: Any) -> bool:
    return not jax.tree_util.tree_leaves(node)


def at(tree: Any, path: Path) -> Any:
    """Return the subtree at a path."""
    if not path:
        return tree
    if isinstance(tree, Mapping) and path[0] in tree:
        return at(tree[path[0]], path[1:])
    return at(dict(_children(tree)[0])[path[0]], path[1:])


def _replaced(node: Any, values: Mapping[Path, Any], path: Path) -> Any:
    if path in values:
        return _with_keys_of(node, values[path])
    children, treedef = _children(node)
    if treedef is None:
        return node
    new = [_replaced(child, values, (*path, name)) for name, child in children]
    return jax.tree_util.tree_unflatten(treedef, new)


def own_name(parameter: str) -> str:
    """Return the name in the State for a parameter's argument: "generator" for generator_state."""
    told = parameter in _NAMES or _OF_NETWORK.match(parameter)
    return parameter if told else parameter.removesuffix("_state") or parameter


def _places(things: Mapping[str, Any]) -> list[str]:
    places = []
    for name, tree in things.items():
        inner = [child for child, _ in _children(tree)[0]]
        places += inner if len(things) == 1 and inner else [name]
    return places


def _listed(things: Mapping[str, Any]) -> str:
    return ", ".join(_places(things)) or "no trees"


def _array(leaf: Any) -> Any:
    """Return a leaf as an array that NumPy can hold: a typed PRNG key as its data."""
    if is_key(leaf):
        return jax.random.key_data(leaf)
    # A step counter may start as a Python int and become an array.
    return leaf if hasattr(leaf, "dtype") else jnp.array(leaf)


def _with_keys_of(template: Any, tree: Any) -> Any:
    """Return a tree with the data of typed PRNG keys made keys, where the template has some."""
    if not any(map(is_key, jax.tree_util.tree_leaves(template))):
        return tree
    return jax.tree_util.tree_map(
        lambda old, new: (
            jax.random.wrap_key_data(jnp.asarray(new), impl=jax.random.key_impl(old))
            if is_key(old)
            else new
        ),
        template,
        tree,
    )


def kind_of(tree: Any) -> str:
    """Return whether a tree is params, statistics, an optimizer state or a key; "" if none of them."""
    if _is_optax(tree):
        return OPTIMIZER
    if _is_prng_key(tree):
        return "key"
    last = {path.rpartition("/")[2] for path in leaf_names(tree)}
    if not isinstance(tree, Mapping) or not last:
        return ""
    if all(map(moment_of, last)):
        return STATISTICS
    return PARAMS if last & {"kernel", "scale", "bias", "embedding", "w", "b"} else ""


def _is_prng_key(value: Any) -> bool:
    dtype, shape = getattr(value, "dtype", None), getattr(value, "shape", None)
    if dtype is None:
        return False
    return (is_key(value) and shape == ()) or (dtype == jnp.uint32 and shape in {(2,), (4,)})


def search(things: Mapping[str, Any], layers: Mapping[str, Sequence[str]]) -> str | None:
    """Find the subtree with the statistics of given normalisation layers.

    Args:
        things: name -> tree.
        layers: path of a layer -> the names of its statistics.

    Returns:
        The path of the subtree in its thing, joined by "/", or the name of the thing that it is; None if
        they are not all in one subtree.
    """
    paths = leaf_names(dict(things))
    holders: set[str] = set()
    for layer, names in layers.items():
        for name in names:
            end = f"/{layer}/{name}" if layer else f"/{name}"
            found = {path.removesuffix(end) for path in paths if path.endswith(end)}
            holders = found if not holders else holders & found
            if not holders:
                return None
    thing, _, inside = min(holders, key=len, default="").partition("/")
    return inside or thing or None
