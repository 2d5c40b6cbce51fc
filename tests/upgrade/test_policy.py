"""Policies: every difference is judged once, and every entry is used, stale or expired."""

from __future__ import annotations

import datetime as dt
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bnverify.errors import UsageError
from bnverify.upgrade.policy import (
    FAILING,
    KINDS,
    Acceptance,
    Bounds,
    Difference,
    Policy,
    Verdict,
    apply,
    find,
    load,
)

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
    """Failing, accepted and reported together contain each difference once."""
    verdict = apply(policy, found, TODAY)
    judged = [*verdict.failing, *(d for d, _ in verdict.accepted), *verdict.reported]
    assert sorted(map(repr, judged)) == sorted(map(repr, found))


@given(policies, st.lists(differences, max_size=5))
def test_every_entry_is_used_stale_or_expired(policy, found):
    """An entry matches something, or is reported."""
    verdict = apply(policy, found, TODAY)
    for entry in policy.accept:
        used = any(entry.covers(d) for d in found) and not entry.expired(TODAY)
        assert used + (entry in verdict.stale) + (entry in verdict.expired) == 1


@given(policies, st.lists(differences, max_size=5))
def test_only_failing_classes_fail(policy, found):
    """A failing difference has a failing class, and no valid entry matches it."""
    verdict = apply(policy, found, TODAY)
    assert verdict.ok == (verdict.failing == ())
    for failing in verdict.failing:
        assert failing.kind in policy.fail
        assert not any(e.covers(failing) and not e.expired(TODAY) for e in policy.accept)


@pytest.mark.parametrize("kind", KINDS)
def test_by_default_initialisation_and_rounding_are_only_reported(kind):
    """A changed random stream or last digit does not fail an upgrade."""
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
    """* matches any text and ? one character; everything else, including brackets, is literal."""
    assert acceptance(leaf=pattern).covers(difference(leaf=leaf)) == covered


def test_an_entry_covers_its_class_and_subject_only():
    """Other classes and subjects are not accepted."""
    assert acceptance(subject="my_*").covers(difference(subject="my_model"))
    assert not acceptance(subject="my_*").covers(difference(subject="reference"))
    assert not acceptance().covers(difference("structure"))


def test_an_entry_is_valid_through_its_last_day():
    """On the next day it has expired, and is reported."""
    policy = Policy(accept=(acceptance(expires=TODAY),))
    assert apply(policy, [difference()], TODAY).ok
    after = apply(policy, [difference()], TOMORROW)
    assert after == Verdict(failing=(difference(),), expired=policy.accept)


@pytest.mark.parametrize(
    ("ratio", "ok"), [(1.4, True), (1.5, True), (1.6, False), (math.nan, False)]
)
def test_a_cost_fails_only_beyond_its_bound(ratio, ok):
    """Costs without a bound never fail."""
    policy = Policy(bounds=Bounds(run_time=1.5))
    verdict = apply(policy, [], TODAY, {"run_time": ratio, "compile_time": 9.0})
    assert verdict.ok == ok
    assert len(verdict.exceeded) == (not ok)


def test_a_difference_has_a_public_json_form():
    """The class is called ``class``, as in the policy file."""
    assert difference().to_json() == {
        "class": "meaning",
        "subject": "reference",
        "leaf": "params/Dense_0/kernel",
        "size": None,
        "text": "it differs",
        "explanation": "",
        "witness": None,
    }


# Reading files.

WHOLE = """
fail = ["meaning", "rounding"]

[[accept]]
class = "meaning"
leaf = "batch_stats/*/var"
subject = "my_model"
reason = "retrained"
expires = 2027-01-31

[[accept]]
class = "initialisation"
reason = "another stream"
expires = "2027-02-28"

[bounds]
run_time = 1.5
program_size = 2
"""
ENTRY = '[[accept]]\nclass = "api"\nreason = "r"\nexpires = 2027-01-31\n'


def test_a_complete_policy_is_read(tmp_path):
    """Every documented key has its documented meaning."""
    path = tmp_path / "bnverify.toml"
    path.write_text(WHOLE)
    assert load(path) == Policy(
        fail=frozenset({"meaning", "rounding"}),
        accept=(
            Acceptance(
                kind="meaning",
                leaf="batch_stats/*/var",
                subject="my_model",
                reason="retrained",
                expires=dt.date(2027, 1, 31),
            ),
            Acceptance(
                kind="initialisation", reason="another stream", expires=dt.date(2027, 2, 28)
            ),
        ),
        bounds=Bounds(run_time=1.5, program_size=2.0),
    )


def test_an_empty_policy_is_the_default(tmp_path):
    """Missing keys have their default values."""
    path = tmp_path / "bnverify.toml"
    path.touch()
    assert load(path) == Policy(fail=frozenset(FAILING))


