"""Programs kept on disk as they were lowered, so that another process need not trace them.

XLA's own cache spares the compiling, and tracing is then most of a second check's time. What is
kept is found by a name that says everything the program depends on: what it computes, the types of
its arguments, this package's code and the releases that lowered it.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bnverify import atomic_file, compile_cache
from bnverify.lazy import jax

WRITERS = ("jax.export", "flatbuffers")
"""What writes a program, the first by the second: old environments, for recordings alone, have none."""

DIGEST = hashlib.sha256().digest_size


class Identity(NamedTuple):
    """What a function computes, in words that mean the same in every process.

    Attributes:
        name: differs wherever the function does, but for the types of its arguments.
        out: the structure of its result.
    """

    name: str
    out: Any


def program(function: Callable[..., Any], args: Any, identity: Identity) -> Any | None:
    """Return ``function``, of the leaves of ``args`` and to the leaves of its result, kept or lowered.

    Args:
        function: traces under ``jax.jit``.
        args: trees of arrays; only their types count.
        identity: of the function.

    Returns:
        A ``jax.export.Exported``; None where nothing is kept, or this program cannot be.
    """
    home = compile_cache.home()
    if home is None or not all(map(importlib.util.find_spec, WRITERS)):
        return None
    leaves, structure = jax.tree_util.tree_flatten(args)
    types = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves]
    path = home / "lowered" / _name(identity.name, structure, types)
    export = importlib.import_module("jax.export")
    # Whatever is wrong with a file, the program can be lowered again.
    with contextlib.suppress(Exception):
        return export.deserialize(bytearray(_read(path)))

    def flat(*leaves: Any) -> list[Any]:
        out = function(*jax.tree_util.tree_unflatten(structure, leaves))
        assert jax.tree_util.tree_structure(out) == identity.out
        return list(jax.tree_util.tree_leaves(out))

    try:
        exported = export.export(jax.jit(flat))(*types)
        data = bytes(exported.serialize())
    except Exception:  # noqa: BLE001 - what cannot be kept is traced as if nobody had asked
        return None
    _write(path, data)
    return exported


def _name(*parts: Any) -> str:
    """Return the name of a file: of ``parts``, this code, the releases, and how JAX is configured.

    A tree may hold functions as its static parts, whose addresses say nothing.
    """
    settings = sorted(getattr(jax.config, "values", {}).items())
    whole = (jax.__version__, np.__version__, _package(), settings, *parts)
    told = re.sub(r"\b0x[0-9a-f]+", "", "\n".join(map(str, whole)))
    return hashlib.sha256(told.encode()).hexdigest()


@functools.cache
def _package() -> str:
    """Return a digest of this package's code: what other code kept is nothing to it."""
    root = Path(__file__).parent
    found = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        found.update(f"{path.relative_to(root)}\n".encode())
        found.update(path.read_bytes())
    return found.hexdigest()


def _read(path: Path) -> bytes:
    """Return what ``_write`` put there, to the bit.

    Raises:
        OSError: there is no such file.
        ValueError: it holds something else.
    """
    found = path.read_bytes()
    digest, data = found[:DIGEST], found[DIGEST:]
    if hashlib.sha256(data).digest() != digest:
        raise ValueError(f"{path} is damaged")
    return data


def _write(path: Path, data: bytes) -> None:
    """Keep a program; where that cannot be, nothing is lost but time."""
    with contextlib.suppress(OSError):
        # 0o700: what is kept here is run.
        path.parent.mkdir(mode=0o700, exist_ok=True)
        atomic_file.write(path, hashlib.sha256(data).digest() + data)
