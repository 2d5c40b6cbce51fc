"""Project settings: command-line defaults, accepted differences, known failures; and the judgement.

They are in `bnverify.toml`, or in the table `[tool.bnverify]` of `pyproject.toml`:

    target = "training.py:subject"  # defaults, overridden on the command line
    profile = "quick"
    select = ["structure", "statistics"]
    ignore = ["eval_rows_are_independent"]
    format = ["terminal", "junit=report.xml"]

    fail = ["api", "structure", "dtype", "meaning"]  # the default; other classes are reported only

    [[accept]]                  # a difference that is expected
    class = "meaning"
    leaf = "batch_stats/*/var"  # optional; * matches any text, ? one character
    subject = "my_model"        # optional, with the same wildcards
    reason = "flax 0.13 divides by n - 1; we retrained"
    expires = 2027-01-31        # the last day on which it is accepted

    [bounds]                    # optional: a cost fails if new / old exceeds this
    run_time = 1.5

    [[failure]]                 # a law that is known to fail
    law = "batch_stats_are_float32"
    subject = "my step"
    reason = "what happens, in one sentence"
    issue = "https://..."
    versions = "flax<0.13"      # or a list, all of which must match

Reasons and expiry dates are required, and entries that match nothing any more are reported, so that
the file stays true.
"""

from __future__ import annotations

import datetime as dt
import functools
import re
import tomllib
from dataclasses import dataclass
from importlib import metadata
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

import msgspec

from bnverify.errors import UsageError, cause, did_you_mean
from bnverify.profile import PROFILES, ProfileName

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

    from packaging.requirements import Requirement

    from bnverify.upgrade.compare import Comparison

# What an upgrade can change.

Kind = Literal["api", "structure", "dtype", "initialisation", "rounding", "meaning"]

KINDS: tuple[Kind, ...] = get_args(Kind)
"""The classes of difference, ordered so that earlier ones may explain later ones.

- api: the code no longer runs.
- structure: a tree has different leaves, or a leaf a different shape.
- dtype: a leaf has a different dtype.
- initialisation: the same seed gives a different initial state; the step may be unchanged.
- rounding: values differ within the rounding noise of both sides.
- meaning: values differ by more than that, or a law that held is violated.
"""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One difference between two recordings.

    Attributes:
        kind: its class, called `class` in files.
        subject: the recorded subject's name.
        leaf: the path of the leaf, such as `params/Dense_0/kernel`; None if it is not about a leaf.
        size: the distance in units of rounding noise; None if there is no such number.
        text: what differs, in one line.
        witness: a standalone script that reproduces it, if there is one.
        explanation: the part of the text that explains all values; see `values.explanation`.
    """

    kind: Kind
    subject: str
    text: str
    leaf: str | None = None
    size: float | None = None
    witness: str | None = None
    explanation: str = ""

    def to_json(self) -> dict[str, str | float | None]:
        """Return the public JSON form."""
        return {
            "class": self.kind,
            "subject": self.subject,
            "leaf": self.leaf,
            "size": self.size,
            "text": self.text,
            "explanation": self.explanation,
            "witness": self.witness,
        }


# What a project sets and accepts.

FAILING: tuple[Kind, ...] = ("api", "structure", "dtype", "meaning")
Text = Annotated[str, msgspec.Meta(pattern=r"\S")]  # not empty
Texts = Text | tuple[Text, ...]
Ratio = Annotated[float, msgspec.Meta(gt=0, le=1e6)]  # excludes infinity


class _Entry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A table of the file; unknown keys are errors."""


class Acceptance(_Entry, frozen=True, kw_only=True):
    """An `[[accept]]` entry: these differences are accepted, for this reason, until this date."""

    kind: Kind = msgspec.field(name="class")
    reason: Text
    expires: dt.date
    leaf: Text | None = None
    subject: Text | None = None

    def covers(self, difference: Difference) -> bool:
        """Return whether the entry matches the difference, ignoring the date."""
        return (
            self.kind == difference.kind
            and _glob(self.subject, difference.subject)
            and _glob(self.leaf, difference.leaf)
        )

    def expired(self, today: dt.date) -> bool:
        """Return whether the entry's last day is over."""
        return today > self.expires


