"""A check runs what the user wrote as the user would, once for each shape, and confirms what it sees."""

from __future__ import annotations

import dataclasses
import logging
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
import pytest

import bnverify
from bnverify import Case, compat, observe, reference, runs, shrink, verify
from bnverify.check import STOPPED, Check, Event, Finished, LawJudged, PhaseStarted, Started
from bnverify.evidence import Report
from bnverify.jaxpr.tracing import Tracer
from bnverify.judge import Bounds, RoundingBounds
from bnverify.laws import LAWS, STEP_LAWS
from bnverify.laws.life import ANOTHER_PROCESS
from bnverify.observe import SINGLE
from bnverify.profile import Profile, named
from bnverify.proof import read
from bnverify.pytree import stack
from bnverify.reruns import other_inputs
from bnverify.runs import Runner, Tally
from tests.faults import FAULTS

LAW = "row_order_changes_nothing"
FEW = Profile("few", tiny=1, shapes=0, block=32, examples=4)

FUNCTIONS = ("init", "step", "evaluate", "after_eval", "layer_inputs", "solution")
"""What a subject may hold of a user's own."""

COMPILED = re.compile(r"Finished XLA compilation of (?:jit\()?(\S+?)\)? in")


class Call(NamedTuple):
    """One call of a user's function.

    Attributes:
        name: of the function.
        traced: whether it was given tracers.
        shape: of the batch, as text: sizes may be symbolic.
        strange: the types of the arrays it was given that are no JAX arrays.
        wide: whether 64-bit types were enabled.
    """

    name: str
    traced: bool
    shape: str
    strange: tuple[str, ...]
    wide: bool


class Watched(NamedTuple):
    """A quick check of the reference, and all that was seen of it."""

    report: Report
    calls: list[Call]
    events: list[Event]
    updates: list[str]


def watching(subject: bnverify.Subject, calls: list[Call]) -> bnverify.Subject:
    """Return ``subject``, whose functions note how they are called."""

    def watched(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            # The one-call function is given its seed and its rate as Python numbers.
            arrays = args[1:3] if name == "solution" else args
            leaves = jax.tree_util.tree_leaves(arrays)
            traced = any(isinstance(leaf, jax.core.Tracer) for leaf in leaves)
            strange = [type(leaf).__name__ for leaf in leaves if not isinstance(leaf, jax.Array)]
            shape = str(next(leaf.shape for leaf in leaves[::-1] if len(leaf.shape) == 2))
            calls.append(Call(name, traced, shape, tuple(strange), jax.config.jax_enable_x64))
            return function(*args)

        return call

    own = {name: getattr(subject, name) for name in FUNCTIONS}
    wrapped = {name: watched(name, each) for name, each in own.items() if each is not None}
    return dataclasses.replace(subject, **wrapped)


@contextmanager
def compilations() -> Iterator[list[str]]:
    """Yield the names of the programs that XLA compiles meanwhile, as JAX logs them."""
    names: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if found := COMPILED.search(record.getMessage()):
                names.append(found[1])

    logger, handler = logging.getLogger("jax"), Handler()
    logger.addHandler(handler)
    propagated, logger.propagate = logger.propagate, False
    jax.config.update("jax_log_compiles", True)
    try:
        yield names
    finally:
        jax.config.update("jax_log_compiles", False)
        logger.propagate = propagated
        logger.removeHandler(handler)


@pytest.fixture(scope="module")
def watched() -> Watched:
    """One check for all the tests that only look at it."""
    calls: list[Call] = []
    events: list[Event] = []
    updates: list[str] = []
    update = type(jax.config).update

    def refuse() -> Any:
        raise AssertionError("a check enables 64-bit types")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compat, "enable_x64", refuse)
        patch.setattr(
            type(jax.config),
            "update",
            lambda self, name, value: updates.append(name) or update(self, name, value),
        )
        report = verify(watching(reference.sgd(), calls), "quick", listener=events.append)
    return Watched(report, calls, events, updates)


