"""Environments, made by the real uv from an index of a few hundred bytes: no network is needed."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_processes import alive, until
from wheels import project, wheel

from bnverify.upgrade import environments, interpreters, uv
from bnverify.upgrade.environments import EnvironmentUnavailableError, build_all, parse, run

pytestmark = pytest.mark.nightly

try:
    uv._program()
except EnvironmentUnavailableError as missing:
    pytest.skip(str(missing), allow_module_level=True)

PINS = "jax==1.0\njaxlib==1.0\nflax==1.0\noptax==1.0\n"


@pytest.fixture
def index(tmp_path, monkeypatch) -> Path:
    """Let uv find two releases of everything in a directory, and nothing anywhere else."""
    path = tmp_path / "index"
    path.mkdir()
    for version in ("1.0", "2.0"):
        wheel(path, "jaxlib", version)
        wheel(path, "jax", version, f"Requires-Dist: jaxlib>={version}")
        wheel(path, "flax", version, f"Requires-Dist: jax>={version}")
        wheel(path, "optax", version)
    wheel(path, "einops", "0.8")
    monkeypatch.setenv("UV_DEFAULT_INDEX", (tmp_path / "nothing").as_uri())
    (tmp_path / "nothing").mkdir()
    monkeypatch.setenv("UV_FIND_LINKS", str(path))
    monkeypatch.setenv("UV_CACHE_DIR", str(tmp_path / "uv-cache"))
    return path


@pytest.fixture
def build(tmp_path, index):
    """Build in a cache of the test's own."""
    assert index.is_dir()

    def call(text: str, *args, **kwargs) -> environments.Environment:
        requirement = parse(text, tmp_path)
        return environments.build(requirement, *args, cache_dir=tmp_path / "cache", **kwargs)

    return call


@pytest.fixture
def newer() -> interpreters.Interpreter:
    """Return the nearest newer Python."""
    newer = [i for i in interpreters.found() if i.version[:2] > sys.version_info[:2]]
    if not newer:
        pytest.skip("no newer version of Python is installed here")
    return newer[0]


def versions(environment) -> dict[str, str]:
    return {
        k: v for k, v in environment.versions.items() if k in {"jax", "jaxlib", "flax", "optax"}
    }


def shows(environment, expression: str, **kwargs) -> str:
    """Return what an expression is in an environment."""
    done = run(environment, ["-c", f"import sys, os\nprint({expression})"], **kwargs)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# What is asked for is what is there


def test_a_list_gets_its_releases_and_what_is_needed_beside(build):
    """Releases not named come at the newest that goes with those named."""
    environment = build("jax==1.0")
    assert versions(environment) == {"jax": "1.0", "jaxlib": "1.0", "flax": "1.0", "optax": "2.0"}
    assert shows(environment, "__import__('jax').version") == "1.0"
    assert environment.python_version == interpreters.running().name


def test_a_file_gets_its_releases(build, tmp_path):
    """Relative to where the requirement was parsed."""
    (tmp_path / "old.txt").write_text(PINS)
    assert versions(build("old.txt")) == dict.fromkeys(("jax", "jaxlib", "flax", "optax"), "1.0")


def test_latest_is_the_newest(build):
    """Of jax, flax and optax."""
    assert set(versions(build("latest")).values()) == {"2.0"}


def test_an_existing_environment_is_taken_as_it_is(build):
    """An environment altered by hand can be a side; bnverify comes in from outside."""
    made = build("jax==1.0")
    (Path(shows(made, "__import__('jax').__file__"))).unlink()
    site = Path(shows(made, "__import__('flax').__file__")).parent
    (site / "jax.py").write_text("version = 'altered'")
    there = build(str(made.python.parents[1]))
    assert shows(there, "__import__('jax').version") == "altered"
    assert there.versions == made.versions


def test_the_running_interpreter_is_an_environment(build, monkeypatch):
    """`installed` is what runs this test."""
    monkeypatch.delenv("COVERAGE_PROCESS_CONFIG", raising=False)  # it would measure the copy
    environment = build("installed")
    assert environment.python == Path(sys.executable)
    assert environment.python_version == interpreters.running().name
    assert shows(environment, "__import__('bnverify').__path__[0]").startswith(
        str(environment.paths[0])
    )


