"""Settings of every test run: the Hypothesis profiles, and one cache of compiled programs."""

from __future__ import annotations

import gc
import os
import signal
from importlib import metadata

import pytest
from hypothesis import HealthCheck, settings

from bnverify.compat import compile_quickly

# Every claim is about the CPU backend; a GPU that happens to be there must not change a verdict.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

# A shell without job control starts what it puts into the background deaf to Ctrl-C, and so would
# be every process that a test starts and interrupts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# The tests run little and compile much.
compile_quickly()

COMMON = settings(
    # The first call of each shape compiles, for 1 to 3 s, the next takes 1 ms: no deadline is
    # both kept by the first and of any use to the second.
    deadline=None,
    # For the same reason an example may be "too slow" without anything being wrong with it.
    suppress_health_check=[HealthCheck.too_slow],
)

# Run by default: other examples every time, and the failing ones remembered. An example of the
# properties is a stack of up to eight cases.
settings.register_profile("dev", COMMON, max_examples=20)
# For an edit-and-run loop.
settings.register_profile("quick", COMMON, max_examples=5)
# The same verdict for the same commit, and a line to paste that repeats a failure elsewhere.
settings.register_profile(
    "ci", COMMON, max_examples=25, derandomize=True, database=None, print_blob=True
)
# Long and random, to find what the others cannot.
settings.register_profile("nightly", COMMON, max_examples=1000, print_blob=True)


def default_profile() -> str:
    """Return the profile of a run that names none with ``--hypothesis-profile``."""
    return os.environ.get("HYPOTHESIS_PROFILE") or ("ci" if os.environ.get("CI") else "dev")


settings.load_profile(default_profile())


def pytest_report_header() -> str:
    """Return the releases under test: a log that names none says little."""
    names = ("jax", "jaxlib", "flax", "optax", "numpy", "hypothesis")
    return "releases: " + ", ".join(f"{name} {metadata.version(name)}" for name in names)


@pytest.fixture(scope="session", autouse=True)
def _compile_cache() -> None:
    # In a fixture, so that --collect-only, --help and the xdist controller load no jax.
    from bnverify import compile_cache

    compile_cache.enable()
    # What collecting the tests imported stays: the collector need not go through it again and again.
    gc.freeze()
