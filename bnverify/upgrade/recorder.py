"""Runs a subject on fixed cases and keeps all that comes out; see ``recording``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from bnverify import target as targets
from bnverify.case import Case, Domain
from bnverify.lazy import jax
from bnverify.pytree import stack, take
from bnverify.stacks import stacked_cases
from bnverify.unusable import first_line
from bnverify.upgrade import draws, leaves, running
from bnverify.upgrade.rounding_noise import Noise, named_noise

if TYPE_CHECKING:
    from bnverify.subject import State, Subject
    from bnverify.upgrade.recorded import Recorded

ROWS = (2, 5, 32)
DIVISIBLE_ROWS = (24, 48, 96)  # for a step that splits its batch
FEATURES = (1, 3, 8)
STEPS = 3
CASES = 12
BUDGET = 24 * 2**20  # bytes of values in a recording; a large model has fewer cases
FLAGS = (
    "jax_enable_x64",
    "jax_threefry_partitionable",
    "jax_default_prng_impl",
    "jax_default_matmul_precision",
    "jax_numpy_dtype_promotion",
)
_STREAM = "jax_threefry_partitionable"
_INFO = ("loss", "grads")


class _Failed(Exception):
    """One of the subject's functions raised; the recording says which and what."""

    def __init__(self, function: str, error: BaseException) -> None:
        super().__init__(function)
        self.function = function
        self.message = first_line(error) + targets.user_line(error)


