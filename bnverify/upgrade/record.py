"""Record a training step: its cases, states, results, and the rounding noise of each.

    recording = record("steps.py:make")              # in the old environment
    replay = record("steps.py:make", old=recording)  # in the new one

Cases are drawn by NumPy from a seed, so they are the same everywhere. A recording starts each case
from the state that `init` makes and takes a few steps. A replay uses the cases *and the state
before every step* from the recording, so that a changed random stream does not look like a changed
step, and a difference in one step does not carry over to the next. It also records what its own
`init` makes from the same seeds.

To compare initial values as distributions, whatever the random stream, `SEEDS` seeds each give
three averages over each leaf h: of h, h^2 and h^4. These tell initialisers apart by mean, spread
and tails. The recording has their mean and variance over the seeds; `compare` tests two recordings
as two samples.
"""

from __future__ import annotations

import os
import platform
import time
from functools import partial
from importlib import metadata
from typing import TYPE_CHECKING, Any

import numpy as np

from bnverify import target as targets
from bnverify.compile_cache import machine
from bnverify.errors import UsageError, first_line
from bnverify.lazy import jax
from bnverify.model import Case, Domain
from bnverify.probe import subject_of
from bnverify.pytree import path_name, stack, take
from bnverify.stacks import stacked_cases
from bnverify.upgrade.recorded_laws import verdicts
from bnverify.upgrade.recording import CONTENT, Manifest, Recording, Tree, without_values
from bnverify.upgrade.rounding_noise import Noise

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from bnverify.model import State, Subject

PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")
ROWS = (2, 5, 32)
DIVISIBLE_ROWS = (24, 48, 96)  # for steps that split the batch
FEATURES = (1, 3, 8)
STEPS = 3
CASES = 12
SEEDS = 512  # for the distribution of initial values
POWERS = (1, 2, 4)
BUDGET = 24 * 2**20  # bytes of values in a recording; large models get fewer cases
TIMED_CALLS = 40
FLAGS = (
    "jax_enable_x64",
    "jax_threefry_partitionable",
    "jax_default_prng_impl",
    "jax_default_matmul_precision",
    "jax_numpy_dtype_promotion",
)
_STREAM = "jax_threefry_partitionable"
_INFO = ("loss", "grads")


def record(
    target: str,
    *,
    seed: int = 0,
    old: Recording | None = None,
    costs: bool = False,
    laws: bool = True,
) -> Recording:
    """Record a target, or replay a recording of it.

    Args:
        target: as on the command line; see `bnverify.target.load`.
        seed: the seed of the cases; a replay uses that of `old`.
        old: the recording to replay. Errors of a replay are recorded in it.
        costs: whether to measure times, which vary from run to run.
        laws: whether to judge the laws.

    Raises:
        UsageError: the target cannot be loaded or does not run.
    """
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # recordings are of the CPU backend
    name = target
    made = _Recorder(seed if old is None else old.manifest["seed"], old)
    with targets.importable(targets.directory(target)):
        try:
            made.subject = subject_of(targets.load(target))
        except UsageError as error:
            if old is None:
                raise
            name, made.errors["target"] = old.manifest["subject"], str(error)
        else:
            name = made.subject.name
            made.run(costs=costs, laws=laws)
    if made.errors and old is None:
        function, message = next(iter(made.errors.items()))
        raise UsageError(f"{target}: {function} raises {message}")
    manifest: Manifest = {
        "content": CONTENT,
        "bnverify": versions("bnverify")["bnverify"],
        "target": target,
        "subject": name,
        "seed": made.seed,
        "cases": made.cases,
        "steps": made.steps,
        "shapes": made.shapes,
        "trees": made.trees,
        "dtypes": {},
        "versions": versions(*PACKAGES),
        "python": platform.python_version(),
        "machine": machine(),
        "flags": flags(),
        "errors": made.errors,
        "laws": made.laws,
        "influence": made.influence,
        "costs": made.costs,
        "notes": made.notes,
        "replays": old.digest if old else "",
    }
    return (
        Recording(without_values(manifest), {}) if made.errors else Recording(manifest, made.arrays)
    )


def versions(*packages: str) -> dict[str, str]:
    """Return package -> installed version, or "unknown"."""
    found = {}
    for name in packages:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "unknown"
    return found


def flags() -> dict[str, bool | int | str | None]:
    """Return the jax settings that affect what a step computes."""
    found = {name: getattr(jax.config, name, None) for name in FLAGS}
    return {name: v if isinstance(v, (bool, int, str)) else None for name, v in found.items()}


