"""Did this upgrade change the training step? Record in one environment, replay in another, judge.

    judgement = gate("steps.py:make", "pins/old.txt", "pins/new.txt", policy)

Recordings are cached under a hash of everything that determines them: the exact releases and the
Python, the sources of bnverify, of the target and of its project, the seed, the processor, and the
variables that configure jax. Recordings made in an existing environment are not cached, because it
may change in place.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import time
from dataclasses import replace
from typing import TYPE_CHECKING

from bnverify.compile_cache import machine
from bnverify.errors import UsageError
from bnverify.upgrade import recording
from bnverify.upgrade.compare import compare
from bnverify.upgrade.environments import parse, resolve, workspace
from bnverify.upgrade.policy import judge
from bnverify.upgrade.sources import locate

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from bnverify.upgrade.environments import Environment, Workspace
    from bnverify.upgrade.policy import Judgement, Policy
    from bnverify.upgrade.recording import Recording
    from bnverify.upgrade.sources import Target

TIME_LIMIT = 1800.0
_ERROR_LINES = 5  # how many of the last lines on stderr a message quotes
_JAX_VARIABLES = ("JAX_", "XLA_")  # prefixes of variables that change what a step computes
_NO_IMPORT = 64  # exit status if jax, flax or optax cannot be imported; bnverify does not use it

_RECORD = f"""
import sys, traceback
try:
    import jax, flax, optax
except Exception:
    traceback.print_exc()
    sys.exit({_NO_IMPORT})
from bnverify.cli import main
sys.exit(main(sys.argv[1:]))
"""


class Recordings:
    """Makes recordings of a target in environments, or finds them in the cache.

    Args:
        target: the target to record.
        work: from `workspace`.
        seed: the seed of the cases.
        time_limit: the limit for one recording, in seconds.
        laws: whether to judge the laws, which takes a third of the time.
    """

    def __init__(
        self,
        target: Target,
        work: Workspace,
        *,
        seed: int = 0,
        time_limit: float = TIME_LIMIT,
        laws: bool = True,
    ) -> None:
        self._target, self._work, self._limit = target, work, time_limit
        self._options = ["--seed", str(seed), "--costs", *([] if laws else ["--no-laws"])]

    def record(self, environment: Environment) -> Recording:
        """Return a recording of the target in an environment.

        Raises:
            UsageError: the environment cannot be created, or the target does not run in it.
        """
        return self._get(environment, None)

    def replay(self, environment: Environment, old: Recording) -> Recording:
        """Return the replay of a recording in an environment; errors of the target are part of it.

        Raises:
            UsageError: the environment cannot be created, or bnverify itself does not run in it.
        """
        try:
            made = self._get(environment, old)
        except _CrashError as error:
            return self._crashed_replay(environment, old, str(error))
        # Witness scripts name the target as the user did.
        return replace(made, manifest={**made.manifest, "target": self._target.text})

    def _get(self, environment: Environment, old: Recording | None) -> Recording:
        """Return the cached recording, or make it; the file read is always in the workspace."""
        key = self._key(environment, old)
        kept = self._work.kept / f"{key}.bnv"
        file = self._work.path / f"{key}.bnv"
        with contextlib.suppress(OSError, recording.RecordingError):
            if environment.key is not None:
                shutil.copy(kept, file)
                os.utime(kept)
                return recording.read(file)
        replaying = [] if old is None else ["--replay", old.source]
        self._run(environment, ["-o", str(file), *replaying])
        made = recording.read(file)
        if environment.key is not None:
            recording.write(kept, made.manifest, made.arrays)
        return made

    def _key(self, environment: Environment, old: Recording | None) -> str:
        settings = {k: v for k, v in sorted(os.environ.items()) if k.startswith(_JAX_VARIABLES)}
        decisive = [
            *(environment.key or environment.requirement, recording.CONTENT, machine(), settings),
            *(self._target.absolute, self._target.digest, self._options, old and old.digest),
        ]
        return hashlib.sha256(json.dumps(decisive).encode()).hexdigest()[:32]

    def _run(self, environment: Environment, options: list[str]) -> None:
        command = ["-c", _RECORD, "record", self._target.absolute, *self._options, *options]
        where = environment.requirement
        try:
            done = environment.run(command, self._work, self._limit)
        except subprocess.TimeoutExpired:
            raise UsageError(
                f"recording {self._target.text} with {where} took longer than {self._limit:g} s; "
                "raise the limit with --time-limit"
            ) from None
        lines = [line for line in done.stderr.strip().splitlines() if "<frozen" not in line]
        words = "\n".join(lines[-_ERROR_LINES:])
        if done.returncode == _NO_IMPORT:
            raise UsageError(
                f"with {where}, jax, flax and optax cannot be imported:\n{words}\nLikely fix: pin them,"
                " numpy and scipy to releases of the same months"
            )
        if done.returncode == 2:  # a UsageError there
            raise UsageError(f"with {where}: {words.rpartition('bnverify: ')[2]}")
        if done.returncode > 128:
            raise _CrashError(f"the process was killed by signal {done.returncode - 128}: {words}")
        if done.returncode:
            raise UsageError(f"bnverify cannot record with {where}: {words}")

    def _crashed_replay(self, environment: Environment, old: Recording, message: str) -> Recording:
        """Return a replay in which the target crashed the process."""
        manifest = recording.without_values(old.manifest)
        packages = list(manifest["versions"])
        asked = environment.run(["-c", _VERSIONS, *packages], self._work, self._limit)
        manifest["python"], *found = asked.stdout.split() or ["unknown"]
        manifest["versions"] = dict(zip(packages, found, strict=False))
        manifest["errors"], manifest["notes"] = {"target": message}, []
        manifest["replays"] = old.digest
        return recording.Recording(manifest, {}, f"a replay with {environment.requirement}")


_VERSIONS = """
import platform, sys
from importlib.metadata import version
print(platform.python_version(), *map(version, sys.argv[1:]))
"""


class _CrashError(UsageError):
    """The target crashed its process."""


def gate(
    target: str,
    old: str,
    new: str,
    policy: Policy,
    *,
    project: Path | None = None,
    seed: int = 0,
    time_limit: float = TIME_LIMIT,
    progress: Callable[[str], None] = lambda message: None,
) -> Judgement:
    """Return the judgement on moving a training step from one set of releases to another.

    Args:
        target: as on the command line.
        old: a requirement, see `environments.parse`.
        new: a requirement, see `environments.parse`.
        policy: what is accepted.
        project: see `sources.locate`.
        seed: the seed of the cases.
        time_limit: the limit for one recording, in seconds.
        progress: called with a message before each step.

    Raises:
        UsageError: an environment cannot be created, or the target does not run in the old one.
    """
    started = time.perf_counter()
    where = locate(target, project)
    with workspace() as work:
        progress("resolving both requirements")
        sides = [resolve(parse(text), work, where.project) for text in (old, new)]
        recordings = Recordings(where, work, seed=seed, time_limit=time_limit)
        progress(f"recording with {old}")
        first = recordings.record(sides[0])
        progress(f"replaying with {new}")
        second = recordings.replay(sides[1], first)
    seconds = time.perf_counter() - started
    return judge(compare(first, second), policy, old=old, new=new, seconds=seconds)
