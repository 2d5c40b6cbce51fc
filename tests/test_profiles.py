"""The Hypothesis profiles of conftest.py are there, loaded, and what they claim to be."""

import os

import pytest
from hypothesis import settings

PROFILES = ("dev", "quick", "ci", "nightly")


def test_the_asked_profile_is_the_active_one(pytestconfig: pytest.Config) -> None:
    """Without this, a misspelt variable would leave Hypothesis at its own defaults."""
    asked = pytestconfig.getoption("--hypothesis-profile") or os.environ.get("HYPOTHESIS_PROFILE")
    expected = settings.get_profile(asked or ("ci" if os.environ.get("CI") else "dev"))
    active = settings.default
    assert active is not None
    for name in ("max_examples", "deadline", "derandomize", "print_blob", "database"):
        assert getattr(active, name) == getattr(expected, name), name


@pytest.mark.parametrize("name", PROFILES)
def test_no_profile_has_a_deadline(name: str) -> None:
    """The first call of a shape compiles, so a deadline would fail what is right."""
    assert settings.get_profile(name).deadline is None


def test_the_ci_profile_repeats_itself_and_tells_how() -> None:
    """The same commit gets the same verdict, and a failure prints what reproduces it."""
    ci = settings.get_profile("ci")
    assert ci.derandomize
    assert ci.print_blob
    assert ci.database is None


def test_the_profiles_are_of_growing_size() -> None:
    """From quick over dev and ci to nightly, each property is tried on more examples."""
    sizes = [settings.get_profile(p).max_examples for p in ("quick", "dev", "ci", "nightly")]
    assert sizes == sorted(set(sizes))
