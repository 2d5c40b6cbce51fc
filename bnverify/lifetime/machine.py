"""The life of a state as a Hypothesis state machine, for users' own tests.

    TestLife = bnverify.life(subject).TestCase

One shape serves a whole machine: a shape costs seconds to compile, a step then takes a millisecond.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from bnverify.case import Case
from bnverify.lifetime.check import offered, shape_for
from bnverify.lifetime.checkpoint import COPIES, CheckpointedSubject, subject_of
from bnverify.lifetime.histories import QUARTERS, RATES, SEEDS
from bnverify.lifetime.life import Life
from bnverify.observe import CompiledSubject
from bnverify.subject import Subject


def batches(shape: tuple[int, int]) -> st.SearchStrategy[Case]:
    """Strategy for the batches of a life: one shape (N, D), small numbers of few digits."""
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
    """Return a state machine that lives the life of a state in every order.

    Args:
        lived: a Subject, saved by ``flax.serialization``, or a CheckpointedSubject with its own way to save
            and restore.
        name: how counterexamples find ``lived``: "module:name"; None: the reader puts it in.
        ignore: names of laws that are not asked.

    Raises:
        ValueError: the step takes no batch of 2, 4 or 24 rows.
    """
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
