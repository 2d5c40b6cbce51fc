"""The command line: exit statuses, one-line errors, JSON, and imports."""

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from pkgutil import iter_modules
from xml.etree import ElementTree as ET

import pytest

import bnverify
from bnverify import commands
from bnverify.cli import SHELLS, main
from bnverify.commands import check
from bnverify.evidence import Violation
from bnverify.laws import LAWS
from bnverify.mistakes import MISTAKES

ROOT = Path(__file__).parents[1]
Run = Callable[..., tuple[int, str, str]]

WRONG_SHAPE = """
from dataclasses import replace
from bnverify import reference

sgd = reference.sgd()
print("the target prints")
wrong = replace(sgd, name="wrong", evaluate=lambda s, x, y: sgd.evaluate(s, x, y).reshape(1, 1))
"""


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run the command line in this process; return status, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "steps.py").write_text(WRONG_SHAPE)

    def run(*argv: str) -> tuple[int, str, str]:
        status = main(argv)
        return status, *capsys.readouterr()

    return run


def start(*argv: str, **options: object) -> "subprocess.Popen[str]":
    """Start the command line in its own process."""
    return subprocess.Popen(  # type: ignore[call-overload, no-any-return] # options vary
        [sys.executable, "-m", "bnverify", *argv],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **options,
    )


def test_status_0_if_all_hold(run: Run) -> None:
    """The reference satisfies the structural laws, by proof."""
    status, out, err = run("check", "--proofs", "--select", "structure", "--quiet")
    assert (status, err) == (0, "")
    assert "reference[sgd]: all hold" in out


def test_status_1_if_a_law_is_violated(run: Run) -> None:
    """The violated law is named, and the script loads the target by its path and name."""
    status, out, err = run("check", "steps.py:wrong", "--proofs", "--select", "structure")
    assert status == 1
    assert "── ✗ eval_loss_has_shape_one ─" in out
    assert f"bnverify.load('{Path.cwd() / 'steps.py'}:wrong')" in out  # works in any directory
    assert "violated: eval_loss_has_shape_one" in err  # printed as soon as it is found


def test_fail_fast_stops_at_the_first_violation(run: Run) -> None:
    """A violation found in the trace comes first; nothing is run, and the other laws say so."""
    status, out, _ = run("check", "steps.py:wrong", "--fail-fast", "--json", "-")
    report = json.loads(out)
    reasons = {each["reason"] for each in report["results"] if each["status"] == "untriggered"}
    assert (status, report["cases"]) == (1, 0)
    assert reasons == {"stopped at a violation"}


def test_a_variant_of_the_reference_is_a_target(run: Run) -> None:
    """Modules of bnverify can be targets, too."""
    status, out, _ = run(
        "check", "bnverify.reference:adam", "--proofs", "--select", "batch_stats_are_float32"
    )
    assert status == 0
    assert "reference[adam]" in out


UNUSABLE = {
    "": "required: COMMAND",
    "chek": "invalid choice: 'chek'",
    "check --profile": "argument --profile: expected one argument",
    "check --profile slow": "invalid choice: 'slow'",
    "check --seed x": "argument --seed: must be a whole number of at least 0, got 'x'",
    "check --seed -1": "argument --seed: must be a whole number of at least 0, got '-1'",
    "check --time-limit nan": "argument --time-limit: must be more than 0 seconds, got 'nan'",
    "check --time-limit 0": "argument --time-limit: must be more than 0 seconds, got '0'",
    "check --format html --format json": "only one --format can go to stdout",
    "check --format htm": "--format 'htm' is none of terminal, json, junit, html, github, sarif; did",
    "check --output no/such/folder/x": "--output no/such/folder/x cannot be written",
    "check --format json=x --output y": "--output y needs a --format without =FILE",
    "check -q -v": "not allowed with argument",
    "bisect --package jax --from 0.9.x --to 1": "--from and --to must be versions of jax, got '0.9",
    "gate --from a --to b --seed abc": "argument --seed: must be a whole number of at least 0, got",
    "check --shard 3/2": "a shard is K/N with K in 1 to N, got '3/2'",
    "check --shard 60/60 --select update": "no law is left to check",
    "check --select speed": "no law or family is named 'speed'",
    "check --ignore speed": "no law or family is named 'speed'",
    "check --select update --ignore update": "no law is left to check",
    "check --json no/such/folder/x.json": "--json no/such/folder/x.json cannot be written",
    "check --json .": "--json . is a directory",
    "check nowhere.py:x": "no file nowhere.py",
    "check steps.py:rong": "steps.py has no 'rong'; did you mean 'wrong'?",
    "check json:loads": "must take no arguments and return",
    "check a b": "unrecognized arguments: b",
    "explain nothing": "no law, family or mistake is named 'nothing'; see",
    "explain": "required: NAME",
}


