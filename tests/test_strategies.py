"""The strategies: all they draw is valid, the hard cases are reached, failures shrink small."""

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, find, given, settings
from hypothesis import strategies as st
from hypothesis.errors import InvalidArgument

from bnverify import shapes, strategies
from bnverify.model import Case, Domain
from bnverify.stacks import KINDS, stacked_cases

DOMAIN = Domain()
SMALL = Domain(max_rows=3, max_features=2, max_abs_x=0.7, max_abs_y=0.1, max_lr=0.3, max_warmup=0)
DOMAINS = pytest.mark.parametrize("domain", [DOMAIN, SMALL], ids=["default", "small"])

# The same search on every run: whether a hard case is found must not depend on luck.
SEARCH = settings(
    database=None,
    derandomize=True,
    deadline=None,  # nothing is measured here
    max_examples=3000,
    suppress_health_check=list(HealthCheck),  # a hard case is rare by nature
)


def minimal(strategy: st.SearchStrategy[Any], condition: Callable[[Any], bool]) -> Any:
    """Return the smallest value Hypothesis finds that meets ``condition``."""
    return find(strategy, condition, settings=SEARCH)


def reached(strategy: st.SearchStrategy[Any], condition: Callable[[Any], bool]) -> Any:
    """Return the first value Hypothesis draws that meets ``condition``."""
    return find(strategy, condition, settings=settings(SEARCH, phases=[Phase.generate]))


# All they draw is valid.


@given(data=st.data())
@DOMAINS
def test_cases_are_valid_and_within_the_domain(data: st.DataObject, domain: Domain) -> None:
    """Each is what Case.of accepts, and the domain claims it."""
    case = data.draw(strategies.cases(domain=domain))
    assert domain.contains(case)
    again = Case.of(*case)
    for ours, theirs in zip(case, again, strict=True):
        np.testing.assert_array_equal(ours, theirs)
        assert np.asarray(ours).dtype == np.asarray(theirs).dtype


@given(data=st.data())
@pytest.mark.parametrize("shape", [(1, 1), (2, 3), (20, 7)])
def test_batches_have_the_shape_asked_for(data: st.DataObject, shape: tuple[int, int]) -> None:
    """A shape may be given, small or large, and the domain still bounds the values."""
    x = data.draw(strategies.batches(shape))
    assert x.shape == shape
    assert x.dtype == np.float32
    assert np.max(np.abs(x)) <= DOMAIN.max_abs_x


@given(x=strategies.batches(st.sampled_from([(1, 2), (5, 4)])))
def test_batches_take_a_strategy_for_the_shape(x: Any) -> None:
    """Strategies compose: the shape may be drawn too."""
    assert x.shape in {(1, 2), (5, 4)}


@given(data=st.data())
@pytest.mark.parametrize("rows", [1, 3, 40])
def test_targets_have_one_value_a_row(data: st.DataObject, rows: int) -> None:
    """They are (N,) float32, bounded by the domain."""
    y = data.draw(strategies.targets(rows, domain=SMALL))
    assert y.shape == (rows,)
    assert y.dtype == np.float32
    assert np.max(np.abs(y)) <= SMALL.max_abs_y


@given(data=st.data())
@pytest.mark.parametrize("bounds", [(0.0, 1.0), (0.0, 0.0), (1e-3, 0.1), (0.5, 0.5), (2.0, 1e6)])
def test_learning_rates_keep_their_bounds(data: st.DataObject, bounds: tuple[float, float]) -> None:
    """They lie between the bounds, and float32 holds them."""
    low, high = bounds
    rate = data.draw(strategies.learning_rates(min_value=low, max_value=high))
    assert low <= rate <= high
    assert float(np.float32(rate)) == rate


@given(case=strategies.cases(shape=(2, 2), seed=st.just(7), lr=st.just(0.5), warmup=st.just(3)))
def test_every_part_of_a_case_can_be_chosen(case: Case) -> None:
    """What is given is used, and the rest is still drawn."""
    assert case.shape == (2, 2)
    assert (case.seed, case.lr, case.warmup) == (7, 0.5, 3)


