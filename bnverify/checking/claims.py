"""Every claim that can be made about a step, whatever shows it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TypeAlias, get_args

from bnverify.claim import Claim
from bnverify.laws import LAWS, Law
from bnverify.laws.law import Family
from bnverify.lifetime import claims as lifetime
from bnverify.parallel import claims as many_devices
from bnverify.unusable import Unusable, did_you_mean

AnyClaim: TypeAlias = Law | Claim

LIFE: Mapping[str, Claim] = lifetime.CLAIMS
PARALLEL: Mapping[str, Claim] = many_devices.CLAIMS
CLAIMS: Mapping[str, AnyClaim] = {**LAWS, **LIFE, **PARALLEL}
"""By name, in the order of reports."""

FAMILIES: tuple[str, ...] = (*get_args(Family), "life", "parallel")
"""In the order of reports."""


def choose(
    select: Collection[str], ignore: Collection[str], *, parallel: bool = False
) -> list[str]:
    """Return the names of the claims that are selected, by name or family, and not ignored.

    Args:
        select: names of claims and families, or one name; empty: all that are about the step.
        ignore: names of claims and families, or one name.
        parallel: whether the step is one for many devices; otherwise what is claimed of those
            must be selected to be answered.

    Raises:
        ValueError: naming what is neither a claim nor a family.
    """
    select, ignore = ([n] if isinstance(n, str) else n for n in (select, ignore))
    for name in (*select, *ignore):
        if name not in CLAIMS and name not in FAMILIES:
            close = did_you_mean(name, (*CLAIMS, *FAMILIES)) or "; see `bnverify list`"
            raise Unusable(f"no law or family is named {name!r}{close}")
    chosen = select or [each for each in FAMILIES if each != "parallel" or parallel]
    return [
        name
        for name, claim in CLAIMS.items()
        if {name, claim.family} & set(chosen) and not {name, claim.family} & set(ignore)
    ]