@pytest.mark.parametrize("line", UNUSABLE)
def test_status_2_and_one_line_if_the_command_is_unusable(run: Run, line: str) -> None:
    """An unusable command or target gives one line on stderr, without a traceback."""
    status, _, err = run(*line.split())
    assert status == 2
    assert UNUSABLE[line] in err
    assert err.count("\n") == 1
    assert err.startswith("bnverify: ")


HANGING = {
    "an import": "import time\nwhile True:\n    time.sleep(60)  # here\n",
    "a step that catches everything": (
        "from dataclasses import replace\n"
        "from bnverify import reference\n"
        "def step(state, x, y, lr):\n"
        "    while True:\n"
        "        try:\n"
        "            while True:\n"
        "                pass  # here\n"
        "        except BaseException:\n"
        "            pass\n"
        "x = replace(reference.sgd(), step=step)\n"
    ),
}


@pytest.mark.parametrize("name", HANGING)
def test_a_target_that_hangs_is_unusable(name: str, tmp_path: Path) -> None:
    """Past the time limit the process ends with status 2, and one line says where it was."""
    file = tmp_path / "hangs.py"
    file.write_text(HANGING[name])
    process = start("check", f"{file}:x", "--time-limit", "8")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert err.count("\n") == 1
    assert err.startswith(f"bnverify: loading {file}:x took more than 8 s ({file}:")
    lines = HANGING[name].splitlines()
    line = lines[int(err.split("hangs.py:")[2].split(":")[0]) - 1].strip()
    assert line.endswith("# here") or line == "while True:"


def test_a_step_that_raises_on_some_input_is_unusable(run: Run, tmp_path: Path) -> None:
    """An exception in a later call is reported like one in the first call."""
    (tmp_path / "later.py").write_text(
        "from dataclasses import replace\n"
        "from bnverify import reference\n"
        "sgd = reference.sgd()\n"
        "def step(state, x, y, lr):\n"
        "    if x.shape[0] > 8:\n"
        "        raise ValueError('too many rows')\n"
        "    return sgd.step(state, x, y, lr)\n"
        "subject = replace(sgd, step=step)\n"
    )
    status, _, err = run(
        "check",
        "later.py:subject",
        "-q",
        "--profile",
        "quick",
        "--select",
        "variance_is_never_negative",
    )
    assert status == 2
    assert "later.py:subject raises ValueError: too many rows" in err
    assert "later.py:6: raise ValueError('too many rows')" in err
    assert err.count("\n") == 1


