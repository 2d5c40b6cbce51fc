"""Known failures as data: which law fails on which subject, why, where that is tracked, and for whom.

    [[failure]]
    law = "batch_stats_are_float32"
    subject = "my step"
    reason = "what happens, in one sentence"
    issue = "https://..."
    versions = "flax<0.13"        # or a list, all of which must hold

No field may be missing: a failure without a reason, an address or an end is one that stays.
"""

from __future__ import annotations

import tomllib
from collections.abc import Collection
from dataclasses import dataclass, fields
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import InvalidRequirement, Requirement

from bnverify.laws import LAWS
from bnverify.unusable import Unusable, cause, did_you_mean


@dataclass(frozen=True)
class KnownFailure:
    """One entry of the file.

    Attributes:
        law: the law that is violated.
        subject: the name of the subject that violates it.
        reason: what happens, in one sentence.
        issue: where it is tracked, an address.
        versions: requirements, all of which the installed packages meet where it fails.
    """

    law: str
    subject: str
    reason: str
    issue: str
    versions: tuple[str, ...]

    @property
    def applies(self) -> bool:
        """Whether the installed versions are ones on which the failure is known."""
        return all(_installed(Requirement(text)) for text in self.versions)

    def __str__(self) -> str:
        return f"{self.law} on {self.subject} ({', '.join(self.versions)})"


def _installed(requirement: Requirement) -> bool:
    try:
        version = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        return False
    return requirement.specifier.contains(version, prereleases=True)


def read(path: Path) -> tuple[KnownFailure, ...]:
    """Return the entries of a file.

    Raises:
        Unusable: it cannot be read, or an entry is not as it should be; the message says which.
    """
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise Unusable(f"known failures {path}: {cause(error)}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise Unusable(f"known failures {path}: {error}") from None
    entries = data.pop("failure", [])
    if data or not isinstance(entries, list):
        raise Unusable(f"known failures {path}: only [[failure]] tables may be there")
    return tuple(_entry(entry, f"{path}, failure {i}") for i, entry in enumerate(entries, 1))


def _entry(entry: Any, where: str) -> KnownFailure:
    names = [field.name for field in fields(KnownFailure)]
    if not isinstance(entry, dict):
        raise Unusable(f"{where} is no table")
    for name in entry:
        if name not in names:
            raise Unusable(f"{where} has an unknown field {name!r}{did_you_mean(name, names)}")
    for name in names:
        if not entry.get(name):
            raise Unusable(f"{where} has no {name!r}")
    versions = entry["versions"]
    versions = [versions] if isinstance(versions, str) else versions
    texts = [*(entry[name] for name in names[:-1]), *versions]
    if not all(isinstance(text, str) for text in texts):
        raise Unusable(f"{where} must hold strings alone")
    if entry["law"] not in LAWS:
        raise Unusable(
            f"{where}: no law is named {entry['law']!r}{did_you_mean(entry['law'], LAWS)}"
        )
    for text in versions:
        try:
            Requirement(text)
        except InvalidRequirement:
            raise Unusable(f"{where}: versions are like 'flax<0.13', got {text!r}") from None
    return KnownFailure(**{**entry, "versions": tuple(versions)})


def stale(
    entries: Collection[KnownFailure], collected: Collection[tuple[str, str]]
) -> list[KnownFailure]:
    """Return the entries for these versions whose law and subject no test was about.

    Args:
        entries: what is known.
        collected: (law, subject name) of every test of a full run.
    """
    return [
        entry for entry in entries if entry.applies and (entry.law, entry.subject) not in collected
    ]
