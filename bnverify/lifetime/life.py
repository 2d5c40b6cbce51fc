"""One state over many steps: train, evaluate, save, restore, copy and resume, in any order.

Two states are kept side by side. One is saved, restored, copied and resumed; its twin is only
trained. After each call they must be equal to the bit. A moving average in float64 gives the
running statistics expected if every batch is folded in exactly once (``bnverify.laws.life``).

The call that shows a violation raises it.
"""

from __future__ import annotations

import re
import shutil
import tempfile
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bnverify.errors import did_you_mean, first_line
from bnverify.evidence import Call, Cause, Counterexample, Evidence, Violation
from bnverify.jaxpr.tracing import traced_anew
from bnverify.laws import LAWS
from bnverify.laws.arithmetic import floats
from bnverify.laws.life import EmaHistory
from bnverify.laws.mismatch import Mismatch
from bnverify.lazy import LazyModule, jax, jnp
from bnverify.model import (
    Case,
    CheckpointedSubject,
    Outcome,
    State,
    StepInfo,
    Subject,
    Target,
    Tree,
)
from bnverify.observe import CompiledSubject
from bnverify.probe import subject_of
from bnverify.pytree import path_name

serialization: Any = LazyModule("flax.serialization")
ocp: Any = LazyModule("orbax.checkpoint")

VALUES = "a_checkpoint_keeps_every_value"
TYPES = "a_checkpoint_keeps_types_and_containers"
COPIED = "a_copy_keeps_everything"
RESTORED = "a_restored_run_continues_to_the_bit"
RESUMED = "a_resumed_process_continues_to_the_bit"
EVALUATED = "evaluation_between_steps_changes_nothing"
FOLDED = "statistics_fold_each_batch_once"

ONE_STEP = "batch_stats_change_only_by_ema"
"""The single-step form of ``FOLDED``: a subject exempt from it is exempt from ``FOLDED``, too."""

CALLS = ("begin", "train", "evaluate", "save", "restore", "copy", "resume")


def exemption(law: str, subject: Subject) -> str | None:
    """Return why a law of the family "life" does not apply to a subject; None if it does."""
    names = (law, ONE_STEP) if law == FOLDED else (law,)
    return next((subject.exempt[name] for name in names if name in subject.exempt), None)


@dataclass
class Record:
    """Counts over many sequences.

    Attributes:
        seen: how often each law was tested.
        worst: the largest error of the statistics, in units of the tolerance.
    """

    seen: Counter[str] = field(default_factory=Counter)
    worst: float = 0.0


class Saved(NamedTuple):
    """A checkpoint, with the twin and the moving average at that time."""

    way: Way
    data: Any
    state: State
    twin: State
    fold: EmaHistory


