"""Compare training and evaluation: at the batch's own moments they compute the same loss.

If they do not, the inputs of evaluation are changed until they do; the change names the mistake.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np

from bnverify.clues.observed import LOOSE, Clues, ObservedCase, raw
from bnverify.lazy import jax, jnp
from bnverify.model import State
from bnverify.pytree import is_floating, path_name
from bnverify.reruns import other_statistic, reverse_rows, with_statistics
from bnverify.statistic_names import moment_of, moments_among

MOST_ROWS = 64
"""Up to this many rows, each row is also trained on separately."""


def row_order(observed: ObservedCase) -> Clues:
    """Return whether the training loss depends on the order of the rows by more than rounding."""
    reversed_rows = reverse_rows(observed.case)
    backwards = observed.calls.step(observed.t.before, reversed_rows).info.loss
    loss, other = float(np.ravel(observed.t.info.loss)[0]), float(np.ravel(backwards)[0])
    return {} if _same(loss, other) else {"row_order": "matters"}


def modes(observed: ObservedCase) -> Clues:
    """Return which change of evaluation makes its loss equal the training loss."""
    loss, size = np.ravel(observed.t.info.loss), np.ravel(observed.t.eval_loss)
    if loss.size != 1 or size.size != 1:
        return {}
    kind = str(np.asarray(observed.t.eval_loss).dtype)
    if kind in {"bfloat16", "float16"}:
        return {"modes": "rounded loss", "modes_type": kind}
    train, own = float(loss[0]), observed.loss_of(observed.own)
    if not np.isfinite(train) or not np.isfinite(own) or _same(own, train):
        return {}
    found: Clues = {"modes_ratio": own / train} if train else {}
    return {**found, "modes": next(iter(_explanations(observed, train, own)), "differ")}


def _explanations(observed: ObservedCase, train: float, own: float) -> Iterator[str]:
    """Yield the changes that make evaluation give the training loss, most certain first."""
    rows = observed.rows
    if rows > 1 and (_same(own, train * rows) or _same(train, own * rows)):
        yield "sum in evaluation" if own > train else "sum in training"
    if rows > 1 and len(np.unique(observed.case.y)) > 1:
        yield from _with_other_targets(observed, train, own)
    yield from _with_rounding(observed, train, own)
    if _same(own**2, train) or _same_predictions(observed, train, own):
        yield "another loss"
    yield from _with_other_moments(observed, train, own)
    if _same(_mean_of_rows(observed), train):
        yield "rows by themselves"
    if observed.loss_of(with_statistics(observed.own, other_statistic)) == own:
        yield "evaluation ignores the statistics here"


def _same(value: float, expected: float) -> bool:
    return abs(value - expected) <= LOOSE * max(abs(value), abs(expected))


def _with_other_targets(observed: ObservedCase, train: float, own: float) -> Iterator[str]:
    """Yield which other targets make evaluation give the training loss."""
    y = observed.case.y
    orders = [y[..., ::-1], *(np.roll(y, by, axis=-1) for by in (1, -1))]
    moved = [observed.loss_of(observed.own, y=order) for order in orders]
    if any(_same(loss, train) for loss in moved):
        yield "targets moved"
    mean = np.broadcast_to(y.mean(axis=-1, keepdims=True), y.shape).astype(y.dtype)
    at_mean = observed.loss_of(observed.own, y=mean)
    spread = float(np.var(np.asarray(y, np.float64)))
    # The mean squared error over all pairs of rows is that for the mean target plus the targets'
    # variance.
    if spread > 1e-3 * abs(train) and _same(train, at_mean + spread):
        yield "broadcast in training"
    if all(_same(loss, own) for loss in moved):
        yield "broadcast in evaluation"
    if _same(at_mean, train) or _same(observed.loss_of(observed.own, y=np.zeros_like(y)), train):
        yield "targets replaced"


def _same_predictions(observed: ObservedCase, train: float, own: float) -> bool:
    """Return whether both modes make the same predictions, so that only their losses differ.

    They do if one loss is the same multiple of the other for all targets. Else one of the losses must be
    quadratic in each target, with a minimum of 0 at the predictions, where the other loss vanishes, too.
    Predictions that differ by a small d leave it at d^2, but explain only a difference of the order of
    d between the losses.
    """
    if observed.rows > MOST_ROWS:
        return False

    def trained(y: Any) -> float:
        case = observed.case._replace(y=y)
        return float(np.ravel(observed.calls.step(observed.t.before, case).info.loss)[0])

    def evaluated(y: Any) -> float:
        return observed.loss_of(observed.own, y=y)

    apart = abs(own - train) / max(abs(own), abs(train))
    y = observed.case.y
    size = np.float32(1 + np.max(np.abs(y)))
    pairs = [(trained(each), evaluated(each)) for each in (y + size, 2 * size - y)]
    allowed = 0.01 * abs(own - train)
    if apart > 1e-3 and all(abs(e * train - t * own) <= allowed * abs(t) for t, e in pairs):
        return True
    left = max((0.03 * apart) ** 2, 1e-4 if apart > 0.1 else 0.0)
    for loss, other, value in ((trained, evaluated, own), (evaluated, trained, train)):
        least = _quadratic_minimum(loss, y)
        if least is not None:
            return abs(other(least)) <= left * abs(value)
    return False


def _quadratic_minimum(loss: Callable[[Any], float], y: Any) -> Any:
    """Return the targets at which a loss that is quadratic in each of them is 0; None if there are none.

    Args:
        loss: targets (1, N) -> the loss.
        y: the targets around which it is evaluated.
    """
    middle, size = loss(y), np.float32(1 + np.max(np.abs(y)))
    least = y.astype(np.float64)
    for row in range(y.shape[-1]):
        shift = np.zeros_like(y)
        shift[..., row] = size
        up, down = loss(y + shift), loss(y - shift)
        curvature = up + down - 2 * middle
        if not curvature > LOOSE * abs(middle):
            return None
        least[..., row] -= size * (up - down) / (2 * curvature)
    found = least.astype(y.dtype)
    return found if abs(loss(found)) <= LOOSE * abs(middle) else None


def _with_rounding(observed: ObservedCase, train: float, own: float) -> Iterator[str]:
    """Yield which rounded values make evaluation give the training loss."""
    x, y = observed.case.x, observed.case.y
    for change in (np.trunc, np.round, np.floor):
        if np.any(change(y) != y) and _same(observed.loss_of(observed.own, y=change(y)), train):
            yield "rounded targets"
    for kind in (np.float16, jnp.bfloat16):
        rounded = x.astype(kind).astype(np.float32)
        # Later operations round differently, so it is enough to explain most of the difference.
        left = abs(observed.loss_of(observed.own, x=rounded) - train)
        if np.any(rounded != x) and left <= 0.02 * abs(own - train):
            yield "rounded inputs"
        narrow = _changed(observed, partial(_rounded, kind))
        reads = observed.loss_of(with_statistics(observed.own, other_statistic)) != own
        if reads and observed.loss_of(narrow) == own:
            yield "rounded statistics in evaluation"


def _rounded(kind: Any, name: str, value: Any) -> Any:
    del name
    return value.astype(kind)


def _changed(observed: ObservedCase, change: Callable[[str, Any], Any]) -> State:
    """Return the state with the batch's moments, changed by ``change(name, value)``, as statistics."""

    def leaf(path: Any, value: Any) -> Any:
        return change(path_name(path), value).astype(value.dtype) if is_floating(value) else value

    stats = jax.tree_util.tree_map_with_path(leaf, observed.own.batch_stats)
    return observed.own._replace(batch_stats=stats)


