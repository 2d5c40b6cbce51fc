"""Reports on a terminal: verdict first, 80 columns, without colour, in ASCII too."""

import io
import json
from dataclasses import replace
from xml.etree import ElementTree as ET

import numpy as np
import pytest

from bnverify.check import LawJudged, PhaseStarted
from bnverify.evidence import READ_ONLY, Cause, Counterexample, Evidence, Report
from bnverify.laws import LAWS
from bnverify.laws.mismatch import Mismatch
from bnverify.mistakes import MISTAKES
from bnverify.model import Case
from bnverify.report import terminal
from bnverify.report.formats import render
from bnverify.report.matrix import LEGEND, matrix
from bnverify.report.progress import progress
from bnverify.report.symbols import ASCII, STYLES, UNICODE
from bnverify.runs import never

SHOWN = Counterexample(
    "variance_is_never_negative", Case.of(seed=0, x=[[1.0] * 40], y=[0.0], lr=0.1), "steps.py:mine"
)
CAUSE = Cause("ema_applied_twice", "the momentum is 0.81")
WRONG = Mismatch("batch_stats/norm/var", (3,), -0.25, 0.0, 1e-7)
FLOWS = {
    "params": ["batch_stats", "lr", "params", "x", "y"],
    "batch_stats": ["batch_stats", "params"],
    "opt_state": [],
    "loss": ["params", "x", "y"],
    "eval_loss": ["batch_stats", "params", "x", "y"],
    "eval_opt_state": [],
}
REPORT = Report(
    subject="my step",
    profile="quick",
    seed=7,
    results=(
        Evidence(
            "variance_is_never_negative",
            "statistics",
            "violated",
            12,
            3e9,
            str(WRONG),
            SHOWN,
            CAUSE,
            (1, 40),
            mismatch=WRONG,
            hint="if it is meant: negative=True",
            failed=7,
            path=("batch_stats", "mul at steps.py:3 (step)", "params"),
        ),
        Evidence("gradients_match_params", "structure", "proved", reason="every N and D"),
        Evidence("momentum_is_as_declared", "statistics", "exempt", reason="it declares none"),
        Evidence("statistics_stay_finite", "statistics", "held", 1234567, 0.256),
        Evidence("eval_repeats_to_the_bit", "evaluation", "untriggered", reason="never reached"),
    ),
    cases=1234567,
    seconds=12.34,
    versions={"jax": "0.0.1", "flax": "0.0.2"},
    influence={"scope": "every N and D", "proved": True, "matrix": FLOWS, "unknown": []},
    notes=("primitives read conservatively: [weird]",),
)


LEAVES = {
    "params/Dense_0/kernel": ["params/Dense_0/kernel", "batch_stats/BatchNorm_0/mean", "x"],
    "params/Dense_0/bias": ["params/Dense_0/bias"],
    "batch_stats/BatchNorm_0/mean": ["batch_stats/BatchNorm_0/mean", "x"],
}


class Terminal(io.StringIO):
    """A stream that claims to be a terminal."""

    def __init__(self, encoding: str = "utf-8") -> None:
        super().__init__()
        self._encoding = encoding

    @property
    def encoding(self) -> str:  # type: ignore[override] # None in io.StringIO
        return self._encoding

    def isatty(self) -> bool:
        return True


