"""Stacks are as large as the model allows, and what they seem to show is confirmed."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import numpy as np
import optax
import pytest

import bnverify
from bnverify import Case, reference, verify
from bnverify.checking.verify import Verifier
from bnverify.engine import budget
from bnverify.engine.budget import Budget
from bnverify.engine.examples import uncompiled
from bnverify.engine.noise import Known, Noise
from bnverify.engine.simplification import CLEAR
from bnverify.jaxpr.noise import ROWS
from bnverify.mutants import MUTANTS
from bnverify.profile import Profile
from bnverify.pytree import stack
from bnverify.reruns import other_inputs

LAW = "row_order_changes_nothing"


pytestmark = pytest.mark.once


@pytest.fixture
def shrunk(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that makes the noise smaller than it is, for the draws of some seeds."""
    read = Noise.__call__

    def shrink(*seeds: int) -> None:
        def call(self: Noise, *args: Any, **options: Any) -> Known:
            known = read(self, *args, **options)
            factor = 0.08 if self._seed in seeds else 1.0
            return known._replace(
                noise=jax.tree_util.tree_map(lambda leaf: np.asarray(leaf) * factor, known.noise)
            )

        monkeypatch.setattr(Noise, "__call__", call)

    return shrink


def test_other_draws_must_confirm_a_close_call(shrunk: Any) -> None:
    """A tolerance that is small by one seed's luck breaks no law: the report says what it saw."""
    shrunk(0)
    report = verify(reference.sgd(), "quick", select=[LAW])
    (evidence,) = report.results
    assert evidence.status == "held"
    assert evidence.reason.endswith("nothing confirms it")
    assert evidence.residual is None


def test_what_other_draws_confirm_is_violated(shrunk: Any) -> None:
    """The same residual stands where both readings show it, with a case of each judge's."""
    shrunk(0, 1)
    report = verify(reference.sgd(), "quick", select=[LAW])
    (evidence,) = report.results
    assert evidence.status == "violated"
    assert 1 < (evidence.residual or 0) < CLEAR
    assert evidence.counterexample


def test_a_check_after_another_says_what_a_fresh_one_says() -> None:
    """What is kept between checks is programs: nothing that was drawn or seen."""
    names = ["row_order_changes_nothing", "float_seeds_act_as_their_integer_part"]
    verifier = Verifier(reference.sgd(), "quick", select=[*names, "life"])
    first, _, again = (verifier.run(seed) for seed in (1, 2, 1))
    fresh = verify(reference.sgd(), "quick", select=[*names, "life"], seed=1)
    assert first.results == again.results == fresh.results
    assert first.cases == again.cases == fresh.cases


def test_what_must_flow_is_shown_by_a_case_that_can_be_pasted() -> None:
    """The law holds because of one case, and that case alone shows it again."""
    law = "inputs_reach_the_statistics"
    (evidence,) = verify(reference.sgd(), "quick", select=[law]).results
    assert evidence.status == "held"
    assert evidence.example is not None
    case = eval(evidence.example, {"bnverify": bnverify})  # noqa: S307 - what a reader would paste
    assert f"{case.shape}" in evidence.reason
    assert bnverify.replay(reference.sgd(), case, law=law) == 0


@pytest.mark.parametrize("features", range(1, 7))
def test_other_inputs_are_no_shift_of_the_whole_batch(features: int) -> None:
    """A normalisation would take such a shift away, and nothing would seem to reach the params."""
    case = Case.of(0, np.zeros((4, features)), np.zeros(4), 0.1)
    moves = other_inputs(case).x
    assert (moves[1:] != moves[:-1]).all()


def test_an_optimizer_that_raises_is_quoted() -> None:
    """What its laws did not reach is not silence: they say what the optimizer raised."""

    def refuse(updates: Any, state: Any, params: Any = None) -> Any:
        raise TypeError("no such leaf: scale")

    tx = optax.GradientTransformation(lambda params: optax.EmptyState(), refuse)
    subject = dataclasses.replace(reference.sgd(), optimizer=lambda lr: tx)
    (evidence,) = verify(subject, "quick", select=["params_follow_the_optimizer"]).results
    assert evidence.status == "untriggered"
    assert evidence.reason == "the optimizer raised TypeError: no such leaf: scale"


