"""``bnverify.suite`` and the pytest plugin, with made-up reports."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis.database import ExampleDatabase, InMemoryExampleDatabase

# Imported before any test runs: pytester unloads modules first imported inside it, and jax cannot
# be imported twice in one process.
from bnverify import Subject, check
from bnverify.evidence import Call, Cause, Counterexample, Evidence, Report, Violation
from bnverify.laws import FAMILIES, LAWS
from bnverify.model import Case
from bnverify.report import progress
from bnverify.target import load
from bnverify.testing import memory, plugin
from bnverify.testing.workers import shared

pytest_plugins = ("pytester",)

ROOT = Path(__file__).parents[1]
PARALLEL = [name for name, law in LAWS.items() if law.family == "parallel"]
TESTS = [name for name in LAWS if name not in PARALLEL]
"""The laws in a suite of a step for one device."""

VIOLATED, HELD, PROVED, UNTRIGGERED, EXEMPT, *_ = TESTS
CASE = Case.of(seed=3, x=[[1.0, 2.0]], y=[0.5], lr=0.25, warmup=1)
SHOWN = Counterexample(VIOLATED, CASE, "test_step.py:test_mine")
CAUSE = Cause("wrong_sign")
EVIDENCE = (
    Evidence.of(
        VIOLATED,
        "violated",
        cases=5,
        residual=7.0,
        reason="off by 7",
        counterexample=SHOWN,
        cause=CAUSE,
    ),
    Evidence.of(HELD, "held", cases=5, residual=0.5),
    Evidence.of(PROVED, "proved", reason="every N and D"),
    Evidence.of(UNTRIGGERED, "untriggered", reason="no case reached it"),
    Evidence.of(EXEMPT, "exempt", reason="it has none"),
)
STEP = """
import bnverify

def nothing(*args):
    pass

mine = bnverify.Subject("mine", nothing, nothing, nothing)
test_mine = bnverify.suite(mine, "quick")
"""
OUTCOMES = ("PASSED", "FAILED", "SKIPPE", "ERROR ")
FIVE = " or ".join(f"[{evidence.law}]" for evidence in EVIDENCE)


class Stand:
    """Replaces the check: returns EVIDENCE, and records how it was called."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.replayed: list[Counterexample] = []
        self.fixed = False

    def verify(
        self, subject: Subject, profile: str, *, select: Sequence[str], **options: object
    ) -> Report:
        asked = {"subject": subject.name, "profile": profile, "select": select, **options}
        self.asked.append(asked)
        listener: Any = options.get("listener")
        if listener is not None:
            listener(check.PhaseStarted("cases of shape (2, 1)", 7, 0.4))
        known = {evidence.law: evidence for evidence in EVIDENCE}
        if self.fixed:
            known[VIOLATED] = Evidence.of(VIOLATED, "held", cases=5)
        results = [known.get(law, Evidence.of(law, "held", cases=1)) for law in select]
        return Report(subject.name, profile, 0, tuple(results), 5, 0.1, {})

    def show_again(self, subject: Subject, counterexample: Counterexample) -> None:
        self.replayed.append(counterexample)
        if not self.fixed:
            raise Violation(EVIDENCE[0])


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> Stand:
    made_up = Stand()
    monkeypatch.setattr(check, "verify", made_up.verify)
    monkeypatch.setattr(check, "show_again", made_up.show_again)
    monkeypatch.delenv("PYTEST_XDIST_TESTRUNUID", raising=False)
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    remembering(monkeypatch, InMemoryExampleDatabase())
    return made_up


def remembering(monkeypatch: pytest.MonkeyPatch, database: ExampleDatabase | None) -> None:
    """Make Hypothesis's settings use this example database."""
    named = settings(database=database)
    monkeypatch.setattr(memory, "settings", lambda: named)


Inner = Callable[..., pytest.RunResult]


@pytest.fixture
def inner(pytester: pytest.Pytester, request: pytest.FixtureRequest, made_up: Stand) -> Inner:
    """A function that runs pytest in this process, with the plugin, on a file with one suite."""
    pytester.makepyfile(test_step=STEP)
    plugins = request.config.pluginmanager
    # If bnverify is installed, its entry point loads the plugin, which cannot be loaded twice.
    ours = () if plugins.has_plugin("bnverify") else ("-p", "bnverify.testing.plugin")
    return lambda *args: pytester.runpytest_inprocess(*ours, "-p", "no:randomly", *args)


def test_a_suite_has_one_test_for_each_law(inner: Inner) -> None:
    """The ids are the names of the laws."""
    result = inner("--collect-only", "-q")
    for law in TESTS:
        result.stdout.fnmatch_lines([f"test_step.py::test_mine[[]{law}[]]"])


