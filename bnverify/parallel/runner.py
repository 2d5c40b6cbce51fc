"""Data-parallel steps checked in a process of their own, which has four simulated devices.

XLA reads the number of devices once, when jax starts: the calling process keeps its own.
"""

from __future__ import annotations

import importlib.util
import json
import os
import pkgutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bnverify.evidence import Evidence
from bnverify.parallel.subject import DEVICES, Parallel
from bnverify.profile import PROFILES, Profile
from bnverify.unusable import Unusable, first_line

FLAG = "--xla_force_host_platform_device_count"
TIME_LIMIT = 1800.0


def run(
    targets: Sequence[str], profile: str | Profile = "ci", seed: int = 0
) -> dict[str, list[Evidence]]:
    """Check each of ``targets`` and return target -> its evidence.

    Args:
        targets: ``package.module:name`` or ``path/file.py:name``, each a Parallel or a function
            that makes one.
        profile: the name of a profile.
        seed: from which the cases are drawn.

    Raises:
        Unusable: nothing can be made of a target, or its process ended without an answer.
    """
    name = profile if isinstance(profile, str) else profile.name
    if name not in PROFILES:
        raise ValueError(f"profile must be one of {', '.join(PROFILES)}, got {name!r}")
    with tempfile.TemporaryDirectory(prefix="bnverify-") as folder:
        answer = Path(folder) / "evidence.json"
        command = [sys.executable, "-m", __name__, str(answer), name, str(seed), *targets]
        done = subprocess.run(  # noqa: S603 - this interpreter, this module
            command,
            env=environment(),
            capture_output=True,
            text=True,
            timeout=TIME_LIMIT,
            check=False,
        )
        if not answer.exists():
            said = (done.stderr.strip().splitlines() or ["nothing said"])[-1]
            raise Unusable(f"the process with {DEVICES} devices ended without an answer: {said}")
        found = json.loads(answer.read_text(encoding="utf-8"))
    if "refused" in found:
        raise Unusable(found["refused"])
    return {target: [_evidence(each) for each in found[target]] for target in targets}


def environment() -> dict[str, str]:
    """Return this process's environment with the simulated devices in it, on the CPU."""
    flags = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if not flag.startswith(FLAG)]
    here = str(Path(__file__).parents[1])
    path = os.pathsep.join(filter(None, (os.getcwd(), here, os.environ.get("PYTHONPATH", ""))))
    return {
        **os.environ,
        "XLA_FLAGS": " ".join([*flags, f"{FLAG}={DEVICES}"]),
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": path,
    }


def find(target: str) -> Parallel:
    """Return the data-parallel step that ``target`` names.

    Raises:
        Unusable: it names none.
    """
    source, _, name = target.rpartition(":")
    try:
        if source.endswith(".py"):
            spec = importlib.util.spec_from_file_location(Path(source).stem, source)
            assert spec is not None
            assert spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            sys.modules[spec.name] = module
            spec.loader.exec_module(module)
            value: Any = getattr(module, name)
        else:
            value = pkgutil.resolve_name(target)
        made = value if isinstance(value, Parallel) else value()
    except Exception as error:
        raise Unusable(f"{target} raises {first_line(error)}") from error
    if not isinstance(made, Parallel):
        raise Unusable(f"{target} is no bnverify.Parallel, nor a function that makes one")
    return made


def _evidence(data: dict[str, Any]) -> Evidence:
    residual = float("inf") if data["residual"] == "inf" else data["residual"]
    shape = tuple(data["shape"]) if data["shape"] is not None else None
    return Evidence(**{**data, "residual": residual, "shape": shape})


def main(answer: str, profile: str, seed: str, *targets: str) -> None:
    """Check each target in this process and write what was found."""
    from bnverify import compile_cache
    from bnverify.parallel.check import Check

    compile_cache.enable()
    found: dict[str, Any] = {}
    try:
        for target in targets:
            evidence = Check(find(target), profile, int(seed)).run()
            found[target] = [each.to_json() for each in evidence]
    except Unusable as error:
        found = {"refused": str(error)}
    Path(answer).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
