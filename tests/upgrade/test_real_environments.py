"""Real releases from the package index, at both ends of what can be recorded."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from bnverify.upgrade import recording_file
from bnverify.upgrade.environments import build_all, parse, run

PINS = Path(__file__).parents[2] / "pins"

pytestmark = [pytest.mark.environments, pytest.mark.slow]

RECORD = """
import sys
import jax.numpy as jnp, numpy as np
from bnverify.upgrade import recording_file
x = jnp.arange(6, dtype=jnp.bfloat16).reshape(2, 3)
recording_file.write(sys.argv[1], {"numpy": np.__version__}, {"x": x, "y": np.float32("nan")})
"""


def test_the_ends_of_the_matrix_can_record(tmp_path):
    """The oldest release and the newest are built together, and what they record is read here."""
    sides = [parse(str(PINS / name)) for name in ("jax-0.4.13.txt", "jax-0.10.2.txt")]
    made = build_all(sides, cache_dir=tmp_path / "cache")
    for environment, side in zip(made, sides, strict=True):
        pins = dict(line.split("==") for line in side.lines() if "==" in line)
        assert {name: environment.versions[name] for name in pins} == pins
        path = tmp_path / "recording"
        done = run(environment, ["-c", RECORD, str(path)], env={"JAX_PLATFORMS": "cpu"})
        assert done.returncode == 0, done.stderr
        manifest, arrays = recording_file.read(path)
        assert manifest == {"numpy": pins["numpy"]}
        assert arrays["x"].dtype.name == "bfloat16"
        assert arrays["x"].astype(np.float32).tolist() == [[0, 1, 2], [3, 4, 5]]
        assert np.isnan(arrays["y"])
    again = build_all(sides, cache_dir=tmp_path / "cache")
    assert [environment.python for environment in again] == [e.python for e in made]
    assert max(environment.seconds for environment in again) < 10
