"""The files of a target: its project, which files are sources, and their hash."""

from __future__ import annotations

import subprocess

import altered_step
import pytest

from bnverify.upgrade import sources
from bnverify.upgrade.sources import locate


@pytest.fixture
def project(tmp_path):
    """Make a project with sources and other files."""
    root = tmp_path / "project"
    for name in (
        *("pyproject.toml", "src/model/__init__.py", "src/model/data.json"),
        *(".venv/lib/x.py", "env/pyvenv.cfg", "env/lib/y.py", "build/z.py", "src/model/a.pyc"),
        *("src/model/__pycache__/b.cpython-311.pyc", ".git-not/c"),
    ):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    (root / "src" / "alias").symlink_to("model")
    return root


SOURCES = ["pyproject.toml", "src/alias", "src/model/__init__.py", "src/model/data.json"]


def test_without_git_hidden_and_built_files_are_skipped(project):
    """So are virtual environments and byte code."""
    assert [str(name) for name in sources.files(project)] == SOURCES


def test_under_git_ignored_files_are_skipped(project):
    """Tracked and new files count, ignored and deleted ones do not."""
    git = ["git", "-C", str(project)]
    (project / ".gitignore").write_text(".venv\nenv\n*.pyc\n.git-not\n")
    (project / "gone.py").touch()
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "add", "gone.py", "pyproject.toml"], check=True)
    (project / "gone.py").unlink()
    names = [str(name) for name in sources.files(project)]
    assert names == [".gitignore", "build/z.py", *SOURCES]


def test_a_directory_ignored_by_git_is_walked(project):
    """A package installed into an ignored environment inside a checkout has sources, too."""
    git = ["git", "-C", str(project)]
    subprocess.run([*git, "init", "-q"], check=True)
    (project / ".gitignore").write_text(".venv\n")
    assert [str(name) for name in sources.files(project / ".venv" / "lib")] == ["x.py"]


def test_a_directory_of_data_is_rejected(project, monkeypatch):
    """Checkpoints must not be copied as sources."""
    monkeypatch.setattr(sources, "_LIMIT", 10)
    with pytest.raises(sources.TreeError, match=r"above the limit of.*\.gitignore"):
        sources.files(project)


def test_the_hash_depends_on_names_and_contents(project):
    """It does not depend on the location."""
    names = sources.files(project)
    before = sources.digest(project, names)
    moved = project.rename(project.with_name("moved"))
    assert sources.digest(moved, names) == before
    (moved / "src" / "model" / "data.json").write_text("other")
    assert sources.digest(moved, names) != before
    assert sources.digest(moved, names[:-1]) != sources.digest(moved, names)


def test_a_copy_contains_the_sources_only(project, tmp_path):
    """Symlinks stay symlinks."""
    names = sources.files(project)
    sources.copy(project, names, tmp_path / "copy")
    assert sources.files(tmp_path / "copy") == names
    assert (tmp_path / "copy" / "src" / "alias").is_symlink()


def test_an_edit_of_the_target_or_its_neighbours_changes_the_hash(tmp_path):
    """Otherwise the cache would return the recording of another step."""
    target = altered_step.write(tmp_path)
    seen = {locate(target).digest}
    (tmp_path / "beside.py").write_text("x = 1\n")
    seen.add(locate(target).digest)
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "inside.py").write_text("y = 1\n")
    seen.add(locate(target).digest)
    (package / "inside.py").write_text("y = 2\n")
    seen.add(locate(target).digest)
    assert len(seen) == 4


def test_the_project_is_the_nearest_buildable_directory(tmp_path, monkeypatch):
    """It is above the target's file or, for a module, above the working directory."""
    (tmp_path / "pyproject.toml").write_text("[project]\n")
    inner = tmp_path / "steps"
    inner.mkdir()
    target = altered_step.write(inner)
    assert locate(target).project == tmp_path
    monkeypatch.chdir(inner)
    assert locate("my_package.steps:make").project == tmp_path
    assert locate("bnverify.reference:sgd").project is None
    assert locate(target, inner).project == inner
