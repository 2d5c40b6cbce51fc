"""Environments, created by the real uv from a tiny local index without network."""

from __future__ import annotations

import fcntl
import functools
import hashlib
import http.server
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from test_processes import alive, until
from wheels import project, wheel

from bnverify.errors import UsageError
from bnverify.upgrade import environments, uv
from bnverify.upgrade.environments import parse, resolve, workspace

pytestmark = pytest.mark.nightly

PINS = "jax==1.0\njaxlib==1.0\nflax==1.0\noptax==1.0\n"


@pytest.fixture
def index(tmp_path, monkeypatch) -> Path:
    """Make uv use a directory with two releases of every package, and nothing else."""
    path = tmp_path / "index"
    path.mkdir()
    for version in ("1.0", "2.0"):
        wheel(path, "jaxlib", version)
        wheel(path, "jax", version, f"Requires-Dist: jaxlib=={version}")
        wheel(path, "flax", version, f"Requires-Dist: jax>={version}")
        wheel(path, "optax", version)
    wheel(path, "einops", "0.8")
    for name in environments.OWN:
        wheel(path, name, "0.1")
    (tmp_path / "nothing").mkdir()
    monkeypatch.setenv("UV_DEFAULT_INDEX", (tmp_path / "nothing").as_uri())
    monkeypatch.setenv("UV_FIND_LINKS", str(path))
    monkeypatch.setenv("UV_CACHE_DIR", str(tmp_path / "uv-cache"))
    return path


@pytest.fixture
def work(tmp_path, monkeypatch):
    """A workspace in a cache used by this test only."""
    monkeypatch.setenv("BNVERIFY_CACHE", str(tmp_path / "cache"))
    with workspace() as made:
        yield made


@pytest.fixture
def build(tmp_path, index, work):
    """A function that resolves a requirement in the test's cache."""
    assert index.is_dir()
    return lambda text, project=None: resolve(parse(text, tmp_path), work, project)


@pytest.fixture
def shows(work):
    """A function that evaluates an expression in an environment."""

    def call(environment, expression: str) -> str:
        done = environment.run(["-c", f"import sys, os\nprint({expression})"], work)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    return call


@pytest.fixture
def versions(shows):
    """A function that returns the releases in an environment."""
    code = (
        "__import__('json').dumps({d.metadata['Name']: d.version"
        " for d in __import__('importlib.metadata').metadata.distributions()})"
    )
    return lambda environment: json.loads(shows(environment, code))


@pytest.fixture
def newer() -> uv.Python:
    """Return the nearest newer Python."""
    found = [python for python in uv.pythons() if python.minor > sys.version_info[:2]]
    if not found:
        pytest.skip("no newer version of Python is installed here")
    return found[0]


# An environment has the requested releases.


def test_a_list_gets_its_releases_and_the_required_packages(build, versions, shows):
    """Packages that are not named get the newest compatible release."""
    environment = build("jax==1.0")
    found = versions(environment)
    assert {**found, "jax": "1.0", "jaxlib": "1.0", "flax": "1.0", "optax": "2.0"} == found
    assert shows(environment, "sys.version_info[:2]") == str(sys.version_info[:2])


def test_latest_is_the_newest(build, versions):
    """This applies to jax, flax and optax."""
    found = versions(build("latest"))
    assert {**found, "jax": "2.0", "flax": "2.0", "optax": "2.0"} == found


def test_an_existing_environment_is_not_changed(build, shows, tmp_path, index):
    """A manually altered environment can be a side; bnverify and its dependency are added from outside."""
    venv = tmp_path / "venv"
    command = [uv.program(), "--quiet", "venv", "--python", sys.executable, str(venv)]
    subprocess.run(command, check=True)
    wheel(tmp_path, "jax", "1.0", code="altered = True")
    install = [uv.program(), "--quiet", "pip", "install", "--python", str(venv), "--no-deps"]
    subprocess.run([*install, next(tmp_path.glob("jax-*.whl"))], check=True)
    environment = build(str(venv))
    assert environment.key is None  # its recordings are not cached
    assert shows(environment, "__import__('jax').altered") == "True"
    assert shows(environment, "__import__('msgspec').version") == "0.1"
    assert shows(environment, "__import__('bnverify').__name__") == "bnverify"
    done = subprocess.run([venv / "bin" / "python", "-I", "-c", "import msgspec"], check=False)
    assert done.returncode == 1  # nothing was installed there