def test_a_pyproject_holds_the_policy_in_its_table(tmp_path):
    """[tool.bnverify] has the same content as bnverify.toml."""
    own = tmp_path / "bnverify.toml"
    own.write_text(ENTRY)
    expected = load(own)
    own.unlink()
    shared = tmp_path / "pyproject.toml"
    shared.write_text(
        ENTRY.replace("[[accept]]", '[project]\nname = "x"\n[[tool.bnverify.accept]]')
    )
    assert find(tmp_path).accept == expected.accept


@pytest.mark.parametrize("text", ["", "[tool]", "tool = 1", "[tool.other]\na = 1"])
def test_without_a_policy_the_default_is_used(tmp_path, text):
    """No file, or a pyproject.toml without the table, is not an error."""
    assert find(tmp_path) == Policy()
    (tmp_path / "pyproject.toml").write_text(text)
    assert find(tmp_path) == Policy()


def test_two_policies_are_rejected(tmp_path):
    """One of them would silently be ignored."""
    (tmp_path / "bnverify.toml").touch()
    (tmp_path / "pyproject.toml").write_text("[tool.bnverify]")
    with pytest.raises(UsageError, match="have settings; keep one"):
        find(tmp_path)
    (tmp_path / "pyproject.toml").write_text("[tool.other]")
    (tmp_path / "bnverify.toml").write_text('fail = ["api"]')
    assert find(tmp_path).fail == {"api"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fail = [", "cannot read the policy"),
        ("a = " + "[" * 10_000, "cannot read the policy"),
        (
            'fails = ["api"]',
            "unknown key fails; did you mean 'fail'.; allowed are target, .*, failure$",
        ),
        (
            "zzz = 1",
            "unknown key zzz; allowed are target, profile, select, ignore, format, fail, accept, bounds, failure$",
        ),
        ('fail = "api"', "fail = 'api' is not allowed: Expected a list, got a string"),
        ('fail = ["apis"]', r"fail\[0\] = 'apis' is not allowed.* not one of api, structure"),
        ("fail = [[]]", r"fail\[0\] = '\[\]' is not allowed"),
        ("accept = 1", "accept = '1' is not allowed: Expected a list"),
        ("accept = [1]", r"accept\[0\] = '1' is not allowed: Expected a table"),
        (
            ENTRY.replace("reason", "reasons"),
            r"unknown key accept\[0\]\.reasons.*did you mean 'reason'",
        ),
        (ENTRY.replace('class = "api"', ""), r"accept\[0\]\.class is missing"),
        (ENTRY.replace('reason = "r"', ""), r"accept\[0\]\.reason is missing"),
        (ENTRY.replace('"r"', '"  "'), r"accept\[0\]\.reason = '  ' is not allowed: .*empty"),
        (ENTRY.replace("expires = 2027-01-31", ""), r"accept\[0\]\.expires is missing"),
        (ENTRY.replace("2027-01-31", '"soon"'), r"expires = 'soon' is not allowed: .*2027-01-31"),
        (ENTRY.replace("2027-01-31", "2027-01-31T00:00:00"), r"expires = .*: Expected a date"),
        (ENTRY.replace("2027-01-31", "20270131"), r"expires = '20270131' is not allowed"),
        (ENTRY + "leaf = 3", r"accept\[0\]\.leaf = '3' is not allowed: Expected a string"),
        (ENTRY + 'subject = ""', r"accept\[0\]\.subject = '' is not allowed: .*empty"),
        ("bounds = 1", "bounds = '1' is not allowed: Expected a table"),
        ("[bounds]\nruntime = 1.0", r"unknown key bounds\.runtime.*did you mean 'run_time'"),
        ("[bounds]\nrun_time = 0", r"bounds\.run_time = '0' is not allowed: Expected a number >"),
        ("[bounds]\nrun_time = true", "Expected a number"),
        ("[bounds]\nrun_time = inf", "Expected a number"),
        ("[bounds]\nrun_time = nan", "Expected a number"),
        ('[bounds]\nrun_time = "2"', "Expected a number"),
    ],
)
def test_an_invalid_policy_is_rejected(tmp_path, text, message):
    """The message names the file, the key, the value and what is allowed."""
    path = tmp_path / "bnverify.toml"
    path.write_text(text)
    with pytest.raises(UsageError, match=message) as caught:
        load(path)
    assert str(path) in str(caught.value)


def test_a_policy_that_is_not_a_table_is_rejected(tmp_path):
    """In a pyproject.toml the whole value may have the wrong type."""
    path = tmp_path / "pyproject.toml"
    path.write_text("[tool]\nbnverify = 1")
    with pytest.raises(UsageError, match=r"tool\.bnverify = '1' is not allowed: Expected a table"):
        find(tmp_path)


def test_a_missing_or_unreadable_file_is_one_message(tmp_path):
    """There is no traceback for a wrong path or encoding."""
    with pytest.raises(UsageError, match=r"cannot read the policy .*absent"):
        load(tmp_path / "absent")
    (tmp_path / "latin.toml").write_bytes(b"# \xe9\n")
    with pytest.raises(UsageError, match=r"cannot read the policy .*utf-8"):
        load(tmp_path / "latin.toml")
