"""bnverify.suite and the pytest plugin, on reports made up for the purpose."""

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

# Loaded before any test runs: pytester forgets what is first imported inside it, and a second jax
# in one process is refused.
from bnverify import Subject, check
from bnverify.evidence import Call, Cause, Counterexample, Evidence, Report, Violation
from bnverify.laws import FAMILIES, LAWS
from bnverify.model import Case
from bnverify.target import load
from bnverify.testing import memory, plugin
from bnverify.testing.workers import shared

pytest_plugins = ("pytester",)

ROOT = Path(__file__).parents[1]
PARALLEL = [name for name, law in LAWS.items() if law.family == "parallel"]
TESTS = [name for name in LAWS if name not in PARALLEL]
"""What a suite of a step for one device holds."""

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
    """Stands in for the check: says what EVIDENCE says, and what it was asked."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.replayed: list[Counterexample] = []
        self.fixed = False

    def verify(
        self, subject: Subject, profile: str, *, select: Sequence[str], **options: object
    ) -> Report:
        asked = {"subject": subject.name, "profile": profile, "select": select, **options}
        self.asked.append(asked)
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
    """Let the settings of Hypothesis name this database."""
    named = settings(database=database)
    monkeypatch.setattr(memory, "settings", lambda: named)


Inner = Callable[..., pytest.RunResult]


@pytest.fixture
def inner(pytester: pytest.Pytester, request: pytest.FixtureRequest, made_up: Stand) -> Inner:
    """Run pytest in this process, with the plugin, on a file with one suite."""
    pytester.makepyfile(test_step=STEP)
    plugins = request.config.pluginmanager
    # Installed, it is there by its entry point, and naming it again would be refused.
    ours = () if plugins.has_plugin("bnverify") else ("-p", "bnverify.testing.plugin")
    return lambda *args: pytester.runpytest_inprocess(*ours, "-p", "no:randomly", *args)


def test_a_suite_is_one_test_for_each_law(inner: Inner) -> None:
    """The ids are the names of the laws."""
    result = inner("--collect-only", "-q")
    for law in TESTS:
        result.stdout.fnmatch_lines([f"test_step.py::test_mine[[]{law}[]]"])


def test_a_tick_means_that_something_was_seen(inner: Inner) -> None:
    """Proved and held pass, violated fails, untriggered and exempt are skipped with a reason."""
    result = inner("-k", FIVE, "-rs")
    result.assert_outcomes(passed=2, failed=1, skipped=2)
    result.stdout.fnmatch_lines_random(
        ["*untriggered: no case reached it*", "*exempt: it has none*"]
    )


def test_a_violation_says_what_it_is_and_nothing_else(inner: Inner) -> None:
    """Claim, reason, diagnosis and counterexample; no traceback of bnverify's own."""
    result = inner("-k", f"[{VIOLATED}]")
    text = str(result.stdout)
    for part in (LAWS[VIOLATED].claim, "off by 7", str(CAUSE), SHOWN.script.strip()):
        assert part in text
    assert "suite.py" not in text
    assert "Traceback" not in text
    assert result.ret == 1


def test_the_short_summary_says_what_was_seen(inner: Inner) -> None:
    """The test's name has the law; beside it stand the leaf and the reason, not a class of ours."""
    result = inner("-k", f"[{VIOLATED}]")
    result.stdout.fnmatch_lines([f"FAILED test_step.py::test_mine[[]{VIOLATED}[]] - off by 7*"])


def test_a_family_is_selected_by_its_mark(inner: Inner, made_up: Stand) -> None:
    """Under --strict-markers, too; -k takes the family's name as well."""
    family = [name for name in TESTS if LAWS[name].family == "update"]
    for options in (("-m", "bnverify_update"), ("-k", "bnverify_update")):
        inner("--strict-markers", *options)
        assert made_up.asked[-1]["select"] == family
    assert plugin.FAMILIES == FAMILIES


def test_junit_gets_the_same_message(inner: Inner, pytester: pytest.Pytester) -> None:
    """The JUnit file of pytest itself carries the reason and the script."""
    inner("-k", f"[{VIOLATED}]", "--junitxml=out.xml")
    text = (pytester.path / "out.xml").read_text()
    assert "off by 7" in text
    assert "bnverify.replay(subject, case" in text


