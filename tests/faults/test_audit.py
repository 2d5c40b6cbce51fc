"""``python -m tests.faults``: which faults the laws detect, and how that is reported."""

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest

from tests.faults import FAULTS, audit
from tests.faults.__main__ import main
from tests.faults.audit import Audit, Finding
from tests.faults.catalogue import learned


def finding(name: str, *laws: str, survives: str = "", refusal: str = "") -> Finding:
    return Finding(name, "family", laws, refusal, 1.0, (2, 1) if laws else None, True, survives)


AUDIT = Audit(
    (
        finding("one", "law_a", "law_b"),
        finding("two", "law_b"),
        finding("three", survives="equivalent: <nothing> differs"),
        finding("four", refusal="TypeError: no"),
        finding("five"),
    )
)


def parsed(picture: str) -> ET.Element:
    return ET.fromstring(picture)  # noqa: S314 - trusted: written by this test


def test_one_fault_is_audited(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command prints the matrix and writes JSON and picture."""
    files = tmp_path / "audit.json", tmp_path / "audit.svg"
    command = ["--select", "new_statistics_dropped", "--profile", "quick"]
    assert main([*command, "--json", str(files[0]), "--picture", str(files[1])]) == 0
    assert "1 of 1 faults killed, 0 survive" in capsys.readouterr().out
    assert json.loads(files[0].read_text())["killed"] == 1
    assert parsed(files[1].read_text()).tag.endswith("svg")


def test_the_command_selects_shards_and_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A shard of a family is audited, printed, written and drawn; gaps give exit status 1."""
    seen: list[str] = []

    def audited(faults: Any, profile: str, **_: Any) -> Audit:
        seen.extend(fault.name for fault in faults)
        return AUDIT

    monkeypatch.setattr(audit, "audit", audited)
    files = tmp_path / "audit.json", tmp_path / "audit.svg"
    command = ["--select", "two_steps", "--shard", "2/3"]
    assert main([*command, "--json", str(files[0]), "--picture", str(files[1])]) == 1
    family = [name for name, fault in FAULTS.items() if fault.family == "two_steps"]
    assert seen == family[1::3]
    assert json.loads(files[0].read_text())["killed"] == 3
    assert files[1].read_text() == audit.picture(AUDIT)
    assert capsys.readouterr().out == audit.text(AUDIT)


def test_shards_are_read_as_one_audit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Results of two shards are shown as those of one run, without any check."""
    files = [tmp_path / "1.json", tmp_path / "2.json"]
    for number, file in enumerate(files):
        file.write_text(Audit(AUDIT.findings[3 * number : 3 * number + 3]).to_json())
    assert main(["--read", *map(str, files)]) == 1
    assert capsys.readouterr().out == audit.text(AUDIT)


def test_what_was_found_is_learned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The entry of a fault that was not audited remains."""
    file, expected = tmp_path / "audit.json", tmp_path / "expected.json"
    monkeypatch.setattr(audit, "EXPECTED", expected)
    before = learned()
    law = before["sample_variance"][-1]
    file.write_text(Audit((finding("sample_variance", law),)).to_json())
    assert main(["--read", str(file), "--learn"]) == 0
    assert json.loads(expected.read_text()) == {**before, "sample_variance": [law]}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--select", "no_such_fault"], "no fault or family is named 'no_such_fault'"),
        (["--shard", "9/3"], "a shard is K/N with K in 1 to N"),
        (["--read", "nowhere.json"], "nowhere.json"),
    ],
)
def test_unusable_arguments_are_refused(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """An invalid command line ends with exit status 2 and a one-line message."""
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


def test_the_matrix_reads_without_colour() -> None:
    """Each row has one character for each law that detects anything; survivors and refusals are marked."""
    assert AUDIT.killers() == ["law_b", "law_a"]
    rows = {line.split()[0]: line.split()[1:] for line in list(audit.matrix(AUDIT))[3:]}
    assert rows["one"][0] == "xx"
    assert rows["two"][0] == "x."
    assert rows["five"][0] == "survives"
    assert rows["four"][:2] == ["refused:", "TypeError:"]


def test_survivors_are_shown_with_their_reason() -> None:
    """A survivor without a reason is called a gap; faults that only one law detects are listed."""
    shown = audit.text(AUDIT)
    assert "survives: three: equivalent: <nothing> differs" in shown
    assert "survives: five: a gap" in shown
    assert "law_b alone kills: two" in shown
    assert "3 of 5 faults killed, 2 survive, 1 of them unexplained" in shown


def test_the_picture_is_whole_and_escaped() -> None:
    """The picture is a well-formed document with a row for every fault and without external resources."""
    text = audit.picture(AUDIT)
    names = {node.text for node in parsed(text).iter("{http://www.w3.org/2000/svg}text")}
    assert {"one", "two", "three", "four", "five", "law_a", "law_b"} <= names
    assert "href" not in text