class Life:
    """One state, checked after each call.

    Args:
        lived: the subject; a Parallel is checked on one device.
        calls: the subject's functions, to reuse what they compiled; None: new ones.
        ignore: names of laws that are not checked.
        record: counts how often each law was tested; None: it is not counted.
        target: how counterexample scripts load the subject, as in ``bnverify.load``; None: they have
            a placeholder.
    """

    def __init__(
        self,
        lived: Target,
        *,
        calls: CompiledSubject | None = None,
        ignore: Collection[str] = (),
        record: Record | None = None,
        target: str | None = None,
    ) -> None:
        self.ways = ways(lived)
        self.ended = False
        self.saved: Saved | None = None
        self._subject = subject_of(lived)
        self._begin = lived.begin if isinstance(lived, CheckpointedSubject) else None
        self._calls = calls or CompiledSubject(self._subject, "jit")
        self._ignore = ignore
        self._record = record or Record()
        self._target = target
        self._history: list[Call] = []
        self._resumed = False
        self._mistake = ""

    def live(self, calls: Iterable[Call]) -> None:
        """Make all of ``calls``, in order.

        Raises:
            Violation: a call violates a law.
            ValueError: a call is invalid.
        """
        for name, argument in calls:
            if name not in CALLS:
                raise ValueError(f"{name!r} is not a call; the calls are {', '.join(CALLS)}")
            getattr(self, name)(*(() if argument is None else (argument,)))

    def begin(self, case: Case) -> None:
        """Initialise the state from the case's seed and shape, and the template from another seed.

        Raises:
            ValueError: it was called before.
        """
        if self._history:
            raise ValueError("begin() may be called only once; create another Life to begin again")
        self._history.append(Call("begin", case))
        if self._begin is not None:
            self._begin()
        self.state = self._init(case.seed, case.x)
        self._template = self._init(case.seed ^ 1, case.x)
        self._twin, self._fold = self.state, EmaHistory()

    def train(self, case: Case) -> None:
        """Train both states on the batch of ``case``."""
        if not self._goes_on("train", case):
            return
        before = self._twin
        self._twin, info = self._step(before, case)
        if self._folds and not self._skipped(before, info):
            self._fold = self._fold.after(before, case, lambda *given: self._step(*given)[0])
        with self._breaking(self._continuing, "the step fails on the restored state"):
            self.state, seen = self._step(self.state, case, resumed=self._resumed)
            self._same(self._continuing, Outcome(self.state, seen), Outcome(self._twin, info))
        if self._folds:
            self._hold_fold()

    def evaluate(self, case: Case) -> None:
        """Evaluate the state, but not its twin, on the batch of ``case``."""
        if not self._goes_on("evaluate", case):
            return
        with self._breaking(self._continuing, "evaluation fails on the restored state"):
            loss, known = (self._evaluate(state, case) for state in (self.state, self._twin))
            self._same(self._continuing, {"eval_loss": loss}, {"eval_loss": known})
        after = self._subject.after_eval
        if after is None or self._mistyped or not self._asks(EVALUATED):
            return
        before = self.state
        self.state = self._calls.single("after_eval", after, before, case.x, case.y)
        if differing := values_differ(self.state, before):
            self._break(EVALUATED, f"evaluation changed {_listed(differing)}")

    def save(self, way: str) -> None:
        """Save the state in one of ``self.ways``."""
        chosen = _known(way, self.ways)
        if not self._goes_on("save", way):
            return
        with self._breaking(VALUES, "saving fails"):
            data = chosen.save(self.state)
            self.saved = Saved(chosen, data, self.state, self._twin, self._fold)

    def restore(self) -> None:
        """Restore the last save; the twin returns to that point without having been saved.

        Raises:
            ValueError: nothing was saved.
        """
        if self.saved is None and not self.ended:
            raise ValueError("restore() needs a save() before it: nothing was saved yet")
        if not self._goes_on("restore") or self.saved is None:
            return
        way, data, known, self._twin, self._fold = self.saved
        with self._breaking(VALUES, "restoring fails"):
            self.state = restored = way.restore(self._template, data)
            difference = kinds_differ(restored, known)
            differing = values_differ(restored, known)
            self._mistake = "hidden_state"  # the cause of a difference that appears only later
            if difference:
                self._mistake = "restored_in_other_types"
            elif differing:
                self._mistake = suspect(restored, known, self._template)
            if self._asks(TYPES) and difference:
                self._break(TYPES, difference, self._mistake)
            if not difference and self._asks(VALUES) and differing:
                self._break(VALUES, f"restoring changes {_listed(differing)}", self._mistake)

    def copy(self, way: str) -> None:
        """Continue with a copy of the state, made in one of ``COPIES``."""
        chosen = _known(way, COPIES)
        if not self._goes_on("copy", way):
            return
        before, self.state = self.state, chosen(self.state)
        if not self._mistyped and self._asks(COPIED):
            difference = kinds_differ(self.state, before, weak=True)
            differing = values_differ(self.state, before)
            if difference or differing:
                self._break(COPIED, difference or f"{_listed(differing)} changed")

    def resume(self) -> None:
        """Continue as another process would: with the step traced again."""
        if self._goes_on("resume"):
            self._resumed = True

    def _init(self, seed: Any, x: Any) -> State:
        batch = self._calls.tracer.init_batch(x)
        state: State = self._calls.single("init", self._subject.init, seed, batch)
        return state

    def _step(self, state: State, case: Case, *, resumed: bool = False) -> tuple[State, StepInfo]:
        step = self._subject.step
        name, step = ("resumed step", traced_anew(step)) if resumed else ("step", step)
        outcome: tuple[State, StepInfo]
        outcome = self._calls.single(name, step, state, case.x, case.y, case.lr)
        return outcome

    def _evaluate(self, state: State, case: Case) -> Any:
        return self._calls.single("evaluate", self._subject.evaluate, state, case.x, case.y)

    def _goes_on(self, name: str, argument: Case | str | None = None) -> bool:
        """Add a call to the history and return whether to make it: not after a failed call.

        Raises:
            ValueError: ``begin`` was not called.
        """
        if not self._history:
            raise ValueError(f"the first call must be begin(case), not {name}")
        if not self.ended:
            self._history.append(Call(name, argument))
        return not self.ended

    @property
    def _continuing(self) -> str | None:
        """The law that a difference from the twin violates at this point."""
        if self._mistake:
            return RESTORED
        return RESUMED if self._resumed else None

    @property
    def _mistyped(self) -> bool:
        """Whether the state has wrong types, which would violate other laws as well."""
        return self._mistake == "restored_in_other_types"

    @property
    def _folds(self) -> bool:
        """Whether the law about the statistics applies and is checked."""
        return (
            FOLDED not in self._ignore
            and exemption(FOLDED, self._subject) is None
            and bool(floats(self._twin.batch_stats))
        )

    def _skipped(self, before: State, info: StepInfo) -> bool:
        """Return whether the twin's step left its statistics alone, because a gradient is not finite."""
        look = self._subject.look
        if look is None or not look.skips:
            return False
        finite = all(np.isfinite(leaf).all() for leaf in floats(info.grads))
        return not finite and not values_differ(self._twin.batch_stats, before.batch_stats)

    def _hold_fold(self) -> None:
        residual, mismatch = self._fold.error(self._twin)
        if residual < 0:
            return
        self._asks(FOLDED)
        self._record.worst = max(self._record.worst, residual)
        if mismatch is not None:
            suspected = self._fold.suspect(self._twin)
            self._break(FOLDED, str(mismatch), suspected, residual, mismatch)

    def _same(self, law: str | None, actual: Any, expected: Any) -> None:
        if law is None or not self._asks(law):
            return
        difference = kinds_differ(actual, expected)
        differing = values_differ(actual, expected)
        if difference or differing:
            reason = difference or f"{_listed(differing)} differs from the uninterrupted run"
            self._break(law, reason, self._mistake)

    def _asks(self, law: str) -> bool:
        """Return whether a law is checked, and count it."""
        if law in self._ignore or exemption(law, self._subject) is not None:
            return False
        self._record.seen[law] += 1
        return True

    @contextmanager
    def _breaking(self, law: str | None, what: str) -> Iterator[None]:
        """Report any exception of the user's code as a violation of the law.

        If that law is ignored, the sequence ends, because it cannot continue.
        """
        try:
            yield
        except Violation:
            raise
        except Exception as error:
            if law is None:
                raise
            if law not in self._ignore:
                self._break(law, f"{what}: {first_line(error)}", self._mistake)
            self.ended = True

    def _break(
        self,
        law: str,
        reason: str,
        mistake: str = "",
        residual: float = float("inf"),
        mismatch: Mismatch | None = None,
    ) -> None:
        first = self._history[0].argument
        assert isinstance(first, Case)
        shown = Counterexample(law, target=self._target, history=tuple(self._history))
        raise Violation(
            Evidence.of(
                law,
                "violated",
                cases=1,
                residual=residual,
                reason=reason,
                counterexample=shown,
                cause=Cause(mistake or LAWS[law].mistakes[0]),
                shape=first.shape,
                mismatch=mismatch,
            )
        )


