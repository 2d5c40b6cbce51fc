"""Find the first release of a package that changes the verdict, with few environments.

    result = bisect("steps.py:make", "jax", "0.4.38", "0.10.2", policy)

Releases are listed by asking uv to resolve the newest release below the last one, repeatedly. This
leaves out yanked releases, pre-releases and releases for other Pythons, as an installation would.
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
from bnverify.upgrade.policy import judge
from bnverify.upgrade.sources import locate

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from bnverify.upgrade.environments import Environment, Workspace
    from bnverify.upgrade.policy import Judgement, Policy

_MAX_RELEASES = 400  # a longer range is a mistake


@dataclass(frozen=True)
class Trial:
    """The result for one release.

    Attributes:
        version: the release.
        judgement: compared with the old release; None if the release is unavailable.
        why: why it is unavailable.
        changed: whether it changes the verdict; None if it is unavailable.
    """

    version: str
    judgement: Judgement | None = None
    why: str = ""
    changed: bool | None = None


@dataclass(frozen=True)
class Bisection:
    """The result of a bisection.

    Attributes:
        package: the package.
        last: the newest release known not to change the verdict.
        first: the oldest release known to change it.
        releases: all releases, oldest first.
        tried: the trials in order.
        between: releases between `last` and `first`, which are unavailable.
    """

    package: str
    last: str
    first: Trial
    releases: tuple[str, ...]
    tried: tuple[Trial, ...]
    between: tuple[str, ...]


def releases_between(package: str, old: str, new: str, work: Workspace) -> list[str]:
    """Return the releases of a package from `old` to `new`, both included, oldest first.

    Raises:
        UsageError: the index cannot be queried, or `old` is not older than `new`.
    """
    if Version(old) >= Version(new):
        raise UsageError(f"--from {old} is not older than --to {new}; swap them")
    pythons = list(uv.pythons())
    found = [new]
    while Version(found[-1]) > Version(old) and len(found) < _MAX_RELEASES:
        older = environments.newest(package, f">={old},<{found[-1]}", pythons, work)
        if older is None:
            break
        found.append(older)
    return [*([old] if found[-1] != old else []), *found[::-1]]


def first_changed(
    releases: Sequence[str], changed: Callable[[str], bool | None]
) -> tuple[int, int]:
    """Return the indices of the newest release known unchanged and the oldest known changed.

    The first release must be unchanged and the last changed. If a release is unavailable, its
    nearest neighbour is tried instead, so unavailable releases may lie between the two.

    Args:
        releases: oldest first.
        changed: tries a release; returns None if it is unavailable.
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
    extra: Sequence[str] = (),
    kind: str | None = None,
    project: Path | None = None,
    seed: int = 0,
    time_limit: float = TIME_LIMIT,
    progress: Callable[[str], None] = lambda message: None,
) -> Bisection | None:
    """Return the first release of a package that changes the verdict; None if `new` does not.

    Args:
        target: as on the command line.
        package: the package whose releases are tried.
        old: the version to compare with.
        new: the newest version to try.
        policy: what is accepted.
        extra: further requirements for every environment, such as `flax==0.12.6`.
        kind: the class of difference to look for; None: any that the policy rejects.
        project: see `sources.locate`.
        seed: the seed of the cases.
        time_limit: the limit for one recording, in seconds.
        progress: called with a message before each step.

    Raises:
        UsageError: the range is empty, or the target does not run with `old` or `new`.
    """
    package = canonicalize_name(package)
    where = locate(target, project)
    tried: list[Trial] = []

    def environment(version: str, work: Workspace) -> Environment:
        progress(f"{package} {version}")
        text = ",".join([f"{package}=={version}", *extra])
        return resolve(parse(text), work, where.project)

    with workspace() as work:
        progress(f"listing the releases of {package}")
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
                tried.append(Trial(version, why=str(error)))
                return None
            found = judgement.comparison.of(kind) if kind else not judgement.ok
            tried.append(Trial(version, judgement, changed=bool(found)))
            return bool(found)

        answer = changed(new)
        if answer is None:
            raise UsageError(tried[-1].why)
        if not answer:
            return None
        low, high = first_changed(releases, changed)
    return Bisection(
        package=package,
        last=releases[low],
        first=next(each for each in tried if each.version == releases[high]),
        releases=tuple(releases),
        tried=tuple(tried),
        between=tuple(releases[low + 1 : high]),
    )
