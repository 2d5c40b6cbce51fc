"""Which changes may pass: every difference is judged once, every entry accounted for."""

from __future__ import annotations

import datetime as dt
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bnverify.upgrade.difference import KINDS, Difference
from bnverify.upgrade.policy import Acceptance, Policy, Verdict, apply

TODAY = dt.date(2026, 6, 15)
TOMORROW = TODAY + dt.timedelta(days=1)

differences = st.builds(
    Difference,
    kind=st.sampled_from(KINDS),
    subject=st.sampled_from(["reference", "my_model"]),
    leaf=st.none() | st.sampled_from(["params/Dense_0/kernel", "batch_stats/BatchNorm_0/var"]),
    text=st.just("it differs"),
)
acceptances = st.builds(
    Acceptance,
    kind=st.sampled_from(KINDS),
    leaf=st.none() | st.sampled_from(["*", "params/*", "batch_stats/*/var", "var"]),
    subject=st.none() | st.sampled_from(["reference", "my_*"]),
    reason=st.just("known"),
    expires=st.sampled_from([TODAY - dt.timedelta(days=1), TODAY, TOMORROW]),
)
policies = st.builds(
    Policy,
    fail=st.frozensets(st.sampled_from(KINDS)),
    accept=st.lists(acceptances, max_size=4).map(tuple),
)


def difference(kind="meaning", subject="reference", leaf="params/Dense_0/kernel") -> Difference:
    return Difference(kind=kind, subject=subject, leaf=leaf, text="it differs")


def acceptance(**changes) -> Acceptance:
    given_by_default = {"kind": "meaning", "reason": "known", "expires": TOMORROW}
    return Acceptance(**(given_by_default | changes))


@given(policies, st.lists(differences, max_size=5))
def test_every_difference_is_judged_exactly_once(policy, found):
    """Failing, accepted and reported hold all differences, none twice."""
    verdict = apply(policy, found, TODAY)
    judged = [*verdict.failing, *(d for d, _ in verdict.accepted), *verdict.reported]
    assert sorted(map(repr, judged)) == sorted(map(repr, found))


@given(policies, st.lists(differences, max_size=5))
def test_every_entry_is_used_stale_or_expired(policy, found):
    """No entry goes unaccounted for: it covers something, or is named."""
    verdict = apply(policy, found, TODAY)
    for entry in policy.accept:
        used = any(entry.covers(d) for d in found) and not entry.expired(TODAY)
        assert used + (entry in verdict.stale) + (entry in verdict.expired) == 1


@given(policies, st.lists(differences, max_size=5))
def test_only_failing_classes_fail(policy, found):
    """What fails is of a failing class, and no valid entry covers it."""
    verdict = apply(policy, found, TODAY)
    assert verdict.ok == (verdict.failing == ())
    for failing in verdict.failing:
        assert failing.kind in policy.fail
        assert not any(e.covers(failing) and not e.expired(TODAY) for e in policy.accept)


@pytest.mark.parametrize("kind", KINDS)
def test_by_default_initialisation_and_rounding_are_only_reported(kind):
    """A changed random stream and a changed last place fail no upgrade by themselves."""
    verdict = apply(Policy(), [difference(kind)], TODAY)
    assert verdict.ok == (kind in {"initialisation", "rounding"})
    assert len(verdict.reported) == verdict.ok


@pytest.mark.parametrize(
    ("pattern", "leaf", "covered"),
    [
        (None, "params/Dense_0/kernel", True),
        (None, None, True),
        ("*", "params/Dense_0/kernel", True),
        ("*", None, False),
        ("params/*", "params/Dense_0/kernel", True),
        ("params/*/kernel", "params/a/b/kernel", True),
        ("params", "params/Dense_0/kernel", False),
        ("params/Dense_?/kernel", "params/Dense_0/kernel", True),
        ("params/Dense_?/kernel", "params/Dense_10/kernel", False),
        ("params['Dense_0']", "params['Dense_0']", True),
        ("params[0-9]", "params5", False),
        ("a.b", "axb", False),
    ],
)
def test_a_leaf_pattern_covers(pattern, leaf, covered):
    """* is any text and ? one character; everything else stands for itself, brackets too."""
    assert acceptance(leaf=pattern).covers(difference(leaf=leaf)) == covered


def test_an_entry_covers_its_class_and_subject_only():
    """An acceptance is no wider than it says."""
    assert acceptance(subject="my_*").covers(difference(subject="my_model"))
    assert not acceptance(subject="my_*").covers(difference(subject="reference"))
    assert not acceptance().covers(difference("structure"))


def test_an_entry_holds_through_its_last_day():
    """On the day it expires it holds; on the next it does not, and is named."""
    policy = Policy(accept=(acceptance(expires=TODAY),))
    assert apply(policy, [difference()], TODAY).ok
    after = apply(policy, [difference()], TOMORROW)
    assert after == Verdict(failing=(difference(),), expired=policy.accept)


@pytest.mark.parametrize(
    ("ratio", "ok"), [(1.4, True), (1.5, True), (1.6, False), (math.nan, False)]
)
def test_a_cost_fails_only_beyond_its_bound(ratio, ok):
    """Costs without a bound inform; with one they fail above it."""
    policy = Policy(bounds={"run_time": 1.5})
    verdict = apply(policy, [], TODAY, {"run_time": ratio, "compile_time": 9.0})
    assert verdict.ok == ok
    assert len(verdict.exceeded) == (not ok)


def test_a_difference_has_a_public_json_form():
    """The class is called class there, as in the policy file."""
    assert difference().to_json() == {
        "class": "meaning",
        "subject": "reference",
        "leaf": "params/Dense_0/kernel",
        "size": None,
        "text": "it differs",
        "explanation": "",
        "witness": None,
    }
