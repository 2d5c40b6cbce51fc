"""Reading a policy: what is written is what holds, and anything doubtful is refused by its key."""

from __future__ import annotations

import datetime as dt

import pytest

from bnverify.upgrade.policy import FAILING, Acceptance, Policy
from bnverify.upgrade.policy_file import PolicyError, find, load

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


def test_a_whole_policy_is_read(tmp_path):
    """Every key of the documentation means what it says."""
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
        bounds={"run_time": 1.5, "program_size": 2.0},
        source=path,
    )


def test_an_empty_policy_is_the_default(tmp_path):
    """What is not said is as if there were no file."""
    path = tmp_path / "bnverify.toml"
    path.touch()
    assert load(path) == Policy(fail=frozenset(FAILING), source=path)


def test_a_pyproject_holds_the_same_policy_under_its_table(tmp_path):
    """[tool.bnverify] is the file bnverify.toml."""
    own = tmp_path / "bnverify.toml"
    own.write_text(ENTRY)
    expected = load(own)
    own.unlink()
    shared = tmp_path / "pyproject.toml"
    shared.write_text(
        ENTRY.replace("[[accept]]", '[project]\nname = "x"\n[[tool.bnverify.accept]]')
    )
    assert find(tmp_path).accept == expected.accept
    assert find(tmp_path).source == shared


@pytest.mark.parametrize("text", ["", "[tool]", "tool = 1", "[tool.other]\na = 1"])
def test_without_a_policy_the_default_holds(tmp_path, text):
    """No file, or a pyproject.toml that does not mention bnverify, is no error."""
    assert find(tmp_path) == Policy()
    (tmp_path / "pyproject.toml").write_text(text)
    assert find(tmp_path) == Policy()


def test_two_policies_are_refused(tmp_path):
    """One of them would be ignored in silence."""
    (tmp_path / "bnverify.toml").touch()
    (tmp_path / "pyproject.toml").write_text("[tool.bnverify]")
    with pytest.raises(PolicyError, match="are two policies; keep one"):
        find(tmp_path)
    (tmp_path / "pyproject.toml").write_text("[tool.other]")
    assert find(tmp_path).source == tmp_path / "bnverify.toml"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fail = [", "cannot read the policy"),
        ("a = " + "[" * 10_000, "cannot read the policy"),
        (
            'fails = ["api"]',
            "unknown key fails; allowed are fail, accept, bounds; did you mean 'fail'",
        ),
        ("zzz = 1", "unknown key zzz; allowed are fail, accept, bounds$"),
        ('fail = "api"', "fail = 'api' is not allowed; it must be a list"),
        ('fail = ["apis"]', r"fail\[0\] = 'apis' is not allowed; it must be one of api, structure"),
        ("fail = [[]]", r"fail\[0\] = '\[\]' is not allowed"),
        ("accept = 1", "accept = '1' is not allowed; it must be a list"),
        ("accept = [1]", r"accept\[0\] = '1' is not allowed; it must be a table"),
        (
            ENTRY.replace("reason", "reasons"),
            r"unknown key accept\[0\]\.reasons.*did you mean 'reason'",
        ),
        (ENTRY.replace('class = "api"', ""), r"accept\[0\]\.class is missing; it must be one of"),
        (ENTRY.replace('reason = "r"', ""), r"accept\[0\]\.reason is missing; it must be text"),
        (ENTRY.replace('"r"', '"  "'), r"accept\[0\]\.reason = '  ' is not allowed"),
        (ENTRY.replace("expires = 2027-01-31", ""), r"accept\[0\]\.expires is missing.*a date"),
        (ENTRY.replace("2027-01-31", '"soon"'), r"accept\[0\]\.expires = 'soon' is not allowed"),
        (ENTRY.replace("2027-01-31", "2027-01-31T00:00:00"), r"expires = .* it must be a date"),
        (ENTRY.replace("2027-01-31", "20270131"), r"expires = '20270131' is not allowed"),
        (ENTRY + "leaf = 3", r"accept\[0\]\.leaf = '3' is not allowed; it must be text"),
        (ENTRY + 'subject = ""', r"accept\[0\]\.subject = '' is not allowed; it must be text"),
        ("bounds = 1", "bounds = '1' is not allowed; it must be a table"),
        ("[bounds]\nruntime = 1.0", r"unknown key bounds\.runtime.*did you mean 'run_time'"),
        ("[bounds]\nrun_time = 0", r"bounds\.run_time = '0' is not allowed; it must be new / old"),
        ("[bounds]\nrun_time = true", "it must be new / old"),
        ("[bounds]\nrun_time = inf", "it must be new / old"),
        ("[bounds]\nrun_time = nan", "it must be new / old"),
        ('[bounds]\nrun_time = "2"', "it must be new / old"),
    ],
)
def test_a_doubtful_policy_is_refused(tmp_path, text, message):
    """The one message names the file, the key, the value and what is allowed."""
    path = tmp_path / "bnverify.toml"
    path.write_text(text)
    with pytest.raises(PolicyError, match=message) as caught:
        load(path)
    assert str(path) in str(caught.value)


def test_a_table_that_is_none_is_refused(tmp_path):
    """In a pyproject.toml the whole policy may be of the wrong type."""
    path = tmp_path / "pyproject.toml"
    path.write_text("[tool]\nbnverify = 1")
    with pytest.raises(
        PolicyError, match=r"tool\.bnverify = '1' is not allowed; it must be a table"
    ):
        find(tmp_path)


def test_a_missing_or_unreadable_file_is_one_message(tmp_path):
    """No traceback for a wrong path or a wrong encoding."""
    with pytest.raises(PolicyError, match=r"cannot read the policy .*absent"):
        load(tmp_path / "absent")
    (tmp_path / "latin.toml").write_bytes(b"# \xe9\n")
    with pytest.raises(PolicyError, match=r"cannot read the policy .*utf-8"):
        load(tmp_path / "latin.toml")