def test_status_3_if_bnverify_itself_fails(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """An internal error is one line, and its traceback lies in the file that the line names."""
    monkeypatch.setattr("bnverify.check.choose", None)  # to call it fails in our own code
    monkeypatch.setenv("BNVERIFY_CACHE", str(tmp_path / "cache"))
    status, _, err = run("check")
    assert status == 3
    assert err.startswith("bnverify: internal error: TypeError: 'NoneType' object is not callable")
    assert err.count("\n") == 1
    file = Path(err.split("; traceback in ")[-1].strip())
    assert file.parent == tmp_path / "cache" / "errors"
    assert "Traceback (most recent call last)" in file.read_text()


def test_the_traceback_is_kept_if_the_cache_is_not_writable(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It is then saved among the temporary files."""
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(check, "_check", lambda args, shard: 1 / 0)
    monkeypatch.setenv("BNVERIFY_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "elsewhere"))
    _, _, err = run("check")
    assert "ZeroDivisionError" in next((tmp_path / "elsewhere").iterdir()).read_text()
    assert f"traceback in {tmp_path / 'elsewhere'}" in err


def test_ctrl_c_ends_without_a_traceback(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The exit status is 130, as shells expect."""

    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(check, "_check", interrupted)
    assert run("check") == (130, "", "bnverify: interrupted\n")


@pytest.mark.skipif(os.name != "posix", reason="signals of this kind are POSIX's")
def test_ctrl_c_during_a_long_check(tmp_path: Path) -> None:
    """A real signal interrupts a real process while it imports its target."""
    (tmp_path / "sleeps.py").write_text(
        f"import time, pathlib\npathlib.Path({str(tmp_path / 'started')!r}).touch()\n"
        "time.sleep(60)\n"
    )
    process = start("check", f"{tmp_path / 'sleeps.py'}:x")
    while not (tmp_path / "started").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (130, "", "bnverify: interrupted\n")


def test_ctrl_c_prints_the_results_so_far(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Laws proved before are in the report; the others are untriggered."""

    def interrupted(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("bnverify.check.Run", interrupted)
    laws = "gradients_match_params,eval_repeats_to_the_bit"
    status, out, err = run("check", "-v", "--select", laws)
    assert status == 130
    assert "none violated, 1 not reached" in out
    assert "note: interrupted" in out
    assert "■ proved      gradients_match_params" in out
    assert "eval_repeats_to_the_bit" in out
    assert err.endswith("bnverify: interrupted\n")


def test_a_required_flow_that_is_missing_is_a_violation(run: Run, tmp_path: Path) -> None:
    """A step that returns its statistics unchanged is found without running it; the script reproduces it."""
    (tmp_path / "kept.py").write_text(
        "from dataclasses import replace\n"
        "from bnverify import reference\n"
        "sgd = reference.sgd()\n"
        "def step(state, x, y, lr):\n"
        "    new, info = sgd.step(state, x, y, lr)\n"
        "    return new._replace(batch_stats=state.batch_stats), info\n"
        "subject = replace(sgd, step=step)\n"
    )
    status, out, _ = run("check", "kept.py:subject", "--proofs", "--json", "report.json")
    assert status == 1
    assert "x cannot change batch_stats" in " ".join(out.split())
    assert "✗ missing" in out
    assert "new_statistics_dropped" in out
    results = json.loads((tmp_path / "report.json").read_text())["results"]
    found = {each["law"]: each for each in results if each["status"] == "violated"}
    assert set(found) == {"inputs_reach_the_statistics", "step_moves_the_statistics"}
    for each in found.values():
        with pytest.raises(Violation, match="proved from the trace"):
            exec(each["counterexample"])  # noqa: S102 - as a user would paste it


def test_one_report_in_every_format(run: Run, tmp_path: Path) -> None:
    """Machine-readable formats have the rule, file and line; the page is self-contained."""
    files = {name: tmp_path / name for name in ("junit", "html", "github", "terminal")}
    asked = [part for name in files for part in ("--format", f"{name}={name}")]
    laws = ("--select", "structure,influence")
    status, out, _ = run("check", "steps.py:wrong", "--proofs", *laws, *asked, "--format", "sarif")
    assert status == 1
    (scan,) = json.loads(out)["runs"]
    (result,) = scan["results"]
    assert result["ruleId"] == "eval_loss_has_shape_one"
    assert scan["tool"]["driver"]["rules"][result["ruleIndex"]]["id"] == result["ruleId"]
    (location,) = result["locations"]
    place = location["physicalLocation"]
    assert place["artifactLocation"]["uri"] == "steps.py"
    line = (tmp_path / "steps.py").read_text().splitlines()[place["region"]["startLine"] - 1]
    assert line.startswith("wrong = ")
    first, *_ = files["github"].read_text().splitlines()
    assert first.startswith("::error title=bnverify%3A eval_loss_has_shape_one,file=steps.py,line=")
    suite = ET.fromstring(files["junit"].read_text())[0]  # noqa: S314 - our own output
    assert suite.get("failures") == "1"
    assert suite.get("tests") == str(len(scan["tool"]["driver"]["rules"]))
    page = files["html"].read_text()
    assert "eval_loss_has_shape_one" in page
    assert "<script" not in page
    assert "1 of" in files["terminal"].read_text()


def test_defaults_are_read_from_the_projects_file(run: Run, tmp_path: Path) -> None:
    """The command line overrides them, and unknown keys are reported."""
    (tmp_path / "pyproject.toml").write_text(
        '[tool.bnverify]\ntarget = "steps.py:wrong"\nselect = "structure"\n'
        'ignore = ["params_keep_their_tree"]\nformat = "json"\n'
    )
    status, out, _ = run("check", "--proofs")
    report = json.loads(out)
    laws = {each["law"] for each in report["results"]}
    assert (status, report["subject"]) == (1, "wrong")
    assert "gradients_match_params" in laws
    assert "params_keep_their_tree" not in laws
    _, out, _ = run("check", "--proofs", "--select", "params_keep_their_tree", "--ignore", "life",
                    "--format", "terminal", "-q", "bnverify.reference:sgd")  # fmt: skip
    assert out == "reference[sgd]: all hold\n"
    (tmp_path / "pyproject.toml").write_text("[tool.bnverify]\nprofil = 1\ntargets = 2\n")
    status, _, err = run("check")
    assert status == 2
    assert "unknown key profil; did you mean 'profile'?; unknown key targets; did you mean" in err


@pytest.mark.skipif(os.name != "posix", reason="pipes break so on POSIX")
def test_a_closed_pipe_is_not_a_violation() -> None:
    """`bnverify check | head -0` does not exit with status 1."""
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "bnverify", "check", "--proofs", "--select", "structure", "-q"]
    process = subprocess.run(command, cwd=ROOT, stdout=writing, stderr=subprocess.PIPE, check=False)
    os.close(writing)
    assert (process.returncode, process.stderr) == (141, b"")


@pytest.mark.skipif(os.name != "posix", reason="pipes break so on POSIX")
def test_a_closed_pipe_is_not_an_error() -> None:
    """`bnverify list | head -1` prints nothing to stderr."""
    reading, writing = os.pipe()
    os.close(reading)
    process = subprocess.run(
        [sys.executable, "-m", "bnverify", "list"],
        cwd=ROOT,
        stdout=writing,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    os.close(writing)
    assert (process.returncode, process.stderr) == (141, "")


def test_json_has_the_documented_fields(run: Run, tmp_path: Path) -> None:
    """The field names are public."""
    status, _, _ = run("check", "steps.py:wrong", "--proofs", "--json", "report.json")
    assert status == 1
    data = json.loads((tmp_path / "report.json").read_text())
    fields = {"bnverify", "versions", "subject", "ok", "seconds", "cases", "results", "influence"}
    assert fields <= set(data)
    assert (data["subject"], data["ok"]) == ("wrong", False)
    assert {"jax", "flax", "optax"} <= set(data["versions"])
    law_fields = ("law", "family", "status", "cases", "residual", "reason", "counterexample",
                  "diagnosis")  # fmt: skip
    for result in data["results"]:
        assert set(law_fields) <= set(result)
    assert [result["law"] for result in data["results"]] == [
        name for name, law in LAWS.items() if law.family != "parallel"
    ]
    assert "leaves" not in data["influence"]


def test_leaves_option(run: Run, tmp_path: Path) -> None:
    """Dependencies are by leaf on the terminal and in JSON, and in merged shards."""
    parts = []
    for shard in ("1/2", "2/2"):
        parts.append(f"part-{shard[0]}.json")
        _, out, _ = run("check", "--proofs", "--leaves", "--shard", shard, "--json", parts[-1])
        assert "batch_stats/BatchNorm_0/mean" in out
    status, _, _ = run("merge", *parts, "--json", "whole.json")
    assert status == 0
    leaves = json.loads((tmp_path / "whole.json").read_text())["influence"]["leaves"]
    assert leaves["eval_batch_stats/BatchNorm_0/mean"] == ["batch_stats/BatchNorm_0/mean"]


def test_a_full_disk_is_reported(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that was writable before the check and is not after it gives one line."""

    def write(*args: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", write)
    status, _, err = run("check", "-q", "--proofs", "--select", "structure", "--json", "x.json")
    assert (status, err) == (
        2,
        "bnverify: --json x.json cannot be written: No space left on device\n",
    )


def test_json_on_stdout_is_pure_json(run: Run) -> None:
    """What the target prints and the text report go to stderr."""
    _, out, err = run("check", "steps.py:wrong", "--proofs", "--json", "-")
    assert json.loads(out)["subject"] == "wrong"
    assert "the target prints" in err
    assert "1 of" in err


def test_an_unusable_target_does_not_touch_an_old_report(run: Run, tmp_path: Path) -> None:
    """The file is written atomically at the end."""
    (tmp_path / "report.json").write_text("old")
    assert run("check", "nowhere.py:x", "--json", "report.json")[0] == 2
    assert (tmp_path / "report.json").read_text() == "old"


def test_shards_cover_every_law_once(run: Run, tmp_path: Path) -> None:
    """The shards are disjoint, together complete, and each is labelled."""
    seen: list[str] = []
    for shard in ("1/2", "2/2"):
        run("check", "--proofs", "--select", "structure", "--shard", shard, "--json", "part.json")
        data = json.loads((tmp_path / "part.json").read_text())
        assert data["shard"] == shard
        seen += [result["law"] for result in data["results"]]
    assert sorted(seen) == sorted(law.name for law in LAWS.values() if law.family == "structure")


def test_laws_are_selected_and_ignored_by_name_and_family(run: Run, tmp_path: Path) -> None:
    """Several names are separated by commas or given by repeated options."""
    run("check", "--proofs", "--select", "structure,influence", "--select", "momentum_is_as_declared",
        "--ignore", "gradients_match_params", "--json", "report.json")  # fmt: skip
    data = json.loads((tmp_path / "report.json").read_text())
    laws = {result["law"] for result in data["results"]}
    assert "momentum_is_as_declared" in laws
    assert "gradients_match_params" not in laws
    assert {result["family"] for result in data["results"]} == {
        "structure",
        "influence",
        "statistics",
    }


def test_list_names_every_law(run: Run) -> None:
    """Piped, it has one law per line: family, name, claim."""
    _, out, _ = run("list")
    rows = [line.split("\t") for line in out.splitlines()]
    assert [name for _, name, _ in rows] == list(LAWS)
    assert all(LAWS[name].family == family for family, name, _ in rows)


def test_list_on_a_terminal(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The claims are wrapped to its width."""
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "60")
    _, out, _ = run("list")
    assert max(map(len, out.splitlines())) <= 60
    for name in LAWS:
        assert f"  {name}\n" in out
    step = sum(law.family != "parallel" for law in LAWS.values())
    assert f"{step} laws, and {len(LAWS) - step} for a step on several" in " ".join(out.split())


def test_list_takes_a_family(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only its laws are listed, with their number; unknown families are errors."""
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    _, out, _ = run("list", "update")
    names = [name for name, law in LAWS.items() if law.family == "update"]
    assert f"update ({len(names)})" in out
    assert [line.strip() for line in out.splitlines() if line.strip() in LAWS] == names
    assert run("list", "updates")[0] == 2


@pytest.mark.parametrize("name", LAWS)
def test_explain_a_law(run: Run, name: str) -> None:
    """It has the claim, the source, and each mistake with its title."""
    status, out, _ = run("explain", name)
    text, law = " ".join(out.split()), LAWS[name]
    assert status == 0
    for part in (law.claim, law.source, *(MISTAKES[each].title for each in law.mistakes)):
        assert " ".join(part.split()) in text


@pytest.mark.parametrize("name", MISTAKES)
def test_explain_a_mistake(run: Run, name: str) -> None:
    """It has the title, symptoms, fix, source and code, and the laws that detect it."""
    status, out, _ = run("explain", name)
    text, mistake = " ".join(out.split()), MISTAKES[name]
    assert status == 0
    for part in (mistake.title[1:], mistake.looks, mistake.fix, mistake.source):
        assert " ".join(part.split()) in text
    for line in (*mistake.wrong.splitlines(), *mistake.right.splitlines()):
        assert line.rstrip() in out
    for law in LAWS.values():
        assert (f"  {law.name}\n" in out) == (name in law.mistakes)


def test_explain_takes_a_prefix(run: Run) -> None:
    """If a prefix fits several laws, families or mistakes, they are listed."""
    assert run("explain", "wrong_si")[1] == run("explain", "wrong_sign")[1]
    assert run("explain", "evaluation")[1].startswith("evaluation (")
    assert run("explain", "metam")[1] == run("explain", "metamorphic")[1]
    status, _, err = run("explain", "wrong_")
    assert status == 2
    assert "3 names begin with 'wrong_': wrong_sign, wrong_gradient, wrong_moments" in err


def test_version_option(capsys: pytest.CaptureFixture[str]) -> None:
    """`bnverify --version` prints the installed version and its location."""
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out == f"bnverify {bnverify.__version__}\n"


@pytest.mark.parametrize("shell", SHELLS)
def test_a_shell_completes_commands_and_options(
    capsys: pytest.CaptureFixture[str], shell: str
) -> None:
    """The completion script has every command."""
    with pytest.raises(SystemExit) as end:
        main(["--print-completion", shell])
    out = capsys.readouterr().out
    assert end.value.code == 0
    assert all(module.name in out for module in iter_modules(commands.__path__))


def test_help_list_and_explain_import_nothing_heavy() -> None:
    """Neither jax nor Hypothesis nor rich is imported."""
    code = (
        "import sys\n"
        "from bnverify.cli import SHELLS, main\n"
        "for argv in (['list'], ['explain', 'gradients_match_params'], ['check', 'nowhere.py:x']):\n"
        "    main(argv)\n"
        "try: main(['check', '--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'jax', 'flax', 'optax', 'hypothesis', 'rich', 'pytest'} & set(sys.modules)\n"
        "sys.exit(f'loaded {heavy}' if heavy else 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr.splitlines()[1:]) == (0, [])


def test_every_command_is_a_module() -> None:
    """Each module in the folder adds the parser of its own name."""
    for module in iter_modules(commands.__path__):
        command = importlib.import_module(f"bnverify.commands.{module.name}")
        assert callable(command.add_parser)
        assert callable(command.run)