def test_a_requirement_for_bnverify_is_passed_over(build, tmp_path):
    """A team lists bnverify beside jax, and the running one is what records, on both sides."""
    (tmp_path / "dev.txt").write_text(PINS + "bnverify==0.0.1\n")
    environment = build("dev.txt")
    assert "bnverify" not in environment.versions
    assert shows(environment, "__import__('bnverify').__path__[0]").startswith(str(tmp_path))


def test_bnverify_tells_its_version_there(build):
    """A manifest names the bnverify that recorded."""
    told = shows(build("jax==1.0"), "__import__('importlib.metadata').metadata.version('bnverify')")
    assert told


def test_hashes_in_a_file_are_checked(build, tmp_path, index):
    """A wheel that is not what the file was made from does not get in."""
    lines = [
        f"{name}==1.0 --hash=sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}"
        for name in ("jax", "jaxlib", "flax", "optax")
        for path in [index / f"{name}-1.0-py3-none-any.whl"]
    ]
    (tmp_path / "hashed.txt").write_text("\n".join(lines))
    assert set(versions(build("hashed.txt")).values()) == {"1.0"}
    wheel(index, "optax", "1.0", code="evil = True")
    shutil.rmtree(tmp_path / "uv-cache")
    shutil.rmtree(tmp_path / "cache")
    with pytest.raises(EnvironmentUnavailableError, match=r"(?s)optax.*find out why"):
        build("hashed.txt")


def test_a_wheel_in_a_directory_counts_by_its_content(build, tmp_path):
    """A patched wheel of the same name is another environment."""
    path = wheel(tmp_path, "flax", "1.0", code="patch = 1")
    text = f"jax==1.0,flax @ {path.as_uri()}"
    first = build(text)
    assert shows(first, "__import__('flax').patch") == "1"
    wheel(tmp_path, "flax", "1.0", code="patch = 2")
    second = build(text)
    assert shows(second, "__import__('flax').patch") == "2"
    assert first.key != second.key
    assert shows(first, "__import__('flax').patch") == "1"


def test_a_directory_in_a_file_counts_by_its_content(build, tmp_path):
    """Installed from a copy, editable or not: the directory stays clean."""
    directory = project(tmp_path / "mymodel", code="patch = 1")
    before = sorted(directory.rglob("*"))
    (tmp_path / "reqs.txt").write_text(f"{PINS}-e {directory}\n")
    first = build("reqs.txt")
    project(tmp_path / "mymodel", code="patch = 2")
    second = build("reqs.txt")
    assert [shows(e, "__import__('mymodel').patch") for e in (first, second)] == ["1", "2"]
    assert sorted(directory.rglob("*")) == before


# It is made once


def test_the_second_time_it_is_found(build):
    """The same place, and what was told about it."""
    first, second = build("jax==1.0"), build("jax==1.0")
    assert (first.python, first.versions) == (second.python, second.versions)


def test_pins_that_leave_nothing_open_need_no_index_again(build, tmp_path, index):
    """A gate that ran once runs again without a network; an open list asks every time."""
    (tmp_path / "old.txt").write_text(PINS)
    first = build("old.txt")
    build("jax==1.0")
    shutil.rmtree(index)
    shutil.rmtree(tmp_path / "uv-cache")
    index.mkdir()
    assert build("old.txt").python == first.python
    with pytest.raises(EnvironmentUnavailableError):
        build("jax==1.0")


def test_the_cache_holds_no_credentials(build, tmp_path, index):
    """An index named in a requirements file serves the install, and is not written down."""
    wheel(tmp_path, "einops", "7.0")
    (tmp_path / "reqs.txt").write_text(f"--find-links {tmp_path}\n{PINS}einops\n")
    assert build("reqs.txt").versions["einops"] == "7.0"
    markers = list((tmp_path / "cache").rglob("complete.json"))
    assert len(markers) == 2  # of the environment and of bnverify
    assert not any(str(tmp_path / "index") in m.read_text() for m in markers)
    assert index.exists()


