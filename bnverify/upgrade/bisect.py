"""Since which release? The first one of a package that changes the verdict, in few environments.

    found = bisect("steps.py:make", "jax", "0.4.38", "0.10.2", policy)

Releases come from the index that uv is set to use, asked as a resolver asks: the newest below this
one, again and again. So yanked releases, pre-releases and those for other Pythons are left out, as
an installation would leave them out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from packaging.utils import canonicalize_name
from packaging.version import Version

from bnverify.errors import UsageError
from bnverify.upgrade import environments, uv
from bnverify.upgrade.compare import compare
from bnverify.upgrade.environments import parse, resolve, workspace
from bnverify.upgrade.gate import TIME_LIMIT, Recordings
from bnverify.upgrade.judgement import judge
from bnverify.upgrade.sources import locate

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from bnverify.upgrade.environments import Environment, Workspace
    from bnverify.upgrade.judgement import Judgement
    from bnverify.upgrade.policy import Policy

_MOST = 400  # releases; a range that holds more is a mistake


@dataclass(frozen=True)
class Tried:
    """One release, tried.

    Attributes:
        version: of the package.
        judgement: against the old release; None where it is unavailable.
        why: why it is.
        changed: whether it changes the verdict; None where it is unavailable.
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
        between: releases between `last` and `first` that are unavailable.
    """

    package: str
    last: str
    first: Tried
    releases: tuple[str, ...]
    tried: tuple[Tried, ...]
    between: tuple[str, ...]


def releases_between(package: str, old: str, new: str, work: Workspace) -> list[str]:
    """Return the releases of a package from `old` to `new`, both included, oldest first.

    Raises:
        UsageError: the index cannot be asked, or holds no such range.
    """
    if Version(old) >= Version(new):
        raise UsageError(f"--from {old} is not older than --to {new}")
    pythons = list(uv.pythons())
    found = [new]
    while Version(found[-1]) > Version(old) and len(found) < _MOST:
        older = environments.newest(package, f">={old},<{found[-1]}", pythons, work)
        if older is None:
            break
        found.append(older)
    return [*([old] if found[-1] != old else []), *found[::-1]]


def first_changed(
    releases: Sequence[str], changed: Callable[[str], bool | None]
) -> tuple[int, int]:
    """Return the indices of the newest release known unchanged and of the oldest known changed.

    The first is unchanged, the last changed. An unavailable release is passed over for its nearest
    neighbour, so that releases of which nothing is known may lie between the two.

    Args:
        releases: oldest first.
        changed: tries one; None where it is unavailable.
    """
    low, high = 0, len(releases) - 1
    unknown: set[int] = set()
    while True:
        middle = (low + high) / 2
        candidates = [i for i in range(low + 1, high) if i not in unknown]
        if not candidates:
            return low, high
        index = min(candidates, key=lambda i: abs(i - middle))
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
        beside: requirements that hold for every release tried, as `flax==0.12.6`.
        kind: the class of difference to look for; None: whatever the policy forbids.
        project: see `sources.locate`.
        seed: of the cases.
        time_limit: seconds that one recording may take.
        tell: told what is being done.

    Raises:
        UsageError: the range is empty, or the target does not run with its ends.
    """
    package = canonicalize_name(package)
    where = locate(target, project)
    tried: list[Tried] = []

    def environment(version: str, work: Workspace) -> Environment:
        tell(f"{package} {version}")
        text = ",".join([f"{package}=={version}", *beside])
        return resolve(parse(text), work, where.project)

    with workspace() as work:
        tell(f"asking for the releases of {package}")
        releases = releases_between(package, old, new, work)
        recordings = Recordings(where, work, seed=seed, time_limit=time_limit)
        recorded = recordings.record(environment(old, work))

        def changed(version: str) -> bool | None:
            try:
                replayed = recordings.replay(environment(version, work), recorded)
                judgement = judge(
                    compare(recorded, replayed),
                    policy,
                    old=f"{package} {old}",
                    new=f"{package} {version}",
                )
            except UsageError as error:
                tried.append(Tried(version, why=str(error)))
                return None
            found = judgement.comparison.of(kind) if kind else not judgement.ok
            tried.append(Tried(version, judgement, changed=bool(found)))
            return bool(found)

        answer = changed(new)
        if answer is None:
            raise UsageError(tried[-1].why)
        if not answer:
            return None
        low, high = first_changed(releases, changed)
    return Found(
        package=package,
        last=releases[low],
        first=next(each for each in tried if each.version == releases[high]),
        releases=tuple(releases),
        tried=tuple(tried),
        between=tuple(releases[low + 1 : high]),
    )
