"""bnverify merge: of the shards, what one machine would have said; of anything else, a refusal."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bnverify.audit.run import Audit, Finding
from bnverify.cli import main
from bnverify.diagnose import diagnosed
from bnverify.errors import UsageError
from bnverify.evidence import Evidence, Report
from bnverify.laws import LAWS
from bnverify.merge import merge
from bnverify.profile import Shard

Shards = Callable[..., dict[str, str]]

WRONG = """
from dataclasses import replace
from bnverify import reference

sgd = reference.sgd()

def rising(state, x, y, lr):
    return sgd.step(state, x, y, -lr)

wrong = replace(sgd, name="wrong", step=rising,
                evaluate=lambda s, x, y: sgd.evaluate(s, x, y).reshape(1, 1))
"""
VERSIONS = {"bnverify": "1", "jax": "0.10.2"}


def report(laws: list[str], status: str = "held") -> Report:
    results = tuple(Evidence(law, LAWS[law].family, status, 5, 0.5) for law in laws)  # type: ignore[arg-type] # a status
    return Report("mine", "ci", 3, results, 7, 1.0, VERSIONS, notes=("a note",))


def shards(whole: Report, count: int) -> dict[str, str]:
    """Return what so many machines would have written."""
    names = [result.law for result in whole.results]
    return {
        f"{k}.json": Shard(k, count).stamp(
            replace(whole, results=tuple(Shard(k, count).take(whole.results))).to_json(), names
        )
        for k in range(1, count + 1)
    }


@pytest.mark.parametrize("count", [1, 2, 5])
def test_shards_make_the_whole(count: int) -> None:
    """The results are there once each, in the order of one machine, whatever that of the files."""
    whole = report(list(LAWS))
    parts = shards(whole, count)
    merged = merge(dict(reversed(parts.items())))
    assert isinstance(merged, Report)
    assert replace(merged, seconds=whole.seconds) == whole
    assert merged.seconds == count * whole.seconds


def test_the_diagnosis_is_that_of_all_shards_together() -> None:
    """What the numbers say on one machine explains a law that is broken on another."""
    laws = ["params_follow_the_optimizer", "sgd_moves_params_by_minus_lr_times_gradient"]
    whole = report(laws, "violated")
    seen = replace(whole.results[0], clues={"params": "twice", "factor": 2.0})
    whole = replace(whole, results=(seen, *whole.results[1:]))
    alone = [diagnosed([each], {})[0] for each in whole.results]  # by each of two machines
    merged = merge(shards(replace(whole, results=tuple(alone)), 2))
    assert isinstance(merged, Report)
    assert list(merged.results) == diagnosed(whole.results, {}) != alone
    assert all((e.diagnosis or "").startswith("update_applied_twice:") for e in merged.results)


def changed(parts: dict[str, str], name: str, **fields: Any) -> dict[str, str]:
    return {**parts, name: json.dumps({**json.loads(parts[name]), **fields})}


AUDIT = Audit(
    "pytest",
    ("a.py:b",),
    2.0,
    tuple(Finding(f"fault_{i}", "wrong_gradient", "is wrong.", "missed", 1.0) for i in range(4)),
)
TWO = shards(report(list(LAWS)), 2)
REFUSED: dict[str, tuple[dict[str, str], str]] = {
    "missing": ({"1.json": TWO["1.json"]}, "missing: shard 2/2"),
    "doubled": ({**TWO, "3.json": TWO["2.json"]}, "2.json and 3.json are both shard 2/2"),
    "of other counts": (
        {**TWO, "3.json": shards(report(list(LAWS)), 3)["3.json"]},
        "1.json and 3.json differ in number of shards: 2 and 3",
    ),
    "no JSON": ({**TWO, "1.json": "{"}, "1.json is not JSON"),
    "no report": ({**TWO, "1.json": "[]"}, "1.json was not written by `bnverify check`"),
    "no shard": (
        {**TWO, "1.json": report(["momentum_is_as_declared"]).to_json()},
        "1.json is not a shard: it was written without --shard K/N",
    ),
    "other releases": (
        changed(TWO, "2.json", versions={**VERSIONS, "jax": "0.10.1"}),
        "1.json and 2.json differ in jax: 0.10.2 and 0.10.1",
    ),
    "other subject": (
        changed(TWO, "2.json", subject="yours"),
        "1.json and 2.json differ in subject: mine and yours",
    ),
    "other profile": (
        changed(TWO, "2.json", profile="quick"),
        "1.json and 2.json differ in profile: ci and quick",
    ),
    "other seed": (changed(TWO, "2.json", seed=4), "1.json and 2.json differ in seed: 3 and 4"),
    "other selection": (
        changed(TWO, "2.json", of=["momentum_is_as_declared"]),
        "1.json and 2.json differ in selection",
    ),
    "a law unanswered": (
        changed(TWO, "2.json", results=[]),
        f"no shard contains {list(LAWS)[1]}",
    ),
    "an audit": (
        {**TWO, "2.json": Shard(2, 2).stamp(AUDIT.to_json(), [])},
        "1.json and 2.json differ in kind: check and audit",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_all_of_one_check_is_refused(name: str) -> None:
    """One line says which files, and why."""
    texts, message = REFUSED[name]
    with pytest.raises(UsageError) as refusal:
        merge(texts)
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_shards_of_an_audit_make_the_whole() -> None:
    """Likewise, and the time of one run without a fault is that of the slowest machine."""
    texts = {
        str(k): Shard(k, 2).stamp(
            replace(
                AUDIT, seconds=float(k), findings=tuple(Shard(k, 2).take(AUDIT.findings))
            ).to_json(),
            [finding.fault for finding in AUDIT.findings],
        )
        for k in (1, 2)
    }
    assert merge(texts) == AUDIT


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "steps.py").write_text(WRONG)
    monkeypatch.chdir(tmp_path)
    return tmp_path


LAWS_OF_EACH_KIND = (
    "structure,a_copy_keeps_everything,params_follow_the_optimizer,step_moves_the_params,"
    "sgd_moves_params_by_minus_lr_times_gradient,same_input_repeats_to_the_bit"
)


def test_the_merged_report_is_that_of_one_machine(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a step that is really checked: the same JSON but for the time, the same exit status.

    And but for the number of cases, the largest of the shards': which of them share cases, a shard
    does not know.
    """
    asked = ("check", "steps.py:wrong", "--profile", "quick", "--select", LAWS_OF_EACH_KIND)
    statuses = [main([*asked, "--json", "whole.json"])]
    for shard in ("1/2", "2/2"):
        main([*asked, "--shard", shard, "--json", f"{shard[0]}.json"])
    capsys.readouterr()
    statuses.append(main(["merge", "2.json", "1.json", "--json", "merged.json"]))
    out = capsys.readouterr().out
    assert statuses == [1, 1]
    assert "wrong: 3 of" in out
    whole, merged = (
        json.loads((folder / f"{name}.json").read_text()) for name in ("whole", "merged")
    )
    del whole["seconds"], merged["seconds"]
    assert 0 < merged.pop("cases") <= whole.pop("cases")
    assert merged == whole


def test_the_status_is_0_where_all_hold(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As for a check; with --json - standard output is JSON alone."""
    for name, text in TWO.items():
        (folder / name).write_text(text)
    assert main(["merge", *TWO, "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["ok"] is True


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("merge 1.json 1.json", "1.json is given twice"),
        ("merge nowhere.json", "nowhere.json cannot be read: No such file or directory"),
        ("merge 1.json --json no/such/x.json", "--json no/such/x.json cannot be written"),
        ("merge 1.json", "missing: shard 2/2"),
        ("merge", "required: FILE"),
    ],
)
def test_status_2_and_one_line_where_files_are_unusable(
    folder: Path, capsys: pytest.CaptureFixture[str], line: str, message: str
) -> None:
    """As every command."""
    (folder / "1.json").write_text(TWO["1.json"])
    assert main(line.split()) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