def test_a_step_is_traced_once_for_each_shape_it_is_run_on(watched: Watched) -> None:
    """Also a symbolic trace for proofs, a second one to compare, and one of a restored state."""
    traces = Counter(each.shape for each in watched.calls if each.name == "step" and each.traced)
    concrete = {shape for shape in traces if not re.search("[a-z]", shape)}
    symbolic = sum(traces[shape] for shape in set(traces) - concrete)
    assert len(concrete) >= 3
    # From jax 0.11 a symbolic D is refused, perhaps within the step: then there are three sizes D.
    assert 1 <= symbolic <= 3 + (jax.__version_info__ >= (0, 11))
    assert sum(traces.values()) - symbolic <= len(concrete) + 2


def test_what_is_not_compiled_is_called_with_jax_arrays(watched: Watched) -> None:
    """`x.at[0].set(1)` works in a step that runs as it is written; a NumPy array has no ``at``."""
    assert {each.name for each in watched.calls} == set(FUNCTIONS)
    assert any(each.name == "step" and not each.traced for each in watched.calls)
    assert [each for each in watched.calls if each.strange] == []

    def step(state: Any, x: Any, y: Any, lr: Any) -> Any:
        kernel = state.params["Dense_0"]["kernel"]
        kernel = kernel.at[0, 0].add(0.0)
        params = {**state.params, "Dense_0": {**state.params["Dense_0"], "kernel": kernel}}
        return sgd.step(state._replace(params=params), x.at[0].mul(1), y.at[:].get(), lr)

    sgd = reference.sgd()
    laws = ["jit_equals_eager", "step_leaves_its_inputs_alone", "same_input_repeats_to_the_bit"]
    report = verify(dataclasses.replace(sgd, step=step), FEW, select=laws)
    assert [each.status for each in report.results] == ["held"] * 3


UNLIKE: dict[str, tuple[Callable[[Any, Any], Any], str]] = {
    "loss": (
        lambda state, info: (state, info._replace(loss=info.loss.reshape(1))),
        "loss: got shape (1,), dtype float32 without jit, expected shape (), dtype float32",
    ),
    "missing": (
        lambda state, info: (
            state._replace(batch_stats={"BatchNorm_0": {"mean": _own(state)["mean"]}}),
            info,
        ),
        "batch_stats/BatchNorm_0/var: got no such leaf without jit, expected shape (8,)",
    ),
    "added": (
        lambda state, info: (
            state._replace(batch_stats={"BatchNorm_0": {**_own(state), "n": _own(state)["mean"]}}),
            info,
        ),
        "batch_stats/BatchNorm_0/n: got shape (8,), dtype float32 without jit, expected no such leaf",
    ),
}


def _own(state: Any) -> Any:
    return state.batch_stats["BatchNorm_0"]


@pytest.mark.parametrize("name", UNLIKE)
def test_a_result_of_another_form_without_jit_is_described(name: str) -> None:
    """The message has the leaf, and its shape and dtype both ways."""
    change, message = UNLIKE[name]
    sgd = reference.sgd()

    def step(state: Any, x: Any, y: Any, lr: Any) -> Any:
        outcome = sgd.step(state, x, y, lr)
        return outcome if isinstance(x, jax.core.Tracer) else change(*outcome)

    report = verify(dataclasses.replace(sgd, step=step), FEW, select=["jit_equals_eager"])
    (found,) = report.results
    assert (found.status, found.mismatch) == ("violated", None)
    assert found.reason.startswith(message)
    assert "return the same tree and shapes" in found.reason


def test_a_check_never_sees_64_bit_types(watched: Watched) -> None:
    """What is computed in float64 is NumPy's: the user's process stays in 32 bits throughout."""
    assert not any(each.wide for each in watched.calls)
    assert "jax_enable_x64" not in watched.updates
    assert not jax.config.jax_enable_x64