def test_a_requirement_for_bnverify_is_ignored(build, versions, shows, tmp_path):
    """A requirements file may list bnverify, but the running bnverify records on both sides."""
    (tmp_path / "dev.txt").write_text(PINS + "bnverify==0.0.1\n")
    environment = build("dev.txt")
    assert not any(pin.startswith("bnverify") for pin in environment.pins)
    assert shows(environment, "__import__('bnverify').__path__[0]").startswith(str(tmp_path))
    assert versions(environment)["bnverify"] == environments._version()


def test_hashes_in_a_file_are_checked(build, work, shows, tmp_path, index):
    """A wheel with another hash is not installed."""
    lines = [
        f"{name}==1.0 --hash=sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}"
        for name in ("jax", "jaxlib", "flax", "optax")
        for path in [index / f"{name}-1.0-py3-none-any.whl"]
    ]
    (tmp_path / "hashed.txt").write_text("\n".join(lines))
    assert shows(build("hashed.txt"), "__import__('optax').version") == "1.0"
    wheel(index, "optax", "1.0", code="evil = True")
    shutil.rmtree(tmp_path / "uv-cache")
    shutil.rmtree(next(work.path.glob("site-*")))
    with pytest.raises(UsageError, match=r"(?s)optax.*find out why"):
        build("hashed.txt").run(["-c", ""], work)


def test_an_index_in_a_requirements_file_is_used(build, shows, tmp_path):
    """It is used for installing as well, as in pip."""
    (tmp_path / "more").mkdir()
    wheel(tmp_path / "more", "einops", "7.0")
    (tmp_path / "reqs.txt").write_text(f"--find-links {tmp_path / 'more'}\n{PINS}einops\n")
    assert shows(build("reqs.txt"), "__import__('einops').version") == "7.0"


@pytest.mark.parametrize("line", ["flax @ {uri}", "-e {path}", "{path}"])
def test_local_files_and_directories_count_by_content(build, shows, tmp_path, line):
    """A patched wheel or directory of the same name gives another environment, and is not modified."""
    seen = []
    for patch in (1, 2):
        if line.startswith("flax"):
            path = wheel(tmp_path, "flax", "1.0", code=f"patch = {patch}")
            text, name = f"jax==1.0,{line.format(uri=path.as_uri())}", "flax"
        else:
            path = project(tmp_path / "mymodel", code=f"patch = {patch}")
            (tmp_path / "reqs.txt").write_text(f"{PINS}{line.format(path=path)}\n")
            text, name = "reqs.txt", "mymodel"
            before = sorted(path.rglob("*"))
        with workspace() as work:
            environment = resolve(parse(text, tmp_path), work)
            code = f"import {name}; print({name}.patch)"
            done = environment.run(["-c", code], work)
        seen.append((done.stdout, environment.key))
        assert path.is_file() or sorted(path.rglob("*")) == before
    assert [told for told, _ in seen] == ["1\n", "2\n"]
    assert seen[0][1] != seen[1][1]