@pytest.mark.parametrize("name", ["statistics_gain_a_count", "variance_missing"])
def test_a_step_that_changes_its_state_is_no_internal_error(name: str) -> None:
    """A law of structure is violated; laws that compare what is no longer alike say so."""
    compared = ("step_moves_the_statistics", "equal_steps_converge_geometrically")
    laws = ["batch_stats_keep_their_tree", *compared, "statistics_fold_each_batch_once"]
    report = verify(MUTANTS[name].make(), "quick", select=laws)
    assert [each.law for each in report.violated] == ["batch_stats_keep_their_tree"]
    assert report["statistics_fold_each_batch_once"].status == "untriggered"
    for law in compared:
        assert report[law].status == "untriggered"
        assert report[law].reason.startswith("what it compares differs in structure")


@pytest.mark.once
@pytest.mark.parametrize(
    ("fault", "law", "shape"),
    [
        (
            "sixty_four_rows_overflow_a_counter",
            "eval_at_the_batchs_own_moments_is_the_training_loss",
            (64, 1),
        ),
        ("features_beyond_eight_not_trained", "params_follow_the_optimizer", (2, 16)),
    ],
)
def test_what_takes_many_rows_or_features_is_shown_by_few_of_the_others(
    fault: str, law: str, shape: tuple[int, int]
) -> None:
    """Found by a batch of 64 rows and 16 features, and shown by a smaller one."""
    few = Profile("few", tiny=1, shapes=2, block=64, examples=1)
    (found,) = verify(MUTANTS[fault].make(), few, select=[law]).results
    assert (found.status, found.shape) == ("violated", shape)


def test_a_batch_that_only_an_uncompiled_step_overwrites_is_confirmed() -> None:
    """Found among the explicit cases, and found again in the simplest one, which can be pasted."""
    few = Profile("few", shapes=0, block=32)
    step = MUTANTS["batch_overwritten_in_place"].make()
    law = "step_leaves_its_inputs_alone"
    (found,) = verify(step, few, seed=11, select=[law]).results
    assert (found.status, found.shape) == ("violated", (1, 1))
    case = Case.of(0, [[1.0]], [0.0], 0.5)
    assert case.code() in (found.counterexample or "")
    with pytest.raises(bnverify.Violation, match=law):
        bnverify.replay(step, case, law=law)


def test_uncompiled_cases_are_no_zeros() -> None:
    """What is not dull is run uncompiled; of the smallest shape first, whose operations are few."""
    dull = [Case.of(0, np.zeros((2, 2)), [0, 0], 0.0) for _ in range(4)]
    dull.append(Case.of(0, 1e-39 * np.arange(4).reshape(2, 2), [1e-39, 2e-39], 0.0))
    large, small = (
        Case.of(0, np.arange(2 * rows).reshape(rows, 2), [0] * rows, 0.1) for rows in (4, 2)
    )
    cases = [*dull, large, small, *dull]
    assert uncompiled(cases, (2, 2), 1) == [6]
    assert uncompiled(cases, (2, 2), 4) == [6, 0, 4, 5]


def test_small_models_are_stacked_as_asked() -> None:
    """The reference's steps cost nothing: neither its stacks nor its rows are fewer."""
    small = Budget(reference.sgd(), 512)
    assert small.block((2, 4)) == 512
    assert small.rows(4) is None


def test_a_stack_of_more_rows_holds_fewer_cases() -> None:
    """Memory is kept to, down to one case: a hundred thousand rows need it all."""
    small = Budget(reference.sgd(), 512)
    sizes = [small.block((rows, 4)) for rows in (1, 64, 1000, 100_000)]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] == 1


def test_what_computes_for_seconds_is_optimised() -> None:
    """The noise of four stacks of the largest shape is, that of the tiny shapes is not."""
    small = Budget(reference.sgd(), 512, 4)
    assert [small.pays(shape) for shape in ((2, 2), (64, 16))] == [False, True]