def test_the_check_runs_once(inner: Inner, made_up: Stand) -> None:
    """All laws share one check, of the laws selected, by the profile of the suite."""
    inner("-k", FIVE)
    (asked,) = made_up.asked
    assert asked["subject"] == "mine"
    assert asked["profile"] == "quick"
    assert asked["seed"] == 0
    assert asked["select"] == [evidence.law for evidence in EVIDENCE]
    assert asked["target"] == f"{Path.cwd() / 'test_step.py'}:test_mine"  # from any directory


def test_options_take_the_place_of_the_suites_own(inner: Inner, made_up: Stand) -> None:
    """--bnverify-profile and --bnverify-seed reach the engine."""
    inner("--bnverify-profile", "nightly", "--bnverify-seed", "11", "-k", f"[{HELD}]")
    (asked,) = made_up.asked
    assert (asked["profile"], asked["seed"]) == ("nightly", 11)


def test_a_failing_check_is_told_by_every_law_and_made_once(
    inner: Inner, made_up: Stand, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the subject itself raises, the first law shows it, the others name it."""
    tries = []

    def verify(*args: object, **options: object) -> None:
        tries.append(1)
        raise RuntimeError("the user's own")

    monkeypatch.setattr(check, "verify", verify)
    result = inner("-k", FIVE)
    result.assert_outcomes(failed=5)
    named = [line for line in result.outlines if line.startswith("the check could not be made: ")]
    assert named == ["the check could not be made: RuntimeError: the user's own"] * 4
    assert tries == [1]


def test_a_failing_case_is_tried_first_next_time(inner: Inner, made_up: Stand) -> None:
    """The next run replays the case, and as long as it fails needs no check."""
    inner("-k", f"[{VIOLATED}]")
    assert made_up.replayed == []
    result = inner("-k", f"[{VIOLATED}]")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*the case of the last run, tried first*"])
    assert len(made_up.asked) == 1
    (remembered,) = made_up.replayed
    assert (remembered.law, remembered.target) == (VIOLATED, SHOWN.target)
    assert remembered.script == SHOWN.script


def test_a_mended_case_is_forgotten(inner: Inner, made_up: Stand) -> None:
    """Once the case passes, the whole check decides, and the case is not tried again."""
    inner("-k", f"[{VIOLATED}]")
    made_up.fixed = True
    inner("-k", f"[{VIOLATED}]").assert_outcomes(passed=1)
    inner("-k", f"[{VIOLATED}]").assert_outcomes(passed=1)
    assert len(made_up.replayed) == 1
    assert len(made_up.asked) == 3


def test_a_case_that_no_longer_fits_is_forgotten(
    inner: Inner, made_up: Stand, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A subject that has changed its shape makes the old case useless, not an error."""
    inner("-k", f"[{VIOLATED}]")

    def replay(*args: object) -> None:
        raise TypeError("of another shape")

    monkeypatch.setattr(check, "show_again", replay)
    inner("-k", f"[{VIOLATED}]").stdout.fnmatch_lines(["*off by 7*"])
    assert len(made_up.asked) == 2


def test_without_a_database_nothing_is_remembered(
    inner: Inner, made_up: Stand, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hypothesis's own profile for CI has none."""
    remembering(monkeypatch, None)
    for _ in range(2):
        inner("-k", f"[{VIOLATED}]").assert_outcomes(failed=1)
    assert made_up.replayed == []


def test_a_subject_may_be_made_late(
    inner: Inner, made_up: Stand, pytester: pytest.Pytester
) -> None:
    """A function that makes the subject is called when the first law runs, and once."""
    late = STEP.replace("bnverify.suite(mine", "bnverify.suite(make") + "\nmade = []\n"
    late += "def make():\n    made.append(1)\n    assert made == [1]\n    return mine\n"
    # The function must be there when the suite is made.
    head, tail = late.split("test_mine = ")
    line, rest = tail.split("\n", 1)
    pytester.makepyfile(test_step=f"{head}{rest}\ntest_mine = {line}\n")
    inner("-k", FIVE).assert_outcomes(passed=2, failed=1, skipped=2)
    assert len(made_up.asked) == 1


PARALLEL_STEP = STEP.replace(
    "test_mine =", "many = bnverify.Parallel('many', mine, nothing)\ntest_mine ="
)


def test_a_parallel_step_has_the_tests_of_many_devices(
    inner: Inner, pytester: pytest.Pytester
) -> None:
    """They are collected beside the others; made late, it is refused: it would be too late for them."""
    pytester.makepyfile(test_step=PARALLEL_STEP.replace("suite(mine", "suite(many"))
    result = inner("--collect-only", "-q")
    for law in PARALLEL:
        result.stdout.fnmatch_lines([f"test_step.py::test_mine[[]{law}[]]"])
    pytester.makepyfile(test_step=PARALLEL_STEP.replace("suite(mine", "suite(lambda: many"))
    result = inner("-k", f"[{HELD}]")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*bnverify.suite needs the Parallel itself*"])


def test_shards_cover_every_test_once(inner: Inner) -> None:
    """--bnverify-shard K/N: disjoint, and together all."""
    seen: list[str] = []
    for shard in ("1/3", "2/3", "3/3"):
        lines = inner("--collect-only", "-q", "--bnverify-shard", shard).outlines
        seen += [line for line in lines if line.startswith("test_step.py::")]
    assert sorted(seen) == sorted(f"test_step.py::test_mine[{law}]" for law in TESTS)


def test_a_shard_that_is_none_is_refused(inner: Inner) -> None:
    """One line, and pytest's own status for wrong use."""
    result = inner("--bnverify-shard", "4/3")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["ERROR: --bnverify-shard: a shard is K/N with K in 1 to N*"])


def test_workers_share_one_check(
    pytester: pytest.Pytester, made_up: Stand, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What one worker of a run has made, another finds."""
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
    with shared(Request()) as share:  # type: ignore[arg-type] # as much as it needs
        assert share.load() is None
        share.save(report)
    with shared(Request()) as share:  # type: ignore[arg-type] # likewise
        assert share.load() == report


def test_the_script_names_a_suite(pytester: pytest.Pytester) -> None:
    """What a counterexample of a suite loads is the subject of that suite."""
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
    """A case, a history or neither: what is remembered is what was shown, as data and as a script."""
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


def test_the_plugin_loads_nothing_heavy() -> None:
    """It is loaded in every run of everybody's tests."""
    code = (
        "import sys, bnverify.testing.plugin\n"
        "heavy = {'jax', 'numpy', 'flax', 'hypothesis', 'rich', 'bnverify.laws'} & set(sys.modules)\n"
        "sys.exit(f'loaded {heavy}' if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_collecting_a_suite_loads_no_jax(pytester: pytest.Pytester) -> None:
    """Where the subject is made late, collection is as quick as without bnverify."""
    pytester.makepyfile(
        test_step="import bnverify, sys\n"
        "def make():\n    import jax\n"
        "test_mine = bnverify.suite(make)\n"
        "assert not {'jax', 'hypothesis.strategies'} & set(sys.modules)\n"
    )
    done = outer(pytester.path, "--collect-only", "-q", "-p", "no:hypothesispytest")
    assert done.returncode == 0, done.stdout + done.stderr


def outer(folder: Path, *args: str) -> "subprocess.CompletedProcess[str]":
    """Run pytest in a process of its own, with the plugin."""
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
    """Return the outcomes of the laws of structure on a step that is really checked."""
    (folder / "test_step.py").write_text(WRONG)
    (folder / "conftest.py").write_text(ORDER)
    laws = " or ".join(f"[{law}]" for law in STRUCTURE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(order, "1")
        done = outer(folder, "-k", laws, "-n", workers, "-rA", "-p", "no:cacheprovider")
    lines = done.stdout.splitlines()
    return sorted(line.split(" - ")[0] for line in lines if line[:6] in OUTCOMES)


def test_a_suite_of_a_wrong_step_fails_where_it_is_wrong(tmp_path: Path) -> None:
    """In a process of its own with a worker: one law fails, the others pass."""
    wrong = "eval_loss_has_shape_one"
    passed = [f"PASSED test_step.py::test_mine[{law}]" for law in STRUCTURE if law != wrong]
    assert verdicts(tmp_path, "1", "FORWARDS") == sorted(
        [*passed, f"FAILED test_step.py::test_mine[{wrong}]"]
    )


@pytest.mark.nightly
def test_workers_and_orders_give_the_same_verdicts(tmp_path: Path) -> None:
    """With -n 0, with -n 2 and backwards, the same laws fail."""
    runs = [("0", "FORWARDS"), ("2", "FORWARDS"), ("0", "BACKWARDS")]
    first, *others = (verdicts(tmp_path, *run) for run in runs)
    assert others == [first, first]
