"""A life as a list of calls: what is drawn, replayed, shortened and pasted."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from bnverify.case import Case


class Call(NamedTuple):
    """One thing that happens in a life.

    Attributes:
        name: a method of :class:`bnverify.lifetime.life.Life`.
        argument: what the method takes: a batch, the name of a way, or nothing.
    """

    name: str
    argument: Case | str | None = None


def script(calls: Iterable[Call], target: str | None) -> str:
    """Return a life as a script that can be pasted and run.

    Args:
        calls: the life.
        target: what ``bnverify.load`` is given; None: the reader puts the subject in.
    """
    subject = f"bnverify.load({target!r})" if target else "..."
    batches: dict[str, str] = {}
    lines = []
    for name, argument in calls:
        shown = "" if argument is None else repr(argument)
        if isinstance(argument, Case):
            shown = batches.setdefault(argument.code(), f"case_{len(batches)}")
        lines.append(f"life.{name}({shown})")
    given = [f"{name} = {code}" for code, name in batches.items()]
    note = "" if target else "  # in the place of the dots: what was verified"
    head = ["import bnverify", "", *given, f"life = bnverify.Life({subject}){note}"]
    return "\n".join([*head, *lines]) + "\n"
