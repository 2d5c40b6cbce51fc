"""``bnverify explain NAME``: describe a law, a family of laws, or a mistake and its fix."""

from __future__ import annotations

import argparse
import shutil
import textwrap
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

from bnverify.errors import UsageError, did_you_mean

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from bnverify.laws import Law
    from bnverify.mistakes import Mistake

HOW = {
    "structure": "from the traced step: proved for every size if it traces with symbolic sizes, else "
    "checked at a few sizes",
    "residual": "error in units of the tolerance, over generated cases",
    "witness": "at least one generated case must show the effect",
    "life": "on fixed and random sequences of steps, evaluations, saves, restores, copies and "
    "resumptions, against a state that is only trained",
    "parallel": "on four simulated devices, against one device, within rounding",
}


def add_parser(subparsers: Any) -> None:
    """Add the command's parser."""
    parser = subparsers.add_parser(
        "explain",
        help="explain a law, a family of laws, or a mistake",
        description="Describe what a law claims and which mistakes break it, which laws a family has, "
        "or what a mistake looks like and how to fix it, with code.",
    )
    parser.add_argument(
        "name",
        metavar="NAME",
        help="the name of a law, family or mistake, as in reports and `bnverify list`, or the "
        "beginning of the name",
    )


def run(args: argparse.Namespace) -> int:
    """Print the description of a name."""
    width = min(shutil.get_terminal_size().columns, 100)
    print("\n".join(_Page(width).lines(args.name)))
    return 0


def found(name: str, known: Iterable[str]) -> str:
    """Return the known name that equals ``name``, or the only one that begins with it.

    Raises:
        UsageError: no name matches, or several do.
    """
    names = list(dict.fromkeys(known))
    if name in names:
        return name
    begun = [each for each in names if each.startswith(name)]
    if len(begun) == 1:
        return begun[0]
    if begun:
        shown = ", ".join(begun[:6]) + (", ..." if len(begun) > 6 else "")
        raise UsageError(f"{len(begun)} names begin with {name!r}: {shown}")
    hint = did_you_mean(name, names) or "; see `bnverify list`"
    raise UsageError(f"no law, family or mistake is named {name!r}{hint}")


class _Page:
    """Descriptions as text.

    Args:
        width: the line width in characters.
    """

    def __init__(self, width: int) -> None:
        self._width = width

    def lines(self, name: str) -> Iterator[str]:
        """Yield the description of a law, family or mistake, given its name or a prefix."""
        from bnverify.laws import FAMILIES, LAWS
        from bnverify.mistakes import MISTAKES

        name = found(name, (*LAWS, *FAMILIES, *MISTAKES))
        if name in LAWS:
            return self._law(LAWS[name])
        if name in FAMILIES:
            return self._family(name)
        return self._mistake(MISTAKES[name])

    def _wrapped(self, text: str, indent: str = "", hang: str = "") -> str:
        return textwrap.fill(
            text,
            self._width,
            initial_indent=indent,
            subsequent_indent=indent + hang,
            break_long_words=False,
            break_on_hyphens=False,
        )

    def _law(self, law: Law) -> Iterator[str]:
        from bnverify.mistakes import MISTAKES

        yield f"{law.name} ({law.family})"
        yield ""
        yield self._wrapped(law.claim)
        for paragraph in filter(None, law.derivation.split("\n\n")):
            yield ""
            yield self._wrapped(paragraph)
        yield ""
        for line in _checked(law):
            yield self._wrapped(line, hang="  ")
        yield self._wrapped(f"Source: {law.source}", hang="  ")
        if law.mistakes:
            yield ""
            yield self._wrapped("Mistakes that break it; `bnverify explain MISTAKE` shows the fix:")
        for name in law.mistakes:
            yield self._wrapped(f"{name}: {MISTAKES[name].title}", "  ", "  ")

    def _family(self, family: str) -> Iterator[str]:
        from bnverify.laws import LAWS

        laws = [law for law in LAWS.values() if law.family == family]
        yield f"{family} ({len(laws)} laws)"
        for law in laws:
            yield ""
            yield law.name
            yield self._wrapped(law.claim, "  ")

    def _mistake(self, mistake: Mistake) -> Iterator[str]:
        from bnverify.laws import LAWS

        yield f"{mistake.name} (mistake)"
        yield ""
        yield self._wrapped(f"{mistake.title[0].upper()}{mistake.title[1:]}.")
        if mistake.looks:
            yield self._wrapped(f"Symptoms: {mistake.looks}", hang="  ")
        yield self._wrapped(f"Fix: {mistake.fix}.", hang="  ")
        yield ""
        yield from self._code(mistake)
        laws = [law.name for law in LAWS.values() if mistake.name in law.mistakes]
        if laws:
            yield "Laws that detect it:"
            yield from (f"  {name}" for name in laws)
        if mistake.source:
            yield self._wrapped(f"Seen at {mistake.source}")

    def _code(self, mistake: Mistake) -> Iterator[str]:
        """Yield the wrong and the right code, side by side if they fit."""
        wrong, right = (["Wrong:", *_indented(text)] for text in (mistake.wrong, mistake.right))
        right[0] = "Right:"
        column = max(map(len, wrong)) + 3
        if not mistake.wrong:
            return
        if column + max(map(len, right)) <= self._width:
            for left, beside in zip_longest(wrong, right, fillvalue=""):
                yield f"{left:<{column}}{beside}".rstrip()
        else:
            yield from (*wrong, "", *right)
        yield ""


def _indented(code: str) -> list[str]:
    return [f"  {line}".rstrip() for line in code.splitlines()]


def _checked(law: Law) -> Iterator[str]:
    """Yield how a law is checked, and what the subject must provide for it."""
    how = HOW[law.kind]
    if law.must_not_reach:
        how = f"proved if the traced step has no such data flow, else {how}"
    yield f"Checked: {how}"
    if law.must_not_reach:
        flows = ", ".join(f"{source} -> {output}" for output, source in law.must_not_reach)
        yield f"Forbidden: {flows}"
    if law.capabilities:
        yield f"Needs from the subject: {', '.join(law.capabilities)}"
