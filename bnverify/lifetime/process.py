"""Load a step in another process, and compare what it computes there with what it computes here.

The other process has another hash seed, so sets are iterated in another order and ``hash`` of a string
has another value. It also has other object ids, another time, and other numbers from generators without
a seed.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bnverify import another_process
from bnverify.errors import first_line
from bnverify.evidence import Counterexample, Evidence
from bnverify.jaxpr.retrace import by_leaf, computed, differences
from bnverify.jaxpr.tracing import Tracer
from bnverify.laws.life import ANOTHER_PROCESS
from bnverify.lazy import jax
from bnverify.probe import subject_of
from bnverify.target import load

NO_TARGET = "the step was not loaded from a target, so another process cannot load it"
NO_PROCESS = "only the profiles ci and nightly load the step in another process"

INSIDE = "BNVERIFY_IN_ANOTHER_PROCESS"
"""Set in the other process, so that a target that checks itself when imported starts no third one."""

SETTINGS = (
    "jax_enable_x64",
    "jax_threefry_partitionable",
    "jax_default_prng_impl",
    "jax_numpy_dtype_promotion",
    "jax_numpy_rank_promotion",
)
"""The settings of jax that affect what is traced, which a conftest.py may have changed."""

TIME_LIMIT = 600.0
"""The time limit of the other process, in seconds."""


def compared(tracer: Tracer, target: str | None, processes: int) -> Evidence:
    """Return the evidence for the law, from this process and some others.

    Args:
        tracer: the tracer of the step.
        target: the target of the step, as for ``bnverify.load``; None: it was given as an object.
        processes: the number of other processes.
    """
    if target is None or not processes:
        reason = NO_PROCESS if not processes else NO_TARGET
        return Evidence.of(ANOTHER_PROCESS, "exempt", reason=reason)
    if INSIDE in os.environ:
        reason = "the target is being loaded by another check, for this law"
        return Evidence.of(ANOTHER_PROCESS, "untriggered", reason=reason)
    try:
        here = by_leaf(computed(tracer))
    except Exception as error:  # noqa: BLE001 - whatever a user's code raises
        return Evidence.of(ANOTHER_PROCESS, "untriggered", reason=first_line(error))
    own = os.environ.get("PYTHONHASHSEED")
    seeds = [str(seed) for seed in range(1, processes + 2) if str(seed) != own][:processes]
    for seed in seeds:
        try:
            there = elsewhere(target, seed)
        except Unavailable as error:
            return Evidence.of(ANOTHER_PROCESS, "untriggered", reason=str(error))
        lines = differences(here, there, "in another process")
        of_init = [line for line in lines if line.startswith("init: ")]
        if lines := of_init or lines:  # the step starts from what init makes
            more = f" (and {len(lines) - 1} more)" if len(lines) > 1 else ""
            return Evidence.of(
                ANOTHER_PROCESS,
                "violated",
                cases=1,
                reason=f"{lines[0]}{more}",
                counterexample=Counterexample(ANOTHER_PROCESS, target=target),
            )
    return Evidence.of(ANOTHER_PROCESS, "held", cases=len(seeds))


class Unavailable(Exception):
    """The other process gave no result; the message says why."""


def elsewhere(target: str, seed: str) -> dict[str, Any]:
    """Return what ``init`` and ``step`` compute in another process, by leaf.

    Args:
        target: the target of the step.
        seed: the hash seed of the process.

    Raises:
        Unavailable: the process gave no result.
    """
    asked = {"target": target, "settings": settings()}
    try:
        with (
            another_process.answer(
                __name__, asked, environment=environment(seed), time_limit=TIME_LIMIT
            ) as file,
            np.load(file) as found,
        ):
            return {name: found[name] for name in found.files}
    except another_process.NoAnswer as error:
        if error.status is None:
            raise Unavailable(f"another process took more than {TIME_LIMIT:g} s") from None
        said = error.said or f"exit status {error.status}"
        raise Unavailable(f"another process cannot load the step: {said}") from None


def environment(seed: str) -> dict[str, str]:
    """Return the environment of this process, with its import path and another hash seed."""
    path = os.pathsep.join(each or os.getcwd() for each in sys.path)
    return {**os.environ, "PYTHONPATH": path, "PYTHONHASHSEED": seed, INSIDE: "1"}


def settings() -> Mapping[str, Any]:
    """Return the settings of jax in this process."""
    found = {name: getattr(jax.config, name, None) for name in SETTINGS}
    return {name: value for name, value in found.items() if isinstance(value, bool | str)}


def answer(asked: str, file: str) -> None:
    """Load a step in this process, and write what it computes to a file for ``elsewhere``."""
    given = json.loads(asked)
    for name, value in given["settings"].items():
        jax.config.update(name, value)
    try:
        tracer = Tracer(subject_of(load(given["target"])))
        found = by_leaf(computed(tracer))
    except Exception as error:  # noqa: BLE001 - whatever a user's code raises
        sys.exit(first_line(error))
    part = Path(file).with_name("part.npz")
    np.savez(part, **found)
    part.rename(file)  # the file is there only when it is complete
