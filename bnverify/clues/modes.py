"""Training beside evaluation: at the batch's own moments they compute one loss.

Where they do not, evaluation is changed until they do: what had to be changed is the difference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np

from bnverify.clues.seen import LOOSE, Clues, Seen, raw
from bnverify.lazy import jax, jnp
from bnverify.model import State
from bnverify.pytree import is_floating, path_name
from bnverify.reruns import other_statistic, reverse_rows, with_statistics

MOST_ROWS = 64
"""Up to so many rows each is trained on by itself."""


def row_order(seen: Seen) -> Clues:
    """Whether the training loss depends on the order of the rows, by more than rounding."""
    backwards = seen.calls.step(seen.t.before, reverse_rows(seen.case)).info.loss
    loss, other = float(np.ravel(seen.t.info.loss)[0]), float(np.ravel(backwards)[0])
    return {} if _same(loss, other) else {"row_order": "matters"}


def modes(seen: Seen) -> Clues:
    """Which change of the evaluation makes it the training loss."""
    loss, size = np.ravel(seen.t.info.loss), np.ravel(seen.t.eval_loss)
    if loss.size != 1 or size.size != 1:
        return {}
    kind = str(np.asarray(seen.t.eval_loss).dtype)
    if kind in {"bfloat16", "float16"}:
        return {"modes": "rounded loss", "modes_type": kind}
    train, own = float(loss[0]), seen.loss_of(seen.own)
    if not np.isfinite(train) or not np.isfinite(own) or _same(own, train):
        return {}
    found: Clues = {"modes_ratio": own / train} if train else {}
    return {**found, "modes": next(iter(_alike(seen, train, own)), "differ")}


def _alike(seen: Seen, train: float, own: float) -> Iterator[str]:
    """Yield the names of changes that make the evaluation the training loss, the surest first."""
    if seen.rows > 1 and (_same(own, train * seen.rows) or _same(train, own * seen.rows)):
        yield "sum in evaluation" if own > train else "sum in training"
    if seen.rows > 1 and len(np.unique(seen.case.y)) > 1:
        yield from _alike_for_other_targets(seen, train, own)
    yield from _alike_in_fewer_digits(seen, train, own)
    if _same(own**2, train):
        yield "root in evaluation"
    yield from _alike_at_other_moments(seen, train, own)
    if _same(_mean_of_rows(seen), train):
        yield "rows by themselves"
    if seen.loss_of(with_statistics(seen.own, other_statistic)) == own:
        yield "evaluation ignores the statistics here"


def _same(value: float, expected: float) -> bool:
    return abs(value - expected) <= LOOSE * max(abs(value), abs(expected))


def _alike_for_other_targets(seen: Seen, train: float, own: float) -> Iterator[str]:
    """Yield by which targets evaluation gives the training loss."""
    y = seen.case.y
    orders = [y[..., ::-1], *(np.roll(y, by, axis=-1) for by in (1, -1))]
    moved = [seen.loss_of(seen.own, y=order) for order in orders]
    if any(_same(loss, train) for loss in moved):
        yield "targets moved"
    mean = np.broadcast_to(y.mean(axis=-1, keepdims=True), y.shape).astype(y.dtype)
    at_mean, spread = seen.loss_of(seen.own, y=mean), float(np.var(np.asarray(y, np.float64)))
    # Over all pairs, the mean squared error is that from the mean target and the targets' variance.
    if spread > 1e-3 * abs(train) and _same(train, at_mean + spread):
        yield "broadcast in training"
    if all(_same(loss, own) for loss in moved):
        yield "broadcast in evaluation"
    if _same(at_mean, train) or _same(seen.loss_of(seen.own, y=np.zeros_like(y)), train):
        yield "targets replaced"


def _alike_in_fewer_digits(seen: Seen, train: float, own: float) -> Iterator[str]:
    """Yield what has to be rounded for the evaluation to give the training loss."""
    x, y = seen.case.x, seen.case.y
    for change in (np.trunc, np.round, np.floor):
        if np.any(change(y) != y) and _same(seen.loss_of(seen.own, y=change(y)), train):
            yield "rounded targets"
    for kind in (np.float16, jnp.bfloat16):
        rounded = x.astype(kind).astype(np.float32)
        # What follows is not rounded alike to the last place: most of the difference is enough.
        left = abs(seen.loss_of(seen.own, x=rounded) - train)
        if np.any(rounded != x) and left <= 0.02 * abs(own - train):
            yield "rounded inputs"
        narrow = _changed(seen, partial(_rounded, kind))
        reads = seen.loss_of(with_statistics(seen.own, other_statistic)) != own
        if reads and seen.loss_of(narrow) == own:
            yield "rounded statistics in evaluation"


def _rounded(kind: Any, name: str, value: Any) -> Any:
    del name
    return value.astype(kind)


def _changed(seen: Seen, change: Callable[[str, Any], Any]) -> State:
    """Return the state at the batch's own moments, each changed by ``change`` of its name and value."""

    def leaf(path: Any, value: Any) -> Any:
        return change(path_name(path), value).astype(value.dtype) if is_floating(value) else value

    stats = jax.tree_util.tree_map_with_path(leaf, seen.own.batch_stats)
    return seen.own._replace(batch_stats=stats)


def _alike_at_other_moments(seen: Seen, train: float, own: float) -> Iterator[str]:
    """Yield at which moments evaluation gives the training loss."""

    def near(state: State) -> bool:
        left = abs(seen.loss_of(state) - train)
        return left <= max(LOOSE * abs(train), 1e-3 * abs(own - train)) < abs(own - train)

    if seen.rows > 1:
        scale = seen.rows / (seen.rows - 1)
        if near(_changed(seen, lambda name, v: v * scale if name.endswith("var") else v)):
            yield "sample variance"
    if near(_one_moment(seen)):
        yield "one moment for all channels"


def _one_moment(seen: Seen) -> State:
    """Return the state whose every channel has the mean and variance of all channels together."""
    leaves = raw(seen.own.batch_stats)

    def change(name: str, value: Any) -> Any:
        if name.endswith("mean"):
            return np.full_like(value, np.mean(value))
        layer = name.rpartition("/")[0]
        means = leaves.get(f"{layer}/mean", np.zeros(1))
        return np.full_like(value, np.mean(value) + np.var(means))

    return _changed(seen, change)


def _mean_of_rows(seen: Seen) -> float:
    """Return the mean of the training losses of batches that repeat one row; NaN of many rows."""
    if not 1 < seen.rows <= MOST_ROWS:
        return np.nan
    losses = []
    for row in range(seen.rows):
        x = np.broadcast_to(seen.case.x[:, row : row + 1], seen.case.x.shape)
        y = np.broadcast_to(seen.case.y[:, row : row + 1], seen.case.y.shape)
        info = seen.calls.step(seen.t.before, seen.case._replace(x=x, y=y)).info
        losses.append(float(np.ravel(info.loss)[0]))
    return float(np.mean(losses))