def test_stacks_that_fill_the_memory_run_one_at_a_time() -> None:
    """Others run two at once."""
    small = Budget(reference.sgd(), 512)
    assert [small.at_once((rows, 4)) for rows in (2, 100_000)] == [2, 1]


def test_blocks_that_run_at_once_are_the_same_every_time() -> None:
    """Which of two ends first changes neither the cases bred from them nor a residual."""
    plan = Profile("blocks", tiny=1, shapes=0, blocks=6, block=64, examples=0)
    first, second = (verify(reference.sgd(), plan, select=[LAW]) for _ in range(2))
    assert first.results == second.results
    assert first.cases == second.cases == 6 * 64


def test_a_step_that_nobody_can_count_is_stacked_as_asked() -> None:
    """One that JAX does not trace has no operations that could be counted."""

    def refuse(*_: Any) -> Any:
        raise TypeError

    silent = dataclasses.replace(reference.sgd(), step=refuse)
    assert Budget(silent, 512).block((64, 4)) == 512


def test_a_case_too_large_for_all_rows_is_read_a_few_at_a_time() -> None:
    """Its exact outcome, its noise and its slope are those of all rows at once, its layers' noise too."""
    assert [Budget(reference.sgd(), 512).held((rows, 4)) for rows in (2, 1_000_000)] == [ROWS, 2]
    subject = reference.adam()
    case = stack(
        [Case.of(seed, [[1.0, 2.0], [3.0, -1.5], [0.5, 0.1]], [1, 2, 3], 0.1) for seed in (1, 2)]
    )
    before = jax.tree_util.tree_map(np.asarray, jax.vmap(subject.init)(case.seed, case.x))
    also = ["slope", "layer_inputs"]
    whole = Noise(subject)(before, case, also)
    parts = Noise(subject, held=lambda shape: 4)(before, case, also)
    alike = partial(np.testing.assert_allclose, rtol=1e-6)
    jax.tree_util.tree_map(alike, parts._replace(slope=None), whole._replace(slope=None))
    (one, err, known), (other, error, _) = (
        map(np.asarray, found.slope) for found in (parts, whole)
    )
    assert known.all()
    assert (np.abs(one - other) <= err + error).all()


@pytest.mark.parametrize("count", [7, 4, 3, 1])
def test_a_stack_is_read_in_portions(count: int) -> None:
    """Each case that counts is told what the whole stack tells of it, however they divide."""
    subject = reference.sgd()
    rng = np.random.default_rng(0)  # plain batches: what cancels has other digits in float64 too
    x, y = (rng.normal(size=(7, *shape)) for shape in ((3, 1), (3,)))
    cases = stack([Case.of(seed, x[seed], y[seed], 0.1) for seed in range(7)])
    before = jax.tree_util.tree_map(np.asarray, jax.vmap(subject.init)(cases.seed, cases.x))
    whole = Noise(subject)(before, cases, ["layer_inputs"])
    known = Noise(subject, portion=3)(before, cases, ["layer_inputs"], count)
    assert {len(leaf) for leaf in jax.tree_util.tree_leaves(known)} == {7}
    alike = partial(np.testing.assert_allclose, rtol=1e-6)
    jax.tree_util.tree_map(lambda a, b: alike(a[:count], b[:count]), known, whole)


@pytest.mark.parametrize(("memory", "fewest", "advice"), [(1e6, 10, ""), (2e5, 3, "narrower")])
def test_a_large_model_has_fewer_cases_of_fewer_rows(
    monkeypatch: pytest.MonkeyPatch, memory: float, fewest: int, advice: str
) -> None:
    """And the report says so; each shape has ten cases, or three where one is read in parts."""
    monkeypatch.setattr(budget, "LARGE", 1.0)
    monkeypatch.setattr(budget, "BYTES", memory)
    report = verify(reference.sgd(), "quick", select=["batch_stats_change_only_by_ema"])
    (note,) = report.notes
    assert note.startswith("a large model: cases of at most")
    assert advice in note
    assert 4 * fewest <= report.cases < 256
    (evidence,) = report.results
    assert evidence.status == "held"
