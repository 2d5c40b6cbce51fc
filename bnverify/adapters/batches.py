"""The batch that a user's step is given, and the report that it returns.

A case has x (N, D) and y (N,); ``batch=`` makes of them what the model takes. What a step returns is split
into the new state and a report, and the loss is looked for in the report.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from bnverify.errors import UsageError, did_you_mean


def rows(x: Any, y: Any) -> tuple[Any, Any]:
    """Return (x, y) unchanged: inputs (N, D) and targets (N,)."""
    return x, y


def classes(y: Any, count: int) -> Any:
    """Return integer labels for real targets: floor(y) modulo ``count``, (N,) int32.

    Targets that differ by 1 have different labels, so laws that change y also change the labels.
    """
    return jnp.floor(y).astype(jnp.int32) % count


def mse(outputs: Any, targets: Any) -> Any:
    """Return the mean squared error, a scalar, of outputs (N, 1) or (N,) against targets (N,).

    Raises:
        ValueError: there is not one output for each target.
    """
    # Shapes are checked because (N, 1) - (N,) would silently broadcast to (N, N).
    predictions = outputs.reshape(-1)
    if predictions.shape != targets.shape:
        raise ValueError(
            f"mse needs one output for each target: got outputs {outputs.shape}, targets "
            f"{targets.shape}; pass loss= for a model with other outputs"
        )
    return jnp.mean((predictions - targets) ** 2)


def under_axis(axis_name: str | None, function: Callable[[Any], Any], inputs: Any) -> Any:
    """Return ``function(inputs)``, run as the only shard of a mapped axis if ``axis_name`` is given."""
    if axis_name is None:
        return function(inputs)
    one = jax.tree_util.tree_map(lambda leaf: leaf[None], inputs)
    out = jax.vmap(function, axis_name=axis_name)(one)
    return jax.tree_util.tree_map(lambda leaf: leaf[0], out)


def image_and_label(x: Any, y: Any) -> dict[str, Any]:
    """Return the batch of Flax's own examples: {"image": x, "label": y}."""
    return {"image": x, "label": y}


# What a step returns.


Reading: TypeAlias = str | Callable[[Any, Any], Any] | None
"""Where the loss is in a report: a key, a function of (report, batch), or None to search for it."""


DENOMINATORS = ("denominator", "weight_sum")
"""What the metrics of a step are sums over, beside them, as Flax's examples of text and T5X have it."""


class NoLoss(UsageError):
    """No loss is found in a report."""


def things_and_report(returned: Any, things: Mapping[str, Any]) -> tuple[dict[str, Any], Any]:
    """Split what a step returned into new state objects and a report.

    Args:
        returned: an object, a tuple or dict that contains objects, or only a report. Objects are
            recognised by their structure or class.
        things: name -> the object that was passed to the step.

    Returns:
        A dict from name to the new object, for those that were returned, and the report: a single
        part, a tuple of parts, or None.
    """
    if isinstance(returned, Mapping) and set(things) & set(returned):
        found = {name: returned[name] for name in things if name in returned}
        return found, {key: value for key, value in returned.items() if key not in found} or None
    if not _is_plain(returned):
        named = next((n for n, thing in things.items() if _likeness(thing, returned) > 0), None)
        return ({named: returned}, None) if named is not None else ({}, returned)
    parts = list(returned)
    found = {}
    wanted = list(things)
    for least in (3, 2, 1):  # the best matches first: two trees may have the same keys
        for name in list(wanted):
            for index, part in enumerate(parts):
                if _likeness(things[name], part) >= least:
                    found[name] = parts.pop(index)
                    wanted.remove(name)
                    break
    for index, part in enumerate(parts):
        if wanted and _is_plain(part) and part:
            inside, rest = things_and_report(part, {name: things[name] for name in wanted})
            if inside and rest is None:  # a tuple that contains nothing else
                found |= inside
                del parts[index]
                break
    report = parts[0] if len(parts) == 1 else tuple(parts) or None
    return found, report


def _is_plain(value: Any) -> bool:
    return isinstance(value, tuple | list) and not hasattr(value, "_fields")


def _likeness(thing: Any, part: Any) -> int:
    """Return how well ``part`` matches ``thing``: 3 same structure, 2 same class, 1 same keys, else 0."""
    structure: Any = jax.tree_util.tree_structure
    if isinstance(thing, Mapping) and isinstance(part, Mapping):
        if structure(dict(thing)) == structure(dict(part)):
            return 3
        return 1 if set(thing) == set(part) else 0
    if jax.tree_util.all_leaves([thing]):
        same = getattr(part, "shape", None) == getattr(thing, "shape", ())
        return 3 if same and getattr(part, "dtype", None) == getattr(thing, "dtype", None) else 0
    if type(thing) is not type(part):
        return 0
    if structure(thing) == structure(part):
        return 3
    return 2 if not isinstance(thing, tuple | list) or hasattr(thing, "_fields") else 0


