"""Diagnosis: from broken laws, flows and numbers to the name of a mistake."""

from __future__ import annotations

import ast
import runpy
from pathlib import Path
from typing import Any

import pytest

from bnverify.clues import general_cases, read_clues
from bnverify.diagnose import RULES, Findings, causes, diagnosed
from bnverify.evidence import Cause, Evidence
from bnverify.jaxpr.tracing import Tracer
from bnverify.judge import RoundingBounds
from bnverify.laws import FAMILIES, LAWS
from bnverify.mistakes import MISTAKES, Mistake, mistake
from bnverify.observe import CompiledSubject
from tests.faults import FAULTS
from tests.faults.audit import expected

BENCHMARK = Path(__file__).parents[1] / "benchmarks" / "naming.py"
FOLLOW, SGD = "params_follow_the_optimizer", "sgd_moves_params_by_minus_lr_times_gradient"
MODES = "eval_at_the_batchs_own_moments_is_the_training_loss"
MOMENTS = "batch_moments_are_the_layers_own"
MOMENTUM = "momentum_is_as_declared"
FINITE = "eval_loss_is_finite"


def evidence(law: str, status: str, **clues: Any) -> Evidence:
    return Evidence(law, LAWS[law].family, status, clues=clues)  # type: ignore[arg-type] # a status by name


def names(*broken: str, flows: Any = None, **clues: Any) -> list[str]:
    found = causes(Findings(broken, flows or {}, clues))
    return list(dict.fromkeys(cause.mistake for cause in found.values()))


@pytest.mark.skipif(not BENCHMARK.exists(), reason="an installed package has no benchmarks")
def test_nine_of_ten_faults_of_the_catalogue_are_diagnosed_correctly() -> None:
    """The first diagnosis from the recorded evidence of each fault is the fault's own mistake."""
    naming = runpy.run_path(str(BENCHMARK))
    lines = naming["read"](naming["RECORDED"])
    noticed = [fault for fault in FAULTS if lines.get(fault, {}).get("broken")]
    assert len(noticed) > 250
    assert len(naming["misnamed"](lines)) <= 0.1 * len(noticed)


def test_rules_name_mistakes_that_exist_and_that_laws_list() -> None:
    """A rule for a mistake that no law lists would never apply."""
    ruled = {rule.mistake for rule in RULES}
    assert ruled <= set(MISTAKES)
    assert ruled <= {name for law in LAWS.values() for name in law.mistakes}


def test_names_are_unique_across_laws_families_and_mistakes() -> None:
    """`bnverify explain` accepts any of them."""
    every = [*LAWS, *FAMILIES, *MISTAKES]
    assert len(every) == len(set(every))


@pytest.mark.parametrize("found", MISTAKES.values(), ids=MISTAKES)
def test_every_mistake_has_code_wrong_and_right(found: Mistake) -> None:
    """Both are valid Python, differ, and fit side by side."""
    assert found.looks.endswith(".")
    assert found.wrong != found.right
    for code in (found.wrong, found.right):
        assert code
        ast.parse("def step():\n" + "\n".join(f"    {line}" for line in code.splitlines()))
        assert max(map(len, code.splitlines())) <= 48


def test_a_mistake_has_one_entry() -> None:
    """Registering a second one with the same name raises."""
    with pytest.raises(ValueError, match="two mistakes are named wrong_sign"):
        mistake("wrong_sign", "the sign is wrong", "change it")


