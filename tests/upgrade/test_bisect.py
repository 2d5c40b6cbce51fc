"""Bisection: the right release, few trials, and unavailable releases reported."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from packaging.specifiers import SpecifierSet

from bnverify.cli import main
from bnverify.errors import UsageError
from bnverify.upgrade import environments, uv
from bnverify.upgrade.bisect import first_changed, releases_between
from bnverify.upgrade.environments import Workspace


@given(st.integers(2, 200).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n - 1))))
def test_the_first_changed_release_is_found_in_logarithmically_many_trials(drawn):
    """It is found wherever it is."""
    count, first = drawn
    releases = [str(i) for i in range(count)]
    tried = []

    def changed(version):
        tried.append(version)
        return int(version) >= first

    assert first_changed(releases, changed) == (first - 1, first)
    assert len(tried) <= math.ceil(math.log2(count))
    assert len(set(tried)) == len(tried)


@given(
    st.integers(2, 40).flatmap(
        lambda n: st.tuples(
            st.just(n), st.integers(1, n - 1), st.sets(st.integers(1, max(1, n - 2)))
        )
    )
)
def test_unavailable_releases_are_skipped_and_reported(drawn):
    """The releases left between the two ends are exactly the unavailable ones."""
    count, first, missing = drawn
    releases = [str(i) for i in range(count)]
    missing.discard(count - 1)

    def changed(version):
        return None if int(version) in missing else int(version) >= first

    low, high = first_changed(releases, changed)
    assert low < first <= high
    assert set(range(low + 1, high)) <= missing


@pytest.fixture
def index(monkeypatch):
    """An index with one package, whose newest releases need another Python."""
    releases = ("1.9", "1.10", "2.0", "2.1")
    needs = {"2.1": "new"}

    def compiled(arguments, overrides, python, requirement, work):
        del arguments, overrides, work
        asked = SpecifierSet(requirement.specifiers[0].removeprefix("thing"))
        fitting = [v for v in releases if v in asked and needs.get(v, python) == python]
        if not fitting:
            raise uv.UvError("the requirements are\n unsatisfiable")
        return [f"thing=={fitting[-1]}", "other==1"]

    monkeypatch.setattr(environments, "_compile", compiled)
    monkeypatch.setattr(uv, "pythons", lambda: iter(["old", "new"]))


def test_releases_are_listed_oldest_first_by_version(index, tmp_path):
    """1.10 comes after 1.9; both ends and releases for another Python are included."""
    work = Workspace(tmp_path, tmp_path)
    assert releases_between("thing", "1.9", "2.1", work) == ["1.9", "1.10", "2.0", "2.1"]
    assert releases_between("thing", "1.9.5", "2.2", work) == ["1.9.5", "1.10", "2.0", "2.1", "2.2"]
    with pytest.raises(UsageError, match="not older"):
        releases_between("thing", "2.0", "2.0", work)


def test_the_command_rejects_invalid_versions(capsys):
    """Requirements files are for the gate only."""
    asked = ["bisect", "--package", "jax", "--to", "0.5.0", "--from"]
    assert main([*asked, "pins/old.txt"]) == 2
    assert "versions of jax" in capsys.readouterr().err
    assert main([*asked, "flax==0.8.5"]) == 2