@DOMAINS
@pytest.mark.parametrize("shape", [(1, 1), (2, 2), (9, 4)])
def test_stacked_cases_are_valid_and_within_the_domain(
    domain: Domain, shape: tuple[int, int]
) -> None:
    """Each slice of a stack is a case as good as one drawn alone."""
    stack = stacked_cases(np.random.default_rng(0), shape, 500, domain)
    unbounded_shape = Domain(
        max_abs_x=domain.max_abs_x,
        max_abs_y=domain.max_abs_y,
        max_lr=domain.max_lr,
        max_warmup=domain.max_warmup,
    )
    for i in range(500):
        case = Case(*(part[i] for part in stack))
        assert unbounded_shape.contains(case)
        for ours, theirs in zip(case, Case.of(*case), strict=True):
            np.testing.assert_array_equal(ours, theirs)
            assert np.asarray(ours).dtype == np.asarray(theirs).dtype


def test_the_same_generator_gives_the_same_stack() -> None:
    """A seed is enough to have a volume run again."""
    first, second = (stacked_cases(np.random.default_rng(3), (5, 2), 64) for _ in range(2))
    for ours, theirs in zip(first, second, strict=True):
        np.testing.assert_array_equal(ours, theirs)


# The hard cases are reached.


def varies(case: Case) -> bool:
    return bool(np.ptp(case.x) > 0)


def spread_below_offset(case: Case) -> bool:
    x = np.asarray(case.x, np.float64)
    spread, centre = np.std(x, axis=0), np.abs(np.mean(x, axis=0))
    return bool(np.any((spread > 0) & (centre > 1e3 * spread)))


def constant_column_beside_another(case: Case) -> bool:
    still = np.ptp(case.x, axis=0) == 0
    return bool(still.any() and not still.all())


HARD_VALUES: dict[str, Callable[[Case], bool]] = {
    "all zeros": lambda c: not np.any(c.x),
    "a constant that is not zero": lambda c: len(c.x) > 1 and not varies(c) and bool(np.any(c.x)),
    "equal rows among others": lambda c: 1 < len(np.unique(c.x, axis=0)) < len(c.x),
    "a constant column": constant_column_beside_another,
    "a subnormal": lambda c: bool(np.any((c.x != 0) & (np.abs(c.x) < 1.17e-38))),
    "both signs": lambda c: np.min(c.x) < 0 < np.max(c.x),
    "an offset that hides the spread": spread_below_offset,
    "near the upper limit": lambda c: bool(np.max(np.abs(c.x)) > DOMAIN.max_abs_x / 10),
    "tiny": lambda c: bool(0 < np.max(np.abs(c.x)) < 1e-7),
    "many decades": lambda c: varies(c) and bool(np.ptp(np.log10(np.abs(c.x[c.x != 0]))) > 8),
    "targets zero": lambda c: not np.any(c.y),
    "targets large": lambda c: bool(np.max(np.abs(c.y)) > DOMAIN.max_abs_y / 10),
    "lr 0": lambda c: c.lr == 0,
    "lr at its limit": lambda c: c.lr == np.float32(DOMAIN.max_lr),
    "lr small": lambda c: bool(0 < c.lr < 1e-5),
    "seed 0": lambda c: c.seed == 0,
    "seed negative": lambda c: bool(c.seed < 0),
    "no warm-up": lambda c: c.warmup == 0,
    "most warm-up": lambda c: c.warmup == DOMAIN.max_warmup,
}


@pytest.mark.parametrize("name", HARD_VALUES)
def test_hard_cases_are_drawn(name: str) -> None:
    """Hypothesis comes upon each of them."""
    assert strategies.DEFAULT_DOMAIN.contains(reached(strategies.cases(), HARD_VALUES[name]))


@pytest.mark.parametrize("name", HARD_VALUES)
def test_hard_cases_are_stacked(name: str) -> None:
    """A stack of the size of one block holds each of them."""
    stack = stacked_cases(np.random.default_rng(0), (6, 2), 512)
    assert any(HARD_VALUES[name](Case(*(part[i] for part in stack))) for i in range(512))


