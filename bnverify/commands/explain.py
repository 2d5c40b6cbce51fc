"""``bnverify explain LAW``: what a law claims, why, and what usually breaks it."""

from __future__ import annotations

import argparse
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
    "life": "in lives from a script and drawn from the seed: steps, evaluations, saves, restores, "
    "copies and resumptions, beside a twin that only trains",
    "parallel": "on four simulated devices beside one, within the rounding of the step on one",
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


def _checked(law: Law) -> Iterator[str]:
    """Yield how a law is checked, and what must be there for it."""
    how = HOW[law.kind]
    if law.forbids:
        how = f"proved where the traced step has no such flow, else {how}"
    yield f"Checked: {how}"
    if law.forbids:
        flows = ", ".join(f"{source} -> {output}" for output, source in law.forbids)
        yield f"Forbidden: {flows}"
    if law.requires:
        yield f"Needs, of the subject: {', '.join(law.requires)}"


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
    for paragraph in filter(None, law.derivation.split("\n\n")):
        yield ""
        yield wrapped(paragraph)
    yield ""
    for line in _checked(law):
        yield wrapped(line, hang="  ")
    yield wrapped(f"Source: {law.source}", hang="  ")
    if law.mistakes:
        yield ""
        yield "What usually breaks it:"
    for name in law.mistakes:
        mistake = MISTAKES[name]
        yield ""
        yield wrapped(f"{mistake.name}: {mistake.title}.", "  ")
        yield wrapped(f"Fix: {mistake.fix}.", "    ", "  ")
        if mistake.source:
            yield wrapped(f"Seen at {mistake.source}", "    ")