def test_the_reference_keeps_every_law(watched: Watched) -> None:
    """Each is proved or seen to hold: none is left but those about whole loops and processes."""
    left = [
        each
        for each in watched.report.results
        if each.status not in {"proved", "held"} and each.law != ANOTHER_PROCESS
    ]
    assert {each.status for each in left} == {"exempt"}
    for each in left:
        assert {"look", "row_weights"}.intersection(LAWS[each.law].capabilities), each


def test_events_arrive_in_order(watched: Watched) -> None:
    """The start, phases and verdicts, one verdict for each law, and the report at the end."""
    first, *between, last = watched.events
    laws = [name for name, law in LAWS.items() if law.family != "parallel"]
    assert first == Started(watched.report.subject, tuple(laws))
    assert last == Finished(watched.report)
    phases = [event for event in between if isinstance(event, PhaseStarted)]
    judged = [event.evidence.law for event in between if isinstance(event, LawJudged)]
    assert len(phases) + len(judged) == len(between)
    assert sorted(judged) == sorted(laws)
    assert phases[0] == PhaseStarted("tracing", 0)
    assert between[0] is phases[0]
    assert phases[1].phase == "compiling"  # before it every law that needs no run is judged
    proved = [each.law for each in watched.report.results if each.status == "proved"]
    assert set(proved) <= set(judged[: between.index(phases[1]) - 1])
    assert [each.cases for each in phases] == sorted(each.cases for each in phases)
    statuses = {
        event.evidence.law: event.evidence.status
        for event in between
        if event in between and isinstance(event, LawJudged)
    }
    assert statuses == {each.law: each.status for each in watched.report.results}


def test_nothing_of_bnverifys_own_is_compiled() -> None:
    """XLA compiles the subject's functions, under the one name that observing gives them all."""
    alone = [name for name, law in STEP_LAWS.items() if SINGLE.intersection(law.observes)]
    with compilations() as names:
        report = verify(reference.adam(), FEW, ignore=[*alone, "life"])
    assert report.ok
    assert set(names) == {"flat"}
    # init, step, evaluate, after_eval and the optimizer's update, stacked; the first four alone.
    assert len(names) <= 10


COMPARING = [
    name for name, law in STEP_LAWS.items() if SINGLE.intersection(law.observes) or name == LAW
]


@pytest.mark.parametrize(
    "law",
    [
        "vmap_equals_loop",
        "gradients_are_gradients_of_the_loss",
        "step_moves_the_params",
        *(
            pytest.param(law, marks=pytest.mark.nightly)
            for law in COMPARING
            if law != "vmap_equals_loop"
        ),
    ],
)
def test_a_law_selected_alone_gets_the_verdict_of_the_full_run(law: str, watched: Watched) -> None:
    """What a law observes is run for it, whatever else is selected."""
    (alone,) = verify(reference.sgd(), FEW, select=[law]).results
    assert alone.status == watched.report[law].status == "held", alone.reason
    assert alone.cases > 0


