"""Known failures: which law fails on which subject and releases, why, and where it is tracked.

They are the `[[failure]]` entries of a policy file, see `bnverify.upgrade.policy`. All fields are
required.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from bnverify.errors import UsageError, did_you_mean
from bnverify.laws import LAWS
from bnverify.upgrade.policy import KnownFailure, load

if TYPE_CHECKING:
    from collections.abc import Collection
    from pathlib import Path

__all__ = ["KnownFailure", "read", "stale"]


def read(path: Path) -> tuple[KnownFailure, ...]:
    """Return the known failures in a policy file.

    Raises:
        UsageError: the file cannot be read, or an entry is invalid or names an unknown law.
    """
    failures = load(path).failure
    for number, entry in enumerate(failures):
        if entry.law not in LAWS:
            hint = did_you_mean(entry.law, LAWS)
            raise UsageError(f"{path}: failure[{number}].law: no law is named {entry.law!r}{hint}")
    return failures


def stale(
    entries: Collection[KnownFailure], collected: Collection[tuple[str, str]]
) -> list[KnownFailure]:
    """Return the entries that match the installed versions but none of the collected tests.

    Args:
        entries: the known failures.
        collected: (law, subject name) of every test of a full run.
    """
    return [
        entry for entry in entries if entry.applies and (entry.law, entry.subject) not in collected
    ]
