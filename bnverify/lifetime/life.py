"""The life of a state: train, evaluate, save, restore, copy and resume, in any order.

Two histories run side by side. One is saved, restored, copied and resumed; its twin only ever
trains. At each moment they must be equal to the bit. A third, in float64, says what the running
statistics must be if every batch was folded in exactly once (``bnverify.lifetime.fold``).

A life breaks as it happens: the call that shows a broken claim is the one that raises.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from bnverify.broken import Broken
from bnverify.case import Case
from bnverify.lazy import jax
from bnverify.lifetime.calls import Call, script
from bnverify.lifetime.checkpoint import COPIES, ORBAX, WAYS, Lived, Way, has_orbax, subject_of
from bnverify.lifetime.claims import CLAIMS
from bnverify.lifetime.differences import kinds_differ, suspect, values_differ
from bnverify.lifetime.fold import Fold
from bnverify.lifetime.programs import Programs
from bnverify.parallel.subject import Parallel
from bnverify.pytree import is_floating
from bnverify.subject import State, StepInfo, Subject
from bnverify.unusable import first_line


@dataclass
class Record:
    """What many lives have shown.

    Attributes:
        seen: how often each claim was tested.
        worst: the largest error of the statistics, in units of the error allowed.
    """

    seen: Counter[str] = field(default_factory=Counter)
    worst: float = 0.0


class Saved(NamedTuple):
    """A checkpoint, and where the twin and the history were when it was made."""

    way: Way
    data: Any
    state: State
    twin: State
    fold: Fold


class Life:
    """One state's life, held to the claims as it goes.

    Args:
        lived: a Subject, a Lived with its own way to save and restore, or the single-device step
            of a Parallel.
        programs: compiled before; None: now.
        ignore: names of claims that are not asked.
        record: counts how often each claim was tested; None: nobody wants to know.
        name: how the script finds ``lived``; None: the reader puts it in.
    """

    def __init__(
        self,
        lived: Subject | Lived | Parallel,
        *,
        programs: Programs | None = None,
        ignore: Collection[str] = (),
        record: Record | None = None,
        name: str | None = None,
    ) -> None:
        self.ways = ways(lived)
        self._begin = lived.begin if isinstance(lived, Lived) else None
        self._programs = programs or Programs(subject_of(lived))
        self._ignore = ignore
        self._record = record or Record()
        self._name = name
        self._log: list[Call] = []
        self._active = 0
        self._mistake = ""
        self.ended = False
        self.saved: Saved | None = None

    def live(self, calls: Iterable[Call]) -> None:
        """Let all of ``calls`` happen, in their order.

        Raises:
            Broken: one of them breaks a claim.
        """
        for name, argument in calls:
            getattr(self, name)(*(() if argument is None else (argument,)))

    def begin(self, case: Case) -> None:
        """Initialise the state from a case's seed and shape, the template from another seed."""
        self._log.append(Call("begin", case))
        if self._begin is not None:
            self._begin()
        self.state: State = self._programs.init(case.seed, case.x)
        self._template: State = self._programs.init(case.seed ^ 1, case.x)
        self._twin = self.state
        self._fold = Fold()

    def train(self, case: Case) -> None:
        """Take one step on the batch of ``case``, in both histories."""
        if self.ended:
            return
        self._log.append(Call("train", case))
        batch = case.x, case.y, case.lr
        main = self._programs.steps[0]
        if self._averages:
            self._fold = self._fold.after(self._twin, lambda state: main(state, *batch)[0])
        self._twin, info = main(self._twin, *batch)
        with self._breaking(self._continuing, "the step fails on the restored state"):
            self.state, seen = self._programs.steps[self._active](self.state, *batch)
            self._same(self._continuing, (self.state, seen), (self._twin, info))
        self._folded()

    def evaluate(self, case: Case) -> None:
        """Evaluate on the batch of ``case``, in one history only."""
        if self.ended:
            return
        self._log.append(Call("evaluate", case))
        with self._breaking(self._continuing, "evaluation fails on the restored state"):
            loss = self._programs.evaluate(self.state, case.x, case.y)
            known = self._programs.evaluate(self._twin, case.x, case.y)
            self._same(self._continuing, StepInfo(loss, None), StepInfo(known, None))
        name = "evaluation_between_steps_changes_nothing"
        if self._programs.after_eval is None or self._mistyped or not self._asks(name):
            return
        before = self.state
        self.state = self._programs.after_eval(self.state, case.x, case.y)
        differing = values_differ(self.state, before)
        if differing:
            self._break(name, f"evaluation changed {_listed(differing)}")

    def save(self, way: str) -> None:
        """Save the state in one of ``self.ways``."""
        if self.ended:
            return
        self._log.append(Call("save", way))
        chosen = self.ways[way]
        with self._breaking("a_checkpoint_keeps_every_value", "saving fails"):
            data = chosen.save(self.state)
            self.saved = Saved(chosen, data, self.state, self._twin, self._fold)

    def restore(self) -> None:
        """Go back to what was saved last; the twin goes back without having been saved.

        Raises:
            ValueError: nothing was saved.
        """
        if self.ended:
            return
        if self.saved is None:
            raise ValueError("nothing was saved that could be restored")
        self._log.append(Call("restore"))
        saved = self.saved
        with self._breaking("a_checkpoint_keeps_every_value", "restoring fails"):
            restored = saved.way.restore(self._template, saved.data)
            self._twin, self._fold, self.state = saved.twin, saved.fold, restored
            difference = kinds_differ(restored, saved.state)
            differing = values_differ(restored, saved.state)
            self._mistake = "hidden_state"  # if this run differs later, though it does not now
            if difference:
                self._mistake = "restored_in_other_types"
            elif differing:
                self._mistake = suspect(restored, saved.state, self._template)
            name = "a_checkpoint_keeps_types_and_containers"
            if self._asks(name) and difference:
                self._break(name, difference, self._mistake)
            name = "a_checkpoint_keeps_every_value"
            if not difference and self._asks(name) and differing:
                self._break(name, f"{_listed(differing)} came back changed", self._mistake)

    def copy(self, way: str) -> None:
        """Go on with a copy of the state, made in one of ``COPIES``."""
        if self.ended:
            return
        self._log.append(Call("copy", way))
        name = "a_copy_keeps_everything"
        copied = COPIES[way](self.state)
        if not self._mistyped and self._asks(name):
            difference = kinds_differ(copied, self.state, weak=True)
            differing = values_differ(copied, self.state)
            if difference or differing:
                self._break(name, difference or f"{_listed(differing)} changed")
        self.state = copied

    def resume(self) -> None:
        """Go on as another process would: with the step traced again."""
        self._log.append(Call("resume"))
        self._active = 1

    @property
    def _continuing(self) -> str | None:
        """The claim that a difference from the twin breaks now."""
        if self._mistake:
            return "a_restored_run_continues_to_the_bit"
        return "a_resumed_process_continues_to_the_bit" if self._active else None

    @property
    def _mistyped(self) -> bool:
        """Whether the state has other types than it should, which breaks other claims as well."""
        return self._mistake == "restored_in_other_types"

    @property
    def _averages(self) -> bool:
        name = "statistics_fold_each_batch_once"
        exempt = self._programs.subject.exempt
        return (
            name not in self._ignore
            and name not in exempt
            and "batch_stats_change_only_by_ema" not in exempt
            and any(map(is_floating, jax.tree_util.tree_leaves(self._twin.batch_stats)))
        )

    def _folded(self) -> None:
        name = "statistics_fold_each_batch_once"
        if not self._averages:
            return
        residual, where = self._fold.worst(self._twin)
        if residual < 0:
            return
        self._asks(name)
        self._record.worst = max(self._record.worst, residual)
        if residual > 1:
            reason = f"batch_stats/{where} is off by {residual:.3g} times the error allowed"
            self._break(name, reason, self._fold.suspect(self._twin), residual)

    def _same(self, name: str | None, actual: Any, expected: Any) -> None:
        if name is None or not self._asks(name):
            return
        difference = kinds_differ(actual, expected) or ""
        differing = values_differ(actual, expected)
        if difference or differing:
            reason = difference or f"{_listed(differing)} differs from the run never saved"
            self._break(name, reason, self._mistake)

    def _asks(self, name: str) -> bool:
        """Return whether a claim is asked, and count it."""
        if name in self._ignore or name in self._programs.subject.exempt:
            return False
        self._record.seen[name] += 1
        return True

    @contextmanager
    def _breaking(self, name: str | None, what: str) -> Iterator[None]:
        """Take whatever a user's code raises for a violation of the claim.

        Where that claim is not asked, the life cannot go on: it ended.
        """
        try:
            yield
        except Broken:
            raise
        except Exception as error:
            if name is None:
                raise
            if name not in self._ignore:
                self._break(name, f"{what}: {first_line(error)}", self._mistake)
            self.ended = True

    def _break(
        self, name: str, reason: str, mistake: str = "", residual: float = float("inf")
    ) -> None:
        first = self._log[0].argument
        assert isinstance(first, Case)
        raise Broken(
            CLAIMS[name],
            reason,
            mistake=mistake,
            script=script(self._log, self._name),
            shape=first.shape,
            residual=residual,
        )


def ways(lived: Subject | Lived | Parallel) -> Mapping[str, Way]:
    """Return the ways in which ``lived`` is saved: its own, or the libraries'."""
    if isinstance(lived, Lived):
        return {"own": Way(lived.save, lived.restore)}
    return {**WAYS, "orbax": ORBAX} if has_orbax() else WAYS


def _listed(paths: list[str]) -> str:
    more = f" and {len(paths) - 3} more" if len(paths) > 3 else ""
    return ", ".join(paths[:3]) + more