@pytest.fixture
def server(tmp_path, index, monkeypatch):
    """Serve the index over HTTP on this machine; uv caches the answers."""
    for path in index.iterdir():
        page = tmp_path / "simple" / path.name.partition("-")[0] / "index.html"
        page.parent.mkdir(parents=True, exist_ok=True)
        with page.open("a") as file:
            file.write(f'<a href="/index/{path.name}">{path.name}</a><br>')
    handler = functools.partial(Quiet, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as made:
        threading.Thread(target=made.serve_forever, daemon=True).start()
        monkeypatch.delenv("UV_FIND_LINKS")
        monkeypatch.setenv("UV_DEFAULT_INDEX", f"http://127.0.0.1:{made.server_port}/simple")
        monkeypatch.setenv("UV_HTTP_RETRIES", "0")
        yield made
        made.shutdown()


class Quiet(http.server.SimpleHTTPRequestHandler):
    """An HTTP handler without output."""

    def log_message(self, *_):
        """Discard the message."""


def test_fully_pinned_requirements_need_the_index_only_once(build, server, shows, tmp_path):
    """A gate that ran once runs again without a network; an open list always needs it."""
    (tmp_path / "old.txt").write_text(PINS)
    first = build("old.txt")
    assert shows(first, "__import__('jax').version") == "1.0"
    build("jax==1.0")
    server.shutdown()
    server.server_close()
    assert build("old.txt") == first
    assert shows(build("old.txt"), "__import__('jax').version") == "1.0"
    with pytest.raises(UsageError, match="the package index is reachable"):
        build("jax==2.0")


# The Python of an environment.


def test_the_python_is_one_that_the_releases_support(build, shows, index, newer):
    """If they do not support the running Python, another installed one is used."""
    wheel(index, "jax", "3.0", python=f"py3{newer.minor[1]}")
    for text in ("jax==3.0,flax", "latest"):  # here `latest` would resolve to older releases
        environment = build(text)
        assert shows(environment, "sys.version_info[:2]") == str(newer.minor)
        assert shows(environment, "__import__('jax').version") == "3.0"


def test_the_running_python_comes_first_then_the_nearest():
    """There is one for each supported minor version, and none is a pyenv shim, which may fail."""
    first, *rest = uv.pythons()
    assert first.path == Path(sys.executable)
    minors = [python.minor for python in (first, *rest)]
    assert len(set(minors)) == len(minors)
    assert min(minors) >= (3, 11)
    apart = [abs(minor[1] - sys.version_info.minor) for minor in minors]
    assert apart == sorted(apart)
    for python in rest:
        code = "import sys; print(sys.version_info[:2])"
        done = subprocess.run([python.path, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == str(python.minor)


# The user's project.


def test_a_project_is_built_and_its_dependencies_are_added(build, shows, versions, tmp_path):
    """Its bounds on the tested releases are overridden, and its directory is not modified."""
    directory = project(tmp_path / "mine", "jax<2", "flax<2", "einops", "bnverify>=7")
    before = sorted(directory.rglob("*"))
    environment = build("jax==2.0,flax==2.0", directory)
    assert versions(environment)["einops"] == "0.8"
    assert shows(environment, "__import__('mymodel').jax.version") == "2.0"
    assert sorted(directory.rglob("*")) == before


def test_editing_the_project_needs_no_new_environment(build, tmp_path):
    """Its code is a separate layer: the installed releases and their byte code stay."""
    first = build("jax==1.0", project(tmp_path / "mine", code="edit = 1"))
    second = build("jax==1.0", project(tmp_path / "mine", code="edit = 2"))
    assert first.pins == second.pins
    assert first.key != second.key


def test_a_directory_that_does_not_build_is_imported_from(build, shows, tmp_path):
    """A few files without a pyproject.toml can be a project, too."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "step.py").write_text("here = True")
    assert shows(build("jax==1.0", tmp_path / "mine"), "__import__('step').here") == "True"


def test_a_project_that_does_not_build_is_reported(build, work, tmp_path):
    """The message is that of the build back end, without a traceback of bnverify."""
    directory = project(tmp_path / "mine")
    (directory / "backend.py").write_text("raise SystemExit('cannot do it')")
    with pytest.raises(UsageError, match="cannot do it"):
        build("jax==1.0", directory).run(["-c", ""], work)


# Isolation


def test_environments_are_isolated_from_this_process(build, work, shows, tmp_path, monkeypatch):
    """PYTHONPATH, user site, virtual environment and working directory are hidden; jax's settings pass."""
    (tmp_path / "leak").mkdir()
    (tmp_path / "leak" / "jax.py").write_text("version = 'leaked'")
    for name in ("PYTHONPATH", "PYTHONUSERBASE", "VIRTUAL_ENV", "PYTHONHOME"):
        monkeypatch.setenv(name, str(tmp_path / "leak"))
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.chdir(tmp_path / "leak")
    environment = build("jax==1.0")
    path = shows(environment, "sys.path")
    assert str(tmp_path / "leak") not in path
    assert "site-packages/numpy" not in path
    assert shows(environment, "__import__('jax').version") == "1.0"
    assert shows(environment, "os.environ['JAX_PLATFORMS']") == "cpu"
    done = environment.run(["-c", "import numpy"], work)
    assert "No module named 'numpy'" in done.stderr  # although it is installed for this test


# Errors.


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("jax==7.0", r"environment jax==7\.0: .*no version of jax==7\.0.*version exist"),
        ("absent-package", r"absent-package.*Likely fix"),
        ("jax==1.0,flax==2.0", r"flax[>=]=2\.0 depends on jax>=2\.0.*Likely fix: choose releases"),
        ("jax==3.0", r"no wheels.*Likely fix: install a Python"),
        ("bad.txt", r"bad\.txt.*Likely fix: correct"),
    ],
)
def test_the_resolvers_message_is_reported(build, index, tmp_path, text, message):
    """The error has the requirement and the likely fix, without a traceback."""
    wheel(index, "jax", "3.0", python="py399")
    (tmp_path / "bad.txt").write_text("jax==1.0\nno such thing ==\n")
    with pytest.raises(UsageError, match=f"(?s){message}") as caught:
        build(text)
    assert "Traceback" not in str(caught.value)


def test_a_broken_wheel_is_reported(build, work, index):
    """What resolves may still fail to install."""
    path = index / "flax-3.0-py3-none-any.whl"
    wheel(index, "flax", "3.0", code="x = 1\n" * 1000)
    content = path.read_bytes()
    path.write_bytes(content.replace(b"x = 1", b"x = 2", 1))
    environment = build("jax==2.0,flax==3.0")
    with pytest.raises(UsageError, match=r"(?s)cannot create the environment.*uv says.*flax"):
        environment.run(["-c", ""], work)


def test_an_unwritable_cache_is_reported(monkeypatch, tmp_path):
    """The error names the variable that sets another directory."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("BNVERIFY_CACHE", str(tmp_path / "file"))
    with pytest.raises(UsageError, match="set BNVERIFY_CACHE to"), workspace():
        pass


def test_a_missing_uv_is_reported(build, monkeypatch):
    """The error says how to install it."""
    monkeypatch.setitem(sys.modules, "uv", None)
    with pytest.raises(UsageError, match="pip install uv"):
        build("jax==1.0")


def test_a_hanging_uv_is_killed(build, monkeypatch, tmp_path):
    """The error has the time limit."""
    (tmp_path / "slow-uv").write_text("#!/bin/sh\nsleep 600\n")
    (tmp_path / "slow-uv").chmod(0o755)
    monkeypatch.setattr(uv, "program", lambda: str(tmp_path / "slow-uv"))
    monkeypatch.setattr(uv, "_SECONDS", 0.3)
    with pytest.raises(UsageError, match=r"uv pip timed out after 0\.3 s"):
        build("jax==1.0")


SAID = {
    "python": """error: No solution found when resolving dependencies
  cause: Because the current Python version (3.11.7) does not satisfy Python>=3.12 and flax==0.12.12
         depends on Python>=3.12, we can conclude that flax==0.12.12 cannot be used.""",
    "wheels": """  x No solution found when resolving dependencies:
  ╰─▶ Because jaxlib==0.4.13 has no wheels with a matching Python ABI tag (e.g., `cp312`) and you
      require jaxlib==0.4.13, we can conclude that your requirements are unsatisfiable.""",
    "version": """  cause: Because there is no version of jax==0.99.1 and you require jax==0.99.1, we can
      conclude that your requirements are unsatisfiable.""",
    "range": """  cause: Because only jaxlib>=0.4.13 is available and you require jaxlib<0.4.13, we can
      conclude that your requirements are unsatisfiable.""",
    "name": "  cause: Because x was not found in the package registry and you require x, ...",
    "clash": "Because flax==0.12.8 depends on jax>=0.10.0 and you require jax==0.4.30, ...",
    "hash": "error: Failed to download `toolz==1.0.0`\n  cause: Hash mismatch for `toolz==1.0.0`",
    "network": "error: Request failed after 3 retries in 5.9s\n  cause: error sending request for url",
    "syntax": "error: Couldn't parse requirement in `l.txt` at position 0",
    "disk": "error: failed to write to file: No space left on device (os error 28)",
    "build": "error: Failed to build `model @ file:///x`\n  cause: The build backend returned an error",
    "unknown": "error: something else",
}


@pytest.mark.parametrize(
    ("said", "fix"),
    [
        ("python", "install a Python"),
        ("wheels", "install a Python"),
        ("version", "the name and the version exist"),
        ("range", "the name and the version exist"),
        ("name", "the name and the version exist"),
        ("clash", "releases that are compatible"),
        ("hash", "find out why"),
        ("network", "the package index is reachable"),
        ("syntax", "correct the requirement"),
        ("disk", "free some space"),
        ("build", "builds with `uv build`"),
        ("unknown", "with `uv pip compile`"),
    ],
)
def test_each_failure_has_its_fix(said, fix):
    """The advice fits the message; another Python is tried only if that may help."""
    error = uv.UvError(SAID[said])
    assert fix in error.fix
    assert error.wants_another_python == (said in {"python", "wheels"})


def test_the_error_message_is_what_follows_the_warnings():
    """It is complete if it is short, otherwise shortened in the middle."""
    assert uv._error_message("warning: x\nerror: no\n  cause: y\n") == "error: no\n  cause: y"
    assert uv._error_message("words without the word") == "words without the word"
    long = "error: " + "a" * 5000 + "end"
    assert uv._error_message(long).startswith("error: a")
    assert uv._error_message(long).endswith("end")
    assert len(uv._error_message(long)) < 2100


# Concurrent, interrupted and killed runs.


def test_concurrent_runs_do_not_interfere(index, tmp_path):
    """Both get the requested environments."""
    wheel(index, "flax", "3.0", code="import time; time.sleep(0.3)")
    command, env = started(tmp_path, "at-once")
    both = [subprocess.Popen(command, env=env, stdout=subprocess.PIPE) for _ in range(2)]
    assert [each.communicate()[0] for each in both] == [TOLD, TOLD]
    assert list((tmp_path / "cache" / "upgrade" / "work").iterdir()) == []


def test_a_workspace_in_use_is_not_removed(work):
    """Another run removes the workspaces of killed runs only."""
    (work.path.parent / "killed").mkdir()
    with workspace() as other:
        assert work.path.exists()
        assert other.path.exists()
        assert not (work.path.parent / "killed").exists()
    assert not other.path.exists()
    with (work.path / "lock").open() as lock, pytest.raises(BlockingIOError):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_recordings_unused_for_sixty_days_are_removed(work):
    """Others stay."""
    for name, days in (("old", 61), ("kept", 59)):
        (work.kept / name).touch()
        then = time.time() - days * 24 * 3600
        os.utime(work.kept / name, (then, then))
    with workspace():
        assert [path.name for path in work.kept.iterdir()] == ["kept"]


def test_the_cache_is_not_writable_for_others(work):
    """Anyone who can write to the cache can run code in processes that use it."""
    assert work.kept.stat().st_mode & 0o077 == 0


RUN = """
import sys
from pathlib import Path
from bnverify.upgrade.environments import parse, resolve, workspace
with workspace() as work:
    for text in ("jax==2.0,flax==3.0", "jax==1.0"):
        made = resolve(parse(text), work, Path(sys.argv[1]))
        code = "import flax, jax, mymodel, einops; print(flax.version, jax.version)"
        print(made.run(["-c", code], work).stdout, end="", flush=True)
"""
TOLD = b"3.0 2.0\n3.0 1.0\n"


def started(tmp_path, name) -> tuple[list[str], dict[str, str]]:
    """Return a command that creates two environments, and its environment with a mark."""
    directory = project(tmp_path / "mine", "einops")
    env = {**os.environ, "BNVERIFY_CACHE": str(tmp_path / "cache"), "MARK": f"{os.getpid()}-{name}"}
    return [sys.executable, "-c", RUN, str(directory)], env


def test_an_interrupted_run_cleans_up(index, tmp_path):
    """Ctrl-C leaves no process, and no workspace."""
    wheel(index, "flax", "3.0", code="import time; time.sleep(600)")
    command, env = started(tmp_path, "interrupted")
    work = tmp_path / "cache" / "upgrade" / "work"
    with subprocess.Popen(command, env=env, stderr=subprocess.PIPE) as asker:
        until(lambda: list(work.glob("*/site-*")), seconds=30)
        time.sleep(0.5)
        asker.send_signal(signal.SIGINT)
        assert b"KeyboardInterrupt" in asker.communicate()[1]
    until(lambda: not alive(env["MARK"]))
    assert list(work.iterdir()) == []


def test_after_a_kill_at_any_moment_the_next_run_succeeds(index, tmp_path):
    """After each of ten SIGKILLs no process and no incomplete file remains, and results are equal."""
    wheel(index, "flax", "3.0", code="import time; time.sleep(0.2)")
    command, env = started(tmp_path, "killed")
    begun = time.monotonic()
    assert subprocess.run(command, env=env, capture_output=True, check=True).stdout == TOLD
    whole = time.monotonic() - begun
    for i in range(10):
        shutil.rmtree(tmp_path / "cache")
        shutil.rmtree(tmp_path / "uv-cache")
        for part in (i + 1, i)[: 1 + i % 2]:  # killed once, or twice
            asker = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL)
            time.sleep(whole * part / 11)
            asker.kill()
            asker.wait()
            until(lambda: not alive(env["MARK"]))
        assert subprocess.run(command, env=env, capture_output=True, check=True).stdout == TOLD
        assert list((tmp_path / "cache" / "upgrade" / "work").iterdir()) == []
