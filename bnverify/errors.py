"""What a command cannot work with: the caller's mistake, told in one line."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

LONGEST = 160


class UsageError(ValueError):
    """An argument, a file or a target that cannot be used; the message is one line.

    The command line prints it and ends with status 2, never with a traceback.
    """


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return "; did you mean 'x'?" for the known name closest to ``name``; "" if none is close."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def first_line(error: BaseException) -> str:
    """Return an exception as one line: its type and the start of its message's first line."""
    lines = str(error).strip().splitlines()
    if not lines:
        return type(error).__name__
    said = lines[0] if len(lines[0]) <= LONGEST else lines[0][:LONGEST] + "..."
    return f"{type(error).__name__}: {said}"


def cause(error: BaseException) -> str:
    """Return what an error says: of the system's, without number and path, which are told beside it."""
    return getattr(error, "strerror", None) or str(error)
