"""What a project sets and accepts, why, and until when: defaults, upgrades and known failures.

It is `bnverify.toml`, or the table `[tool.bnverify]` of `pyproject.toml`:

    target = "training.py:subject"  # defaults of the command line, which it overrides
    profile = "quick"
    select = ["structure", "statistics"]
    ignore = ["eval_rows_are_independent"]
    format = ["terminal", "junit=report.xml"]

    fail = ["api", "structure", "dtype", "meaning"]  # the default; other classes are only reported

    [[accept]]                  # an upgrade may change this
    class = "meaning"
    leaf = "batch_stats/*/var"  # optional; * stands for any text, ? for one character
    subject = "my_model"        # optional, likewise
    reason = "flax 0.13 divides by n - 1; we retrained"
    expires = 2027-01-31        # the last day on which it holds

    [bounds]                    # optional: new / old, beyond which a cost fails
    run_time = 1.5

    [[failure]]                 # a law is known to fail
    law = "batch_stats_are_float32"
    subject = "my step"
    reason = "what happens, in one sentence"
    issue = "https://..."
    versions = "flax<0.13"      # or a list, all of which must hold

A reason and an end are not optional, and what is listed but no longer occurs is reported: a policy
states what is true today, or says that it does not.
"""

from __future__ import annotations

import datetime as dt
import functools
import re
import tomllib
from dataclasses import dataclass
from importlib import metadata
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
from packaging.requirements import InvalidRequirement, Requirement

from bnverify.errors import UsageError, cause, did_you_mean
from bnverify.profile import PROFILES, ProfileName
from bnverify.upgrade.difference import KINDS, Difference, Kind

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

FAILING: tuple[Kind, ...] = ("api", "structure", "dtype", "meaning")
Text = Annotated[str, msgspec.Meta(pattern=r"\S")]  # not empty
Texts = Text | tuple[Text, ...]
Ratio = Annotated[float, msgspec.Meta(gt=0, le=1e6)]  # and so finite


class _Entry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a file holds and nothing else."""


class Acceptance(_Entry, frozen=True, kw_only=True):
    """One `[[accept]]` entry: these differences are known, for this reason, until this day."""

    kind: Kind = msgspec.field(name="class")
    reason: Text
    expires: dt.date
    leaf: Text | None = None
    subject: Text | None = None

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


class KnownFailure(_Entry, frozen=True, kw_only=True):
    """One `[[failure]]` entry: this law is violated on this subject, on these versions."""

    law: Text
    subject: Text
    reason: Text
    issue: Text
    versions: Text | Annotated[tuple[Text, ...], msgspec.Meta(min_length=1)]

    @property
    def requirements(self) -> tuple[Requirement, ...]:
        """Return what the installed packages meet where it fails."""
        texts = (self.versions,) if isinstance(self.versions, str) else self.versions
        return tuple(map(Requirement, texts))

    @property
    def applies(self) -> bool:
        """Whether the installed versions are ones on which the failure is known."""
        return all(map(_installed, self.requirements))

    def __str__(self) -> str:
        return f"{self.law} on {self.subject} ({', '.join(map(str, self.requirements))})"


class Bounds(_Entry, frozen=True, kw_only=True):
    """The `[bounds]` table: new / old of each cost, beyond which it fails; None: never."""

    compile_time: Ratio | None = None
    run_time: Ratio | None = None
    program_size: Ratio | None = None


class Policy(_Entry, frozen=True, kw_only=True):
    """Defaults, what fails, what is accepted, the bounds on costs; empty where no file is found."""

    target: Text | None = None
    profile: ProfileName | None = None
    select: Texts = ()
    ignore: Texts = ()
    format: Texts = ()
    fail: frozenset[Kind] = frozenset(FAILING)
    accept: tuple[Acceptance, ...] = ()
    bounds: Bounds = Bounds()
    failure: tuple[KnownFailure, ...] = ()


def _installed(requirement: Requirement) -> bool:
    try:
        version = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        return False
    return requirement.specifier.contains(version, prereleases=True)


# Reading


def find(directory: Path) -> Policy:
    """Return the policy of a project: its bnverify.toml, or its pyproject.toml, or the default.

    Raises:
        UsageError: as `load`; or both files hold a policy, so that one would be ignored.
    """
    own, shared = directory / "bnverify.toml", directory / "pyproject.toml"
    shared_policy = load(shared) if shared.is_file() and _table(shared) is not None else None
    if not own.is_file():
        return shared_policy or Policy()
    if shared_policy:
        raise UsageError(f"{own} and [tool.bnverify] in {shared} are two policies; keep one")
    return load(own)


def load(path: Path) -> Policy:
    """Return the policy in a file; in a pyproject.toml, the one under [tool.bnverify].

    Raises:
        UsageError: the file is missing or not TOML, or a key or value in it is not allowed.
    """
    table = _table(path)
    _refuse_unknown(path, table)
    try:
        policy = msgspec.convert({} if table is None else table, Policy)
    except msgspec.ValidationError as error:
        raise UsageError(f"{path}: {_explained(str(error), table)}") from None
    for number, failure in enumerate(policy.failure):
        try:
            list(failure.requirements)
        except InvalidRequirement:
            got = f"failure[{number}].versions = {failure.versions!r:.80} is not allowed"
            raise UsageError(f"{path}: {got}: versions are like 'flax<0.13'") from None
    return policy


def _table(path: Path) -> Any:
    """Return the policy's own table, None where a pyproject.toml has none."""
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # not TOML, or not UTF-8
        raise UsageError(f"cannot read the policy {path}: {cause(error)}") from None
    if path.name != "pyproject.toml":
        return document
    tool = document.get("tool")
    return tool.get("bnverify") if isinstance(tool, dict) else None