def _known(name: str, table: Any) -> Any:
    if name not in table:
        close = did_you_mean(name, table)
        raise ValueError(f"{name!r} is not one of {', '.join(table)}{close}")
    return table[name]


def _listed(paths: list[str]) -> str:
    more = f" and {len(paths) - 3} more" if len(paths) > 3 else ""
    return ", ".join(paths[:3]) + more


# Ways to save, restore and copy a state. ``flax.serialization`` needs a template to restore into: a
# state of the same structure, here initialised from another seed, so that a value that is not restored
# is noticed.


@dataclass(frozen=True)
class Way:
    """A way to save and restore.

    Attributes:
        save: (state) -> anything.
        restore: (a template, what ``save`` returned) -> the state.
    """

    save: Callable[[State], Any]
    restore: Callable[[State, Any], Any]


def _save_bytes(state: State) -> Any:
    return serialization.to_bytes(state)


def _restore_bytes(template: State, data: Any) -> Any:
    return serialization.from_bytes(template, data)


def _restore_state_dict(template: State, data: Any) -> Any:
    return serialization.from_state_dict(template, data)


def _save_state_dict(state: State) -> Any:
    # Copied, because a training loop that overwrites its buffers must not change the checkpoint.
    as_dict = serialization.to_state_dict(state)
    return jax.tree_util.tree_map(lambda leaf: jnp.array(leaf, copy=True), as_dict)