# The Python that it needs


def test_the_python_is_the_one_that_the_releases_need(build, index, newer):
    """Where the running one is refused, another that was found takes its place."""
    wheel(index, "jax", "3.0", python=f"py3{newer.version[1]}")
    environment = build("jax==3.0,flax")
    assert environment.python_version == newer.name
    assert environment.versions["jax"] == "3.0"


def test_latest_is_the_newest_on_any_python(build, index, newer):
    """The running Python would resolve `latest` to less, without a word."""
    wheel(index, "jax", "3.0", python=f"py3{newer.version[1]}")
    environment = build("latest")
    assert environment.python_version == newer.name
    assert environment.versions["jax"] == "3.0"


def test_without_a_python_that_will_do_it_is_said(build, index):
    """The resolver's words, and what to install."""
    wheel(index, "jax", "3.0", python="py399")
    with pytest.raises(
        EnvironmentUnavailableError, match=r"(?s)no wheels.*Likely mend: install a Python"
    ):
        build("jax==3.0")


def test_a_python_that_was_replaced_is_looked_for_again(build, tmp_path, index, monkeypatch):
    """What was kept of a resolution holds while its interpreter does."""
    (tmp_path / "old.txt").write_text(PINS)
    build("old.txt")
    assert index.exists()
    real = interpreters.probe
    monkeypatch.setattr(interpreters, "probe", lambda _path: None)
    assert set(versions(build("old.txt")).values()) == {"1.0"}
    monkeypatch.setattr(interpreters, "probe", real)


# The user's project


def test_a_project_is_built_and_its_dependencies_are_added(build, tmp_path):
    """What it asks of the releases under test is overridden; its tree stays as it was."""
    directory = project(tmp_path / "mine", "jax<2", "flax<2", "einops", "bnverify>=7")
    before = sorted(directory.rglob("*"))
    environment = build("jax==2.0,flax==2.0", directory)
    assert versions(environment)["jax"] == "2.0"
    assert environment.versions["einops"] == "0.8"
    assert shows(environment, "__import__('mymodel').jax.version") == "2.0"
    assert sorted(directory.rglob("*")) == before


def test_an_edit_of_the_project_makes_no_environment_anew(build, tmp_path):
    """Its code is a layer of its own: the releases stay, their byte code too."""
    first = build("jax==1.0", project(tmp_path / "mine", code="edit = 1"))
    second = build("jax==1.0", project(tmp_path / "mine", code="edit = 2"))
    assert [shows(e, "__import__('mymodel').edit") for e in (first, second)] == ["1", "2"]
    assert first.python == second.python
    assert first.key != second.key


def test_a_directory_that_does_not_build_is_imported_from(build, tmp_path):
    """A few files and no pyproject.toml are a project too."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "step.py").write_text("here = True")
    assert shows(build("jax==1.0", tmp_path / "mine"), "__import__('step').here") == "True"


def test_a_project_that_does_not_build_is_said(build, tmp_path):
    """The back end's words, not a traceback of ours."""
    directory = project(tmp_path / "mine")
    (directory / "backend.py").write_text("raise SystemExit('cannot do it')")
    with pytest.raises(EnvironmentUnavailableError, match="cannot do it"):
        build("jax==1.0", directory)


# Isolation


def test_it_sees_nothing_of_this_process(build, tmp_path, monkeypatch):
    """No PYTHONPATH, user site, virtual environment or current directory; jax's settings pass."""
    environment = build("jax==1.0", None, [tmp_path / "extra"])
    (tmp_path / "leak").mkdir()
    (tmp_path / "leak" / "jax.py").write_text("version = 'leaked'")
    for name in ("PYTHONPATH", "PYTHONUSERBASE", "VIRTUAL_ENV", "PYTHONHOME"):
        monkeypatch.setenv(name, str(tmp_path / "leak"))
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    in_leak = functools.partial(shows, environment, cwd=tmp_path / "leak")
    path = in_leak("sys.path", env={"MINE": "1"})
    assert str(tmp_path / "leak") not in path
    assert "''" not in path
    assert path.index(str(environment.paths[0])) < path.index(str(tmp_path / "extra"))
    assert in_leak("__import__('jax').version") == "1.0"
    assert in_leak("os.environ['JAX_PLATFORMS']") == "cpu"
    assert in_leak("os.environ.get('VIRTUAL_ENV')") == "None"
    assert in_leak("os.environ['MINE']", env={"MINE": "1"}) == "1"


