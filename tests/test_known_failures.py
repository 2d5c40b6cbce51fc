"""Known failures: complete entries, strict in both directions, and stale ones reported."""

from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

# Imported before any test runs: pytester unloads modules first imported inside it.
from bnverify import check
from bnverify.errors import UsageError
from bnverify.evidence import Evidence, Report
from bnverify.laws import LAWS
from bnverify.testing import known_failures
from bnverify.testing.known_failures import KnownFailure

pytest_plugins = ("pytester",)

TESTS = [name for name, law in LAWS.items() if law.family != "parallel"]
"""The laws in a suite of a step for one device."""

LAW, OTHER, *_ = TESTS
JAX = metadata.version("jax")
ENTRY = {
    "law": LAW,
    "subject": "mine",
    "reason": "it does so",
    "issue": "https://example.com/1",
    "versions": f"jax=={JAX}",
}
STEP = """
import bnverify

def nothing(*args):
    pass

mine = bnverify.Subject("mine", nothing, nothing, nothing)
test_mine = bnverify.suite(mine)
"""
Inner = Callable[..., pytest.RunResult]


def toml(*entries: dict[str, Any]) -> str:
    lines = []
    for entry in entries:
        lines.append("[[failure]]")
        lines += [f"{name} = {value!r}" for name, value in entry.items()]
    return "\n".join(lines) + "\n"


