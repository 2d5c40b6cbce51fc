"""In what two states differ, and which mistake in saving or restoring explains it."""

from __future__ import annotations

from typing import Any

import numpy as np

from bnverify.lazy import jax, jnp
from bnverify.pytree import path_name
from bnverify.subject import State, Tree


def kinds_differ(actual: Tree, expected: Tree, *, weak: bool = False) -> str:
    """Return the first container, shape or type in which two trees differ; "" where none does.

    Args:
        actual: what came back.
        expected: what was put in.
        weak: whether weak types must agree as well.
    """
    if type(actual) is not type(expected):
        return f"a {type(expected).__name__} came back as a {type(actual).__name__}"
    whole = not isinstance(expected, State)
    parts = [("all", actual, expected)] if whole else zip(State._fields, actual, expected)  # noqa: B905 - two States
    for name, part, other in parts:
        was, now = (jax.tree_util.tree_structure(tree) for tree in (other, part))
        if was != now:
            return f"{name} was {_short(was)}, came back as {_short(now)}"
    found = jax.tree_util.tree_leaves(actual)
    known = jax.tree_util.tree_flatten_with_path(expected)[0]
    for leaf, (path, other) in zip(found, known, strict=True):
        was_kind, now_kind = kind(other, weak=weak), kind(leaf, weak=weak)
        if was_kind != now_kind:
            return f"{path_name(path)} was {was_kind}, came back as {now_kind}"
    return ""


def _short(structure: Any) -> str:
    text = str(structure)
    return text if len(text) <= 120 else f"{text[:117]}..."


def kind(leaf: Any, *, weak: bool = False) -> str:
    """Return dtype and shape of a leaf in words; a Python number is none of an array's kinds."""
    if not hasattr(leaf, "dtype"):
        return f"a Python {type(leaf).__name__}"
    shape = ", ".join(map(str, leaf.shape))
    is_weak = weak and bool(getattr(leaf, "weak_type", False))
    return f"{'weak ' if is_weak else ''}{leaf.dtype}[{shape}]"


def bits(leaf: Any) -> bytes:
    """Return the bits of one leaf: two NaN are equal, 0 and -0 are not."""
    if hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    return np.asarray(leaf).tobytes()


def values_differ(actual: Tree, expected: Tree) -> list[str]:
    """Return the paths of the leaves of ``expected`` that ``actual`` does not equal to the bit.

    Trees of other structures differ everywhere.
    """
    known, structure = jax.tree_util.tree_flatten_with_path(expected)
    found, other = jax.tree_util.tree_flatten(actual)
    paths = [path_name(path) for path, _ in known]
    if structure != other:
        return paths or ["."]
    return [
        path
        for path, leaf, (_, value) in zip(paths, found, known, strict=True)
        if bits(leaf) != bits(value)
    ]


DROPPED = {
    "batch_stats": "checkpoint_drops_statistics",
    "opt_state": "checkpoint_drops_optimizer_state",
    "extra": "checkpoint_drops_key",
}


def suspect(restored: State, saved: State, template: State) -> str:
    """Return the likeliest mistake where a restored state has other values than the saved one."""
    differing = set(values_differ(restored, saved))
    if not set(values_differ(restored, template)):
        return "checkpoint_not_used"
    if _close(restored, saved):
        return "checkpoint_loses_digits"
    leaves = jax.tree_util.tree_flatten_with_path(saved)[0]
    changed = [leaf for path, leaf in leaves if path_name(path) in differing]
    (part, *others) = {path.partition("/")[0] for path in differing}
    if part == "opt_state" and all(jnp.issubdtype(leaf.dtype, jnp.integer) for leaf in changed):
        return "counter_reset_on_restore"
    if not others and not differing & set(values_differ(restored, template)):
        return DROPPED.get(part, "checkpoint_is_stale")
    ours, theirs = (sorted(map(bits, jax.tree_util.tree_leaves(s))) for s in (restored, saved))
    return "restored_in_another_order" if ours == theirs else "checkpoint_is_stale"


def _close(actual: State, expected: State) -> bool:
    """Return whether all values agree to the two digits that the narrowest float type keeps."""
    if jax.tree_util.tree_structure(actual) != jax.tree_util.tree_structure(expected):
        return False
    pairs = zip(jax.tree_util.tree_leaves(actual), jax.tree_util.tree_leaves(expected), strict=True)
    return all(
        _same_to_two_digits(leaf, value)
        if jnp.issubdtype(value.dtype, jnp.floating)
        else bits(leaf) == bits(value)
        for leaf, value in pairs
    )


def _same_to_two_digits(leaf: Any, value: Any) -> bool:
    actual, expected = np.asarray(leaf, np.float64), np.asarray(value, np.float64)
    return bool(np.all(np.abs(actual - expected) <= 2.0**-7 * np.abs(expected) + 1e-6))