# When it cannot be had


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "jax==7.0",
            r"cannot make the environment jax==7\.0: .*no version of jax==7\.0.*version exist",
        ),
        ("absent-package", r"absent-package.*Likely mend"),
        ("jax==1.0,flax==2.0", r"flax[>=]=2\.0 depends on jax>=2\.0.*Likely mend: choose releases"),
    ],
)
def test_the_resolvers_last_words_are_told(build, text, message):
    """With the requirement and the likely mend, and without a traceback."""
    with pytest.raises(EnvironmentUnavailableError, match=f"(?s){message}") as caught:
        build(text)
    assert "Traceback" not in str(caught.value)


def test_a_file_that_is_no_requirements_file_is_said(build, tmp_path):
    """Where it does not parse."""
    (tmp_path / "bad.txt").write_text("jax==1.0\nno such thing ==\n")
    with pytest.raises(EnvironmentUnavailableError, match=r"(?s)bad\.txt.*Likely mend: correct"):
        build("bad.txt")


def test_releases_that_do_not_import_are_refused(build, index):
    """They resolve, they install, and they do not work: that is said at once, and not kept."""
    wheel(index, "flax", "3.0", code="import numpy.absent_module")
    for _ in range(2):
        with pytest.raises(
            EnvironmentUnavailableError, match=r"(?s)do not import.*No module.*months"
        ):
            build("jax==2.0,flax==3.0")


def test_what_is_not_what_was_asked_for_is_refused(build, monkeypatch):
    """Whoever installs something else in its place."""
    real = uv.Uv.install
    monkeypatch.setattr(
        uv.Uv,
        "install",
        lambda self, python, lines, **kw: real(
            self, python, [line.replace("optax==2.0", "optax==1.0") for line in lines], **kw
        ),
    )
    with pytest.raises(
        EnvironmentUnavailableError, match=r"optax==2\.0 was asked for and 1\.0 was"
    ):
        build("jax==1.0")


def test_an_interpreter_without_the_releases_is_refused(build, tmp_path):
    """A bare virtual environment is none to record in."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "bare"], check=True)
    with pytest.raises(EnvironmentUnavailableError, match="No module named 'jax'"):
        build("bare")


def test_a_cache_that_cannot_be_written_is_said(index, tmp_path):
    """With the variable that names another."""
    (tmp_path / "file").touch()
    assert index.exists()
    with pytest.raises(EnvironmentUnavailableError, match=r"Likely mend: let BNVERIFY_CACHE"):
        build_all([parse("jax==1.0")], cache_dir=tmp_path / "file")


def test_without_uv_it_is_said_how_to_get_it(build, monkeypatch):
    """The gate is an extra."""
    monkeypatch.setitem(sys.modules, "uv", None)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(EnvironmentUnavailableError, match=r"pip install 'bnverify\[gate\]'"):
        build("jax==1.0")


def test_uv_on_path_will_do(build, monkeypatch, tmp_path):
    """As a program alone, it need not be a Python package."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "uv").symlink_to(uv._program())
    monkeypatch.setitem(sys.modules, "uv", None)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:/usr/bin:/bin")
    assert build("jax==1.0").versions["jax"] == "1.0"


def test_a_uv_that_hangs_is_ended(build, monkeypatch, tmp_path):
    """After a time it is given up, and said."""
    (tmp_path / "slow-uv").write_text("#!/bin/sh\nsleep 600\n")
    (tmp_path / "slow-uv").chmod(0o755)
    monkeypatch.setattr(uv, "_program", lambda: str(tmp_path / "slow-uv"))
    monkeypatch.setattr(environments, "_UV_SECONDS", 0.3)
    with pytest.raises(EnvironmentUnavailableError, match="uv pip compile timed out after 0 s"):
        build("jax==1.0")


