"""Check the laws of the family "life" on sequences of calls, and shrink the sequences that break one.

``check_life`` runs scripted sequences and random ones; ``life`` returns a Hypothesis state machine
for users' own tests:

    TestLife = bnverify.life(subject).TestCase
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from bnverify import compile_cache
from bnverify.errors import did_you_mean, first_line
from bnverify.evidence import Call, Evidence, Violation
from bnverify.laws import LAWS
from bnverify.laws.arithmetic import floats
from bnverify.laws.life import ANOTHER_PROCESS
from bnverify.lifetime import process
from bnverify.lifetime.life import COPIES, EVALUATED, FOLDED, Life, Record, exemption, ways
from bnverify.model import Case, CheckpointedSubject, Shape, Subject
from bnverify.observe import CompiledSubject
from bnverify.probe import subject_of
from bnverify.profile import PROFILES, Profile, ProfileName, named
from bnverify.shrink import shorten

if TYPE_CHECKING:
    from hypothesis.stateful import RuleBasedStateMachine

NAMES = tuple(name for name, law in LAWS.items() if law.kind == "life")
"""The laws of the family "life", in the order of reports."""

SHAPES = ((2, 2), (4, 3), (24, 3))
"""Tried in turn; 24 rows, because a step may split its batch into 2, 3, 4, 6 or 8 parts."""


def check_life(
    lived: Subject | CheckpointedSubject,
    profile: ProfileName | Profile = "ci",
    seed: int = 0,
    *,
    select: Collection[str] = (),
    target: str | None = None,
) -> list[Evidence]:
    """Check the laws of the family "life" and return the evidence for each.

    Args:
        lived: a Subject, or a CheckpointedSubject with its own functions to save and restore.
        profile: how much to do: two scripted sequences for each way to save, and twice as many
            random ones as the profile has explicit examples.
        seed: the seed of the random sequences; the same seed gives the same evidence.
        select: names of laws, or one name; empty: all.
        target: the name of the subject in counterexample scripts.

    Raises:
        ValueError: an unknown profile or law is named.
    """
    names = [select] if isinstance(select, str) else select
    for name in names:
        if name not in NAMES:
            close = did_you_mean(name, NAMES)
            raise ValueError(f"no law of the family life is named {name!r}{close}")
    asked = [name for name in NAMES if name in names or not names]
    return Lives(lived, named(profile), asked, target).run(seed)


class Untraceable(ValueError):
    """A subject that cannot be traced at any of the shapes tried; the message gives the reason."""


def shape_for(calls: CompiledSubject) -> Shape:
    """Return the first of ``SHAPES`` at which the subject can be traced.

    Raises:
        Untraceable: there is none.
    """
    subject, trace = calls.subject, calls.tracer.trace
    failure: Exception | None = None
    multiple = subject.rows or 1
    fitting = [shape for shape in SHAPES if shape[0] % multiple == 0] or [(2 * multiple, 3)]
    for rows, features in fitting:
        shape = rows, subject.width(features)
        try:
            batch, state = calls.tracer.batch(*shape), calls.tracer.state(*shape)
            after = trace("step", subject.step, state, batch.x, batch.y, batch.lr).out[0]
            trace("evaluate", subject.evaluate, after, batch.x, batch.y)
        except Exception as error:  # noqa: BLE001 - whatever a user's code raises when traced
            failure = error
        else:
            return shape
    sizes = ", ".join(str(rows) for rows, _ in fitting)
    assert failure is not None
    raise Untraceable(
        f"{subject.name} cannot be traced with {sizes} rows: {first_line(failure)}"
    ) from failure


def offered(
    lived: Subject | CheckpointedSubject, calls: CompiledSubject, shape: Shape, *, orbax: bool
) -> tuple[list[str], dict[str, str]]:
    """Return the ways in which the subject's states can be saved, and why the others cannot be used.

    A user's own way is always included: if it raises, that is a violation.

    Args:
        lived: a Subject, or a CheckpointedSubject with its own functions to save and restore.
        calls: the subject's functions.
        shape: (N, D) of the batches.
        orbax: whether to try orbax, too; each save takes tenths of a second.
    """
    known = {name: way for name, way in ways(lived).items() if orbax or name != "orbax"}
    if isinstance(lived, CheckpointedSubject):
        return list(known), {}
    batch = calls.tracer.init_batch(np.zeros(shape, np.float32))
    state = calls.single("init", calls.subject.init, np.int32(0), batch)
    refused = {}
    for name, way in known.items():
        try:
            way.save(state)
        except Exception as error:  # noqa: BLE001 - whatever a library raises on a user's types
            refused[name] = f"{name} cannot save it: {first_line(error)}"
    return [name for name in known if name not in refused], refused


class Lives:
    """Runs sequences of calls on one subject, and reuses what was compiled.

    Args:
        lived: a Subject, or a CheckpointedSubject with its own functions to save and restore.
        plan: how much to do.
        names: the names of the laws.
        target: the name of the subject in counterexample scripts.
        calls: the subject's functions, to reuse what they traced and compiled; None: new ones.

    Attributes:
        cases: the number of sequences in the last run.
    """

    def __init__(
        self,
        lived: Subject | CheckpointedSubject,
        plan: Profile,
        names: Collection[str],
        target: str | None = None,
        calls: CompiledSubject | None = None,
    ) -> None:
        self._lived = lived
        self._subject = subject_of(lived)
        self._plan = plan
        self._names = names
        self._target = target
        self._calls = calls or CompiledSubject(self._subject, "jit")
        self._forget()

    def _forget(self) -> None:
        self.cases = 0
        self._record = Record()
        self._broken: dict[str, Evidence] = {}
        self._refused: dict[str, str] = {}

    def run(self, seed: int) -> list[Evidence]:
        """Run all sequences and return the evidence for each law, in the order of the names.

        If the subject cannot be traced, every law that applies is "untriggered".

        Args:
            seed: the seed of the random sequences.
        """
        compile_cache.enable()
        self._forget()
        exempt = {name: exemption(name, self._subject) for name in self._names}
        declared = exempt.pop(ANOTHER_PROCESS, None)
        missing = ""
        if not all(exempt.values()):
            try:
                shape = shape_for(self._calls)
            except Untraceable as error:
                missing = str(error)
            else:
                self._live_all(seed, shape)
                exempt = {name: exempt[name] or self._missing(name, shape) for name in exempt}
        return [
            self._in_another_process(declared)
            if name == ANOTHER_PROCESS
            else self._evidence(name, exempt[name], missing)
            for name in self._names
        ]

    def _in_another_process(self, declared: str | None) -> Evidence:
        """Return the evidence for the law that needs other processes instead of sequences."""
        if declared is not None:
            return Evidence.of(ANOTHER_PROCESS, "exempt", reason=declared)
        return process.compared(self._calls.tracer, self._target, self._plan.processes)

    def _missing(self, name: str, shape: Shape) -> str | None:
        """Return why a law cannot be checked on the subject; None if it can."""
        if name == EVALUATED and self._subject.after_eval is None:
            return "eval_step returns no state"
        if name == FOLDED and not floats(self._calls.tracer.state(*shape).batch_stats):
            return "the subject keeps no running statistics"
        return None

    def _evidence(self, name: str, exempt: str | None, missing: str) -> Evidence:
        if name in self._broken:
            return replace(self._broken[name], cases=self._record.seen[name])
        if exempt is not None:
            return Evidence.of(name, "exempt", reason=exempt)
        cases, reason = self._record.seen[name], missing or "; ".join(self._refused.values())
        if not cases:
            return Evidence.of(name, "untriggered", reason=reason or "no sequence reached it")
        worst = self._record.worst if name == FOLDED else None
        return Evidence.of(name, "held", cases=cases, residual=worst, reason=reason)

    def _live_all(self, seed: int, shape: Shape) -> None:
        for calls in self._histories(seed, shape):
            self.cases += 1
            # A violated law is ignored from then on, because others may be violated later in the sequence.
            while (found := self._live(calls, self._record)) is not None:
                self._broken[found.law] = self._short(calls, found)

    def _histories(self, seed: int, shape: Shape) -> Iterator[Sequence[Call]]:
        orbax = self._plan.examples > PROFILES["quick"].examples
        saved, self._refused = offered(self._lived, self._calls, shape, orbax=orbax)
        for way in saved:
            yield from scripted(way, shape)
        quick = [way for way in saved if way != "orbax"]
        yield from drawn(seed, 2 * self._plan.examples, quick, shape)

    def _live(self, calls: Sequence[Call], record: Record | None) -> Evidence | None:
        """Return the first violation in a sequence; None if there is none."""
        left = {name for name in self._names if name not in self._broken}
        life = Life(
            self._lived,
            calls=self._calls,
            ignore=[name for name in NAMES if name not in left],
            record=record,
            target=self._target,
        )
        try:
            life.live(calls)
        except Violation as found:
            return found.evidence
        return None

    def _short(self, calls: Sequence[Call], found: Evidence) -> Evidence:
        """Return the same violation in the shortest sequence found."""
        shortest = found

        def breaks(fewer: Sequence[Call]) -> bool:
            nonlocal shortest
            try:
                seen = self._live(fewer, None)
            except ValueError:  # a restore without a save before it
                return False
            if seen is None or (seen.law, seen.cause) != (found.law, found.cause):
                return False
            shortest = seen
            return True

        shorten(calls, breaks)
        return shortest


# Sequences of calls: scripted ones that contain every call, and random ones. These are not drawn by
# Hypothesis, whose draws depend on the constants in all imported modules: the same seed must give the
# same sequences.

# Small numbers of few digits do not overflow, and make counterexamples easy to read.
QUARTERS = 8
"""The largest number in a batch, in quarters."""
RATES = (0.125, 0.0, 0.5)
SEEDS = 4
LONGEST = 12
"""The number of calls in a random sequence after the first."""


def scripted(way: str, shape: Shape) -> tuple[list[Call], list[Call]]:
    """Return two sequences: one that contains every call, and one with a resumed process.

    Args:
        way: the way in which the first one saves.
        shape: (N, D) of the batches.
    """
    rng = np.random.default_rng(0)
    first, second = (_batch(rng, shape) for _ in range(2))
    train, again = Call("train", first), Call("train", second)
    save, restore = Call("save", way), Call("restore")
    copies = [Call("copy", name) for name in COPIES]
    begin, evaluate = Call("begin", first), Call("evaluate", second)
    # Saved twice, because a second checkpoint may fail where the first does not.
    saved = [begin, train, evaluate, save, again, save, train, restore, *copies, train, again]
    return saved, [begin, train, Call("resume"), again]


def drawn(seed: int, count: int, ways: Sequence[str], shape: Shape) -> Iterator[list[Call]]:
    """Yield ``count`` random sequences, the same ones for the same arguments.

    Args:
        seed: the seed.
        count: the number of sequences.
        ways: the ways in which a state can be saved; empty: it is never saved.
        shape: (N, D) of the batches.
    """
    for index in range(count):
        yield _history(np.random.default_rng((seed, index)), ways, shape)


def _history(rng: np.random.Generator, ways: Sequence[str], shape: Shape) -> list[Call]:
    calls = [Call("begin", _batch(rng, shape))]
    saved = False
    for _ in range(rng.integers(1, LONGEST + 1)):
        names = ["train", "train", "evaluate", "copy", "resume"]
        names += ["save"] * bool(ways) + ["restore", "restore"] * saved
        name = _one_of(rng, names)
        saved = saved or name == "save"
        argument = {"copy": tuple(COPIES), "save": ways}.get(name, ())
        if name in {"train", "evaluate"}:
            calls.append(Call(name, _batch(rng, shape)))
        else:
            calls.append(Call(name, _one_of(rng, argument) if argument else None))
    return calls


def _batch(rng: np.random.Generator, shape: Shape) -> Case:
    def numbers(of: Any) -> Any:
        return rng.integers(-QUARTERS, QUARTERS + 1, of) / 4

    return Case.of(int(rng.integers(SEEDS)), numbers(shape), numbers(shape[0]), _one_of(rng, RATES))


def _one_of(rng: np.random.Generator, items: Sequence[Any]) -> Any:
    return items[int(rng.integers(len(items)))]


# For users' own tests. A state machine uses a single shape, because compiling for a shape takes seconds
# and a step a millisecond.


def batches(shape: tuple[int, int]) -> st.SearchStrategy[Case]:
    """Strategy for the batches of a sequence: one shape (N, D), small numbers of few digits."""
    numbers = st.integers(-QUARTERS, QUARTERS).map(lambda k: k / 4)

    def array(of: Any) -> st.SearchStrategy[Any]:
        return hnp.arrays(np.float32, of, elements=numbers, fill=st.nothing())

    return st.builds(
        Case.of,
        st.integers(0, SEEDS - 1),
        array(shape),
        array(shape[0]),
        st.sampled_from(RATES),
    )


def life(
    lived: Subject | CheckpointedSubject, *, name: str | None = None, ignore: Collection[str] = ()
) -> type[RuleBasedStateMachine]:
    """Return a Hypothesis state machine that trains, evaluates, saves, restores, copies and resumes.

    Args:
        lived: a Subject, saved by ``flax.serialization``, or a CheckpointedSubject with its own
            functions to save and restore.
        name: how counterexample scripts load ``lived``: "module:name"; None: they have a placeholder.
        ignore: names of laws that are not checked.

    Raises:
        ValueError: the step cannot be traced with 2, 4 or 24 rows.
    """
    from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

    subject = subject_of(lived)
    calls = CompiledSubject(subject, "jit")
    shape = shape_for(calls)
    saved, _ = offered(lived, calls, shape, orbax=False)
    cases = batches(shape)

    class Machine(RuleBasedStateMachine):
        def __init__(self) -> None:
            super().__init__()
            self.life = Life(lived, calls=calls, ignore=ignore, target=name)

        @initialize(case=cases)
        def begin(self, case: Case) -> None:
            self.life.begin(case)

        @rule(case=cases)
        def train(self, case: Case) -> None:
            self.life.train(case)

        @rule(case=cases)
        def evaluate(self, case: Case) -> None:
            self.life.evaluate(case)

        @precondition(lambda self: bool(saved))
        @rule(way=st.sampled_from(saved or [""]))
        def save(self, way: str) -> None:
            self.life.save(way)

        @precondition(lambda self: self.life.saved is not None)
        @rule()
        def restore(self) -> None:
            self.life.restore()

        @rule(way=st.sampled_from(sorted(COPIES)))
        def copy(self, way: str) -> None:
            self.life.copy(way)

        @rule()
        def resume(self) -> None:
            self.life.resume()

    Machine.__name__ = Machine.__qualname__ = f"Life[{subject.name}]"
    return Machine
