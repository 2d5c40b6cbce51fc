"""``bnverify explain LAW``: what a law claims, why, and what usually breaks it."""

from __future__ import annotations

import argparse
import inspect
import shutil
import textwrap
from typing import TYPE_CHECKING, Any

from bnverify.unusable import Unusable, did_you_mean

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bnverify.laws import Law

HOW = {
    "structure": "proved from the traced step where it traces for every size, else read at a few",
    "residual": "an error in units of the error allowed, over generated cases",
    "witness": "some generated case must show it",
}


def add_parser(subparsers: Any) -> None:
    """Add the command's parser."""
    parser = subparsers.add_parser(
        "explain",
        help="say what a law claims and what usually breaks it",
        description="Say what a law claims, why it holds, and which mistakes usually break it.",
    )
    parser.add_argument("law", metavar="LAW", help="a name that `bnverify list` shows")


def run(args: argparse.Namespace) -> int:
    """Print one law."""
    from bnverify.laws import LAWS

    if args.law not in LAWS:
        hint = did_you_mean(args.law, LAWS) or "; see `bnverify list`"
        raise Unusable(f"no law is named {args.law!r}{hint}")
    width = min(shutil.get_terminal_size().columns, 100)
    print("\n".join(_lines(LAWS[args.law], width)))
    return 0


def _lines(law: Law, width: int) -> Iterator[str]:
    from bnverify.mistakes import MISTAKES

    def wrapped(text: str, indent: str = "", hang: str = "") -> str:
        return textwrap.fill(
            text,
            width,
            initial_indent=indent,
            subsequent_indent=indent + hang,
            break_long_words=False,
            break_on_hyphens=False,
        )

    yield f"{law.name} ({law.family})"
    yield ""
    yield wrapped(law.claim)
    for paragraph in inspect.cleandoc("\n" + law.derivation).split("\n\n"):
        if paragraph:
            yield ""
            yield wrapped(paragraph)
    yield ""
    how = HOW[law.kind]
    if law.forbids:
        how = f"proved where the traced step has no such flow, else {how}"
    yield wrapped(f"Checked: {how}", hang="  ")
    if law.forbids:
        flows = ", ".join(f"{source} -> {output}" for output, source in law.forbids)
        yield wrapped(f"Forbidden: {flows}", hang="  ")
    if law.requires:
        yield wrapped(f"Needs, of the subject: {', '.join(law.requires)}", hang="  ")
    yield wrapped(f"Source: {law.source}", hang="  ")
    if law.mistakes:
        yield ""
        yield "What usually breaks it:"
    for name in law.mistakes:
        mistake = MISTAKES[name]
        yield ""
        yield wrapped(f"{mistake.name}: {mistake.title}.", "  ")
        yield wrapped(f"Mend: {mistake.mend}.", "    ", "  ")
        if mistake.source:
            yield wrapped(f"Seen at {mistake.source}", "    ")
