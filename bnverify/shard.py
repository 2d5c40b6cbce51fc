"""One of N equal parts of some work, the same on every machine."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from bnverify.errors import UsageError

T = TypeVar("T")


@dataclass(frozen=True)
class Shard:
    """Part ``index`` of ``count``, counted from 1.

    Attributes:
        index: which part.
        count: how many parts there are.
    """

    index: int
    count: int

    @classmethod
    def parse(cls, text: str) -> Shard:
        """Return the shard written as ``K/N``.

        Raises:
            UsageError: it is not so written, or K is not in 1 to N.
        """
        match = re.fullmatch(r"([0-9]+)/([0-9]+)", text)
        if not match or not 1 <= int(match[1]) <= int(match[2]):
            raise UsageError(f"a shard is K/N with K in 1 to N, got {text!r}")
        return cls(int(match[1]), int(match[2]))

    def take(self, items: Sequence[T]) -> list[T]:
        """Return every N-th of ``items``, from the K-th on: neighbours are alike in cost."""
        return list(items[self.index - 1 :: self.count])

    def stamp(self, text: str, whole: Sequence[str], **same: Any) -> str:
        """Return a part's findings, JSON text, with what ``bnverify merge`` needs besides.

        Args:
            text: the findings, a JSON object.
            whole: the names of everything that all parts together are about, in its order.
            same: what must be the same in all parts.
        """
        data = {**json.loads(text), **same, "shard": str(self), "of": list(whole)}
        return json.dumps(data, indent=2) + "\n"

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"
