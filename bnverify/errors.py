"""Usage errors, and one-line messages for exceptions."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

LONGEST = 160


class UsageError(ValueError):
    """An argument, file or target that cannot be used; the message is one line.

    The command line prints the message and exits with status 2, without a traceback.
    """


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return "; did you mean 'x'?" for the known name closest to ``name``; "" if none is close."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def first_line(error: BaseException) -> str:
    """Return an exception in one line: its type and the first 160 characters of its first line."""
    lines = str(error).strip().splitlines()
    if not lines:
        return type(error).__name__
    said = lines[0] if len(lines[0]) <= LONGEST else lines[0][:LONGEST] + "..."
    return f"{type(error).__name__}: {said}"


def cause(error: BaseException) -> str:
    """Return an error's message; for an OSError without errno and path, which callers print themselves."""
    return getattr(error, "strerror", None) or str(error)