def test_outcomes_of_the_statuses(inner: Inner) -> None:
    """Proved and held pass, violated fails, untriggered and exempt are skipped with a reason."""
    result = inner("-k", FIVE, "-rs")
    result.assert_outcomes(passed=2, failed=1, skipped=2)
    result.stdout.fnmatch_lines_random(
        ["*untriggered: no case reached it*", "*exempt: it has none*"]
    )


def test_the_message_of_a_violation(inner: Inner) -> None:
    """Claim, reason, diagnosis and counterexample, without a traceback of bnverify."""
    result = inner("-k", f"[{VIOLATED}]")
    text = str(result.stdout)
    for part in (LAWS[VIOLATED].claim, "off by 7", str(CAUSE), SHOWN.script.strip()):
        assert part in text
    assert "suite.py" not in text
    assert "Traceback" not in text
    assert result.ret == 1


def test_the_short_summary_has_the_leaf_and_the_reason(inner: Inner) -> None:
    """The test's name has the law, so the summary needs neither it nor an exception class."""
    result = inner("-k", f"[{VIOLATED}]")
    result.stdout.fnmatch_lines([f"FAILED test_step.py::test_mine[[]{VIOLATED}[]] - off by 7*"])


def test_a_family_is_selected_by_its_marker(inner: Inner, made_up: Stand) -> None:
    """It works with --strict-markers; -k accepts the family's name as well."""
    family = [name for name in TESTS if LAWS[name].family == "update"]
    for options in (("-m", "bnverify_update"), ("-k", "bnverify_update")):
        inner("--strict-markers", *options)
        assert made_up.asked[-1]["select"] == family
    assert plugin.FAMILIES == FAMILIES


def test_junit_gets_the_same_message(inner: Inner, pytester: pytest.Pytester) -> None:
    """The JUnit file of pytest itself has the reason and the script."""
    inner("-k", f"[{VIOLATED}]", "--junitxml=out.xml")
    text = (pytester.path / "out.xml").read_text()
    assert "off by 7" in text
    assert "bnverify.replay(subject, case" in text


def test_the_check_runs_once(inner: Inner, made_up: Stand) -> None:
    """All selected laws share one check with the suite's profile."""
    inner("-k", FIVE)
    (asked,) = made_up.asked
    assert asked["subject"] == "mine"
    assert asked["profile"] == "quick"
    assert asked["seed"] == 0
    assert asked["select"] == [evidence.law for evidence in EVIDENCE]
    assert asked["target"] == f"{Path.cwd() / 'test_step.py'}:test_mine"  # works in any directory


