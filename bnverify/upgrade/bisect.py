"""Since which release? The first one of a package that changes the verdict, in few environments.

    found = bisect("steps.py:make", "jax", "0.4.38", "0.10.2", policy)

Releases come from the index that uv is set to use, asked as a resolver asks: the newest below this
one, again and again. So yanked releases, pre-releases and those for other Pythons are left out, as
an installation would leave them out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from bnverify import compile_cache
from bnverify.unusable import Unusable
from bnverify.upgrade import environments, interpreters, recording_file
from bnverify.upgrade.compare import compare
from bnverify.upgrade.gate import TIME_LIMIT, Recordings
from bnverify.upgrade.judgement import judge
from bnverify.upgrade.processes import Token
from bnverify.upgrade.requirements import normal, release
from bnverify.upgrade.sources import locate
from bnverify.upgrade.store import Store
from bnverify.upgrade.uv import Uv, UvError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from bnverify.upgrade.environments import Environment
    from bnverify.upgrade.judgement import Judgement
    from bnverify.upgrade.policy import Policy
    from bnverify.upgrade.recorded import Recorded

_SECONDS = 120.0  # for one question to the index
_MOST = 400  # releases; a range that holds more is a mistake


@dataclass(frozen=True)
class Tried:
    """One release, tried.

    Attributes:
        version: of the package.
        judgement: against the old release; None where it could not be had.
        why: why it could not.
        changed: whether it changes the verdict; None where it could not be tried.
    """

    version: str
    judgement: Judgement | None = None
    why: str = ""
    changed: bool | None = None


@dataclass(frozen=True)
class Found:
    """The outcome of a bisection.

    Attributes:
        package: which package.
        last: the newest release known to leave the verdict as it is.
        first: the oldest known to change it.
        releases: all from old to new.
        tried: in the order they were tried.
        between: releases between ``last`` and ``first`` that could not be tried.
    """

    package: str
    last: str
    first: Tried
    releases: tuple[str, ...]
    tried: tuple[Tried, ...]
    between: tuple[str, ...]


def releases_between(package: str, old: str, new: str, cache_dir: Path | None = None) -> list[str]:
    """Return the releases of a package from ``old`` to ``new``, both included, oldest first.

    Raises:
        Unusable: the index cannot be asked, or holds no such range.
    """
    if release(old) >= release(new):
        raise Unusable(f"--from {old} is not older than --to {new}")
    store = Store((cache_dir or compile_cache.cache_root()).absolute() / "upgrade")
    found = [new]
    pythons = list(interpreters.found())
    with store.scratch() as work:
        tool = Uv(work, work, Token(), _SECONDS)
        while release(found[-1]) > release(old) and len(found) < _MOST:
            older = _newest_below(tool, package, old, found[-1], pythons)
            if older is None:
                break
            found.append(older)
    return [*([old] if found[-1] != old else []), *found[::-1]]


def _newest_below(
    tool: Uv, package: str, old: str, limit: str, pythons: list[interpreters.Interpreter]
) -> str | None:
    """Return the newest release from ``old`` on and below ``limit``; None where there is none.

    The Pythons that know no such release are dropped: going down, they will know none again.
    """
    asked = tool.write("range.in", [f"{package}>={old},<{limit}"])
    while pythons:
        try:
            pins = tool.compile([asked], pythons[0])
        except UvError as error:
            said = str(error)
            if not error.wants_another_python and "unsatisfiable" not in said.replace("\n", " "):
                raise Unusable(f"cannot list the releases of {package}: {error}") from None
            pythons.pop(0)
            continue
        for pin in pins:
            name, _, version = pin.partition("==")
            if normal(name) == package:
                return version
        pythons.pop(0)
    return None


class Bisection:
    """Tries releases against the oldest one.

    Args:
        package: which package moves.
        beside: requirements that stay.
        kind: the class of difference to look for; None: whatever the policy forbids.
        recordings: makes them.
        policy: what is accepted.
        project: see ``environments.build``.
        cache_dir: likewise.
        tell: told what is being done.
    """

    def __init__(
        self,
        package: str,
        beside: Sequence[str],
        kind: str | None,
        recordings: Recordings,
        policy: Policy,
        *,
        project: Path | None,
        cache_dir: Path | None,
        tell: Callable[[str], None],
    ) -> None:
        self._package, self._beside, self._kind = package, beside, kind
        self._recordings, self._policy = recordings, policy
        self._project, self._cache_dir, self._tell = project, cache_dir, tell
        self._old: tuple[str, Recorded] | None = None
        self.tried: list[Tried] = []

    def start(self, version: str) -> None:
        """Record with the oldest release, against which the others are compared.

        Raises:
            Unusable: it cannot be made, or the target does not run there.
        """
        self._old = version, self._recordings.record(self._environment(version))

    def changed(self, version: str) -> bool | None:
        """Return whether a release changes the verdict; None where it cannot be tried."""
        assert self._old is not None
        then, old = self._old
        try:
            new = self._recordings.replay(self._environment(version), old)
            names = [f"{self._package} {v}" for v in (then, version)]
            judgement = judge(compare(old, new), self._policy, old=names[0], new=names[1])
        except Unusable as error:
            self.tried.append(Tried(version, why=str(error)))
            return None
        if self._kind is None:
            changed = not judgement.ok
        else:
            changed = bool(judgement.comparison.of(self._kind))
        self.tried.append(Tried(version, judgement, changed=changed))
        return changed

    def _environment(self, version: str) -> Environment:
        text = ",".join([f"{self._package}=={version}", *self._beside])
        self._tell(f"{self._package} {version}")
        try:
            return environments.build(
                environments.parse(text), project=self._project, cache_dir=self._cache_dir
            )
        except environments.EnvironmentUnavailableError as error:
            raise Unusable(str(error)) from None


def first_changed(
    releases: Sequence[str], changed: Callable[[str], bool | None]
) -> tuple[int, int]:
    """Return the indices of the newest release known unchanged and of the oldest known changed.

    The first is unchanged, the last changed. What cannot be tried is passed over for its nearest
    neighbour, so that between the two may lie releases of which nothing is known.

    Args:
        releases: oldest first.
        changed: tries one.
    """
    low, high = 0, len(releases) - 1
    unknown: set[int] = set()
    while True:
        middle = (low + high) / 2
        open_ = [i for i in range(low + 1, high) if i not in unknown]
        if not open_:
            return low, high
        index = min(open_, key=lambda i: abs(i - middle))
        answer = changed(releases[index])
        if answer is None:
            unknown.add(index)
        elif answer:
            high = index
        else:
            low = index


def bisect(
    target: str,
    package: str,
    old: str,
    new: str,
    policy: Policy,
    *,
    beside: Sequence[str] = (),
    kind: str | None = None,
    project: Path | None = None,
    seed: int = 0,
    cache_dir: Path | None = None,
    time_limit: float = TIME_LIMIT,
    tell: Callable[[str], None] = lambda doing: None,
) -> Found | None:
    """Return the first release of a package that changes the verdict; None where the newest does not.

    Args:
        target: as on the command line.
        package: whose releases to try.
        old: its version to compare with.
        new: the newest version to try.
        policy: what is accepted.
        beside: requirements that hold for every release tried, as ``flax==0.12.6``.
        kind: the class of difference to look for; None: whatever the policy forbids.
        project: see ``sources.locate``.
        seed: of the cases.
        cache_dir: by default what ``compile_cache.cache_root`` says.
        time_limit: seconds that one recording may take.
        tell: told what is being done.

    Raises:
        Unusable: the range is empty, or the target does not run with its ends.
    """
    package = normal(package)
    where = locate(target, project)
    tell(f"asking for the releases of {package}")
    releases = releases_between(package, old, new, cache_dir)
    recordings = Recordings(where, seed=seed, cache_dir=cache_dir, time_limit=time_limit)
    work = Bisection(
        package,
        beside,
        kind,
        recordings,
        policy,
        project=where.project,
        cache_dir=cache_dir,
        tell=tell,
    )
    try:
        work.start(old)
        answer = work.changed(new)
        if answer is None:
            raise Unusable(work.tried[-1].why)
        if not answer:
            return None
        low, high = first_changed(releases, work.changed)
    except recording_file.RecordingError as error:
        raise Unusable(str(error)) from None
    first = next(each for each in work.tried if each.version == releases[high])
    return Found(
        package=package,
        last=releases[low],
        first=first,
        releases=tuple(releases),
        tried=tuple(work.tried),
        between=tuple(releases[low + 1 : high]),
    )