@pytest.fixture
def shrunk(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that makes the rounding smaller than it is, for the draws of some seeds."""
    evaluate = RoundingBounds.__call__

    def shrink(*seeds: int) -> None:
        def call(self: RoundingBounds, *args: Any, **options: Any) -> Bounds:
            known = evaluate(self, *args, **options)
            factor = 0.08 if self._seed in seeds else 1.0
            return known._replace(
                noise=jax.tree_util.tree_map(lambda leaf: np.asarray(leaf) * factor, known.noise)
            )

        monkeypatch.setattr(RoundingBounds, "__call__", call)

    return shrink


def test_other_draws_must_confirm_a_close_call(shrunk: Any) -> None:
    """A tolerance that is small by one seed's luck breaks no law: the report says what it saw.

    Where both readings show the same, it stands, with a case of each judge's.
    """
    plan = Profile("some", tiny=1, shapes=1)
    shrunk(0)
    (evidence,) = verify(reference.sgd(), plan, select=[LAW]).results
    assert evidence.status == "held"
    assert evidence.reason.endswith("no single run confirms it")
    assert evidence.residual is None
    shrunk(0, 1)
    (evidence,) = verify(reference.sgd(), plan, select=[LAW]).results
    assert evidence.status == "violated"
    assert 1 < (evidence.residual or 0) < shrink.CLEAR
    assert evidence.counterexample


def test_there_may_be_a_single_tiny_shape() -> None:
    """If the batch has a fixed number of rows that is over half of the most, and one number of features."""
    subject = dataclasses.replace(reference.sgd(), features=(3,), rows=48)
    runner = Runner(Tracer(subject), None, [], named("quick"))
    assert runner.tiny() == [(48, 3)]
    assert runner.between() == []


def test_a_check_after_another_says_what_a_fresh_one_says() -> None:
    """What is kept between checks is programs: nothing that was drawn or seen."""
    names = [LAW, "float_seeds_act_as_their_integer_part", "a_copy_keeps_everything"]
    check = Check(reference.sgd(), FEW, select=names)
    first, _, again = (check.run(seed) for seed in (1, 2, 1))
    fresh = verify(reference.sgd(), FEW, select=names, seed=1)
    assert first.results == again.results == fresh.results
    assert first.cases == again.cases == fresh.cases


def test_what_must_flow_is_shown_by_a_case_that_can_be_pasted() -> None:
    """The law holds because of one case, and that case alone shows it again."""
    law = "inputs_reach_the_statistics"
    (evidence,) = verify(reference.sgd(), FEW, select=[law]).results
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
    (evidence,) = verify(subject, FEW, select=["params_follow_the_optimizer"]).results
    assert evidence.status == "untriggered"
    assert evidence.reason == "the optimizer raised TypeError: no such leaf: scale"


@pytest.mark.parametrize("name", ["statistics_gain_a_count", "variance_missing"])
def test_a_step_that_changes_its_state_is_no_internal_error(name: str) -> None:
    """A law of structure is violated; laws that compare what is no longer alike say so."""
    compared = ("step_moves_the_statistics", "equal_steps_converge_geometrically")
    laws = ["batch_stats_keep_their_tree", *compared, "statistics_fold_each_batch_once"]
    report = verify(FAULTS[name].make(), FEW, select=laws)
    assert [each.law for each in report.violated] == ["batch_stats_keep_their_tree"]
    assert report["statistics_fold_each_batch_once"].status == "untriggered"
    for law in compared:
        assert report[law].status == "untriggered"
        assert report[law].reason.startswith("the arrays that it compares do not match (")


@pytest.mark.nightly
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
    (found,) = verify(FAULTS[fault].make(), few, select=[law]).results
    assert (found.status, found.shape) == ("violated", shape)


def test_what_only_an_uncompiled_step_does_is_confirmed_by_a_small_case() -> None:
    """Found among the cases run one at a time, and again in the simplest one, which can be pasted."""

    def step(state: Any, x: Any, y: Any, lr: Any) -> Any:
        after, info = sgd.step(state, x, y, lr)
        state.batch_stats["BatchNorm_0"]["mean"] = after.batch_stats["BatchNorm_0"]["mean"]
        return after, info

    sgd, law = reference.sgd(), "step_leaves_its_inputs_alone"
    subject = dataclasses.replace(sgd, step=step)
    (found,) = verify(subject, FEW, seed=11, select=[law]).results
    assert (found.status, found.shape) == ("violated", (2, 1))
    assert found.counterexample is not None
    case = found.counterexample.case
    assert case is not None
    assert case.code() in found.counterexample.script
    with pytest.raises(bnverify.Violation, match=law):
        bnverify.replay(subject, case, law=law)


def test_cases_that_are_run_one_at_a_time_are_no_zeros() -> None:
    """What shows most comes first: the most distinct numbers, and no batch twice before the others."""
    dull = [Case.of(0, np.zeros((2, 2)), [0, 0], 0.0) for _ in range(4)]
    faint = Case.of(0, 1e-39 * np.arange(4).reshape(2, 2), [1e-39, 2e-39], 0.0)
    large, small = (
        Case.of(0, np.arange(2 * rows).reshape(rows, 2), [0] * rows, 0.1) for rows in (4, 2)
    )
    ranked = shrink.rich([*dull, faint, large, small, large, *dull])
    assert ranked[:2] == [5, 6]
    assert set(ranked) == set(range(12))


def runner(subject: bnverify.Subject, plan: Profile) -> Runner:
    """Return what runs ``subject`` for one law."""
    reading = read(subject)
    laws = [LAWS["batch_stats_change_only_by_ema"]]
    tracer = reading.tracer(subject)
    return Runner(tracer, reading.abstract, laws, plan, refusal=reading.refusal)


def test_a_large_model_has_fewer_cases_of_fewer_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small ones are stacked as asked; of a large one the report says what was left out."""
    plan = named("quick")
    small = runner(reference.sgd(), plan)
    assert small.block((2, 4)) == plan.block
    sizes = [small.block((rows, 4)) for rows in (1, 64, 1000, 100_000, 10**7)]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] == 1
    monkeypatch.setattr(observe, "OPERATIONS", 1e4)
    report = verify(reference.sgd(), plan, select=["batch_stats_change_only_by_ema"])
    (note,) = report.notes
    assert re.match(r"a large model: cases of at most \d+ rows; .*narrower", note)
    assert runs.FEWEST * 4 <= report.cases < 256
    (evidence,) = report.results
    assert evidence.status == "held"


