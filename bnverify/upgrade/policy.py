"""Which changes of an upgrade a project accepts, why, and until when.

`policy_file` reads it from `bnverify.toml`, or from under `[tool.bnverify]` in `pyproject.toml`:

    fail = ["api", "structure", "dtype", "meaning"]  # the default: the others are reported only

    [[accept]]
    class = "meaning"
    leaf = "batch_stats/*/var"  # optional; * stands for any text, ? for one character
    subject = "my_model"        # optional, likewise
    reason = "flax 0.13 divides by n - 1; we retrained"
    expires = 2027-01-31        # the last day on which it holds

    [bounds]                    # optional: new / old, beyond which a cost fails
    run_time = 1.5
    compile_time = 2.0
    program_size = 1.2

As in cargo-deny, a reason and an expiry are not optional, and what is accepted but no longer occurs
is reported: a policy states what is true today, or says that it does not.
"""

from __future__ import annotations

import datetime as dt
import functools
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from bnverify.upgrade.difference import Difference, Kind

FAILING: tuple[Kind, ...] = ("api", "structure", "dtype", "meaning")
COSTS = ("compile_time", "run_time", "program_size")


@dataclass(frozen=True, kw_only=True)
class Acceptance:
    """One `[[accept]]` entry: these differences are known, for this reason, until this day."""

    kind: Kind
    reason: str
    expires: dt.date
    leaf: str | None = None
    subject: str | None = None

    def covers(self, difference: Difference) -> bool:
        """Return whether the difference is one of these, whatever the date."""
        return (
            self.kind == difference.kind
            and _glob(self.subject, difference.subject)
            and _glob(self.leaf, difference.leaf)
        )

    def expired(self, today: dt.date) -> bool:
        """Return whether its last day is past."""
        return today > self.expires


@dataclass(frozen=True, kw_only=True)
class Policy:
    """What fails, what is accepted, and the bounds on costs; the default where no file is found."""

    fail: frozenset[Kind] = frozenset(FAILING)
    accept: tuple[Acceptance, ...] = ()
    bounds: Mapping[str, float] = field(default_factory=dict)
    source: Path | None = None


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What a policy makes of the differences: every one of them is in exactly one of three lists.

    Attributes:
        failing: of a class that fails, and not accepted.
        accepted: each with the entry that accepts it.
        reported: of a class that does not fail.
        stale: entries, still valid, that no difference matched.
        expired: entries whose last day is past, which accept nothing.
        exceeded: (cost, ratio, bound) for each cost beyond its bound.
    """

    failing: tuple[Difference, ...] = ()
    accepted: tuple[tuple[Difference, Acceptance], ...] = ()
    reported: tuple[Difference, ...] = ()
    stale: tuple[Acceptance, ...] = ()
    expired: tuple[Acceptance, ...] = ()
    exceeded: tuple[tuple[str, float, float], ...] = ()

    @property
    def ok(self) -> bool:
        """Whether the upgrade may pass."""
        return not self.failing and not self.exceeded


def apply(
    policy: Policy,
    differences: Iterable[Difference],
    today: dt.date,
    costs: Mapping[str, float] | None = None,
) -> Verdict:
    """Judge the differences of an upgrade.

    Args:
        policy: from `policy_file.find`, or `Policy()`.
        differences: what a comparison found.
        today: acceptances that expired before this day accept nothing.
        costs: new / old for each of COSTS that was measured.
    """
    expired = tuple(entry for entry in policy.accept if entry.expired(today))
    valid = [entry for entry in policy.accept if not entry.expired(today)]
    failing, accepted, reported, used = [], [], [], set()
    for difference in differences:
        entries = [entry for entry in valid if entry.covers(difference)]
        used.update(entries)
        if entries:
            accepted.append((difference, entries[0]))
        elif difference.kind in policy.fail:
            failing.append(difference)
        else:
            reported.append(difference)
    return Verdict(
        failing=tuple(failing),
        accepted=tuple(accepted),
        reported=tuple(reported),
        stale=tuple(entry for entry in valid if entry not in used),
        expired=expired,
        exceeded=tuple(
            (cost, ratio, policy.bounds[cost])
            for cost, ratio in (costs or {}).items()
            if cost in policy.bounds and not ratio <= policy.bounds[cost]  # NaN is beyond any bound
        ),
    )


def _glob(pattern: str | None, text: str | None) -> bool:
    if pattern is None:
        return True
    return text is not None and _compiled(pattern).fullmatch(text) is not None


@functools.lru_cache(maxsize=256)
def _compiled(pattern: str) -> re.Pattern[str]:
    # Not fnmatch: to it, the brackets that leaves are often written with are classes of characters.
    pieces = {"*": ".*", "?": "."}
    return re.compile("".join(pieces.get(c, re.escape(c)) for c in pattern), re.DOTALL)