def test_a_long_check_reports_its_progress(
    inner: Inner, made_up: Stand, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A line on stderr, despite pytest's capturing, unless -q is given."""
    monkeypatch.setattr(progress, "SILENCE", -1.0)
    expected = "bnverify: mine: 40% cases of shape (2, 1), 7 cases so far"
    assert expected in inner("-k", VIOLATED).stderr.str()
    made_up.fixed = True  # else its stored case is replayed instead of a check
    assert "bnverify: mine" not in inner("-q", "-k", VIOLATED).stderr.str()


def test_options_override_the_suite(inner: Inner, made_up: Stand) -> None:
    """--bnverify-profile and --bnverify-seed are passed to the check."""
    inner("--bnverify-profile", "nightly", "--bnverify-seed", "11", "-k", f"[{HELD}]")
    (asked,) = made_up.asked
    assert (asked["profile"], asked["seed"]) == ("nightly", 11)


def test_a_failing_check_runs_once_and_is_reported_by_every_law(
    inner: Inner, made_up: Stand, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the subject raises, the first test shows the traceback, the others the message."""
    tries = []

    def verify(*args: object, **options: object) -> None:
        tries.append(1)
        raise RuntimeError("the user's own")

    monkeypatch.setattr(check, "verify", verify)
    result = inner("-k", FIVE)
    result.assert_outcomes(failed=5)
    named = [line for line in result.outlines if line.startswith("the check failed: ")]
    assert named == ["the check failed: RuntimeError: the user's own"] * 4
    assert tries == [1]


def test_a_failing_case_is_replayed_first(inner: Inner, made_up: Stand) -> None:
    """While the case still fails, the next run needs no check."""
    inner("-k", f"[{VIOLATED}]")
    assert made_up.replayed == []
    result = inner("-k", f"[{VIOLATED}]")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*replayed from the last run*"])
    assert len(made_up.asked) == 1
    (remembered,) = made_up.replayed
    assert (remembered.law, remembered.target) == (VIOLATED, SHOWN.target)
    assert remembered.script == SHOWN.script


def test_a_fixed_case_is_forgotten(inner: Inner, made_up: Stand) -> None:
    """Once the case passes, the check runs again, and the case is not replayed any more."""
    inner("-k", f"[{VIOLATED}]")
    made_up.fixed = True
    inner("-k", f"[{VIOLATED}]").assert_outcomes(passed=1)
    inner("-k", f"[{VIOLATED}]").assert_outcomes(passed=1)
    assert len(made_up.replayed) == 1
    assert len(made_up.asked) == 3


def test_a_case_that_no_longer_fits_is_forgotten(
    inner: Inner, made_up: Stand, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the subject has changed its shape, the old case is ignored without an error."""
    inner("-k", f"[{VIOLATED}]")

    def replay(*args: object) -> None:
        raise TypeError("of another shape")

    monkeypatch.setattr(check, "show_again", replay)
    inner("-k", f"[{VIOLATED}]").stdout.fnmatch_lines(["*off by 7*"])
    assert len(made_up.asked) == 2


def test_without_a_database_nothing_is_stored(
    inner: Inner, made_up: Stand, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hypothesis's "ci" profile has none."""
    remembering(monkeypatch, None)
    for _ in range(2):
        inner("-k", f"[{VIOLATED}]").assert_outcomes(failed=1)
    assert made_up.replayed == []


def test_a_subject_may_be_made_lazily(
    inner: Inner, made_up: Stand, pytester: pytest.Pytester
) -> None:
    """A function that makes the subject is called once, when the first test runs."""
    late = STEP.replace("bnverify.suite(mine", "bnverify.suite(make") + "\nmade = []\n"
    late += "def make():\n    made.append(1)\n    assert made == [1]\n    return mine\n"
    # The function must exist when the suite is made.
    head, tail = late.split("test_mine = ")
    line, rest = tail.split("\n", 1)
    pytester.makepyfile(test_step=f"{head}{rest}\ntest_mine = {line}\n")
    inner("-k", FIVE).assert_outcomes(passed=2, failed=1, skipped=2)
    assert len(made_up.asked) == 1


PARALLEL_STEP = STEP.replace(
    "test_mine =", "many = bnverify.Parallel('many', mine, nothing)\ntest_mine ="
)


def test_a_parallel_step_has_additional_tests(inner: Inner, pytester: pytest.Pytester) -> None:
    """They are collected with the others, so a function that returns a Parallel is rejected."""
    pytester.makepyfile(test_step=PARALLEL_STEP.replace("suite(mine", "suite(many"))
    result = inner("--collect-only", "-q")
    for law in PARALLEL:
        result.stdout.fnmatch_lines([f"test_step.py::test_mine[[]{law}[]]"])
    pytester.makepyfile(test_step=PARALLEL_STEP.replace("suite(mine", "suite(lambda: many"))
    result = inner("-k", f"[{HELD}]")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*pass the Parallel itself*"])


def test_shards_cover_every_test_once(inner: Inner) -> None:
    """The shards of --bnverify-shard K/N are disjoint and together complete."""
    seen: list[str] = []
    for shard in ("1/3", "2/3", "3/3"):
        lines = inner("--collect-only", "-q", "--bnverify-shard", shard).outlines
        seen += [line for line in lines if line.startswith("test_step.py::")]
    assert sorted(seen) == sorted(f"test_step.py::test_mine[{law}]" for law in TESTS)


def test_an_invalid_shard_is_rejected(inner: Inner) -> None:
    """It gives one line, and pytest's status for usage errors."""
    result = inner("--bnverify-shard", "4/3")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["ERROR: --bnverify-shard: a shard is K/N with K in 1 to N*"])


def test_workers_share_one_check(
    pytester: pytest.Pytester, made_up: Stand, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One worker finds the report that another has made."""
    monkeypatch.setenv("PYTEST_XDIST_TESTRUNUID", "of this run")
    (pytester.path / "gw0").mkdir()

    class Factory:
        def getbasetemp(self) -> Path:
            return pytester.path / "gw0"

    class Request:
        node = type("Node", (), {"nodeid": "test_step.py::test_mine[law]"})

        def getfixturevalue(self, name: str) -> Factory:
            return Factory()

    report = made_up.verify(Subject("mine", print, print, print), "quick", select=[HELD])
    with shared(Request()) as share:  # type: ignore[arg-type] # a minimal request
        assert share.load() is None
        share.save(report)
    with shared(Request()) as share:  # type: ignore[arg-type] # a minimal request
        assert share.load() == report


def test_the_script_can_load_a_suite(pytester: pytest.Pytester) -> None:
    """A counterexample of a suite loads the suite's subject."""
    pytester.makepyfile(test_step=STEP)
    with pytest.raises(ValueError, match=r"test_step.py:test_mine: init must return"):
        load("test_step.py:test_mine")


HISTORY = Counterexample(
    "statistics_fold_each_batch_once",
    None,
    "test_step.py:test_mine",
    (Call("begin", CASE), Call("restore", "pickle"), Call("evaluate", CASE), Call("copy")),
)


@pytest.mark.parametrize("shown", [SHOWN, HISTORY, Counterexample(VIOLATED)])
@pytest.mark.parametrize("residual", [7.0, float("inf"), None])
def test_a_counterexample_survives_json_and_memory(
    monkeypatch: pytest.MonkeyPatch, shown: Counterexample, residual: float | None
) -> None:
    """A case, a history, or neither: data and script are restored as stored."""
    remembering(monkeypatch, InMemoryExampleDatabase())
    evidence = Evidence.of(shown.law, "violated", residual=residual, counterexample=shown)
    assert Counterexample.from_json(json.loads(json.dumps(shown.to_json()))).script == shown.script
    kept = memory.Memory("test_step.py::test_mine[law]")
    kept.keep(evidence)
    recalled = kept.recall()
    assert recalled is not None
    assert recalled.counterexample is not None
    assert json.dumps(recalled.to_json()) == json.dumps(evidence.to_json())
    assert recalled.counterexample.script == shown.script
    assert memory.Memory("test_step.py::test_mine[other]").recall() is None
    kept.forget()
    assert kept.recall() is None


def test_the_plugin_imports_nothing_heavy() -> None:
    """It is loaded in every pytest run."""
    code = (
        "import sys, bnverify.testing.plugin\n"
        "heavy = {'jax', 'numpy', 'flax', 'hypothesis', 'rich', 'bnverify.laws'} & set(sys.modules)\n"
        "sys.exit(f'loaded {heavy}' if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_collecting_a_suite_imports_no_jax(pytester: pytest.Pytester) -> None:
    """With a lazily made subject, collection is as fast as without bnverify."""
    pytester.makepyfile(
        test_step="import bnverify, sys\n"
        "def make():\n    import jax\n"
        "test_mine = bnverify.suite(make)\n"
        "assert not {'jax', 'hypothesis.strategies'} & set(sys.modules)\n"
    )
    done = outer(pytester.path, "--collect-only", "-q", "-p", "no:hypothesispytest")
    assert done.returncode == 0, done.stdout + done.stderr


def outer(folder: Path, *args: str) -> "subprocess.CompletedProcess[str]":
    """Run pytest in its own process, with the plugin."""
    installed = any(entry.name == "bnverify" for entry in entry_points(group="pytest11"))
    ours = () if installed else ("-p", "bnverify.testing.plugin")
    return subprocess.run(
        [sys.executable, "-m", "pytest", *ours, *args],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ
        | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
    )


WRONG = """
import bnverify

def make():
    from dataclasses import replace
    from bnverify.reference import sgd
    good = sgd()
    evaluate = lambda s, x, y: good.evaluate(s, x, y).reshape(1, 1)
    return replace(good, evaluate=evaluate)

test_mine = bnverify.suite(make, "quick")
"""
STRUCTURE = [law.name for law in LAWS.values() if law.family == "structure"]
ORDER = """
import os
def pytest_collection_modifyitems(items):
    if "BACKWARDS" in os.environ: items.reverse()
"""


def verdicts(folder: Path, workers: str, order: str) -> list[str]:
    """Return the outcomes of the structural laws of a step that is really checked."""
    (folder / "test_step.py").write_text(WRONG)
    (folder / "conftest.py").write_text(ORDER)
    laws = " or ".join(f"[{law}]" for law in STRUCTURE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(order, "1")
        done = outer(folder, "-k", laws, "-n", workers, "-rA", "-p", "no:cacheprovider")
    lines = done.stdout.splitlines()
    return sorted(line.split(" - ")[0] for line in lines if line[:6] in OUTCOMES)


def test_a_suite_of_a_wrong_step_fails_at_the_right_law(tmp_path: Path) -> None:
    """In its own process with a worker, one law fails and the others pass."""
    wrong = "eval_loss_has_shape_one"
    passed = [f"PASSED test_step.py::test_mine[{law}]" for law in STRUCTURE if law != wrong]
    assert verdicts(tmp_path, "1", "FORWARDS") == sorted(
        [*passed, f"FAILED test_step.py::test_mine[{wrong}]"]
    )


@pytest.mark.nightly
def test_workers_and_orders_give_the_same_verdicts(tmp_path: Path) -> None:
    """The same laws fail with -n 0, with -n 2 and in reverse order."""
    runs = [("0", "FORWARDS"), ("2", "FORWARDS"), ("0", "BACKWARDS")]
    first, *others = (verdicts(tmp_path, *run) for run in runs)
    assert others == [first, first]
