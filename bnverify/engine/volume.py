"""Thousands of cases in one compiled call: the step, its re-runs and the laws under vmap."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import numpy.typing as npt

from bnverify.case import Case, Domain
from bnverify.engine.judge import READ, Judge
from bnverify.engine.tally import Tally, complexity
from bnverify.laws import Law
from bnverify.observe import FEW_ROWS, Calls, observe
from bnverify.pytree import stack, stacks, take
from bnverify.reruns import EVALS, LATER_RERUNS, RERUNS
from bnverify.stacks import stacked_cases
from bnverify.subject import State, Subject
from bnverify.transition import Outcome

NEEDS = frozenset(
    [f"step:{name}" for name in (*RERUNS, *LATER_RERUNS, "shifted_bias")]
    + [f"eval:{name}" for name in (*EVALS, "rows")]
    + ["expected_update", "layer_inputs", "after_eval", *READ]
)
"""What laws can ask of a stacked run; the rest takes single calls."""

Residuals = Mapping[str, npt.NDArray[np.float64]]


class Volume:
    """A subject's functions under vmap, and the laws judged on what they give.

    Args:
        subject: what is verified.
        laws: the laws to judge, all of whose needs are in ``NEEDS``.
        judge: judges them, and says how many cases a call stacks.
        domain: where cases are drawn from.

    Attributes:
        laws: their names.
        domain: as given.
        refused: see ``Calls``.
    """

    def __init__(
        self,
        subject: Subject,
        laws: Sequence[Law],
        judge: Judge,
        *,
        domain: Domain,
    ) -> None:
        self.laws = frozenset(law.name for law in laws)
        self.domain = domain
        self._laws = laws
        self._calls = Calls(subject, "stacked", optimise=judge.often)
        self.refused = self._calls.refused
        self._judge = judge

    def judged(self, shape: tuple[int, int]) -> list[Law]:
        """Return the laws judged on cases of one shape; always together: one program for all."""
        return [law for law in self._laws if _affordable(law, shape)]

    def residuals(self, cases: Case, count: int | None = None) -> Residuals:
        """Return law name -> residuals, (block,), of stacked cases; only ``count`` of them count."""
        laws = self.judged(cases.shape)
        needs = {need for law in laws for need in law.needs}
        return self._judge.residuals(observe(self._calls, cases, needs), laws, count)

    def outcomes(self, given: Sequence[tuple[State, Case]]) -> list[Outcome]:
        """Return what the step gives for states and cases of one shape when they are run in stacks."""
        found: list[Outcome] = []
        for (state, cases), count in stacks(given, self._judge.block(given[0][1].shape)):
            outcome = self._calls.step(state, cases)
            outcome = outcome._replace(eval_loss=self._calls.evaluate(outcome.state, cases))
            found += [take(outcome, index) for index in range(count)]
        return found

    def blocks(
        self, shape: tuple[int, int], count: int, rng: np.random.Generator
    ) -> Iterator[tuple[Case, Residuals]]:
        """Yield ``count`` blocks of cases of one shape with their residuals.

        Half of every block is bred from the worst cases known as it starts. The first block runs
        alone and in this thread: it traces the user's code, which others need not bear, and
        compiles what the next ones share.
        """
        worst: dict[str, tuple[float, Case]] = {}

        def known(cases: Case, residuals: Residuals) -> tuple[Case, Residuals]:
            _remember(worst, cases, residuals)
            return cases, residuals

        cases = self._cases(shape, rng, worst)
        yield known(cases, self.residuals(cases))
        at_once = self._judge.at_once(shape)
        with ThreadPoolExecutor(at_once) as pool:
            running: deque[tuple[Case, Future[Residuals]]] = deque()
            for _ in range(count - 1):
                cases = self._cases(shape, rng, worst)
                running.append((cases, pool.submit(self.residuals, cases)))
                if len(running) == at_once:
                    cases, first = running.popleft()
                    yield known(cases, first.result())
            for cases, left in running:
                yield known(cases, left.result())

    def _cases(
        self,
        shape: tuple[int, int],
        rng: np.random.Generator,
        worst: Mapping[str, tuple[float, Case]],
    ) -> Case:
        """Return a block of cases, half of them bred from the ``worst`` where there are some."""
        block = self._judge.block(shape)
        cases = stacked_cases(rng, shape, block, self.domain)
        parents = [case for _, case in worst.values()]
        if not parents:
            return cases
        bred = breed(parents, block // 2, rng, self.domain)
        kept = take(cases, np.arange(block // 2, block))
        return Case(*(np.concatenate(leaves) for leaves in zip(bred, kept, strict=True)))

    def simplify(self, tally: Tally, others: Collection[Tally], rounds: int = 12) -> Case:
        """Return a case of the same shape that violates the same law and reads easier.

        Args:
            tally: of the law.
            others: of laws that are violated too: what is tried shows them as well.
            rounds: how often it is made simpler at most.
        """
        assert tally.case is not None
        best, name = tally.case, tally.law.name
        block = self._judge.block(best.shape)
        for _ in range(rounds):
            candidates = sorted(simpler(best), key=complexity)[:block]
            if not candidates:
                break
            cases, count = next(stacks(candidates, block))
            broken = {
                law: np.nan_to_num(values, nan=np.inf) > 1
                for law, values in self.residuals(cases, count).items()
            }
            for other in others:
                if other.law.name in broken:
                    other.keep_simplest(cases, broken[other.law.name])
            failing = np.flatnonzero(broken[name][:count])
            if not len(failing):
                break
            best = candidates[int(failing[0])]
        return best


def _remember(worst: dict[str, tuple[float, Case]], cases: Case, residuals: Residuals) -> None:
    """Put each law's worst case into ``worst`` where it is worse than what is there."""
    for name, values in residuals.items():
        finite = np.where(np.isfinite(values), values, -1.0)
        index = int(np.argmax(finite))
        if finite[index] > worst.get(name, (0.0, None))[0]:
            worst[name] = (float(finite[index]), take(cases, index))


