"""The options of a check: families of laws, amount of work, and shard.

This module imports nothing heavy, so the command line and the pytest plugin can use it at startup.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, TypeVar, get_args

from bnverify.errors import UsageError

T = TypeVar("T")

Family: TypeAlias = Literal[
    "structure",
    "influence",
    "statistics",
    "update",
    "evaluation",
    "metamorphic",
    "life",
    "parallel",
]

FAMILIES: tuple[Family, ...] = get_args(Family)
"""In the order of reports."""

ProfileName: TypeAlias = Literal["quick", "ci", "nightly"]


@dataclass(frozen=True)
class Profile:
    """The amount of work of one check.

    Attributes:
        name: its name in options.
        tiny: the number of tiny shapes: of (2, 2), (1, 1) and (2, 1) the first ones. Smaller
            counterexamples are sought in (2, 1) in any case.
        shapes: the number of shapes (N, D) drawn from the domain besides the tiny ones.
        blocks: the number of stacks for each shape.
        block: the number of cases in a stack.
        examples: the number of explicit cases that Hypothesis draws.
        eager: the number of them that are also run without jit.
        large: the row counts of further shapes, beyond the default domain's limit.
        processes: the number of other processes that load the step; each takes some 5 CPU seconds.
    """

    name: str
    tiny: int = 3
    shapes: int = 1
    blocks: int = 1
    block: int = 256
    examples: int = 10
    eager: int = 1
    large: tuple[int, ...] = ()
    processes: int = 0


PROFILES = {
    profile.name: profile
    for profile in (
        Profile("quick", tiny=2),
        Profile("ci", shapes=3, blocks=4, block=512, examples=60, eager=3, processes=1),
        Profile(
            "nightly",
            shapes=10,
            blocks=40,
            block=1024,
            examples=500,
            eager=10,
            large=(1000, 100_000),
            processes=4,
        ),
    )
}


def named(profile: ProfileName | Profile) -> Profile:
    """Return the profile with a name; a Profile is returned as it is.

    Raises:
        ValueError: no profile has that name.
    """
    found = PROFILES.get(profile) if isinstance(profile, str) else profile
    if found is None:
        raise ValueError(f"profile must be one of {', '.join(PROFILES)}, got {profile!r}")
    return found


@dataclass(frozen=True)
class Shard:
    """Part ``index`` of ``count`` equal parts, counted from 1; by default everything.

    Attributes:
        index: the number of the part.
        count: the number of parts.
    """

    index: int = 1
    count: int = 1

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    @classmethod
    def parse(cls, text: str) -> Shard:
        """Return the shard written as ``K/N``.

        Raises:
            UsageError: the text has another form, or K is not in 1 to N.
        """
        match = re.fullmatch(r"([0-9]+)/([0-9]+)", text)
        if not match or not 1 <= int(match[1]) <= int(match[2]):
            raise UsageError(f"a shard is K/N with K in 1 to N, got {text!r}")
        return cls(int(match[1]), int(match[2]))

    def take(self, items: Sequence[T]) -> list[T]:
        """Return every N-th item, starting with the K-th, because neighbouring items cost about the same."""
        return list(items[self.index - 1 :: self.count])

    def stamp(self, text: str, whole: Sequence[str], **same: Any) -> str:
        """Return the JSON report of a shard with the fields that ``bnverify merge`` needs.

        Args:
            text: a JSON object.
            whole: the names of all items of all shards, in order.
            same: fields that must agree in all shards.
        """
        data = {
            **json.loads(text),
            **same,
            "shard": str(self),
            "of": list(whole),
        }
        return json.dumps(data, indent=2) + "\n"