def _refuse_unknown(path: Path, table: Any) -> None:
    """Name every key that means nothing, not only the first."""
    known = _keys("")
    unknown = [key for key in table if key not in known] if isinstance(table, dict) else []
    if not unknown:
        return
    named = "; ".join(f"unknown key {key}{did_you_mean(key, known)}" for key in unknown)
    raise UsageError(f"{path}: {named}; allowed are {', '.join(known)}")


def _keys(name: str) -> list[str]:
    """Return the keys that a table allows; "" is the whole."""
    return [field.encode_name for field in msgspec.structs.fields(_TABLES[name])]


def _explained(error: str, table: Any) -> str:
    """Return what is wrong with a table: the key, the value, what is allowed.

    Args:
        error: msgspec's words, which end in the place: "... - at `$.accept[0].class`".
        table: what was refused.
    """
    wrong, _, place = error.partition(" - at ")
    key = place.strip("`").removeprefix("$").lstrip(".")
    field = re.fullmatch(r"Object (contains unknown|missing required) field `(.*)`", wrong)
    if field:
        name = f"{key}.{field[2]}" if key else field[2]
        if field[1] == "missing required":
            return f"{name} is missing"
        known = _keys(re.split(r"\W", key)[0])
        hint = did_you_mean(field[2], known)
        return f"unknown key {name}; allowed are {', '.join(known)}{hint}"
    value = table
    for name, index in re.findall(r"(\w+)|\[(\d+)\]", key):
        value = value[name] if name else value[int(index)]
    for words, plainer in _PLAINER.items():
        wrong = wrong.replace(words, plainer)
    allowed = PROFILES if key == "profile" else KINDS
    kinds = f", not one of {', '.join(allowed)}" if "enum" in wrong else ""
    return f"{key or 'tool.bnverify'} = {str(value)!r:.80} is not allowed: {wrong}{kinds}"


_TABLES: dict[str, type[msgspec.Struct]] = {
    "": Policy,
    "accept": Acceptance,
    "bounds": Bounds,
    "failure": KnownFailure,
}
_PLAINER = {
    " | null`": "`",
    "`str | array`": "text, or a list of texts",
    "Invalid RFC3339 encoded date": "it is not a date, as 2027-01-31",
    "`date`": "a date, as 2027-01-31",
    "Expected `str` matching regex '\\\\S'": "the text is empty",
    "`object`": "a table",
    "`float`": "a number",
    "`array`": "a list",
    "`str`": "text",
}


# Judging


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
        policy: from `find` or `load`, or `Policy()`.
        differences: what a comparison found.
        today: acceptances that expired before this day accept nothing.
        costs: new / old for each cost that was measured.
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
            (cost, ratio, bound)
            for cost, ratio in (costs or {}).items()
            # NaN is beyond any bound.
            if (bound := getattr(policy.bounds, cost)) is not None and not ratio <= bound
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
