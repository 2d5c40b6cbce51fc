"""How much a check does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

ProfileName: TypeAlias = Literal["quick", "ci", "nightly"]


@dataclass(frozen=True)
class Profile:
    """The amount of work of one check.

    Attributes:
        name: how it is chosen.
        tiny: how many of the tiny shapes, where counterexamples are small; the largest of them.
        shapes: how many shapes (N, D) are drawn from the domain besides the tiny ones.
        blocks: how many stacked blocks are run for each shape.
        block: how many cases a block stacks.
        examples: how many explicit cases Hypothesis draws.
        eager: how many of them are also run uncompiled.
        large: the row counts of further shapes, beyond the default domain's.
    """

    name: str
    tiny: int = 3
    shapes: int = 1
    blocks: int = 1
    block: int = 256
    examples: int = 10
    eager: int = 1
    large: tuple[int, ...] = ()


PROFILES = {
    profile.name: profile
    for profile in (
        Profile("quick"),
        Profile("ci", shapes=3, blocks=4, block=512, examples=60, eager=3),
        Profile(
            "nightly",
            shapes=10,
            blocks=40,
            block=1024,
            examples=500,
            eager=10,
            large=(1000, 100_000),
        ),
    )
}


def named(profile: ProfileName | Profile) -> Profile:
    """Return the profile of that name; a Profile is itself.

    Raises:
        ValueError: no profile has that name.
    """
    found = PROFILES.get(profile) if isinstance(profile, str) else profile
    if found is None:
        raise ValueError(f"profile must be one of {', '.join(PROFILES)}, got {profile!r}")
    return found
