"""A life as a list of calls: what is drawn, replayed, shortened and pasted."""

from __future__ import annotations

import ast
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


def batches(text: str) -> dict[str, Case]:
    """Return name -> case of every batch that a counterexample script assigns to a name."""
    found = {}
    for statement in ast.parse(text).body:
        if not isinstance(statement, ast.Assign) or not isinstance(statement.value, ast.Call):
            continue
        given = {each.arg: each.value for each in statement.value.keywords if each.arg}
        if {"seed", "x", "y", "lr"} <= set(given):
            case = Case.of(**{name: ast.literal_eval(value) for name, value in given.items()})
            found[ast.unparse(statement.targets[0])] = case
    return found


def parse(text: str) -> list[Call]:
    """Return the life that ``script`` wrote.

    Raises:
        ValueError: there is none.
    """
    known = batches(text)
    calls = []
    for statement in ast.parse(text).body:
        call = statement.value if isinstance(statement, ast.Expr) else None
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute):
            given = [
                known[each.id] if isinstance(each, ast.Name) else ast.literal_eval(each)
                for each in call.args
            ]
            calls.append(Call(call.func.attr, *given))
    if not calls:
        raise ValueError("no life in the script")
    return calls


def script(calls: Iterable[Call], target: str | None) -> str:
    """Return a life as a script that can be pasted and run.

    Args:
        calls: the life.
        target: what ``bnverify.load`` is given; None: the reader puts the subject in.
    """
    subject = f"bnverify.load({target!r})" if target else "..."
    names: dict[str, str] = {}
    lines = []
    for name, argument in calls:
        shown = "" if argument is None else repr(argument)
        if isinstance(argument, Case):
            shown = names.setdefault(argument.code(), f"case_{len(names)}")
        lines.append(f"life.{name}({shown})")
    given = [f"{name} = {code}" for code, name in names.items()]
    note = "" if target else "  # in the place of the dots: what was verified"
    head = ["import bnverify", "", *given, f"life = bnverify.Life({subject}){note}"]
    return "\n".join([*head, *lines]) + "\n"
