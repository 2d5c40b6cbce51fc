"""Did this upgrade change the training step? Two environments, a recording, its replay, a verdict.

    judgement = gate("steps.py:make", "pins/old.txt", "pins/new.txt", policy)

A recording is kept in the cache under a hash of everything that decides it: the exact releases and
the Python, bnverify's sources, the target's and its project's, the seed, the processor, and what
configures jax. One made in an environment that exists already is not kept: that may change in place.
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
from bnverify.upgrade.judgement import judge
from bnverify.upgrade.sources import locate

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from bnverify.upgrade.environments import Environment, Workspace
    from bnverify.upgrade.judgement import Judgement
    from bnverify.upgrade.policy import Policy
    from bnverify.upgrade.recording import Recording
    from bnverify.upgrade.sources import Target

TIME_LIMIT = 1800.0
_WORDS = 5  # lines of a failed recording's last words
_DECISIVE = ("JAX_", "XLA_")  # environment variables that change what a step computes
_NO_IMPORT = 64  # exit status where jax, flax or optax does not import; none of bnverify's own

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
        target: what to record.
        work: where.
        seed: of the cases.
        time_limit: seconds that one recording may take.
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
            UsageError: the environment cannot be made, or the target does not run there.
        """
        return self._get(environment, None)

    def replay(self, environment: Environment, old: Recording) -> Recording:
        """Return the replay of a recording in an environment, whatever fails in it.

        Raises:
            UsageError: the environment cannot be made, or bnverify itself does not run there.
        """
        try:
            made = self._get(environment, old)
        except _DiedError as error:
            return self._dead(environment, old, str(error))
        # Witnesses name the target as the user does.
        return replace(made, manifest={**made.manifest, "target": self._target.text})

    def _get(self, environment: Environment, old: Recording | None) -> Recording:
        """Return what is kept, or make it; either way it is read from a file of this run's own."""
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
        settings = {k: v for k, v in sorted(os.environ.items()) if k.startswith(_DECISIVE)}
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
                f"recording {self._target.text} with {where} takes longer than {self._limit:g} s"
            ) from None
        lines = [line for line in done.stderr.strip().splitlines() if "<frozen" not in line]
        words = "\n".join(lines[-_WORDS:])
        if done.returncode == _NO_IMPORT:
            raise UsageError(
                f"with {where}, jax, flax and optax do not import:\n{words}\nLikely fix: pin them,"
                " numpy and scipy to releases of the same months; some sets resolve and do not work"
            )
        if done.returncode == 2:  # the command's own refusal
            raise UsageError(f"with {where}: {words.rpartition('bnverify: ')[2]}")
        if done.returncode > 128:
            raise _DiedError(f"the process died of signal {done.returncode - 128}: {words}")
        if done.returncode:
            raise UsageError(f"bnverify cannot record with {where}: {words}")

    def _dead(self, environment: Environment, old: Recording, message: str) -> Recording:
        """Return a replay in which the target killed its process."""
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


class _DiedError(UsageError):
    """The target took its process with it."""


def gate(
    target: str,
    old: str,
    new: str,
    policy: Policy,
    *,
    project: Path | None = None,
    seed: int = 0,
    time_limit: float = TIME_LIMIT,
    tell: Callable[[str], None] = lambda doing: None,
) -> Judgement:
    """Return what moving from one set of releases to another does to a training step.

    Args:
        target: as on the command line.
        old: a requirement, see `environments.parse`.
        new: likewise.
        policy: what is accepted.
        project: see `sources.locate`.
        seed: of the cases.
        time_limit: seconds that one recording may take.
        tell: told what is being done.

    Raises:
        UsageError: an environment cannot be made, or the target does not run in the old one.
    """
    started = time.perf_counter()
    where = locate(target, project)
    with workspace() as work:
        tell("resolving both requirements")
        sides = [resolve(parse(text), work, where.project) for text in (old, new)]
        recordings = Recordings(where, work, seed=seed, time_limit=time_limit)
        tell(f"recording with {old}")
        first = recordings.record(sides[0])
        tell(f"replaying with {new}")
        second = recordings.replay(sides[1], first)
    seconds = time.perf_counter() - started
    return judge(compare(first, second), policy, old=old, new=new, seconds=seconds)
