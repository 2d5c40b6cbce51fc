"""What differs between releases of jax is absorbed in one place."""

from __future__ import annotations

import os
from importlib import metadata

import jax
import jax.numpy as jnp
import pytest

from bnverify import compat
from bnverify.observe import QUICK

LEVEL = "--xla_backend_optimization_level=0"


@pytest.mark.parametrize(
    ("jaxlib", "given", "expected"),
    [
        ("0.4.30", "", [LEVEL]),
        ("0.10.2", "", [LEVEL, "--xla_cpu_use_fusion_emitters=false"]),
        ("0.12.0.1", "", [LEVEL, "--xla_cpu_opt_preset=FAST_COMPILE"]),
        ("99.0", "", [LEVEL]),  # an unknown flag would end the process
        (
            "99.0",
            "--xla_backend_optimization_level=2 --a",
            ["--xla_backend_optimization_level=2", "--a"],
        ),
    ],
)
def test_xla_is_told_to_compile_quickly_by_flags_that_it_knows(
    monkeypatch: pytest.MonkeyPatch, jaxlib: str, given: str, expected: list[str]
) -> None:
    """What the user set stays, and releases that nobody tried get no flag that could be gone."""
    monkeypatch.setattr(metadata, "version", lambda name: jaxlib)
    monkeypatch.setenv("XLA_FLAGS", given)
    monkeypatch.setenv("TF_CPP_MIN_LOG_LEVEL", "0")
    compat.compile_quickly()
    assert os.environ["XLA_FLAGS"].split() == expected


def test_a_stack_of_cases_keeps_the_nan_of_a_single_one() -> None:
    """XLA may drop it where the maximum with 0 is summed over a large array: docs/findings.md."""
    x = jnp.full((512, 8), jnp.nan)
    lowered = jax.jit(lambda x: jax.nn.relu(x).sum(axis=1)).lower(x)
    assert jnp.isnan(compat.compiled(lowered, QUICK)(x)).all()
