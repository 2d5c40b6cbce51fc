"""Where a step violates a law: which leaf and entry, the value it got and the value expected.

A law returns one number per case. To locate a violation, the law is judged once more on its
counterexample inside ``watching``, and every comparison that it makes (``residual`` in
``bnverify.laws.arithmetic``) reports its worst entry. Leaves are identified by ``id``, so laws need
not name what they compare.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from bnverify.lazy import jax
from bnverify.model import Transition
from bnverify.pytree import by_path, path_name

RUNS = {
    "before": "before the step",
    "after_eval": "after evaluation",
    "again": "when repeated",
    "eager": "without jit",
    "stacked": "under vmap",
    "solution": "from the one-call function",
    "other_statistics": "with other running statistics",
    "zero_statistics": "with running statistics of 0",
    "huge_statistics": "with huge running statistics",
    "own_statistics": "with the batch's own moments as running statistics",
    "other_params": "with other params",
    "other_inputs": "with another x",
    "other_targets": "with another y",
    "reversed_targets": "with y reversed",
    "zero_lr": "with lr = 0",
    "reversed_rows": "with the rows reversed",
    "doubled_batch": "with every row repeated",
    "shifted_bias": "with a shifted bias",
    "second_step": "after a second step",
    "far_statistics": "with running statistics far from the batch's",
    "other_padding": "with other rows of weight 0",
    "constant_features": "with a feature that is the same in every row",
}
"""Name of a run -> how a message describes it."""


EXACT = 2.0**-30
"""A relative tolerance below this only allows for flushed subnormals; the message says "exactly"."""


@dataclass(frozen=True)
class Mismatch:
    """The entry with the largest error, relative to its tolerance, in one case.

    Attributes:
        leaf: the path of the leaf, ``batch_stats/BatchNorm_0/mean``; empty if the value is no leaf.
        index: the index of the entry; empty if the leaf is a scalar.
        got: the value.
        expected: the value expected.
        tolerance: the largest difference allowed.
        quantity: what was computed from the leaf, such as its momentum; empty: the leaf itself.
        run: the run that the value comes from, a key of ``RUNS``; empty: the observed step.
    """

    leaf: str
    index: tuple[int, ...]
    got: float
    expected: float
    tolerance: float
    quantity: str = ""
    run: str = ""

    @property
    def where(self) -> str:
        """The leaf and the entry: ``batch_stats/BatchNorm_0/mean[3]``."""
        entry = f"[{', '.join(map(str, self.index))}]" if self.index else ""
        place = f"{self.leaf}{entry}"
        return " of ".join(filter(None, (self.quantity, place))) or "a value"

    @property
    def times(self) -> float | None:
        """The error divided by the tolerance; None if it is not finite or the claim is exact."""
        if not math.isfinite(self.expected) or self.tolerance <= abs(self.expected) * EXACT:
            return None
        times = abs(self.got - self.expected) / self.tolerance
        return times if math.isfinite(times) else None

    def __str__(self) -> str:
        """Return the entry, the value it got, the value expected and by how much it is off."""
        got, expected = _told_apart(self.got, self.expected)
        run = f" {RUNS.get(self.run, self.run)}" if self.run else ""
        if not math.isfinite(self.expected):
            return f"{self.where}: got {got}{run}, expected a finite value"
        if self.tolerance <= abs(self.expected) * EXACT:
            return f"{self.where}: got {got}{run}, expected exactly {expected}"
        text = f"{self.where}: got {got}{run}, expected {expected} ± {self.tolerance:.2g}"
        return f"{text} ({factor(self.times)} the tolerance)" if self.times is not None else text

    def to_json(self) -> dict[str, Any]:
        """Return a dict for JSON, with numbers that are not finite as strings."""
        data = {**vars(self), "index": list(self.index)}
        for name in ("got", "expected", "tolerance"):
            if not math.isfinite(data[name]):
                data[name] = str(data[name])
        return data

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Mismatch:
        """Return the mismatch that ``to_json`` wrote."""
        numbers = {name: float(data[name]) for name in ("got", "expected", "tolerance")}
        return cls(**{**data, **numbers, "index": tuple(data["index"])})


def factor(times: float) -> str:
    """Return a factor in readable form: 3.2x, 142,000x, 1.7e+34x."""
    if times < 9.95 or times >= 1e6:
        return f"{times:.2g}x"
    return f"{float(f'{times:.3g}'):,.0f}x"


def _told_apart(one: float, other: float) -> tuple[str, str]:
    """Return two numbers with as few digits as it takes to tell them apart."""
    for digits in (4, 6, 9, 12, 17):
        shown = f"{one:.{digits}g}", f"{other:.{digits}g}"
        if shown[0] != shown[1] or one == other:
            return shown
    return shown


class Watch:
    """Keeps the worst entry of all comparisons that a law makes on one case.

    Args:
        t: a stacked transition of a single case, or a tree; its leaves give the comparisons their names.

    Attributes:
        worst: the worst entry so far; None if everything was within its tolerance.
        row: the leaves being compared, while whole trees are compared.
        unlike: how trees that were to be compared differ in structure or shapes; "" if none did.
    """

    def __init__(self, t: Transition | Mapping[str, Any]) -> None:
        self.worst: Mismatch | None = None
        self.row: tuple[Any, ...] = ()
        self.unlike = ""
        self._ratio = 1.0
        self._known: dict[int, tuple[str, str]] = {}
        self._kept = t  # ids are unique only while their objects are alive
        for run, part in _parts(t):
            for path, leaf in jax.tree_util.tree_flatten_with_path(part)[0]:
                self._known.setdefault(id(leaf), (path_name(path), run))

    def see(self, compared: Any, ratio: Any, values: tuple[Any, Any, Any], quantity: str) -> None:
        """Record one comparison.

        Args:
            compared: the array that is compared, whose path is looked up.
            ratio: the errors divided by the tolerance, (1, ...).
            values: got, expected and tolerance, each broadcastable to ``ratio``.
            quantity: see :class:`Mismatch`.
        """
        if ratio.size == 0 or not ratio.max() > self._ratio:
            return
        got, expected, tolerance = (np.broadcast_to(value, ratio.shape) for value in values)
        place = int(np.argmax(ratio))
        if np.isinf(ratio.max()):  # among entries without tolerance, take the largest error
            with np.errstate(all="ignore"):
                apart = np.where(np.isinf(ratio), np.abs(got - expected), -1.0)
            place = int(np.argmax(np.nan_to_num(apart, nan=np.inf)))
        index = tuple(int(i) for i in np.unravel_index(place, ratio.shape))
        leaf, run = self._name(compared)
        self._ratio = float(ratio.max())
        self.worst = Mismatch(
            leaf,
            index[1:] if ratio[0].size > 1 else (),
            float(got[index]),
            float(expected[index]),
            float(tolerance[index]),
            quantity,
            "" if quantity else run,
        )

    def see_unlike(self, *operands: Any) -> None:
        """Record how trees of different structure or shapes differ.

        Args:
            operands: the tree that a law judges, then the trees that it is compared with.
        """
        got = by_path(operands[0])
        run = next((self._name(leaf)[1] for leaf in got.values()), "")
        for expected in map(by_path, operands[1:]):
            for path in [*expected, *(path for path in got if path not in expected)]:
                there, wanted = (_form(tree.get(path)) for tree in (got, expected))
                if there != wanted and not self.unlike:
                    leaf = expected.get(path, got.get(path))
                    self.unlike = (
                        f"{self._name(leaf)[0] or path}: got {there} {RUNS.get(run, run)}".rstrip()
                        + f", expected {wanted}: the step must return the same tree and shapes each time"
                    )
        if not self.unlike:
            forms = [str(jax.tree_util.tree_structure(tree)) for tree in operands]
            other = next((form for form in forms if form != forms[0]), forms[0])
            self.unlike = f"got the tree {forms[0]}, expected {other}"

    def _name(self, compared: Any) -> tuple[str, str]:
        for leaf in (compared, *self.row):
            if id(leaf) in self._known:
                return self._known[id(leaf)]
        return "", ""


def _form(leaf: Any) -> str:
    """Return the shape and dtype of a stacked leaf, (1, ...); None: there is none."""
    return "no such leaf" if leaf is None else f"shape {tuple(leaf.shape[1:])}, dtype {leaf.dtype}"


_WATCH: ContextVar[Watch | None] = ContextVar("watch", default=None)


def watch() -> Watch | None:
    """Return the Watch of the innermost ``watching`` block; None outside of one."""
    return _WATCH.get()


@contextmanager
def watching(t: Transition | Mapping[str, Any]) -> Iterator[Watch]:
    """Record every comparison made within this context; see :class:`Watch`.

    Args:
        t: a stacked transition of a single case, or a tree of leaves, (1, ...).
    """
    told = Watch(t)
    token = _WATCH.set(told)
    try:
        yield told
    finally:
        _WATCH.reset(token)


def not_finite(t: Transition, where: Collection[str] = ("",)) -> Mismatch | None:
    """Return the first non-finite value in the outcome of a single case; None if all are finite.

    Args:
        t: the stacked transition of a single case.
        where: the runs to look at; "" is the observed step.
    """
    watch = Watch(t)
    for run, part in _parts(t):
        if run not in where:
            continue
        for leaf in jax.tree_util.tree_leaves(part):
            bad = np.where(np.isfinite(np.asarray(leaf, np.float64)), 0.0, np.inf)
            watch.see(leaf, bad, (np.asarray(leaf, np.float64), np.nan, 0.0), "")
        if watch.worst is not None:
            return replace(watch.worst, expected=math.nan)
    return None


def _parts(t: Transition | Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield (run, its results by name); the run is "" for the observed step."""
    if isinstance(t, Mapping):
        yield "", t
        return
    yield "", _state(t.after)
    yield "", {**_fields(t.info), "eval_loss": t.eval_loss}
    yield "before", _state(t.before)
    for run, outcome in t.reruns.items():
        yield run, {**_state(outcome.state), **_fields(outcome.info)}
    for run, loss in t.evals.items():
        yield run, {"eval_loss": loss}
    for run in ("again", "eager", "stacked"):
        if (seen := t.facts.get(run)) is not None:
            yield run, {**_state(seen.state), **_fields(seen.info), "eval_loss": seen.eval_loss}
    if "after_eval" in t.facts:
        yield "after_eval", _state(t.facts["after_eval"])
    if (seen := t.facts.get("solution")) is not None:
        yield "solution", {"eval_loss": seen.whole}
        yield "solution", {"eval_loss": seen.fractional}


def _state(state: Any) -> dict[str, Any]:
    return dict(zip(state._fields, state, strict=True))


def _fields(info: Any) -> dict[str, Any]:
    return {name: value for name, value in _state(info).items() if value is not None}
