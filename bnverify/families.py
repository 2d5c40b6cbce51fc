"""The families of laws, apart from the laws: pytest's plugin names them in runs that check nothing."""

from __future__ import annotations

from typing import Literal, TypeAlias, get_args

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
