"""Parameters of which the default tier runs one, and the nightly tier all."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def first_of(names: Iterable[Any]) -> list[Any]:
    """Return the names as parameters of a test; all but the first are marked for nightly runs."""
    first, *others = names
    return [first, *(pytest.param(name, marks=pytest.mark.nightly) for name in others)]