class KnownFailure(_Entry, frozen=True, kw_only=True):
    """A `[[failure]]` entry: this law is violated on this subject with these versions."""

    law: Text
    subject: Text
    reason: Text
    issue: Text
    versions: Text | Annotated[tuple[Text, ...], msgspec.Meta(min_length=1)]

    @property
    def requirements(self) -> tuple[Requirement, ...]:
        """The requirements that installed packages meet where the law fails.

        Raises:
            ValueError: ``versions`` are not requirements.
        """
        from packaging.requirements import Requirement  # may be missing where recordings are made

        texts = (self.versions,) if isinstance(self.versions, str) else self.versions
        return tuple(map(Requirement, texts))

    @property
    def applies(self) -> bool:
        """Whether the installed versions match."""
        return all(map(_installed, self.requirements))

    def __str__(self) -> str:
        return f"{self.law} on {self.subject} ({', '.join(map(str, self.requirements))})"


class Bounds(_Entry, frozen=True, kw_only=True):
    """The `[bounds]` table: the largest accepted new / old of each cost; None: no limit."""

    compile_time: Ratio | None = None
    run_time: Ratio | None = None
    program_size: Ratio | None = None


class Policy(_Entry, frozen=True, kw_only=True):
    """The settings of a project; the defaults if there is no file."""

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


# Reading.


def find(directory: Path) -> Policy:
    """Return the policy from a directory's bnverify.toml or pyproject.toml, or the default.

    Raises:
        UsageError: as `load`; or both files have a policy.
    """
    own, shared = directory / "bnverify.toml", directory / "pyproject.toml"
    shared_policy = load(shared) if shared.is_file() and _table(shared) is not None else None
    if not own.is_file():
        return shared_policy or Policy()
    if shared_policy:
        raise UsageError(
            f"both {own} and [tool.bnverify] in {shared} have settings; keep one of them"
        )
    return load(own)


def load(path: Path) -> Policy:
    """Return the policy in a file; for a pyproject.toml, the table [tool.bnverify].

    Raises:
        UsageError: the file is missing or not TOML, or has an invalid key or value.
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
        except ValueError:
            got = f"failure[{number}].versions = {failure.versions!r:.80} is not allowed"
            raise UsageError(f"{path}: {got}; write versions like 'flax<0.13'") from None
    return policy


def _table(path: Path) -> Any:
    """Return the policy's table; None if a pyproject.toml has none."""
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # not TOML, or not UTF-8
        raise UsageError(f"cannot read the policy {path}: {cause(error)}") from None
    if path.name != "pyproject.toml":
        return document
    tool = document.get("tool")
    return tool.get("bnverify") if isinstance(tool, dict) else None


def _refuse_unknown(path: Path, table: Any) -> None:
    """Raise a UsageError that lists all unknown top-level keys."""
    known = _keys("")
    unknown = [key for key in table if key not in known] if isinstance(table, dict) else []
    if not unknown:
        return
    named = "; ".join(f"unknown key {key}{did_you_mean(key, known)}" for key in unknown)
    raise UsageError(f"{path}: {named}; allowed are {', '.join(known)}")


def _keys(name: str) -> list[str]:
    """Return the keys of a table; "" is the top level."""
    return [field.encode_name for field in msgspec.structs.fields(_TABLES[name])]


def _explained(error: str, table: Any) -> str:
    """Return what is wrong with a table: the key, its value, and what is allowed.

    Args:
        error: msgspec's message, which ends with the location: "... - at `$.accept[0].class`".
        table: the invalid table.
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
    "`str | array`": "a string, or a list of strings",
    "Invalid RFC3339 encoded date": "it is not a date such as 2027-01-31",
    "`date`": "a date such as 2027-01-31",
    "Expected `str` matching regex '\\\\S'": "the string is empty",
    "`object`": "a table",
    "`float`": "a number",
    "`array`": "a list",
    "`str`": "a string",
}


# Judging.


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """A policy's verdict: each difference is in exactly one of the first three lists.

    Attributes:
        failing: of a class that fails, and not accepted.
        accepted: each with the entry that accepts it.
        reported: of a class that does not fail.
        stale: valid entries that match no difference.
        expired: entries that have expired and accept nothing.
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
        """Whether the upgrade is accepted."""
        return not self.failing and not self.exceeded