def test_a_step_that_nobody_can_count_is_stacked_as_asked() -> None:
    """One that JAX does not trace has no operations that could be counted."""

    def refuse(*_: Any) -> Any:
        raise TypeError

    silent = dataclasses.replace(reference.sgd(), step=refuse)
    laws = [LAWS[LAW]]
    assert Runner(Tracer(silent), None, laws, named("quick")).block((64, 4)) == 256


def test_a_loss_of_one_axis_is_told_and_no_error() -> None:
    """It has no slope: the law about that is not judged, and a law of structure says why."""
    few = Profile("few", tiny=1, shapes=0, block=8, examples=2, eager=0)
    laws = ["training_loss_is_a_scalar", "gradients_are_gradients_of_the_loss"]
    report = verify(FAULTS["loss_has_one_axis"].make(), few, select=laws)
    assert [each.law for each in report.violated] == ["training_loss_is_a_scalar"]


@pytest.mark.parametrize(("worst", "violated"), [(0.99, False), (1.01, True), (np.nan, True)])
def test_an_error_beyond_the_one_allowed_is_a_violation(worst: float, *, violated: bool) -> None:
    """A residual is in units of the error allowed: 1 is the bound, and what is no number is beyond."""
    tally = Tally(LAWS[LAW])
    cases = stack([Case.of(0, [[0.0], [1.0]], [0.0, 1.0], 0.1)])
    tally.add(cases, np.array([worst]))
    assert tally.violated is violated


def test_a_check_that_is_to_stop_runs_nothing_more() -> None:
    """After a violation the checkpoint laws are not run, and the report says why."""
    sgd = reference.sgd()

    def step(state: Any, x: Any, y: Any, lr: Any) -> Any:
        new, info = sgd.step(state, x, y, lr)
        return new._replace(batch_stats=state.batch_stats), info

    laws = ["inputs_reach_the_statistics", "a_copy_keeps_everything"]
    report = verify(dataclasses.replace(sgd, step=step), "quick", select=laws, fail_fast=True)
    assert [each.status for each in report.results] == ["violated", "untriggered"]
    assert report.results[1].reason == STOPPED