@pytest.mark.parametrize(
    ("broken", "clues", "expected_name"),
    [
        ([FOLLOW, SGD], {"params": "opposite", "factor": -1.0}, "wrong_sign"),
        ([FOLLOW, SGD], {"params": "twice", "factor": 2.0}, "update_applied_twice"),
        ([FOLLOW, SGD], {"params": "scaled", "factor": 0.5}, "update_scaled"),
        ([FOLLOW, SGD], {"params": "unchanged"}, "update_dropped"),
        ([MOMENTS, MODES], {"moments": "sample variance"}, "sample_variance"),
        ([MOMENTS, MODES], {"moments": "weights"}, "weights_do_not_sum_to_one"),
        ([MODES], {"modes": "sample variance"}, "sample_variance"),
        ([MOMENTS], {"moments": "scaled mean", "moments_factor": 3.0}, "wrong_moments"),
        ([MODES], {"modes": "differ"}, "modes_differ"),
        ([MODES], {"modes": "another loss"}, "losses_differ"),
        (
            [MODES],
            {"modes": "differ", "unread": ["batch_stats/norm/mean"]},
            "eval_ignores_variables",
        ),
        ([MODES, "eval_rows_are_independent"], {}, "eval_in_train_mode"),
        (["eval_rows_are_independent"], {}, "eval_in_train_mode"),
        (
            ["eval_rows_are_independent"],
            {"eval_rows": "root of a mean over rows"},
            "loss_not_a_mean_over_rows",
        ),
        ([FINITE], {"nonfinite_kind": "exponential"}, "exponential_overflows"),
        ([FINITE], {"nonfinite_kind": "logarithm"}, "log_of_zero"),
        ([FINITE], {"nonfinite_kind": "zero variance"}, "division_by_zero_variance"),
        ([FINITE], {"nonfinite_kind": "negative variance"}, "variance_below_zero"),
        ([FINITE], {"nonfinite_kind": "division"}, "division_by_zero"),
        ([FINITE], {"nonfinite_kind": "slope"}, "slope_is_infinite"),
        ([FINITE], {"nonfinite_kind": "domain"}, "outside_the_domain"),
        ([FINITE], {"nonfinite_kind": "overflow"}, "number_overflows"),
        ([FINITE], {}, "division_by_zero_variance"),
        (["a_constant_feature_gives_a_finite_step"], {}, "variance_below_zero"),
        ([MODES], {"mixed": "norm/var", "mixed_with": "norm/mean"}, "wrong_moments"),
        ([MOMENTUM], {"average": "squared"}, "ema_applied_twice"),
        ([MOMENTUM], {"average": "reversed"}, "momentum_reversed"),
        ([MOMENTUM], {"average": "another momentum"}, "momentum_not_as_declared"),
    ],
)
def test_the_numbers_decide_between_mistakes(
    broken: list[str], clues: dict[str, Any], expected_name: str
) -> None:
    """Several mistakes break the same laws, but differ in their numbers."""
    assert names(*broken, **clues) == [expected_name]


@pytest.mark.parametrize(
    ("broken", "clues", "expected_name"),
    [
        (
            [MOMENTUM, "inputs_reach_the_statistics", "every_pass_reaches_the_statistics"],
            {"average": "another momentum"},
            "pass_dropped",
        ),
        (
            [MOMENTUM, "batch_stats_are_free_of_targets", "each_batch_is_folded_in_once"],
            {"average": "squared"},
            "ema_applied_twice",
        ),
        (
            [
                "inputs_reach_the_params",
                "loss_reads_params_and_inputs",
                "targets_belong_to_their_rows",
                "unlike_rows_have_a_variance",
                MODES,
            ],
            {"modes": "differ"},
            "rows_normalised_alone",
        ),
        (["schedule_counts_updates"], {}, "schedule_counts_batches"),
        (
            ["state_signature_is_a_fixed_point"],
            {"only_weak_types": ["params/temperature"]},
            "weak_type_in_the_state",
        ),
    ],
)
def test_a_law_specific_to_one_mistake_decides_first(
    broken: list[str], clues: dict[str, Any], expected_name: str
) -> None:
    """The other broken laws alone would suggest another mistake."""
    assert names(*broken, **clues) == [expected_name]


def test_the_trace_decides() -> None:
    """A learning rate that reaches nothing is ignored, whatever the factor."""
    flows = {"params": ["params", "x", "y"]}
    assert (
        names(FOLLOW, SGD, flows=flows, params="scaled", factor=0.1)[0] == "learning_rate_ignored"
    )


def test_two_mistakes_are_both_named() -> None:
    """Each explains the laws that list it."""
    found = names(FOLLOW, MOMENTUM, params="opposite", average="reversed")
    assert found == ["wrong_sign", "momentum_reversed"]