@pytest.fixture
def statuses(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The statuses that a check returns, by law; held by default."""
    said: dict[str, Any] = {}

    def verify(subject: Any, *args: object, select: list[str], **options: object) -> Report:
        results = [Evidence.of(law, said.get(law, "held"), reason="made up") for law in select]
        return Report(subject.name, "made up", 0, tuple(results), 1, 0.1, {})

    monkeypatch.setattr(check, "verify", verify)
    monkeypatch.delenv("PYTEST_XDIST_TESTRUNUID", raising=False)
    return said


@pytest.fixture
def inner(
    pytester: pytest.Pytester, request: pytest.FixtureRequest, statuses: dict[str, Any]
) -> Inner:
    """A function that runs pytest in this process on a suite, with a file of known failures."""
    pytester.makepyfile(test_step=STEP)
    installed = request.config.pluginmanager.has_plugin("bnverify")
    ours = () if installed else ("-p", "bnverify.testing.plugin")

    def run(*args: str, known: str | None) -> pytest.RunResult:
        if known is not None:
            (pytester.path / "known.toml").write_text(known)
        return pytester.runpytest_inprocess(*ours, "--bnverify-known-failures", "known.toml", *args)

    return run


def test_a_known_failure_is_expected(inner: Inner, statuses: dict[str, Any]) -> None:
    """It is reported as xfailed with its reason and issue, and the run passes."""
    statuses[LAW] = "violated"
    result = inner("-rx", known=toml(ENTRY))
    assert result.ret == pytest.ExitCode.OK
    result.assert_outcomes(xfailed=1, passed=len(TESTS) - 1)
    result.stdout.fnmatch_lines([f"XFAIL *{LAW}* - it does so (https://example.com/1)*"])


def test_another_failure_is_not_expected(inner: Inner, statuses: dict[str, Any]) -> None:
    """Only that law on that subject is expected to fail."""
    statuses[LAW] = statuses[OTHER] = "violated"
    inner(known=toml(ENTRY)).assert_outcomes(xfailed=1, failed=1, passed=len(TESTS) - 2)


def test_a_known_failure_that_passes_fails(inner: Inner) -> None:
    """The failure no longer occurs, so the entry must be deleted."""
    result = inner(known=toml(ENTRY))
    result.assert_outcomes(failed=1, passed=len(TESTS) - 1)
    result.stdout.fnmatch_lines(["*XPASS(strict)*it does so*"])


@pytest.mark.parametrize("status", ["untriggered", "exempt"])
def test_a_known_failure_that_is_untriggered_fails(
    inner: Inner, statuses: dict[str, Any], status: str
) -> None:
    """A skip would hide that the entry has no effect."""
    statuses[LAW] = status
    result = inner(known=toml(ENTRY))
    result.assert_outcomes(failed=1, passed=len(TESTS) - 1)
    result.stdout.fnmatch_lines([f"*expected a known failure, but {status}: made up*"])


def test_any_other_exception_fails(
    inner: Inner, statuses: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only a violation is expected, not a crash."""

    def verify(*args: object, **options: object) -> None:
        raise RuntimeError

    monkeypatch.setattr(check, "verify", verify)
    inner("-k", f"[{LAW}]", known=toml(ENTRY)).assert_outcomes(failed=1)


def test_entries_for_other_versions_are_ignored(inner: Inner, statuses: dict[str, Any]) -> None:
    """With other versions an entry is neither used nor stale."""
    elsewhere = {**ENTRY, "versions": f"jax!={JAX}"}
    inner(known=toml(elsewhere)).assert_outcomes(passed=len(TESTS))
    absent = {**ENTRY, "versions": [f"jax=={JAX}", "no-such-package-anywhere"]}
    inner(known=toml(absent)).assert_outcomes(passed=len(TESTS))
    statuses[LAW] = "violated"
    inner(known=toml(elsewhere)).assert_outcomes(failed=1, passed=len(TESTS) - 1)


def test_a_stale_entry_fails_a_full_run(inner: Inner) -> None:
    """An entry for a subject without tests is reported, and the run fails."""
    result = inner(known=toml({**ENTRY, "subject": "gone"}))
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines(
        ["*stale known failures*", f"no test matches {LAW} on gone (jax=={JAX}): delete the entry"]
    )


def test_a_narrower_run_finds_nothing_stale(inner: Inner, statuses: dict[str, Any]) -> None:
    """If a path is given, the test may exist elsewhere."""
    gone = toml({**ENTRY, "subject": "gone"})
    assert inner("test_step.py", known=gone).ret == pytest.ExitCode.OK
    assert inner("--ignore", "elsewhere", known=gone).ret == pytest.ExitCode.OK


def test_deselected_tests_do_not_make_entries_stale(inner: Inner) -> None:
    """-k deselects tests that exist."""
    assert inner("-k", f"[{OTHER}]", known=toml(ENTRY)).ret == pytest.ExitCode.OK


def test_workers_report_stale_entries(
    pytester: pytest.Pytester, request: pytest.FixtureRequest
) -> None:
    """Under pytest-xdist the controller collects nothing, and reports what its workers find."""
    pytester.makepyfile("def test_nothing():\n    pass\n")
    (pytester.path / "known.toml").write_text(toml(ENTRY))
    installed = request.config.pluginmanager.has_plugin("bnverify")
    ours = () if installed else ("-p", "bnverify.testing.plugin")
    result = pytester.runpytest_subprocess(
        *ours, "-n", "1", "--bnverify-known-failures", "known.toml"
    )
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines(["*stale known failures*", f"no test matches {LAW} on mine*"])


def test_a_subject_that_cannot_be_made_is_reported_by_its_tests(
    inner: Inner, pytester: pytest.Pytester
) -> None:
    """Its name is needed to match entries, but the tests report the error."""
    pytester.makepyfile(
        test_step="import bnverify\ndef make():\n    1 / 0\ntest_mine = bnverify.suite(make)\n"
    )
    result = inner("-k", f"[{LAW}]", known=toml(ENTRY))
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*ZeroDivisionError*"])


def test_the_file_is_also_found_from_the_rootdir(
    inner: Inner, pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In addopts the path is relative to the rootdir, wherever pytest is started."""
    pytester.makeini("[pytest]\n")
    (pytester.path / "below").mkdir()
    inner(known="")
    monkeypatch.chdir(pytester.path / "below")
    assert inner(str(pytester.path), known=None).ret == pytest.ExitCode.OK


REFUSED = {
    **{
        f"no {name}": (toml({k: v for k, v in ENTRY.items() if k != name}), f".{name} is missing")
        for name in ENTRY
    },
    "empty reason": (toml({**ENTRY, "reason": ""}), "failure[0].reason = '' is not allowed"),
    "no versions": (toml({**ENTRY, "versions": []}), "versions = '[]' is not allowed"),
    "bad versions": (toml({**ENTRY, "versions": "flax<<1"}), "write versions like 'flax<0.13'"),
    "not a string": (
        toml({**ENTRY, "reason": 3}),
        "reason = '3' is not allowed: Expected a string",
    ),
    "unknown law": (toml({**ENTRY, "law": LAW[:-1]}), f"did you mean '{LAW}'?"),
    "unknown field": (toml({**ENTRY, "isue": "x"}), "did you mean 'issue'?"),
    "other table": ('[other]\nx = "y"\n', "unknown key other"),
    "one table": ("[failure]\n", "failure = '{}' is not allowed: Expected a list"),
    "no table": ("failure = [1]\n", "failure[0] = '1' is not allowed: Expected a table"),
    "no TOML": ("x = [\n", "known.toml: "),
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_incomplete_file_is_rejected(tmp_path: Path, name: str) -> None:
    """The message names the entry and the field."""
    text, message = REFUSED[name]
    path = tmp_path / "known.toml"
    path.write_text(text)
    with pytest.raises(UsageError) as refusal:
        known_failures.read(path)
    assert message in str(refusal.value)


def test_a_missing_file_is_rejected(tmp_path: Path) -> None:
    """So is an unreadable one."""
    with pytest.raises(UsageError, match="No such file"):
        known_failures.read(tmp_path / "nowhere.toml")


def test_pytest_rejects_the_run(inner: Inner) -> None:
    """An invalid file ends the run before any test, with one line and the status for usage errors."""
    result = inner(known="[other]\n")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["ERROR: *known.toml: unknown key other*"])


def test_the_versions_of_an_entry(tmp_path: Path) -> None:
    """They may be one requirement or a list."""
    path = tmp_path / "known.toml"
    path.write_text(toml(ENTRY, {**ENTRY, "versions": ["flax<1", "jax"]}))
    first, second = known_failures.read(path)
    assert first == KnownFailure(**ENTRY)
    assert second.versions == ("flax<1", "jax")
