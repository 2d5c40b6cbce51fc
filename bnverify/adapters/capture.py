"""What a value inside a traced step was: marked where it arises, read from the step's jaxpr.

A value cannot simply be stored while a model is traced: inside ``value_and_grad``, ``remat`` or
``vmap`` it belongs to a trace that is gone afterwards. So it is marked by an identity equation
with a name, and the program is run with an eye on those equations. A mark inside a loop, a
branch or the backward pass is not read: there one mark stands for many values, or for none.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

from bnverify.jaxpr.interpreter import called_jaxpr, inner_jaxprs, open_jaxpr
from bnverify.subject import LayerInput

PREFIX = "bnverify:"
PRIMITIVE = "name"  # of checkpoint_name, which does nothing where no policy asks for the name


def mark(value: Any, label: str) -> Any:
    """Return ``value``, marked."""
    return checkpoint_name(value, PREFIX + label)


def marked(function: Callable[..., Any], *args: Any) -> dict[str, list[Any]]:
    """Run ``function`` and return label -> the values marked so, in the order they arise.

    Args:
        function: traces under ``jax.jit``.
        *args: trees of arrays, or of tracers.
    """
    return evaluated(function, *args)[1]


def evaluated(function: Callable[..., Any], *args: Any) -> tuple[Any, dict[str, list[Any]]]:
    """Run ``function`` and return its result, and what ``marked`` returns."""
    found: dict[str, list[Any]] = {}
    jaxpr, shapes = jax.make_jaxpr(function, return_shape=True)(*args)
    results = _run(jaxpr, jax.tree_util.tree_leaves(args), found)
    return jax.tree_util.tree_unflatten(jax.tree_util.tree_structure(shapes), results), found


def _run(jaxpr: Any, inputs: Sequence[Any], found: dict[str, list[Any]]) -> list[Any]:
    """Evaluate a program, entering what it calls once; add marked values to ``found``."""
    inner, consts = open_jaxpr(jaxpr)
    env = dict(zip((*inner.constvars, *inner.invars), (*consts, *inputs), strict=True))

    def value(atom: Any) -> Any:
        return atom.val if hasattr(atom, "val") else env[atom]  # a literal has its value

    for eqn in inner.eqns:
        given = [value(atom) for atom in eqn.invars]
        label, called = label_of(eqn), called_jaxpr(eqn)
        results: Sequence[Any]
        if label is not None:
            found.setdefault(label, []).extend(given)
            results = given
        elif called is not None and not _is_backward(eqn):
            results = _run(called, given, found)
        else:
            results = _bind(eqn, given)
        env.update(zip(eqn.outvars, results, strict=True))
    return [value(atom) for atom in inner.outvars]


def _bind(eqn: Any, inputs: Sequence[Any]) -> Sequence[Any]:
    given = eqn.primitive.get_bind_params(eqn.params)
    # A pair to jax 0.9; from 0.10 one mapping, with the functions among the parameters.
    functions, params = given if isinstance(given, tuple) else ((), given)
    out = eqn.primitive.bind(*functions, *inputs, **params)
    return out if eqn.primitive.multiple_results else [out]


def label_of(eqn: Any) -> str | None:
    """Return the label that an equation marks; None where it is no mark."""
    name = str(eqn.params.get("name", "")) if eqn.primitive.name == PRIMITIVE else ""
    return name.removeprefix(PREFIX) if name.startswith(PREFIX) else None


def _is_backward(eqn: Any) -> bool:
    return bool(eqn.params.get("differentiated"))  # remat's second run of the forward pass


def levels(jaxpr: Any) -> Iterator[Any]:
    """Yield a program and every program it calls exactly once: no loops, branches, re-runs."""
    inner, _ = open_jaxpr(jaxpr)
    yield inner
    for eqn in inner.eqns:
        called = called_jaxpr(eqn)
        if called is not None and not _is_backward(eqn):
            yield from levels(called)


def labels(jaxpr: Any) -> Counter[str]:
    """Return how often each label is marked where ``marked`` reads it."""
    found = (label_of(eqn) for level in levels(jaxpr) for eqn in level.eqns)
    return Counter(label for label in found if label is not None)


def labels_anywhere(jaxpr: Any) -> Counter[str]:
    """Return how often each label is marked, loops, branches and re-runs included."""
    inner, _ = open_jaxpr(jaxpr)
    found: Counter[str] = Counter()
    for eqn in inner.eqns:
        label = label_of(eqn)
        if label is not None:
            found[label] += 1
        for each in inner_jaxprs(eqn):
            found += labels_anywhere(each)
    return found


def links(jaxpr: Any) -> set[tuple[str, str]]:
    """Return the pairs (a, b) where the value marked a is used once: as the value marked b."""
    found = set()
    for level in levels(jaxpr):
        uses: dict[Any, list[Any]] = {}
        for eqn in level.eqns:
            for atom in eqn.invars:
                if not hasattr(atom, "val"):  # a literal is nobody's output
                    uses.setdefault(atom, []).append(eqn)
        results = {atom for atom in level.outvars if not hasattr(atom, "val")}
        for eqn in level.eqns:
            label = label_of(eqn)
            if label is None or eqn.outvars[0] in results:
                continue
            readers = uses.get(eqn.outvars[0], [])
            if len(readers) == 1 and (reader := label_of(readers[0])) is not None:
                found.add((label, reader))
    return found


def rows_first(value: Any, feature_axes: Sequence[int]) -> Any:
    """Return ``value`` as (R, *features): the other axes moved to the front and flattened."""
    kept = sorted(axis % value.ndim for axis in feature_axes)
    reduced = [axis for axis in range(value.ndim) if axis not in kept]
    shape = tuple(value.shape[axis] for axis in kept)
    return value.transpose(*reduced, *kept).reshape(-1, *shape)


def layer_input(
    value: Any, mask: Any, shape: tuple[int, ...], feature_axes: Sequence[int]
) -> LayerInput | None:
    """Return what a normalisation layer was given, or None where a transformation changed it.

    Args:
        value: as read from the program.
        mask: likewise; broadcastable to ``shape``. None: all counts.
        shape: the input's shape as the layer saw it; one ``vmap`` of size 1 may surround it.
        feature_axes: the axes that the layer keeps.
    """
    import jax.numpy as jnp

    if [n for n in value.shape if n != 1] != [n for n in shape if n != 1]:
        return None
    rows = rows_first(value.reshape(shape), feature_axes)
    if mask is None:
        return LayerInput(rows)
    if mask.ndim > len(shape):
        mask = mask.reshape(mask.shape[mask.ndim - len(shape) :])
    weights = jnp.broadcast_to(mask, shape).astype(bool).astype(jnp.float32)
    return LayerInput(rows, rows_first(weights, feature_axes))
