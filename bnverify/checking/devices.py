"""Data-parallel steps checked in a process of their own, which has four simulated devices.

XLA reads the number of devices once, when jax starts: the calling process keeps its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Collection, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from bnverify import compile_cache
from bnverify.evidence import Evidence
from bnverify.parallel.check import Check
from bnverify.parallel.claims import CLAIMS
from bnverify.parallel.subject import DEVICES, Parallel
from bnverify.profile import Profile, named
from bnverify.target import load
from bnverify.unusable import Unusable

FLAG = "--xla_force_host_platform_device_count"
TIME_LIMIT = 1800.0


class Found(NamedTuple):
    """What was found of one target.

    Attributes:
        results: the evidence of each claim.
        cases: how many cases were run.
    """

    results: list[Evidence]
    cases: int


def check_parallel(
    what: str | Parallel = "bnverify.mutants.parallel_step:reference",
    profile: str | Profile = "ci",
    seed: int = 0,
) -> list[Evidence]:
    """Hold a data-parallel step to the claims about many devices and return what is known.

    Args:
        what: ``package.module:name`` or ``path/file.py:name`` of a Parallel or of a function that
            makes one: it is checked in a process with four simulated devices. A Parallel itself
            is checked in this process; what it has too few devices for reads "untriggered".
        profile: how much to do.
        seed: from which the cases are drawn.

    Raises:
        ValueError: the profile is unknown, or nothing can be made of ``what``.
    """
    if isinstance(what, Parallel):
        return Check(what, profile, seed).run()
    if not isinstance(what, str):
        raise Unusable(
            f"check_parallel takes a Parallel, or the target of one, got a {type(what).__name__}"
        )
    return run([what], profile, seed)[what].results


def run(
    targets: Sequence[str],
    profile: str | Profile = "ci",
    seed: int = 0,
    select: Collection[str] = (),
) -> dict[str, Found]:
    """Check each of ``targets`` and return target -> what was found.

    Args:
        targets: ``package.module:name`` or ``path/file.py:name``, each a Parallel or a function
            that makes one.
        profile: how much to do.
        seed: from which the cases are drawn.
        select: names of claims; empty: all.

    Raises:
        ValueError: the profile is unknown.
        Unusable: nothing can be made of a target, or its process ended without an answer.
    """
    asked = {
        "profile": asdict(named(profile)),
        "seed": seed,
        "select": sorted(select or CLAIMS),
        "targets": list(targets),
    }
    with tempfile.TemporaryDirectory(prefix="bnverify-") as folder:
        answer = Path(folder) / "evidence.json"
        done = subprocess.run(  # noqa: S603 - this interpreter, this module
            [sys.executable, "-m", __name__, json.dumps(asked), str(answer)],
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
    return {
        target: Found([Evidence.from_json(each) for each in part["results"]], part["cases"])
        for target, part in found.items()
    }


def environment() -> dict[str, str]:
    """Return this process's environment with the simulated devices in it, on the CPU."""
    flags = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if not flag.startswith(FLAG)]
    here = str(Path(__file__).parents[2])
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
    made = load(target)
    if not isinstance(made, Parallel):
        raise Unusable(f"{target} is no bnverify.Parallel, nor a function that makes one")
    return made


def main(asked: str, answer: str) -> None:
    """Check each target in this process and write what was found."""
    compile_cache.enable()
    given = json.loads(asked)
    plan = Profile(**{**given["profile"], "large": tuple(given["profile"]["large"])})
    found: dict[str, Any] = {}
    try:
        for target in given["targets"]:
            check = Check(
                find(target), plan, given["seed"], target=target, select=tuple(given["select"])
            )
            results = [each.to_json() for each in check.run()]
            found[target] = {"results": results, "cases": check.cases}
    except Unusable as error:
        found = {"refused": str(error)}
    Path(answer).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