def loss_of(report: Any, how: Reading, batch: Any) -> Any:
    """Return the loss in a report; None if it has none.

    Args:
        report: a mapping of metrics, an object with ``compute()``, a loss, or a tuple with one of
            them. A pair is (sum, count), and so are "loss" and "denominator" or "weight_sum".
        how: see ``Reading``.
        batch: the batch that was passed to the step.

    Raises:
        NoLoss: the report has no entry with the key ``how``.
    """
    if callable(how):
        return jnp.asarray(how(report, batch))
    for part in report if isinstance(report, tuple) else (report,):
        found = _in_part(part, how or _key_of_the_loss(part), named=how is not None)
        if found is not None:
            return _number(found)
    if how is not None:
        near = did_you_mean(how, keys_of(report))
        raise NoLoss(f"the step reports no {how!r}; it reports {described(report)}{near}")
    return None


# Words that say which loss it is, where it is the only one: "train/loss", "val_loss", "loss_value".
_WHICH = {"train", "training", "total", "value", "mean", "avg", "eval", "val", "valid", "test"}


def _key_of_the_loss(part: Any) -> str:
    """Return the key "loss" of a report, or the only one that says no more than which loss it is."""
    names = {
        name: [word for word in re.split(r"[^a-z]+", name.lower()) if word and word not in _WHICH]
        for name in keys_of(part)
    }
    similar = [name for name, words in names.items() if words == ["loss"]]
    return similar[0] if len(similar) == 1 and "loss" not in names else "loss"


def _in_part(part: Any, key: str, *, named: bool) -> Any:
    if is_metrics(part):
        part = part.compute()
    if isinstance(part, Mapping):
        counts = [part[name] for name in DENOMINATORS if name in part and not named]
        found, count = part.get(key), counts[0] if counts else None
        return found if found is None or count is None else (found, count)
    if named and hasattr(part, key):
        return getattr(part, key)
    if hasattr(part, "_fields") and hasattr(part, key):  # a NamedTuple of metrics
        return getattr(part, key)
    is_number = isinstance(part, float) or (hasattr(part, "shape") and part.shape == ())
    return part if is_number and not named else None


def _number(value: Any) -> Any:
    """Return a reported loss as an array; for a pair (sum, count) the quotient."""
    if is_metrics(value):
        value = value.compute()
    pair = value if isinstance(value, tuple | list) else None
    if pair is None and getattr(value, "shape", None) == (2,):
        pair = (value[0], value[1])
    if pair is not None and len(pair) == 2:
        total, count = (jnp.asarray(part) for part in pair)
        return total / count
    return jnp.asarray(value)


def is_metrics(value: Any) -> bool:
    """Return whether an object is a metric such as ``nnx.MultiMetric`` or those of clu."""
    if isinstance(value, type):
        return False
    gathers = any(callable(getattr(value, name, None)) for name in ("reset", "merge", "empty"))
    return gathers and callable(getattr(value, "compute", None))


def keys_of(report: Any) -> Sequence[str]:
    """Return the names in a report."""
    parts = report if _is_plain(report) else (report,)
    names: list[str] = []
    for part in parts:
        value = part.compute() if is_metrics(part) else part
        names += [str(k) for k in value] if isinstance(value, Mapping) else []
        names += list(getattr(value, "_fields", ()))
    return names


def described(report: Any) -> str:
    """Return a short description of a report."""
    names = keys_of(report)
    if names:
        return "the keys " + ", ".join(map(repr, names))
    if report is None:
        return "nothing"
    shape = getattr(report, "shape", None)
    return f"an array of shape {shape}" if shape is not None else f"a {type(report).__name__}"


def inputs_and_targets(batch: Any) -> tuple[Any, Any]:
    """Return (inputs, targets) of a batch, for functions that take them separately.

    Args:
        batch: a pair, or a mapping whose first entry is the inputs and the second the targets.
    """
    parts = list(batch.values()) if isinstance(batch, Mapping) else batch
    if isinstance(parts, tuple | list) and len(parts) >= 2:
        return parts[0], parts[1]
    return batch, None


def copied(tree: Any) -> Any:
    """Return ``tree`` with every concrete array copied, since a step may donate its arguments."""
    return jax.tree_util.tree_map(
        lambda leaf: leaf if isinstance(leaf, jax.core.Tracer) else jnp.array(leaf), tree
    )
