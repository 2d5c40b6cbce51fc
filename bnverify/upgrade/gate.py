"""Did this upgrade change the training step? Two environments, a recording, its replay, a verdict.

    judgement = gate("steps.py:make", "pins/old.txt", "pins/new.txt", policy)

Recordings are kept in the cache under a hash of all that decides them: the environment, bnverify's
own sources, the target's, the processor. Nothing else is left behind, however the gate ends.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bnverify import compile_cache
from bnverify.unusable import Unusable
from bnverify.upgrade import environments, recorded, recording_file
from bnverify.upgrade.compare import compare
from bnverify.upgrade.judgement import judge
from bnverify.upgrade.processes import Token
from bnverify.upgrade.recorded import Recorded
from bnverify.upgrade.sources import locate
from bnverify.upgrade.store import Store

if TYPE_CHECKING:
    from collections.abc import Callable

    from bnverify.upgrade.environments import Environment
    from bnverify.upgrade.judgement import Judgement
    from bnverify.upgrade.policy import Policy
    from bnverify.upgrade.sources import Target

_FORMAT = 1  # raise it when recordings in the cache shall be made anew
_FILE = "recording.bnv"
_WORDS = 5  # lines of a failed recording's last words
TIME_LIMIT = 1800.0
_DECISIVE = ("JAX_", "XLA_")  # environment variables that change what a step computes


class Recordings:
    """Makes recordings in environments, or finds them in the cache.

    Args:
        target: what to record.
        seed: of the cases.
        cache_dir: by default what ``compile_cache.cache_root`` says.
        time_limit: seconds that one recording may take.
        laws: whether to judge the laws, which takes a third of the time.
    """

    def __init__(
        self,
        target: Target,
        *,
        seed: int = 0,
        cache_dir: Path | None = None,
        time_limit: float = TIME_LIMIT,
        laws: bool = True,
    ) -> None:
        self._target, self._seed, self._limit = target, seed, time_limit
        self._always = ["--costs"] if laws else ["--costs", "--no-laws"]
        self._store = Store((cache_dir or compile_cache.cache_root()).absolute() / "upgrade")
        self._token = Token()

    def record(self, environment: Environment) -> Recorded:
        """Return a recording of the target in an environment.

        Raises:
            Unusable: the target does not run there.
        """
        place = self._make(environment, [], "")
        return recorded.read(place / _FILE)

    def replay(self, environment: Environment, old: Recorded) -> Recorded:
        """Return the replay of a recording in an environment, whatever fails in it.

        Raises:
            Unusable: bnverify itself does not run there.
        """
        try:
            place = self._make(environment, ["--replay", old.source], old.digest)
        except _DiedError as error:
            return _dead(old, environment, str(error))
        replayed = recorded.read(place / _FILE)
        # Witnesses name the target as the user does.
        return replace(replayed, manifest={**replayed.manifest, "target": self._target.text})

    def _make(self, environment: Environment, options: list[str], of: str) -> Path:
        settings = {k: v for k, v in sorted(os.environ.items()) if k.startswith(_DECISIVE)}
        decisive = [
            *(_FORMAT, environment.key, self._target.absolute, self._target.digest),
            *(self._seed, self._always, of, compile_cache.machine(), settings),
        ]
        key = hashlib.sha256(json.dumps(decisive).encode()).hexdigest()[:32]

        def make(place: Path) -> dict[str, Any]:
            self._run(environment, [*options, *self._always, "-o", str(place / _FILE)], place)
            return {"target": self._target.text}

        place, _ = self._store.get("recordings", key, make, self._token)
        try:
            recorded.read(place / _FILE)
        except recording_file.RecordingError:  # damaged where it lay: forget it, once
            (place / "complete.json").unlink(missing_ok=True)
            place, _ = self._store.get("recordings", key, make, self._token)
        return place

    def _run(self, environment: Environment, options: list[str], cwd: Path) -> None:
        command = ["-m", "bnverify.upgrade.recording", self._target.absolute, *options]
        try:
            done = environments.run(
                environment,
                [*command, "--seed", str(self._seed)],
                timeout=self._limit,
                # The CPU is what claims are about; and no project's directory on the path by chance.
                env={"JAX_PLATFORMS": os.environ.get("JAX_PLATFORMS", "cpu")},
                cwd=cwd,
                token=self._token,
            )
        except subprocess.TimeoutExpired:
            raise Unusable(
                f"recording {self._target.text} with {environment.requirement} takes longer than "
                f"{self._limit:g} s"
            ) from None
        if done.returncode == 0:
            return
        last = "\n".join(done.stderr.strip().splitlines()[-_WORDS:])
        if done.returncode == 2:  # the command's own refusal
            words = last.splitlines()[-1].removeprefix("bnverify: ") if last else ""
            raise Unusable(f"with {environment.requirement}: {words}")
        if done.returncode > 128:
            raise _DiedError(f"the process died of signal {done.returncode - 128}: {last}")
        raise Unusable(f"bnverify cannot record with {environment.requirement}: {last}")


class _DiedError(Unusable):
    """The target took its process with it."""


def _dead(old: Recorded, environment: Environment, message: str) -> Recorded:
    """Return a replay in which the target killed its process."""
    manifest = {
        **old.manifest,
        "replays": old.digest,
        "errors": {"target": message},
        "versions": {
            name: environment.versions.get(name, "unknown") for name in old.manifest["versions"]
        },
        "python": environment.python_version,
        "shapes": [],
        "trees": [],
        "notes": [],
        "laws": {},
        "influence": {},
        "costs": {},
    }
    return Recorded(manifest, {}, f"a replay with {environment.requirement}")


def gate(
    target: str,
    old: str,
    new: str,
    policy: Policy,
    *,
    project: Path | None = None,
    seed: int = 0,
    cache_dir: Path | None = None,
    time_limit: float = TIME_LIMIT,
    tell: Callable[[str], None] = lambda doing: None,
) -> Judgement:
    """Return what moving from one set of releases to another does to a training step.

    Args:
        target: as on the command line.
        old: a requirement, see ``requirements.parse``.
        new: likewise.
        policy: what is accepted.
        project: see ``sources.locate``.
        seed: of the cases.
        cache_dir: by default what ``compile_cache.cache_root`` says.
        time_limit: seconds that one recording may take.
        tell: told what is being done.

    Raises:
        Unusable: an environment cannot be made, or the target does not run in the old one.
    """
    started = time.perf_counter()
    where = locate(target, project)
    tell("making the environments")
    try:
        sides = environments.build_all(
            [environments.parse(old), environments.parse(new)],
            project=where.project,
            cache_dir=cache_dir,
        )
    except environments.EnvironmentUnavailableError as error:
        raise Unusable(str(error)) from None
    recordings = Recordings(where, seed=seed, cache_dir=cache_dir, time_limit=time_limit)
    try:
        tell(f"recording with {old}")
        first = recordings.record(sides[0])
        tell(f"replaying with {new}")
        second = recordings.replay(sides[1], first)
    except recording_file.RecordingError as error:
        raise Unusable(str(error)) from None
    except OSError as error:
        raise Unusable(f"the cache cannot be used: {error}") from None
    seconds = time.perf_counter() - started
    return judge(compare(first, second), policy, old=old, new=new, seconds=seconds)