def _with_other_moments(observed: ObservedCase, train: float, own: float) -> Iterator[str]:
    """Yield which other moments make evaluation give the training loss."""

    def near(state: State) -> bool:
        left = abs(observed.loss_of(state) - train)
        return left <= max(LOOSE * abs(train), 1e-3 * abs(own - train)) < abs(own - train)

    if observed.rows > 1:
        scale = observed.rows / (observed.rows - 1)
        if near(_changed(observed, lambda name, v: v * scale if moment_of(name) == "var" else v)):
            yield "sample variance"
    if near(_one_moment(observed)):
        yield "one moment for all channels"


def _one_moment(observed: ObservedCase) -> State:
    """Return the state in which every channel has the mean and variance over all channels."""
    leaves = raw(observed.own.batch_stats)

    def change(name: str, value: Any) -> Any:
        if moment_of(name) == "mean":
            return np.full_like(value, np.mean(value))
        layer = name.rpartition("/")[0]
        beside = {n: leaf for n, leaf in leaves.items() if n.rpartition("/")[0] == layer}
        means = moments_among(beside).get("mean", np.zeros(1))
        return np.full_like(value, np.mean(value) + np.var(means))

    return _changed(observed, change)


def rows_of_evaluation(observed: ObservedCase) -> Clues:
    """Return how the eval loss combines its rows, if they are independent but it is not their mean.

    A batch that repeats one row has N times its loss if losses are summed, and otherwise the same.
    """
    if not 1 < observed.rows <= MOST_ROWS:
        return {}
    whole = float(np.ravel(observed.t.eval_loss)[0])
    losses = []
    for row in range(observed.rows):
        x = np.broadcast_to(observed.case.x[:, row : row + 1], observed.case.x.shape)
        y = np.broadcast_to(observed.case.y[:, row : row + 1], observed.case.y.shape)
        losses.append(observed.loss_of(observed.t.after, x=x, y=y))
    alone = observed.loss_of(observed.t.after, x=observed.case.x[:, :1], y=observed.case.y[:, :1])
    if not _same(alone, losses[0]):
        is_sum = _same(observed.rows * alone, losses[0]) and _same(float(np.mean(losses)), whole)
        return {"eval_rows": "sum over rows"} if is_sum else {}
    if _same(float(np.mean(losses)), whole):
        return {}
    if _same(float(np.sqrt(np.mean(np.square(losses)))), whole):
        return {"eval_rows": "root of a mean over rows"}
    return {}


def _mean_of_rows(observed: ObservedCase) -> float:
    """Return the mean training loss of batches that repeat one row; NaN for too many rows."""
    if not 1 < observed.rows <= MOST_ROWS:
        return np.nan
    losses = []
    for row in range(observed.rows):
        x = np.broadcast_to(observed.case.x[:, row : row + 1], observed.case.x.shape)
        y = np.broadcast_to(observed.case.y[:, row : row + 1], observed.case.y.shape)
        info = observed.calls.step(observed.t.before, observed.case._replace(x=x, y=y)).info
        losses.append(float(np.ravel(info.loss)[0]))
    return float(np.mean(losses))