def test_magnitudes_span_more_than_twelve_decades() -> None:
    """Both ways of drawing reach from subnormals to the limit, with no decade left out."""
    stack = stacked_cases(np.random.default_rng(0), (6, 2), 4096)
    stacked = {int(e) for e in np.floor(np.log10(np.abs(stack.x[stack.x != 0])))}
    drawn: set[int] = set()

    @settings(SEARCH, max_examples=800)
    @given(x=strategies.batches())
    def collect(x: Any) -> None:
        drawn.update(int(e) for e in np.floor(np.log10(np.abs(x[x != 0]))))

    collect()
    for reached in (stacked, drawn):
        assert set(range(-12, 4)) <= reached
        assert min(reached) < -38


@pytest.mark.parametrize("kind", KINDS)
def test_large_batches_come_in_every_kind(kind: str) -> None:
    """A batch too large to be drawn one by one has the same hard cases as a small one."""
    conditions = {
        "whole": lambda x: len(np.unique(x)) in {2, 3, 4, 5} and bool(np.any(x)),
        "normal": lambda x: len(np.unique(x)) == x.size,
        "zeros": lambda x: not np.any(x),
        "constant": lambda x: np.ptp(x) == 0 and bool(np.any(x)),
        "tied_rows": lambda x: len(np.unique(x, axis=0)) == 2 and np.all(np.ptp(x, axis=0) > 0),
        "constant_columns": lambda x: 0 < np.count_nonzero(np.ptp(x, axis=0) == 0) < x.shape[1],
        "outlier": lambda x: np.count_nonzero(np.any(x != 0, axis=1)) == 1,
        "offset": lambda x: (
            bool(np.any(np.abs(np.mean(x)) > 1e4 * np.std(x, axis=0))) and bool(np.ptp(x) > 0)
        ),
        "decades": lambda x: bool(np.all(x)) and np.ptp(np.log10(np.abs(x))) > 12,
        "subnormal": lambda x: 0 < np.max(np.abs(x)) < 1.17e-38,
    }
    assert reached(strategies.batches((12, 4)), conditions[kind]).shape == (12, 4)


# Failures shrink small.


FAULTS: dict[str, Callable[[Case], bool]] = {
    "any input": lambda c: True,
    "a large x": lambda c: bool(np.max(np.abs(c.x)) >= 100),
    "rows that differ": varies,
    "a large x with a large y": lambda c: bool(np.ptp(c.x[:, 0]) > 100 and np.max(c.y) > 10),
    "a cancelled variance": spread_below_offset,
    "columns that differ": lambda c: c.shape[1] > 1 and not np.array_equal(c.x[:, 0], c.x[:, 1]),
    "a step that moves": lambda c: bool(c.lr > 0 and np.var(c.y) > 0.1),
}


LONG_SEARCHES = ("a step that moves", "a large x with a large y", "a cancelled variance")


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(name, marks=pytest.mark.nightly if name in LONG_SEARCHES else ())
        for name in FAULTS
    ],
)
def test_failures_shrink_to_at_most_two_rows_and_features(fault: str) -> None:
    """Whatever shape a failure is found in, a tiny one of the pool is what is reported."""
    assert minimal(strategies.cases(), FAULTS[fault]).shape in shapes.TINY_SHAPES


def test_what_does_not_matter_shrinks_to_zero() -> None:
    """The smallest case with a difference between rows is a difference and nothing else."""
    case = minimal(strategies.cases(), varies)
    assert (case.seed, case.lr, case.warmup) == (0, 0, 0)
    assert not np.any(case.y)
    assert np.max(np.abs(case.x)) <= 2


def test_shapes_shrink_to_one_by_one() -> None:
    """The simplest shape of all is the first in every pool."""
    assert minimal(strategies.shapes(), lambda shape: True) == (1, 1)


# Shapes come from a pool.


