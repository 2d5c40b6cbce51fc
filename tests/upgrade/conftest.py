"""Skip tests of real environments where uv or a package index is missing."""

from __future__ import annotations

import functools
import os
import subprocess
from collections.abc import Iterator

import pytest

from bnverify.errors import UsageError
from bnverify.upgrade import uv

REAL = {"test_altered_flax", "test_real_environments"}


@functools.cache
def lacking() -> str | None:
    """Return why no environment can be created here, or None; determined once per process."""
    try:
        program = uv.program()
    except UsageError as missing:
        return str(missing)
    if os.environ.get("UV_OFFLINE"):
        return None  # offline on purpose: uv uses its cache
    done = subprocess.run(
        [program, "pip", "compile", "--quiet", "--no-cache", "-"],
        input="iniconfig\n",
        env={**os.environ, "UV_HTTP_RETRIES": "1", "UV_HTTP_TIMEOUT": "15"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode == 0:
        return None
    return (
        f"the package index does not answer (UV_OFFLINE=1: use uv's cache): {done.stderr.strip()}"
    )


def pytest_runtest_setup(item: pytest.Item) -> None:
    # Before any fixture: module fixtures create environments.
    if item.path.stem in REAL and (why := lacking()):
        pytest.skip(why)


@pytest.fixture(scope="package", autouse=True)
def _flags_of_no_release() -> Iterator[None]:
    """Unset XLA_FLAGS: other releases may not know the flags used here, and abort."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("XLA_FLAGS", raising=False)
        yield