def multiples(rows: Sequence[int], of: int) -> list[int]:
    """Return the multiples of a number that are not below some increasing ones, each only once."""
    found: list[int] = []
    for each in rows:
        found.append(max(-(-each // of) * of, *(last + of for last in found[-1:]), of))
    return found


class _CallError(Exception):
    """One of the subject's functions raised an exception."""

    def __init__(self, function: str, error: BaseException) -> None:
        super().__init__(function)
        self.function = function
        self.message = first_line(error) + targets.user_line(error)


class _Recorder:
    """A recording while it is made.

    Args:
        seed: the seed of the cases.
        old: the recording to replay, if any.
    """

    subject: Subject | None = None

    def __init__(self, seed: int, old: Recording | None) -> None:
        self.seed, self._old = seed, old
        self.cases, self.steps = CASES, STEPS
        self.arrays: dict[str, Any] = {}
        self.trees: list[dict[str, Tree]] = []
        self.shapes: list[tuple[int, int]] = []
        self.errors: dict[str, str] = {}
        self.notes: list[str] = []
        self.laws: Any = {}
        self.influence: Any = {}
        self.costs: dict[str, float] = {}
        self._functions: dict[str, _Compiled] = {}
        self._noise: dict[str, Noise] = {}

    def run(self, *, costs: bool, laws: bool) -> None:
        """Record everything; errors of the subject's functions go into `errors`."""
        assert self.subject is not None
        for name in ("init", "step", "evaluate"):
            function = getattr(self.subject, name)
            self._functions[name], self._noise[name] = _Compiled(function), Noise(function)
        try:
            for index, case in enumerate(self._cases()):
                self._record(index, case)
        except _CallError as failure:
            self.errors[failure.function] = failure.message
        else:
            self._record_subject(costs=costs, laws=laws)

    def _cases(self) -> list[Case]:
        """Return the stacked cases of each shape; in a replay, the recorded ones."""
        if self._old is not None:
            self.cases, self.steps = self._old.manifest["cases"], self._old.manifest["steps"]
            recorded = (
                self._old.under(f"shape{i}/case") for i in range(len(self._old.manifest["shapes"]))
            )
            return [Case(c["seed"], c["x"], c["y"], c["lr"]) for c in recorded]
        shapes = self._choose_shapes()
        rng = np.random.default_rng(self.seed)
        return [stacked_cases(rng, shape, self.cases, Domain()) for shape in shapes]

    def _choose_shapes(self) -> list[tuple[int, int]]:
        """Return the shapes to record; reduce the number of cases if the state is large."""
        assert self.subject is not None
        own = self.subject.features
        widths = tuple(own[min(i, len(own) - 1)] for i in range(3)) if own else FEATURES
        declared = self.subject.rows
        shapes = list(zip(multiples(ROWS, declared or 1), widths, strict=False))
        try:
            self._try(shapes[0])
        except _CallError as failure:
            if declared is not None:
                raise
            divisible = list(zip(DIVISIBLE_ROWS, widths, strict=True))
            try:
                self._try(divisible[0])
            except _CallError:
                raise failure from None
            rows = shapes[0][0]
            self.notes.append(
                f"batches of {DIVISIBLE_ROWS} rows, because with {rows}: {failure.message}"
            )
            shapes = divisible
        state = self._try(shapes[-1])
        a_step = 5 * sum(leaf.nbytes for leaf in jax.tree_util.tree_leaves(state))
        fits = BUDGET // max(1, a_step * len(shapes))
        if fits < CASES * STEPS:
            self.steps = max(1, min(STEPS, fits // 2))
            self.cases = max(1, fits // self.steps)
            self.notes.append(
                f"large state: only {self.cases} cases of {self.steps} steps per shape"
            )
        return shapes

    def _try(self, shape: tuple[int, int]) -> State:
        x, y = np.zeros(shape, np.float32), np.zeros(shape[:1], np.float32)
        state: State = self._call("init", np.int32(0), x)
        self._call("step", state, x, y, np.float32(0.5))
        return state

    def _call(self, name: str, *args: Any) -> Any:
        try:
            return self._functions[name](*args)
        except Exception as error:  # user code may raise anything
            raise _CallError(name, error) from error

    def _each(self, name: str, *stacked: Any) -> Any:
        """Return a function's results for all cases, stacked."""
        cases = range(self.cases)
        return stack([self._call(name, *(take(part, i) for part in stacked)) for i in cases])

    def _keep(self, home: str, values: Mapping[str, Any]) -> None:
        self.arrays.update({f"{home}/{name}": value for name, value in values.items()})

    def _record(self, index: int, case: Case) -> None:
        """Record all cases of one shape."""
        home = f"shape{index}"
        self._keep(f"{home}/case", {"seed": case.seed, "x": case.x, "y": case.y, "lr": case.lr})
        before = self._each("init", case.seed, case.x)
        self._keep(f"{home}/init", named(before))
        one = take(before, 0)
        trees = {"state": _described(one, "")}
        for step in range(self.steps):
            if self._old is not None:
                try:
                    before, same_paths = fill(before, self._old.before(index, step))
                except TreeMismatchError as error:
                    self.notes.append(f"not replayed: {error}")
                    break
                if not same_paths and index == step == 0:
                    self.notes.append("paths of the state changed; leaves were matched by position")
            after = self._record_step(index, step, before, case, trees)
            if _described(take(after, 0), "") != trees["state"]:
                self.steps = min(self.steps, step + 1)  # the structural laws report it
                break
            before = after
        self.trees.append(trees)
        self.shapes.append((case.shape[0], case.shape[1]))

    def _record_step(
        self, index: int, step: int, before: Any, case: Case, trees: dict[str, Tree]
    ) -> Any:
        """Record a step from `before` and the evaluation after it; return the new states."""
        home = f"shape{index}/step{step}"
        after, info = self._each("step", before, case.x, case.y, case.lr)
        # Evaluation also starts from the recorded states, so that only its own changes count.
        given = after if self._old is None else self._recorded_after(index, step, after)
        eval_loss = self._each("evaluate", given, case.x, case.y)
        read = self._noise["step"](before, case.x, case.y, case.lr)
        after_noise, info_noise = read or (None, None)
        parts = [("", after, after_noise)]
        parts += [
            (name, getattr(info, name), info_noise and getattr(info_noise, name)) for name in _INFO
        ]
        parts.append(("eval_loss", eval_loss, self._noise["evaluate"](given, case.x, case.y)))
        for name, values, noise in parts:
            if values is not None:
                self._keep(f"{home}/value", named(values, name))
                self._keep(f"{home}/noise", named(noise, name) if noise is not None else {})
                trees.setdefault(name or "after", _described(take(values, 0), name))
        return after

    def _recorded_after(self, index: int, step: int, after: Any) -> Any:
        assert self._old is not None
        values = self._old.under(f"shape{index}/step{step}/value")
        try:
            return fill(after, {path: values[path] for path in self._old.leaves(index, "after")})[0]
        except (TreeMismatchError, KeyError):
            return after  # reported as a structural change

    def _record_subject(self, *, costs: bool, laws: bool) -> None:
        """Record what is not about single cases: draws, the old random stream, laws, costs."""
        assert self.subject is not None
        rows, features = self.shapes[min(1, len(self.shapes) - 1)]
        x = np.zeros((rows, features), np.float32)
        if self.cases == CASES:  # too slow for a large state
            self._keep("draws", _draws(self._functions["init"], x))
        self._record_same_stream()
        for name, function in self._functions.items():
            if function.eager:
                self.notes.append(f"{name} was run without jit: {function.eager}")
        for name, noise in self._noise.items():
            if noise.unread:
                self.notes.append(f"rounding of {name} is unknown: {noise.unread}")
        zeros = np.zeros((rows,), np.float32)
        given = (self._functions["init"](np.int32(0), x), x, zeros, np.float32(0.5))
        self.costs = _costs(self.subject.step, given, times=costs)
        if laws:
            try:
                self.laws, self.influence = verdicts(self.subject, (rows, features), self.seed)
            except Exception as error:  # noqa: BLE001 - values can be compared without laws
                self.notes.append(f"laws not judged: {first_line(error)}")

    def _record_same_stream(self) -> None:
        """Record what `init` makes with the old recording's setting for random bits."""
        if self._old is None or self.subject is None:
            return
        now, then = flags()[_STREAM], self._old.manifest["flags"].get(_STREAM)
        if now == then or not isinstance(then, bool):
            return
        jax.config.update(_STREAM, then)
        usual = self._functions["init"]
        try:
            self._functions["init"] = _Compiled(self.subject.init)
            for index in range(len(self.shapes)):
                case = self._old.under(f"shape{index}/case")
                states = self._each("init", case["seed"], case["x"])
                self._keep(f"shape{index}/same_stream", named(states))
        finally:
            jax.config.update(_STREAM, now)
            self._functions["init"] = usual


def _draws(init: Callable[..., Any], x: Any) -> dict[str, Any]:
    """Return leaf -> (2, 3) float64: mean and variance of the three averages over the seeds.

    Args:
        init: (seed, x) -> State.
        x: (N, D); only its shape matters.
    """
    found: dict[str, list[list[float]]] = {}
    for seed in range(SEEDS):
        for path, leaf in named(init(np.int32(seed), x)).items():
            if leaf.dtype.kind in "fV" and leaf.size:  # V: bfloat16 and other ml_dtypes
                wide = np.asarray(leaf, np.float64)
                found.setdefault(path, []).append([float(np.mean(wide**p)) for p in POWERS])
    return {
        path: np.stack([np.mean(rows, axis=0), np.var(rows, axis=0, ddof=1)])
        for path, rows in found.items()
    }


# Calling the subject case by case, as a user would, and the costs of that.


class _Compiled:
    """A jitted function; called without jit if it does not trace.

    Attributes:
        eager: why it is not compiled; empty if it is.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self._jitted = jax.jit(partial(function))  # partial: its own entry in jax's cache
        self.eager = ""

    def __call__(self, *args: Any) -> Any:
        """Return the function's result as a pytree of NumPy arrays."""
        if self.eager:
            return _on_host(self._function(*args))
        try:
            return _on_host(self._jitted(*args))
        except Exception as error:  # noqa: BLE001 - user code may raise anything under jit
            # If it raises without jit too, report that error.
            result = self._function(*args)
            self.eager = first_line(error)
            return _on_host(result)


def _on_host(tree: Any) -> Any:
    return jax.tree_util.tree_map(np.asarray, tree)


def _costs(function: Callable[..., Any], args: tuple[Any, ...], *, times: bool) -> dict[str, float]:
    """Return the number of instructions of the compiled function and, if asked, times in seconds.

    `compile_time` is the time to compile, `run_time` that of the fastest call. Empty if the
    function does not compile.
    """
    started = time.perf_counter()
    try:
        program = jax.jit(partial(function)).lower(*args).compile()
        compiled = time.perf_counter() - started
        instructions = sum(" = " in line for line in program.as_text().splitlines())
        found = {"program_size": float(instructions)}
        if not times:
            return found
        jax.block_until_ready(program(*args))
    except Exception:  # noqa: BLE001 - costs are informational; errors are reported elsewhere
        return {}
    taken = []
    for _ in range(TIMED_CALLS):
        started = time.perf_counter()
        jax.block_until_ready(program(*args))
        taken.append(time.perf_counter() - started)
    return {**found, "compile_time": compiled, "run_time": min(taken)}


# Pytrees as named leaves, to rebuild a tree recorded in one environment in another.


class TreeMismatchError(ValueError):
    """A recorded tree does not fit the tree to fill; the message names the first mismatch."""


def named(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Return path -> leaf, in flattening order: `params/Dense_0/kernel`.

    Raises:
        TreeMismatchError: two leaves have the same path, such as those of keys 1 and "1".
    """
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    heads = [prefix] if prefix else []
    found = {"/".join([*heads, *filter(None, [path_name(path)])]): leaf for path, leaf in flat}
    if len(found) != len(flat):
        raise TreeMismatchError(f"two leaves of {prefix or 'a tree'} have the same path")
    return found


def containers(tree: Any) -> str:
    """Return the nesting of the tree's containers: `dict(FrozenDict(*, *))`.

    Unlike `str(treedef)` it does not depend on the jax release.
    """

    def describe(treedef: Any) -> str:
        node = treedef.node_data()
        if node is None:
            return "*" if treedef.num_leaves else "None"
        inner = ", ".join(describe(child) for child in treedef.children())
        return f"{node[0].__name__}({inner})"

    return describe(jax.tree_util.tree_structure(tree))


def _described(tree: Any, prefix: str) -> Tree:
    """Return the manifest's description of a tree."""
    leaves = [
        (path, str(np.dtype(leaf.dtype)), [int(size) for size in leaf.shape])
        for path, leaf in named(tree, prefix).items()
    ]
    return {"containers": containers(tree), "leaves": leaves}


def fill(tree: Any, values: Mapping[str, Any]) -> tuple[Any, bool]:
    """Return `tree` with other values in its leaves, and whether their paths agreed.

    If the paths differ but the shapes agree one by one, leaves are matched by position: a renamed
    path is reported, and does not hide other changes.

    Args:
        tree: gives the structure and the dtypes.
        values: path -> value, in flattening order.

    Raises:
        TreeMismatchError: the number of leaves or their shapes differ.
    """
    leaves, treedef = jax.tree_util.tree_flatten(tree)
    paths = list(named(tree))
    same_paths = set(paths) == set(values)
    chosen = [values[path] for path in paths] if same_paths else list(values.values())
    if len(chosen) != len(leaves):
        raise TreeMismatchError(f"{len(values)} leaves were recorded, now there are {len(leaves)}")
    for path, leaf, value in zip(paths, leaves, chosen, strict=True):
        if tuple(leaf.shape) != tuple(value.shape):
            raise TreeMismatchError(f"{path} had shape {value.shape}, now has {leaf.shape}")
    cast = [np.asarray(v).astype(leaf.dtype) for leaf, v in zip(leaves, chosen, strict=True)]
    return jax.tree_util.tree_unflatten(treedef, cast), same_paths