@pytest.mark.parametrize("seed", range(20))
def test_every_pool_has_the_tiny_shapes_first_and_keeps_the_domain(seed: int) -> None:
    """A failure can always shrink to them, and no shape is out of bounds."""
    pool = shapes.shape_pool(seed)
    assert pool[: len(shapes.TINY_SHAPES)] == shapes.TINY_SHAPES
    assert len(set(pool)) == shapes.POOL_SIZE
    assert all(rows <= DOMAIN.max_rows and width <= DOMAIN.max_features for rows, width in pool)
    assert any(rows > 2 and rows % 2 for rows, _ in pool)


def test_pools_differ_from_run_to_run_and_together_cover_the_domain() -> None:
    """Few shapes a run, many in the end."""
    pools = [shapes.shape_pool(seed) for seed in range(200)]
    assert len(set(pools)) == 200
    assert pools[0] == shapes.shape_pool(0)
    rows, widths = zip(*(shape for pool in pools for shape in pool), strict=True)
    assert set(widths) == set(range(1, DOMAIN.max_features + 1))
    assert len(set(rows)) > DOMAIN.max_rows * 0.9
    assert max(rows) == DOMAIN.max_rows
    for pool in pools:  # each run sees both kinds of rank deficiency
        assert any(rows > width for rows, width in pool)
    assert sum(any(rows < width for rows, width in pool) for pool in pools) > 100


def test_a_pool_keeps_to_the_features_a_subject_accepts() -> None:
    """A model for flattened images has one D only."""
    pool = shapes.shape_pool(0, features=(784,))
    assert {width for _, width in pool} == {784}
    assert pool[:2] == ((1, 784), (2, 784))