def _affordable(law: Law, shape: tuple[int, int]) -> bool:
    """Return whether a law is worth its programs: what doubling a batch shows, it shows on few rows."""
    return "step:doubled_batch" not in law.needs or shape[0] <= FEW_ROWS


def breed(parents: list[Case], count: int, rng: np.random.Generator, domain: Domain) -> Case:
    """Return ``count`` stacked variations of ``parents``: rescaled, shifted, another lr or seed."""
    of = take(stack(parents), np.arange(count) % len(parents))
    scales = 2.0 ** rng.integers(-3, 4, (count, 1, 1))
    x = of.x * scales
    largest = np.max(np.abs(x), axis=(1, 2), keepdims=True, initial=1e-6)
    shifts = rng.normal(size=(count, 1, 1)) * (rng.random((count, 1, 1)) < 0.5)
    x = np.clip(x + shifts * largest, -domain.max_abs_x, domain.max_abs_x)
    seeds, rates = rng.integers(0, 1000, count), rng.random(count) * domain.max_lr
    return Case(
        np.where(rng.random(count) < 0.5, of.seed, seeds).astype(np.int32),
        x.astype(np.float32),
        of.y,
        np.where(rng.random(count) < 0.5, of.lr, rates).astype(np.float32),
        of.warmup,
    )


def simpler(case: Case) -> list[Case]:
    """Return cases of the same shape that read easier, a step or two away."""
    rank = complexity(case)
    found = [case._replace(warmup=np.int32(0)), case._replace(seed=np.int32(0))]
    found += [case._replace(lr=np.float32(lr)) for lr in (0.0, 0.1, 0.5, 1.0)]
    for name in ("x", "y"):
        value = getattr(case, name)
        flat = np.ravel(value)
        wholes = [np.zeros_like(value), np.ones_like(value)]
        wholes.append(np.arange(value.size, dtype=np.float32).reshape(value.shape))
        wholes += [np.round(value, digits) for digits in (0, 1, 2, 3)]
        wholes += [(value * np.float32(10.0**-k)) for k in (1, 2, 3)]
        found += [case._replace(**{name: whole.astype(np.float32)}) for whole in wholes]
        for index in range(min(flat.size, 64)):
            for to in (0.0, 1.0, -1.0, 2.0, float(np.round(flat[index], 1))):
                other = flat.copy()
                other[index] = to
                found.append(case._replace(**{name: other.reshape(value.shape)}))
    return [candidate for candidate in found if complexity(candidate) < rank]