class _Folder:
    """A directory that is removed when nothing refers to it any longer."""

    def __init__(self) -> None:
        home = tempfile.mkdtemp(prefix="bnverify-")
        self.path = Path(home) / "state"
        weakref.finalize(self, shutil.rmtree, home, ignore_errors=True)


def _save_orbax(state: State) -> Any:
    folder = _Folder()
    with warnings.catch_warnings():
        # orbax for jax 0.4 uses functions that this jax deprecates.
        warnings.simplefilter("ignore")
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(folder.path, state)
    return folder


def _restore_orbax(template: State, folder: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as in _save_orbax
        with ocp.StandardCheckpointer() as checkpointer:
            return checkpointer.restore(folder.path, template)


WAYS: dict[str, Way] = {
    "bytes": Way(_save_bytes, _restore_bytes),
    "state_dict": Way(_save_state_dict, _restore_state_dict),
}
"""The ways of ``flax.serialization``, fast enough for hundreds of saves."""

ORBAX = Way(_save_orbax, _restore_orbax)
"""Orbax, into a directory on disk: tenths of a second for each save."""


def has_orbax() -> bool:
    """Return whether orbax is installed and works with this jax.

    orbax 0.11.24 needs ``jax.monitoring.record_scalar``, which jax 0.5.3 lacks; 0.11.0 does not.
    """
    try:
        version = metadata.version("orbax-checkpoint")
    except metadata.PackageNotFoundError:
        return False
    numbers = tuple(map(int, re.findall(r"\d+", version)[:3]))
    return numbers <= (0, 11, 0) or hasattr(jax.monitoring, "record_scalar")


def ways(lived: Target) -> Mapping[str, Way]:
    """Return the ways in which ``lived`` is saved: its own, or those of the libraries."""
    if isinstance(lived, CheckpointedSubject):
        return {"own": Way(lived.save, lived.restore)}
    return {**WAYS, "orbax": ORBAX} if has_orbax() else WAYS


def _copied(state: State) -> Any:
    return jax.tree_util.tree_map(jnp.copy, state)


def _put(state: State) -> Any:
    return jax.device_put(state)


def _rebuilt(state: State) -> Any:
    leaves, structure = jax.tree_util.tree_flatten(state)
    return jax.tree_util.tree_unflatten(structure, leaves)


COPIES: dict[str, Callable[[State], Any]] = {
    "jnp.copy": _copied,
    "device_put": _put,
    "unflatten": _rebuilt,
}
"""Ways to copy a state; none of them may change anything."""


# How two states differ, and which mistake in saving or restoring explains the difference.


def kinds_differ(actual: Tree, expected: Tree, *, weak: bool = False) -> str:
    """Return the first difference in container, shape or dtype between two trees; "" if there is none.

    Args:
        actual: the tree after saving and restoring, or after copying.
        expected: the tree before.
        weak: whether weak types must agree as well.
    """
    if type(actual) is not type(expected):
        return f"a {type(expected).__name__} came back as a {type(actual).__name__}"
    parts = [("all", actual, expected)]
    if isinstance(expected, State):
        parts = list(zip(State._fields, actual, expected, strict=True))
    for name, part, other in parts:
        was, now = (jax.tree_util.tree_structure(tree) for tree in (other, part))
        if was != now:
            return f"{name} was {_short(was)}, came back as {_short(now)}"
    found = jax.tree_util.tree_leaves(actual)
    known = jax.tree_util.tree_flatten_with_path(expected)[0]
    for leaf, (path, other) in zip(found, known, strict=True):
        was, now = _kind(other, weak=weak), _kind(leaf, weak=weak)
        if was != now:
            return f"{path_name(path)} was {was}, came back as {now}"
    return ""


def _short(structure: Any) -> str:
    text = str(structure)
    return text if len(text) <= 120 else f"{text[:117]}..."


def _kind(leaf: Any, *, weak: bool) -> str:
    """Return the dtype and shape of a leaf in words; a Python number has neither."""
    if not hasattr(leaf, "dtype"):
        return f"a Python {type(leaf).__name__}"
    shape = ", ".join(map(str, leaf.shape))
    is_weak = weak and bool(getattr(leaf, "weak_type", False))
    return f"{'weak ' if is_weak else ''}{leaf.dtype}[{shape}]"


def _bits(leaf: Any) -> bytes:
    """Return the bits of a leaf: NaN equals NaN, 0 differs from -0."""
    if hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    return np.asarray(leaf).tobytes()


def values_differ(actual: Tree, expected: Tree) -> list[str]:
    """Return the paths of the leaves of ``expected`` that differ in any bit from ``actual``.

    If the structures differ, these are all paths.
    """
    known, structure = jax.tree_util.tree_flatten_with_path(expected)
    found, other = jax.tree_util.tree_flatten(actual)
    paths = [path_name(path) for path, _ in known]
    if structure != other:
        return paths or ["."]
    return [
        path
        for path, leaf, (_, value) in zip(paths, found, known, strict=True)
        if _bits(leaf) != _bits(value)
    ]


DROPPED = {
    "batch_stats": "checkpoint_drops_statistics",
    "opt_state": "checkpoint_drops_optimizer_state",
    "extra": "checkpoint_drops_key",
}


def suspect(restored: State, saved: State, template: State) -> str:
    """Return the most likely mistake if a restored state has other values than the saved one."""
    differing = set(values_differ(restored, saved))
    still = set(values_differ(restored, template))  # what did come from the checkpoint
    if not still:
        return "checkpoint_not_used"
    if _close(restored, saved):
        return "checkpoint_loses_digits"
    leaves = jax.tree_util.tree_flatten_with_path(saved)[0]
    changed = [leaf for path, leaf in leaves if path_name(path) in differing]
    parts = {path.partition("/")[0] for path in differing}
    part = parts.pop() if len(parts) == 1 else ""
    if part == "opt_state" and all(jnp.issubdtype(leaf.dtype, jnp.integer) for leaf in changed):
        return "counter_reset_on_restore"
    if part and not differing & still:
        return DROPPED.get(part, "checkpoint_is_stale")
    ours, theirs = (sorted(map(_bits, jax.tree_util.tree_leaves(s))) for s in (restored, saved))
    return "restored_in_another_order" if ours == theirs else "checkpoint_is_stale"


def _close(actual: State, expected: State) -> bool:
    """Return whether all values agree to two digits, the precision of the narrowest float type."""
    pairs = zip(jax.tree_util.tree_leaves(actual), jax.tree_util.tree_leaves(expected), strict=True)
    return all(
        _same_to_two_digits(leaf, value)
        if jnp.issubdtype(value.dtype, jnp.floating)
        else _bits(leaf) == _bits(value)
        for leaf, value in pairs
    )


def _same_to_two_digits(leaf: Any, value: Any) -> bool:
    actual, expected = np.asarray(leaf, np.float64), np.asarray(value, np.float64)
    return bool(np.all(np.abs(actual - expected) <= 2.0**-7 * np.abs(expected) + 1e-6))