def shown(
    monkeypatch: pytest.MonkeyPatch,
    report: Report = REPORT,
    *,
    width: int = 80,
    encoding: str = "utf-8",
    no_color: bool = True,
    verbosity: int = terminal.NORMAL,
) -> str:
    for name in ("FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("TERM", "xterm-256color")
    if no_color:
        monkeypatch.setenv("NO_COLOR", "1")
    file = Terminal(encoding)
    file.write(terminal.render(report, file, verbosity))
    return file.getvalue()


def plain(text: str) -> str:
    return text.replace("\x1b[1m", "").replace("\x1b[2m", "").replace("\x1b[0m", "")


def test_each_status_has_a_word_and_a_sign(monkeypatch: pytest.MonkeyPatch) -> None:
    """The five statuses can be told apart without colour."""
    text = plain(shown(monkeypatch, verbosity=terminal.VERBOSE))
    for signs in (UNICODE, ASCII):
        assert len({signs.status[status] for status in STYLES}) == len(STYLES)
    for evidence in REPORT.results:
        assert f" {UNICODE.status[evidence.status]} {evidence.status} " in text


def test_no_line_but_a_script_is_wider_than_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """80 columns are enough; only the script to paste is not wrapped."""
    for line in plain(shown(monkeypatch, verbosity=terminal.VERBOSE)).splitlines():
        assert len(line) <= 80 or line in SHOWN.script.splitlines()


def test_the_script_can_be_pasted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The counterexample is printed literally, without indent, wrapping or markup."""
    assert SHOWN.script in shown(monkeypatch)


def test_a_violation_is_complete(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has claim, leaf and entry, actual and expected value, number of cases, cause and fix."""
    lines = plain(shown(monkeypatch)).splitlines()
    text = " ".join(" ".join(lines).split())
    assert LAWS["variance_is_never_negative"].claim in text
    assert "batch_stats/norm/var[3]: got -0.25, expected 0 ± 1e-07 (2.5e+06x the tolerance)" in text
    assert "in 7 of 12 cases" in text
    assert "If it is meant: negative=True" in text
    known = MISTAKES["ema_applied_twice"]
    assert f"Likely cause: {known.title} (the momentum is 0.81)." in text
    assert f"Fix: {known.fix}." in text


def test_a_violation_fits_on_a_screen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Long arrays are written as the expression that makes them."""
    case = Case.of(seed=0, x=np.zeros((2, 64)), y=[0.0, 0.0], lr=0.1)
    found = replace(REPORT.results[0], counterexample=replace(SHOWN, case=case))
    lines = shown(monkeypatch, replace(REPORT, results=(found,), influence={})).splitlines()
    assert "x=np.zeros((2, 64)), y=[0.0, 0.0], lr=0.1)" in "\n".join(lines)
    assert len(lines) <= 30


def test_violations_with_one_cause_are_grouped(monkeypatch: pytest.MonkeyPatch) -> None:
    """A group has the cause once, one script and all its laws; a violation without cause is alone."""
    first = REPORT.results[0]
    second = replace(first, law="momentum_is_as_declared", shape=(4, 1))
    unknown = replace(first, law="statistics_stay_finite", cause=None)
    text = plain(shown(monkeypatch, replace(REPORT, results=(first, second, unknown))))
    assert "Most likely cause (explains 2 of 3 violations): ema_applied_twice" in text
    assert text.count("Likely cause: ") == 1
    assert "── ✗ ema_applied_twice: 2 laws violated ─" in text
    assert "To reproduce momentum_is_as_declared:" in text  # it has the smaller case
    assert "── ✗ statistics_stay_finite ─" in text


def test_machine_formats_have_the_same_groups() -> None:
    """GitHub gets one error per cause; SARIF and JUnit keep one per law, with the cause's name."""
    first = REPORT.results[0]
    second = replace(first, law="momentum_is_as_declared", shape=(4, 1))
    other = replace(first, law="statistics_stay_finite", cause=None)
    told = [replace(REPORT, results=(other, first, *REPORT.results[1:3], second))]
    errors = [line for line in render(told, "github").splitlines() if line.startswith("::error")]
    titles = [line.split("::")[1].split(",")[0] for line in errors]
    assert titles == [
        "error title=bnverify%3A ema_applied_twice%3A 2 laws violated",
        "error title=bnverify%3A statistics_stay_finite batch_stats/norm/var",
        "error title=bnverify",
    ]
    assert errors[0].count("Likely cause: ") == 1
    assert all(law in errors[0] for law in (first.law, second.law))
    results = json.loads(render(told, "sarif"))["runs"][0]["results"]
    causes = {result["ruleId"]: result["properties"].get("cause") for result in results}
    assert causes == {first.law: CAUSE.mistake, second.law: CAUSE.mistake, other.law: None}
    suite = ET.fromstring(render(told, "junit"))[0]  # noqa: S314 - our own output
    kinds = {case.get("name"): each.get("type") for case in suite for each in case.iter("failure")}
    assert kinds == causes
    summary = render(told, "github summary")
    assert summary.count("Likely cause: ") == 1


def test_a_cause_is_data_and_reads_back() -> None:
    """The JSON has the mistake, its evidence, title, fix and source as fields, and the text."""
    known = MISTAKES["ema_applied_twice"]
    told = json.loads(REPORT.to_json())["results"][0]
    assert told["cause"] == {
        "mistake": "ema_applied_twice",
        "seen": "the momentum is 0.81",
        "title": known.title,
        "fix": known.fix,
        "source": known.source,
    }
    assert told["diagnosis"] == str(CAUSE) == REPORT.results[0].diagnosis
    again = Evidence.from_json(told)
    assert (again.cause, again.path) == (CAUSE, REPORT.results[0].path)
    with pytest.raises(ValueError, match="no mistake is named 'slip'"):
        Cause("slip")


def test_a_witness_law_reports_what_was_changed_and_what_never_moved() -> None:
    """Its violation has no mismatch of values."""
    law = LAWS["inputs_reach_the_statistics"]
    assert never(law, 256) == "Changing x never changed the new batch_stats in 256 cases"
    for each in LAWS.values():
        assert bool(each.never) == (each.kind == "witness"), each.name


@pytest.mark.parametrize(
    ("mismatch", "text"),
    [
        (Mismatch("w", (1, 0), 1.5, 1.25, 0.0), "w[1, 0]: got 1.5, expected exactly 1.25"),
        (Mismatch("w", (), 1.5, 1.25, 1.2e-38), "w: got 1.5, expected exactly 1.25"),
        (Mismatch("loss", (), float("nan"), 1.0, 0.1), "loss: got nan, expected 1 ± 0.1"),
        (
            Mismatch("loss", (), float("inf"), float("nan"), 0.0),
            "loss: got inf, expected a finite value",
        ),
        (
            Mismatch("w", (), 1.000001, 1.0, 1e-8, run="zero_lr"),
            "w: got 1.000001 with lr = 0, expected 1 ± 1e-08 (100x the tolerance)",
        ),
        (
            Mismatch("s/mean", (2,), 0.1, 0.9, 1e-6, "momentum"),
            "momentum of s/mean[2]: got 0.1, expected 0.9 ± 1e-06 (800,000x the tolerance)",
        ),
    ],
    ids=lambda value: value.leaf if isinstance(value, Mismatch) else "",
)
def test_a_mismatch_is_one_line(mismatch: Mismatch, text: str) -> None:
    """It has enough digits to tell the values apart, and no tolerance if there is none."""
    assert str(mismatch) == text
    again = Mismatch.from_json(json.loads(json.dumps(mismatch.to_json(), allow_nan=False)))
    assert repr(again) == repr(mismatch)


def test_the_summary_has_the_scope_of_the_check(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first lines have the verdict, cause, counts, cases, time and settings."""
    end = " ".join(plain(shown(monkeypatch, verbosity=terminal.VERBOSE)).splitlines()[:5])
    for part in (
        "my step: 1 of 5 laws violated",
        "1 proved, 1 held, 1 violated, 1 untriggered, 1 exempt",
        "1,234,567 cases in 12.3 s",
        "Most likely cause: ema_applied_twice",
        "profile quick, seed 7",
        "jax 0.0.1, flax 0.0.2",
    ):
        assert part in end


def test_an_untriggered_law_is_not_a_clean_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    """If nothing is violated but a law was not exercised, the verdict says so."""
    report = replace(REPORT, results=REPORT.results[1:])
    assert "my step: none violated, 1 not reached" in shown(monkeypatch, report)
    assert "my step: all hold" in shown(monkeypatch, replace(REPORT, results=REPORT.results[1:4]))


def test_normal_has_a_line_per_family_and_quiet_only_the_verdict(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Laws are only listed with -v."""
    report = replace(REPORT, results=REPORT.results[1:4], influence={}, notes=())
    lines = plain(shown(monkeypatch, report)).splitlines()
    assert lines[-2:] == [" ■ structure    1 proved", " ✓ statistics   1 held, 1 exempt"]
    assert plain(shown(monkeypatch, REPORT, verbosity=terminal.QUIET)) == (
        "my step: 1 of 5 laws violated\n"
    )


def test_laws_that_need_runs_are_counted_where_none_are_made(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A check with --proofs counts these laws, and says that they need cases."""
    laws = [name for name, law in LAWS.items() if law.family == "statistics"]
    results = tuple(Evidence.of(name, "untriggered", reason=READ_ONLY) for name in laws)
    text = plain(shown(monkeypatch, replace(REPORT, results=results), verbosity=terminal.VERBOSE))
    assert f"nothing violated in the trace; {len(laws)} laws need cases to be run" in text
    assert f"? untriggered {len(laws)} laws: {READ_ONLY}" in text
    assert not any(name in text for name in laws)


def test_str_of_a_report_is_its_verdict() -> None:
    """It is short, and names the violated laws."""
    assert str(REPORT).splitlines() == [
        "my step: 1 of 5 laws violated",
        "1 proved, 1 held, 1 violated, 1 untriggered, 1 exempt; 1,234,567 cases in 12.3 s",
        f"violated: variance_is_never_negative: {WRONG}",
        "  batch_stats -> mul at steps.py:3 (step) -> params; If it is meant: negative=True",
        f"  likely cause: {CAUSE}",
    ]
    assert repr(REPORT).startswith("<Report my step: 1 of 5 laws violated; 1 proved")
    assert len(repr(REPORT)) < 200


def test_no_color_is_honoured(monkeypatch: pytest.MonkeyPatch) -> None:
    """NO_COLOR removes every colour and nothing else."""
    coloured, without = shown(monkeypatch, no_color=False), shown(monkeypatch)
    assert "\x1b[1;31m" in coloured
    assert "\x1b[1;31m" not in without
    assert "\x1b[32m" not in without


def test_an_ascii_terminal_gets_ascii(monkeypatch: pytest.MonkeyPatch) -> None:
    """No other characters are used if the encoding cannot represent them."""
    text = shown(monkeypatch, encoding="ascii", verbosity=terminal.VERBOSE)
    assert text.isascii()
    assert " X violated" in text
    assert "expected 0 +- 1e-07" in text


def test_notes_are_printed_literally(monkeypatch: pytest.MonkeyPatch) -> None:
    """Square brackets in a note are text, not markup."""
    assert "note: primitives read conservatively: [weird]" in plain(shown(monkeypatch))


def test_the_matrix_marks_the_entries_that_matter() -> None:
    """A forbidden flow leaks, a required one may be missing, and an absent forbidden one is kept out."""
    entries = matrix(FLOWS)
    cell = {
        (output, source): kind
        for output, kinds in entries.rows.items()
        for source, kind in zip(entries.inputs, kinds, strict=True)
    }
    assert cell["params", "batch_stats"] == "leaks"
    assert cell["batch_stats", "x"] == "missing"
    assert cell["loss", "batch_stats"] == "kept out"
    assert cell["params", "y"] == "may"
    assert cell["loss", "lr"] == "cannot"
    seen = matrix(FLOWS, ["targets_reach_the_params"]).rows["params"]
    held = dict(zip(entries.inputs, seen, strict=True))
    assert held["y"] == "shown"
    assert held["x"] == "may"


def test_the_matrix_leaves_out_trees_without_leaves() -> None:
    """Plain SGD has no optimizer state, so it has neither a row nor a column."""
    entries = matrix(FLOWS)
    assert "opt_state" not in entries.inputs
    assert not {"opt_state", "eval_opt_state"} & set(entries.rows)


def test_the_matrix_is_printed_with_its_scope(monkeypatch: pytest.MonkeyPatch) -> None:
    """Important entries have a word as well as a sign."""
    laws = ("training_is_free_of_old_statistics", "inputs_reach_the_statistics")
    results = (*REPORT.results, *(Evidence.of(law, "violated") for law in laws))
    report = replace(REPORT, results=results)
    text = plain(shown(monkeypatch, report, verbosity=terminal.VERBOSE))
    assert "from the traced step, for all values, every N and D" in text
    assert f"✗ leaks    {LEGEND['leaks']}" in text
    assert f"✗ missing  {LEGEND['missing']}" in text


def test_a_flow_that_no_case_has_judged_is_open() -> None:
    """With --proofs, a possible dependency that a law forbids is a question, not a leak."""
    law = "training_is_free_of_old_statistics"
    entries = matrix(FLOWS, violated=(), unjudged=(law,))
    params = dict(zip(entries.inputs, entries.rows["params"], strict=True))
    assert params["batch_stats"] == "open"
    assert "leaks" not in entries.kinds()
    assert "leaks" in matrix(FLOWS, violated=(law,)).kinds()


def test_nothing_leaks_where_all_laws_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    """A flow that is intended or cancels is not a leak: its law is exempt, or held."""
    text = plain(shown(monkeypatch))
    assert "leaks" not in text
    assert "missing" not in text


def test_leaks_are_shown_by_leaf(monkeypatch: pytest.MonkeyPatch) -> None:
    """With --leaves each leaf has a row, and a forbidden flow leaks in the leaf's row only."""
    rows = matrix(LEAVES).rows
    inputs = matrix(LEAVES).inputs
    assert inputs == ("params", "batch_stats", "x")
    kinds = {name: dict(zip(inputs, row, strict=True)) for name, row in rows.items()}
    assert kinds["params/Dense_0/kernel"]["batch_stats"] == "leaks"
    assert kinds["params/Dense_0/bias"]["batch_stats"] == "kept out"
    assert kinds["params/Dense_0/bias"]["x"] == "cannot"
    report = replace(REPORT, influence={**REPORT.influence, "leaves": LEAVES})
    assert "params/Dense_0/kernel" in shown(monkeypatch, report)
    assert "params/Dense_0/kernel" not in shown(monkeypatch, report.by_trees())


@pytest.mark.parametrize(
    ("number", "text"), [(0, "0"), (1034, "1,034"), (12_345, "12k"), (3_140_000, "3.1M")]
)
def test_counts_are_short(number: int, text: str) -> None:
    """They have at most five characters."""
    assert terminal.count(number) == text


def test_progress_without_a_terminal_is_a_line_per_phase(
    capfd: pytest.CaptureFixture[str],
) -> None:
    """A log shows the phase, the progress, and each violation as soon as it is found."""
    with progress("my step") as listener:
        listener(PhaseStarted("tracing", 0))
        for evidence in REPORT.results[:2]:
            listener(LawJudged(evidence))
        for cases in (0, 256, 512):
            listener(PhaseStarted("cases of shape (2, 2)", cases, 0.25))
        listener(LawJudged(REPORT.results[0]))
    assert capfd.readouterr().err.splitlines() == [
        "my step:   0% tracing",
        f"my step: violated: variance_is_never_negative: {WRONG}",
        "my step: 1 law proved from the trace",
        "my step:  25% cases of shape (2, 2)",
    ]


def test_progress_on_a_terminal_is_a_bar_that_is_cleared(monkeypatch: pytest.MonkeyPatch) -> None:
    """It shows the phase, the cases and the fraction done; violations stay."""
    file = Terminal()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr("sys.stderr", file)
    with progress("my [step]") as listener:
        listener(PhaseStarted("tracing", 0))
        listener(PhaseStarted("cases one at a time", 1034, 0.5))
        for evidence in REPORT.results:
            listener(LawJudged(evidence))
    text = file.getvalue()
    assert "my [step]: cases one at a time, 1,034 cases so far" in text
    assert "50%" in text
    assert "violated: variance_is_never_negative" in text
