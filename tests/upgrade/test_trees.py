"""Which files are a project's sources, and that a hash and a copy hold just these."""

from __future__ import annotations

import subprocess

import pytest

from bnverify.upgrade import trees


@pytest.fixture
def project(tmp_path):
    """Make a project with sources, and with what is none."""
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


def test_without_git_hidden_and_built_files_are_left_out(project):
    """Nor are environments or byte code sources."""
    assert [str(name) for name in trees.files(project)] == SOURCES


def test_under_git_it_decides(project):
    """Tracked files and new ones count, ignored and deleted ones do not."""
    git = ["git", "-C", str(project)]
    (project / ".gitignore").write_text(".venv\nenv\n*.pyc\n.git-not\n")
    (project / "gone.py").touch()
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "add", "gone.py", "pyproject.toml"], check=True)
    (project / "gone.py").unlink()
    names = [str(name) for name in trees.files(project)]
    assert names == [".gitignore", "build/z.py", *SOURCES]


def test_a_directory_that_git_ignores_is_walked(project):
    """A package installed into an ignored environment of a checkout has sources all the same."""
    git = ["git", "-C", str(project)]
    subprocess.run([*git, "init", "-q"], check=True)
    (project / ".gitignore").write_text(".venv\n")
    assert [str(name) for name in trees.files(project / ".venv" / "lib")] == ["x.py"]


def test_data_are_not_taken_for_sources(project, monkeypatch):
    """A directory of checkpoints is refused before it is copied."""
    monkeypatch.setattr(trees, "_LIMIT", 10)
    with pytest.raises(trees.TreeError, match=r"more than sources do;.*\.gitignore"):
        trees.files(project)


def test_the_hash_follows_names_and_contents(project):
    """Any change of either changes it; the place does not."""
    names = trees.files(project)
    before = trees.digest(project, names)
    moved = project.rename(project.with_name("moved"))
    assert trees.digest(moved, names) == before
    (moved / "src" / "model" / "data.json").write_text("other")
    assert trees.digest(moved, names) != before
    assert trees.digest(moved, names[:-1]) != trees.digest(moved, names)


def test_a_copy_holds_the_sources(project, tmp_path):
    """Links stay links, and nothing else comes along."""
    names = trees.files(project)
    trees.copy(project, names, tmp_path / "copy", trees.digest(project, names))
    assert trees.files(tmp_path / "copy") == names
    assert (tmp_path / "copy" / "src" / "alias").is_symlink()


def test_sources_that_change_meanwhile_are_not_kept(project, tmp_path):
    """A copy must be what its hash says."""
    names = trees.files(project)
    expected = trees.digest(project, names)
    (project / "pyproject.toml").write_text("other")
    with pytest.raises(trees.TreeError, match="changed while it was copied"):
        trees.copy(project, names, tmp_path / "copy", expected)
