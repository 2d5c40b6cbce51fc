"""What a person sees of a report: all of it, in 80 columns, without colour, in ASCII too."""

import io
from dataclasses import replace

import pytest

from bnverify.case import Case
from bnverify.check import LawJudged, PhaseStarted
from bnverify.evidence import Counterexample, Evidence, Report
from bnverify.laws import LAWS
from bnverify.show import terminal
from bnverify.show.matrix import matrix
from bnverify.show.symbols import ASCII, STYLES, UNICODE

SHOWN = Counterexample(
    "variance_is_never_negative", Case.of(seed=0, x=[[1.0] * 40], y=[0.0], lr=0.1), "steps.py:mine"
)
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
            "off by 3e+09",
            SHOWN,
            "ema_applied_twice: it is applied twice. Fix: once.",
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
    """A file that says it is a terminal."""

    def __init__(self, encoding: str = "utf-8") -> None:
        super().__init__()
        self._encoding = encoding

    @property
    def encoding(self) -> str:  # type: ignore[override] # None in io.StringIO, whose place it takes
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
) -> str:
    for name in ("FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("TERM", "xterm-256color")
    if no_color:
        monkeypatch.setenv("NO_COLOR", "1")
    file = Terminal(encoding)
    terminal.show(report, file)
    return file.getvalue()


def plain(text: str) -> str:
    return text.replace("\x1b[1m", "").replace("\x1b[2m", "").replace("\x1b[0m", "")


def test_each_status_has_a_word_and_a_sign(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without colour the five statuses still differ, by a word and by a sign."""
    text = plain(shown(monkeypatch))
    for signs in (UNICODE, ASCII):
        assert len({signs.status[status] for status in STYLES}) == len(STYLES)
    for evidence in REPORT.results:
        assert f" {UNICODE.status[evidence.status]} {evidence.status} " in text


def test_no_line_but_a_script_is_wider_than_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """80 columns are enough; the script to paste is the one thing that is never wrapped."""
    for line in plain(shown(monkeypatch)).splitlines():
        assert len(line) <= 80 or line in SHOWN.script.splitlines()


def test_the_script_can_be_pasted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The counterexample stands there to the letter: no indent, no wrapping, no markup."""
    assert SHOWN.script in shown(monkeypatch)


def test_a_violation_is_told_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Claim, reason and diagnosis of the violated law are all there."""
    text = " ".join(plain(shown(monkeypatch)).split())
    assert LAWS["variance_is_never_negative"].claim in text
    assert "off by 3e+09" in text
    assert "Usually: ema_applied_twice: it is applied twice. Fix: once." in text


def test_the_summary_says_how_much_was_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last lines give the verdict, the counts, the cases, the time and the versions."""
    end = " ".join(plain(shown(monkeypatch)).splitlines()[-4:])
    for part in (
        "my step: 1 of 5 laws violated",
        "1 proved, 1 held, 1 violated, 1 untriggered, 1 exempt",
        "1,234,567 cases in 12.3 s",
        "likeliest mistake, by 1 of 1: ema_applied_twice",
        "jax 0.0.1, flax 0.0.2",
    ):
        assert part in end


def test_a_law_that_was_not_reached_is_no_clean_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing is violated but something was not exercised, the verdict says so."""
    report = replace(REPORT, results=REPORT.results[1:])
    assert "my step: none violated, 1 not reached" in shown(monkeypatch, report)
    assert "my step: all hold" in shown(monkeypatch, replace(REPORT, results=REPORT.results[1:4]))


def test_a_printed_report_is_its_verdict() -> None:
    """What a notebook or a script prints is short, and names what is violated."""
    assert str(REPORT).splitlines() == [
        "my step: 1 of 5 laws violated",
        "1 proved, 1 held, 1 violated, 1 untriggered, 1 exempt; 1,234,567 cases in 12.3 s",
        "violated: variance_is_never_negative: off by 3e+09",
        "  usually ema_applied_twice: it is applied twice. Fix: once.",
    ]


def test_no_color_is_honoured(monkeypatch: pytest.MonkeyPatch) -> None:
    """NO_COLOR removes every colour, and nothing else."""
    coloured, without = shown(monkeypatch, no_color=False), shown(monkeypatch)
    assert "\x1b[1;31m" in coloured
    assert "\x1b[1;31m" not in without
    assert "\x1b[32m" not in without


def test_an_ascii_terminal_gets_ascii(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the encoding has no other letters, none are used."""
    text = shown(monkeypatch, encoding="ascii")
    assert text.isascii()
    assert " X violated" in text


def test_notes_are_printed_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Square brackets in a note are text, not markup."""
    assert "note: primitives read conservatively: [weird]" in plain(shown(monkeypatch))


def test_the_matrix_tells_which_entries_matter() -> None:
    """A forbidden flow leaks, a needed one is missing, a forbidden one that is absent is kept out."""
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
    """Plain SGD keeps no state, so it has neither a row nor a column."""
    entries = matrix(FLOWS)
    assert "opt_state" not in entries.inputs
    assert not {"opt_state", "eval_opt_state"} & set(entries.rows)


def test_the_matrix_is_drawn_with_its_scope(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scope is named, and what matters is a word, not only a sign."""
    open_laws = ("training_is_free_of_old_statistics", "inputs_reach_the_statistics")
    results = (*REPORT.results, *(Evidence.of(law, "untriggered") for law in open_laws))
    text = plain(shown(monkeypatch, replace(REPORT, results=results)))
    assert "read from the traced step, for all values, every N and D" in text
    assert "✗ leaks" in text
    assert "✗ missing" in text


def test_nothing_leaks_where_all_laws_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    """A flow that is by design, or was seen to cancel, is no leak: its law is exempt, or held."""
    text = plain(shown(monkeypatch))
    assert "leaks" not in text
    assert "missing" not in text


def test_a_leaf_that_leaks_is_told_from_its_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where leaves are asked for, each has a row, and what must not reach its tree leaks there."""
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
    """Five characters at most."""
    assert terminal.count(number) == text


def test_progress_is_quiet_where_nobody_watches(capfd: pytest.CaptureFixture[str]) -> None:
    """Standard error that is no terminal stays empty."""
    with terminal.progress("my step") as listener:
        assert listener is None
    assert capfd.readouterr().err == ""


def test_progress_shows_what_is_done_and_clears_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a terminal the listener shows the doing, the cases and each violation as it comes."""
    file = Terminal()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr("sys.stderr", file)
    with terminal.progress("my [step]") as listener:
        assert listener is not None
        listener(PhaseStarted("tracing", 0))
        listener(PhaseStarted("cases one at a time", 1034))
        for evidence in REPORT.results:
            listener(LawJudged(evidence))
    text = file.getvalue()
    assert "my [step]: cases one at a time, 1,034 cases" in text
    assert "violated: variance_is_never_negative" in text