def test_the_deciding_number_is_reported() -> None:
    """It is in the text of each law that the mistake explains, and of no other."""
    results = [
        evidence(FOLLOW, "violated", params="opposite", factor=-1.0),
        evidence(SGD, "violated"),
        evidence(MODES, "held"),
    ]
    told = {each.law: each.diagnosis for each in diagnosed(results, {})}
    assert told[FOLLOW] == told[SGD]
    start = (
        "wrong_sign: the update has the wrong sign (the update is -1 times the optimizer's). Fix: "
    )
    assert (told[FOLLOW] or "").startswith(start)
    assert told[MODES] is None


def test_a_law_without_a_rule_names_its_first_mistake() -> None:
    """A diagnosis that exists already is kept."""
    law = LAWS["jit_equals_eager"]
    assert names(law.name) == [law.mistakes[0]]
    known = Evidence(law.name, law.family, "violated", cause=Cause("wrong_sign"))
    assert diagnosed([known], {}) == [known]


RECOGNISED = {
    "update_subtracted": {"params": "opposite"},
    "gradient_applied_as_update": {"params": "gradient added"},
    "optimizer_bypassed": {"params": "plain descent"},
    "update_of_initial_params": {"params": "another start"},
    "output_bias_never_updated": {"params": "partly unchanged", "still": ["Dense_1/bias"]},
    "optimizer_count_stuck": {"opt_state": "old"},
    "mean_never_moves": {"average": "partly unchanged", "idle": ["BatchNorm_0/mean"]},
    "momentum_reversed": {"average": "reversed", "declared": 0.99},
    "sample_variance": {"moments": "sample variance", "moments_of": "BatchNorm_0"},
    "statistics_of_the_first_shard": {"moments": "part of the rows", "rows": "1 to 2 of 4"},
    "targets_reversed": {"modes": "targets moved"},
    "gradient_doubled_by_two_backward_passes": {"gradient": "scaled"},
    "loss_is_the_root_of_a_mean": {"eval_rows": "root of a mean over rows"},
    "epsilon_forgotten": {"nonfinite": "rsqrt", "nonfinite_kind": "zero variance"},
}


@pytest.mark.parametrize("name", RECOGNISED)
def test_the_numbers_of_a_step_are_recognised(name: str) -> None:
    """On random cases of four rows, as in reports."""
    subject = FAULTS[name].make()
    tracer = Tracer(subject)
    calls = CompiledSubject(subject, "jit", tracer=tracer)
    found = read_clues(calls, RoundingBounds(tracer), general_cases((4, 2)), LAWS)
    assert RECOGNISED[name].items() <= found.items()


def test_a_correct_step_gives_no_clue() -> None:
    """Nothing is recognised, whichever laws are assumed broken."""
    from bnverify import reference

    subject = reference.adamw()
    tracer = Tracer(subject)
    calls = CompiledSubject(subject, "jit", tracer=tracer)
    found = read_clues(calls, RoundingBounds(tracer), general_cases((4, 2)), LAWS)
    assert set(found) <= {"modes_ratio"}


NOTICED = [
    {"fault": "momentum_reversed", "laws": ["momentum_is_as_declared"]},
    {"fault": "momentum_of_the_variance_reversed", "laws": ["momentum_is_as_declared", "gone"]},
    {"fault": "sign_flips_on_the_fifth_step", "laws": []},
]


def test_expected_laws_noticed_the_fault_in_every_audit() -> None:
    """A law that noticed a fault once but not again is not expected to notice it."""
    assert {law for fault in FAULTS.values() for law in fault.expected} <= set(LAWS)
    again = [{"fault": "momentum_reversed", "laws": ["variance_is_never_negative"]}]
    assert expected([NOTICED]) == {
        "momentum_reversed": ["momentum_is_as_declared"],
        "momentum_of_the_variance_reversed": ["momentum_is_as_declared"],
    }
    assert expected([NOTICED, again]) == {
        "momentum_of_the_variance_reversed": ["momentum_is_as_declared"]
    }
