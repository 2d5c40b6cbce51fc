"""Differences between Flax releases in nnx, absorbed in one place.

Each entry says which releases need it; delete it with the last of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

# A Variable's array, as the last step of a path into a State: ``raw_value`` to flax 0.10,
# ``value`` from 0.11.
HOLDERS = ("raw_value", "value")


def variable_path(path: Any) -> tuple[str, ...]:
    """Return where a State's leaf sits in the module: ("layers", "0", "mean")."""
    names = [_name(entry) for entry in path]
    # In flax 0.8 the optimizer's copies of Variables are dicts of their arrays.
    is_holder = names[-1:] == [HOLDERS[0]] or (hasattr(path[-1], "name") and names[-1] in HOLDERS)
    if len(path) > 1 and is_holder:
        names.pop()
    return tuple(names)


def _name(entry: Any) -> str:
    for attribute in ("key", "name", "idx"):
        if hasattr(entry, attribute):
            return str(getattr(entry, attribute))
    return str(entry)


def modules_of(node: Any) -> Iterator[tuple[str, nnx.Module]]:
    """Yield (path, module) for every module in ``node``, itself with the path "".

    A method of Module to flax 0.11, a function from 0.12.
    """
    found = nnx.iter_modules(node) if hasattr(nnx, "iter_modules") else node.iter_modules()
    for path, module in found:
        yield "/".join(str(part) for part in path), module


def is_key(leaf: Any) -> bool:
    """Return whether a leaf is a typed PRNG key, which NumPy cannot hold."""
    return bool(jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key))