class Recorder:
    """A recording in the making.

    Args:
        subject: what to record; None where it could not be loaded.
        seed: from which the cases are drawn.
        old: the recording to replay.
        costs: whether to measure times, which differ from run to run.
        laws: whether to judge the laws.
    """

    def __init__(
        self, subject: Subject, seed: int, old: Recorded | None, *, costs: bool, laws: bool
    ) -> None:
        self.subject = subject
        self.arrays: dict[str, Any] = {}
        self.trees: list[dict[str, Any]] = []
        self.shapes: list[list[int]] = []
        self.errors: dict[str, str] = {}
        self.notes: list[str] = []
        self.laws: dict[str, Any] = {}
        self.influence: dict[str, Any] = {}
        self.costs: dict[str, float] = {}
        self._seed, self._old = seed, old
        self._measure, self._judge = costs, laws
        self._init = running.Runner(subject.init)
        self._step = running.Runner(subject.step)
        self._evaluate = running.Runner(subject.evaluate)
        self._step_noise, self._eval_noise = Noise(subject.step), Noise(subject.evaluate)
        self.cases, self.steps = CASES, STEPS

    def make(self) -> None:
        """Record everything; what the subject raises is kept in ``errors``."""
        try:
            for index, case in enumerate(self._cases()):
                self._record(index, case)
        except _Failed as failure:
            self.errors[failure.function] = failure.message
            return
        self._last()

    def _cases(self) -> list[Case]:
        """Return the cases, stacked, of each shape; of a replay, the old ones."""
        if self._old is not None:
            self.cases, self.steps = self._old.manifest["cases"], self._old.manifest["steps"]
            recorded_cases = (
                self._old.under(f"shape{i}/case") for i in range(len(self._old.manifest["shapes"]))
            )
            return [Case(c["seed"], c["x"], c["y"], c["lr"]) for c in recorded_cases]
        shapes = self._choose_shapes()
        rng = np.random.default_rng(self._seed)
        return [stacked_cases(rng, shape, self.cases, Domain()) for shape in shapes]

    def _choose_shapes(self) -> list[tuple[int, int]]:
        """Return the shapes to record, and settle how many cases fit in the budget."""
        own = self.subject.features
        widths = tuple(own[min(i, len(own) - 1)] for i in range(3)) if own else FEATURES
        shapes = list(zip(ROWS, widths))  # noqa: B905 - strict is of Python 3.10
        try:
            self._try(shapes[0])
        except _Failed as failure:
            divisible = list(zip(DIVISIBLE_ROWS, widths))  # noqa: B905 - as above
            try:
                self._try(divisible[0])
            except _Failed:
                raise failure from None
            self.notes.append(f"batches of {DIVISIBLE_ROWS}: of {ROWS[0]} rows, {failure.message}")
            shapes = divisible
        state = self._try(shapes[-1])
        a_step = 5 * sum(leaf.nbytes for leaf in jax.tree_util.tree_leaves(state))
        fits = BUDGET // max(1, a_step * len(shapes))
        if fits < CASES * STEPS:
            self.steps = max(1, min(STEPS, fits // 2))
            self.cases = max(1, fits // self.steps)
            self.notes.append(f"a large state: {self.cases} cases of {self.steps} steps a shape")
        return shapes

    def _try(self, shape: tuple[int, int]) -> State:
        x, y = np.zeros(shape, np.float32), np.zeros(shape[:1], np.float32)
        state: State = self._call("init", np.int32(0), x)
        self._call("step", state, x, y, np.float32(0.5))
        return state

    def _call(self, name: str, *args: Any) -> Any:
        runner = {"init": self._init, "step": self._step, "evaluate": self._evaluate}[name]
        try:
            return runner(*args)
        except Exception as error:  # whatever a user's code raises
            raise _Failed(name, error) from error

    def _each(self, name: str, argument_lists: list[tuple[Any, ...]]) -> Any:
        return stack([self._call(name, *args) for args in argument_lists])

    def _keep(self, home: str, values: dict[str, Any]) -> None:
        self.arrays.update({f"{home}/{name}": value for name, value in values.items()})

    def _record(self, index: int, case: Case) -> None:
        """Record all the cases of one shape."""
        home = f"shape{index}"
        self._keep(f"{home}/case", {"seed": case.seed, "x": case.x, "y": case.y, "lr": case.lr})
        init = self._each("init", [(seed, x) for seed, x in zip(case.seed, case.x)])  # noqa: B905
        self._keep(f"{home}/init", leaves.named(init))
        one = take(init, 0)
        trees = {"state": leaves.described(one, "")}
        before = init
        for step in range(self.steps):
            if self._old is not None:
                try:
                    template = jax.tree_util.tree_map(
                        lambda leaf: leaf[None].repeat(self.cases, 0), one
                    )
                    before, alike = leaves.fill(template, self._old.before(index, step))
                except leaves.UnlikeError as error:
                    self.notes.append(f"not replayed: {error}")
                    break
                if not alike and index == step == 0:
                    self.notes.append("paths of the state changed; leaves were matched in order")
            after = self._record_step(f"{home}/step{step}", before, case, trees)
            if leaves.described(take(after, 0), "") != trees["state"]:
                self.steps = min(self.steps, step + 1)  # the laws of structure say so
                break
            before = after
        self.trees.append(trees)
        self.shapes.append(list(case.shape))

    def _record_step(self, home: str, before: Any, case: Case, trees: dict[str, Any]) -> Any:
        """Record one step from the states ``before``, and evaluation after it; return the states."""
        batch = [(case.x[i], case.y[i], case.lr[i]) for i in range(self.cases)]
        states = [take(before, i) for i in range(self.cases)]
        after, info = self._each("step", [(s, *b) for s, b in zip(states, batch)])  # noqa: B905
        # Evaluation starts from the recorded states too: its own changes alone show in it.
        given = after if self._old is None else self._recorded_after(home, after)
        finals = [take(given, i) for i in range(self.cases)]
        eval_loss = self._each("evaluate", [(s, x, y) for s, (x, y, _) in zip(finals, batch)])  # noqa: B905
        noisy = self._step_noise(before, case.x, case.y, case.lr)
        after_noise, info_noise = (None, None) if noisy is None else noisy
        parts = [("", after, after_noise)]
        parts += [
            (name, getattr(info, name), info_noise and getattr(info_noise, name)) for name in _INFO
        ]
        parts.append(("eval_loss", eval_loss, self._eval_noise(given, case.x, case.y)))
        for name, values, noise in parts:
            if values is not None:
                self._keep(f"{home}/value", leaves.named(values, name))
                self._keep(f"{home}/noise", named_noise(noise, name))
                trees.setdefault(name or "after", leaves.described(take(values, 0), name))
        return after

    def _recorded_after(self, home: str, after: Any) -> Any:
        assert self._old is not None
        index = int(home[len("shape") : home.index("/")])
        values = self._old.under(f"{home}/value")
        paths = self._old.leaves(index, "after")
        try:
            return leaves.fill(after, {path: values[path] for path in paths})[0]
        except (leaves.UnlikeError, KeyError):
            return after  # told of as a structure that changed

    def _last(self) -> None:
        """Record what speaks of the subject as a whole: draws, the old stream, laws, costs."""
        rows, features = self.shapes[min(1, len(self.shapes) - 1)]
        x = np.zeros((rows, features), np.float32)
        if self.cases == CASES:  # not for a large state
            self._keep("draws", draws.summaries(self._init, x))
        self._same_stream()
        for name, runner in (
            ("init", self._init),
            ("step", self._step),
            ("evaluate", self._evaluate),
        ):
            if runner.eager:
                self.notes.append(f"{name} run without jit: {runner.eager}")
        for name, noise in (("step", self._step_noise), ("evaluate", self._eval_noise)):
            if noise.unread:
                self.notes.append(f"rounding of {name} not read: {noise.unread}")
        zeros = np.zeros((rows,), np.float32)
        given = (self._init(np.int32(0), x), x, zeros, np.float32(0.5))
        self.costs = running.size(self.subject.step, *given)
        if self._measure:
            self.costs.update(running.times(self.subject.step, *given))
        if self._judge:
            from bnverify.upgrade.recorded_laws import verdicts

            try:
                found = verdicts(self.subject, (rows, features), self._seed)
                self.laws, self.influence = found
            except Exception as error:  # noqa: BLE001 - an old release; recordings do without
                self.notes.append(f"laws not judged: {first_line(error)}")

    def _same_stream(self) -> None:
        """Record what ``init`` makes under the old recording's way of drawing random bits."""
        if self._old is None:
            return
        now, then = flags().get(_STREAM), self._old.manifest["flags"].get(_STREAM)
        if now == then or not isinstance(then, bool):
            return
        jax.config.update(_STREAM, then)
        try:
            init = running.Runner(self.subject.init)
            for index in range(len(self.shapes)):
                case = self._old.under(f"shape{index}/case")
                states = init.each((case["seed"][i], case["x"][i]) for i in range(self.cases))
                self._keep(f"shape{index}/same_stream", leaves.named(states))
        finally:
            jax.config.update(_STREAM, now)


def flags() -> dict[str, Any]:
    """Return the settings of jax that decide what a step computes."""
    found = {}
    for name in FLAGS:
        value = getattr(jax.config, name, None)
        found[name] = value if isinstance(value, (bool, int, str)) else None
    return found