def apply(
    policy: Policy,
    differences: Iterable[Difference],
    today: dt.date,
    costs: Mapping[str, float] | None = None,
) -> Verdict:
    """Apply a policy to the differences of an upgrade.

    Args:
        policy: from `find` or `load`, or `Policy()`.
        differences: from a comparison.
        today: entries that expired before this day accept nothing.
        costs: new / old for each measured cost.
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
            # NaN exceeds any bound.
            if (bound := getattr(policy.bounds, cost)) is not None and not ratio <= bound
        ),
    )


def _glob(pattern: str | None, text: str | None) -> bool:
    if pattern is None:
        return True
    return text is not None and _compiled(pattern).fullmatch(text) is not None


@functools.lru_cache(maxsize=256)
def _compiled(pattern: str) -> re.Pattern[str]:
    # Unlike fnmatch, brackets are literal: leaf paths often contain them.
    pieces = {"*": ".*", "?": "."}
    return re.compile("".join(pieces.get(c, re.escape(c)) for c in pattern), re.DOTALL)


# A comparison with the verdict on it: what every report shows.

PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")


@dataclass(frozen=True)
class Judgement:
    """A comparison and the policy's verdict on it.

    Attributes:
        comparison: what changed.
        verdict: the policy's verdict.
        old: the name of the old side, for titles.
        new: the name of the new side.
        seconds: the time taken.
    """

    comparison: Comparison
    verdict: Verdict
    old: str
    new: str
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        """Whether the upgrade is accepted."""
        return self.verdict.ok

    def changed_versions(self) -> dict[str, tuple[str, str]]:
        """Return package -> (old version, new version) for packages whose versions differ."""
        then, now = self.comparison.old["versions"], self.comparison.new["versions"]
        return {
            name: (then.get(name, "-"), now.get(name, "-"))
            for name in PACKAGES
            if then.get(name) != now.get(name)
        }

    def marked(self) -> Iterator[tuple[str, Difference, str]]:
        """Yield (mark, difference, reason it is accepted), failing ones first; marks as in JSON."""
        for difference in self.verdict.failing:
            yield "failing", difference, ""
        for difference, entry in self.verdict.accepted:
            yield "accepted", difference, f"{entry.reason} (until {entry.expires})"
        for difference in self.verdict.reported:
            yield "reported", difference, ""

    def headline(self) -> str:
        """Return the verdict in one line."""
        if self.verdict.failing:
            kinds = sorted({d.kind for d in self.verdict.failing}, key=KINDS.index)
            count = len(self.verdict.failing)
            return f"{count} difference{'s' if count > 1 else ''} not accepted: {', '.join(kinds)}"
        if self.verdict.exceeded:
            return "a cost exceeds its bound"
        differences = self.comparison.differences
        if not differences:
            return "nothing changed; all values are bit-identical"
        if self.verdict.accepted:
            return f"{len(self.verdict.accepted)} differences, all accepted by the policy"
        if all(d.kind == "rounding" for d in differences):
            return "only rounding changed"
        kinds = sorted({d.kind for d in differences if d.kind != "rounding"})
        return f"the step did not change; {', '.join(kinds)} did"

    def to_json(self) -> dict[str, Any]:
        """Return the public JSON form."""
        old, new = self.comparison.old, self.comparison.new
        verdict = self.verdict
        return {
            "bnverify": new["bnverify"],
            "subject": self.comparison.subject,
            "ok": self.ok,
            "verdict": self.headline(),
            "from": {"asked": self.old, "python": old["python"], "versions": old["versions"]},
            "to": {"asked": self.new, "python": new["python"], "versions": new["versions"]},
            "differences": [
                {**difference.to_json(), "mark": mark, "accepted": why}
                for mark, difference, why in self.marked()
            ],
            "stale": [entry.reason for entry in verdict.stale],
            "expired": [entry.reason for entry in verdict.expired],
            "exceeded": [
                {"cost": cost, "ratio": ratio, "bound": bound}
                for cost, ratio, bound in verdict.exceeded
            ],
            "costs": dict(self.comparison.costs),
            "notes": list(self.comparison.notes),
            "seconds": round(self.seconds, 3),
        }


def judge(
    comparison: Comparison,
    policy: Policy,
    *,
    old: str = "",
    new: str = "",
    seconds: float = 0.0,
    today: dt.date | None = None,
) -> Judgement:
    """Apply a policy to a comparison.

    Args:
        comparison: what changed.
        policy: from `find` or `load`.
        old: the name of the old side; by default its jax and flax versions.
        new: the name of the new side; by default its jax and flax versions.
        seconds: the time taken.
        today: decides which acceptances are valid; by default the current date.
    """
    day = today or dt.datetime.now(tz=dt.UTC).date()
    verdict = apply(policy, comparison.differences, day, comparison.costs)
    sides = (comparison.old["versions"], comparison.new["versions"])
    names = [f"jax {v.get('jax', '?')}, flax {v.get('flax', '?')}" for v in sides]
    return Judgement(comparison, verdict, old or names[0], new or names[1], seconds)