def test_releases_that_import_for_ever_are_given_up(build, monkeypatch, index):
    """A hanging import is no hanging gate."""
    wheel(index, "flax", "3.0", code="import time; time.sleep(600)")
    monkeypatch.setattr("bnverify.upgrade.releases._IMPORT_SECONDS", 1)
    with pytest.raises(EnvironmentUnavailableError, match="takes longer than 1 s"):
        build("jax==2.0,flax==3.0")


# Two at once


def test_two_sides_are_made_together(index, tmp_path):
    """In the order asked for, one of them for both where they are the same."""
    assert index.exists()
    sides = [parse(text) for text in ("jax==1.0", "jax==2.0", "jax==1.0")]
    made = build_all(sides, cache_dir=tmp_path / "cache")
    assert [environment.versions["jax"] for environment in made] == ["1.0", "2.0", "1.0"]
    assert made[0].python == made[2].python


def test_one_side_that_fails_gives_up_the_other(index, tmp_path):
    """The reason told is the failure, not the giving up."""
    wheel(index, "flax", "3.0", code="import time; time.sleep(600)")
    sides = [parse("jax==2.0,flax==3.0"), parse("jax==7.0")]
    with pytest.raises(EnvironmentUnavailableError, match=r"no version of jax==7\.0"):
        build_all(sides, cache_dir=tmp_path / "cache")
    assert list((tmp_path / "cache" / "upgrade" / "building").iterdir()) == []


BUILD = """
import json, sys
from pathlib import Path
from bnverify.upgrade.environments import build_all, parse
sides = [parse("jax==2.0,flax==3.0"), parse("jax==1.0")]
made = build_all(sides, Path(sys.argv[2]), cache_dir=Path(sys.argv[1]))
print(json.dumps([[e.versions, str(e.python)] for e in made]))
"""


def test_interrupted_it_cleans_up(index, tmp_path):
    """Ctrl-C leaves no process and no half of an environment."""
    wheel(index, "flax", "3.0", code="import time; time.sleep(600)")
    command = [sys.executable, "-c", BUILD, tmp_path / "cache", project(tmp_path / "mine")]
    mark = f"{os.getpid()}-interrupted"
    building = tmp_path / "cache" / "upgrade" / "building"
    with subprocess.Popen(
        command, env=os.environ | {"MARK": mark}, stderr=subprocess.PIPE
    ) as asker:
        until(lambda: list(building.glob("environments-*/venv")))
        asker.send_signal(signal.SIGINT)
        assert b"KeyboardInterrupt" in asker.communicate()[1]
    until(lambda: not alive(mark))
    assert list(building.iterdir()) == []


def test_killed_at_any_moment_the_next_run_gives_the_same(index, tmp_path):
    """SIGKILL ten times over: no process remains, nothing is half there, the answer is one."""
    wheel(index, "flax", "3.0", code="import time; time.sleep(0.2)")
    directory = project(tmp_path / "mine", "einops")
    command = [sys.executable, "-c", BUILD, tmp_path / "cache", directory]
    mark = f"{os.getpid()}-killed"
    started = time.monotonic()
    expected = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    whole = time.monotonic() - started
    for i in range(10):
        shutil.rmtree(tmp_path / "cache")
        asker = subprocess.Popen(
            command, env=os.environ | {"MARK": mark}, stdout=subprocess.DEVNULL
        )
        time.sleep(whole * (i + 1) / 11)
        asker.kill()
        asker.wait()
        until(lambda: not alive(mark))
        if i % 2:  # once killed, or twice
            asker = subprocess.Popen(command, stdout=subprocess.DEVNULL)
            time.sleep(whole * i / 11)
            asker.kill()
            asker.wait()
        again = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert json.loads(again) == json.loads(expected)
        assert list((tmp_path / "cache" / "upgrade" / "building").iterdir()) == []