@pytest.mark.parametrize("multiple", [2, 5, 24])
def test_a_pool_keeps_to_the_batches_that_a_step_can_split(multiple: int) -> None:
    """From the smallest of them to the largest of the domain, an odd number of parts among them."""
    pool = shapes.shape_pool(0, domain=Domain(multiple=multiple))
    assert {rows % multiple for rows, _ in pool} == {0}
    assert pool[0] == (multiple, 1)
    assert max(rows for rows, _ in pool) == 64 // multiple * multiple
    assert any(rows // multiple % 2 for rows, _ in pool)


def test_a_small_domain_has_a_small_pool() -> None:
    """Where there are not enough shapes the pool is what there is."""
    pool = shapes.shape_pool(0, domain=Domain(max_rows=1, max_features=2))
    assert set(pool) == {(1, 1), (1, 2)}


def test_a_run_draws_from_one_pool_only() -> None:
    """However many cases are drawn, few programs compile."""
    seen = set()

    @settings(SEARCH, max_examples=300)
    @given(shape=strategies.shapes())
    def collect(shape: tuple[int, int]) -> None:
        seen.add(shape)

    collect()
    assert seen == set(shapes.shape_pool(0))


def test_the_workers_of_one_run_share_a_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    """What one worker of pytest-xdist compiles the other finds in the cache."""
    monkeypatch.setenv("PYTEST_XDIST_TESTRUNUID", "one run")
    run_seed = strategies._random_run_seed.__wrapped__
    first = run_seed()
    assert run_seed() == first
    monkeypatch.setenv("PYTEST_XDIST_TESTRUNUID", "another run")
    assert run_seed() != first


def test_without_xdist_each_run_has_a_pool_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing fixes it but the derandomised profiles."""
    monkeypatch.delenv("PYTEST_XDIST_TESTRUNUID", raising=False)
    run_seed = strategies._random_run_seed.__wrapped__
    assert len({run_seed() for _ in range(8)}) > 1


# Optimizers.


@pytest.mark.parametrize("optimizer", strategies.OPTIMIZERS, ids=repr)
def test_optimizers_know_whether_they_have_a_state(optimizer: strategies.Optimizer) -> None:
    """Those called stateful have leaves where a statistic could hide; the others none."""
    import jax

    state = optimizer(0.1).init({"w": np.zeros(2, np.float32)})
    leaves = [leaf for leaf in jax.tree_util.tree_leaves(state) if np.ndim(leaf) == 1]
    assert bool(leaves) == optimizer.stateful


@given(optimizer=strategies.optimizers(stateful=True))
def test_optimizers_can_be_restricted(optimizer: strategies.Optimizer) -> None:
    """Only those with a state say anything about what it excludes."""
    assert optimizer.stateful


def test_an_optimizer_shows_the_call_that_makes_it() -> None:
    """A failing example can be pasted."""
    chosen = minimal(strategies.optimizers(), lambda o: "momentum" in o.options)
    assert repr(chosen) == "optax.sgd(lr, momentum=0.9)"
    assert repr(minimal(strategies.optimizers(), lambda o: True)) == "optax.sgd(lr)"


# What cannot be drawn is refused, with the argument, its value and the limit.

REFUSED: dict[str, Callable[[], Any]] = {
    "min_value must be finite and at least 0, got -1.0": lambda: strategies.learning_rates(
        min_value=-1.0
    ),
    "max_value must be finite and at least 0, got inf": lambda: strategies.learning_rates(
        max_value=float("inf")
    ),
    "min_value must be at most max_value=0.1, got 0.5": lambda: strategies.learning_rates(
        min_value=0.5, max_value=0.1
    ),
    "no float32 lies between min_value=0.1 and 0.1": lambda: strategies.learning_rates(
        min_value=0.1, max_value=0.1
    ),
    "size must be at least 3, got 1": lambda: strategies.shapes(size=1),
    "features must be one or more sizes of at least 1, got ()": lambda: strategies.shapes(
        features=()
    ),
    "shape must be (N, D) with N and D at least 1, got (0, 2)": lambda: strategies.cases(
        shape=(0, 2)
    ),
    "rows must be at least 1, got 0": lambda: strategies.targets(0),
    "domain must be a bnverify.Domain, got 64": lambda: strategies.cases(domain=64),
    "domain.multiple must be from 1 to 64, got 65": lambda: strategies.cases(
        domain=Domain(multiple=65)
    ),
    "domain.max_rows must be at least 1, got 0": lambda: strategies.cases(
        domain=Domain(max_rows=0)
    ),
    "domain.max_features must be at least 1, got 0": lambda: strategies.batches(
        domain=Domain(max_features=0)
    ),
    "domain.max_abs_x must be finite and above 0, got inf": lambda: strategies.batches(
        domain=Domain(max_abs_x=float("inf"))
    ),
    "domain.max_abs_y must be finite and above 0, got 0.0": lambda: strategies.targets(
        1, domain=Domain(max_abs_y=0.0)
    ),
    "domain.max_warmup must be at least 0, got -1": lambda: strategies.cases(
        domain=Domain(max_warmup=-1)
    ),
}


@pytest.mark.parametrize("message", REFUSED)
def test_impossible_arguments_are_refused(message: str) -> None:
    """At the call, not at the first draw."""
    with pytest.raises(InvalidArgument) as refused:
        REFUSED[message]()
    assert str(refused.value) == message


@pytest.mark.parametrize(
    ("shape", "count", "message"),
    [
        ((0, 1), 1, "shape must be (N, D) with N and D at least 1, got (0, 1)"),
        ((1, 1), 0, "count must be at least 1, got 0"),
    ],
)
def test_impossible_stacks_are_refused(shape: Any, count: int, message: str) -> None:
    """With the same words, but no need of Hypothesis to catch them."""
    with pytest.raises(ValueError, match=r"^(shape|count) must") as refused:
        stacked_cases(np.random.default_rng(0), shape, count)
    assert str(refused.value) == message


def test_no_strategy_draws_from_the_global_generators() -> None:
    """Drawing leaves random and numpy.random as they were: whoever seeds them can rely on it."""
    before = random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002 - it is watched
    shapes.shape_pool(5)
    stacked_cases(np.random.default_rng(0), (3, 2), 10)
    assert random.getstate() == before[0]
    np.testing.assert_array_equal(np.random.get_state()[1], before[1])  # noqa: NPY002 - as above
