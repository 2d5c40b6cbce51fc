"""``bnverify list``: the laws, by family."""

from __future__ import annotations

import argparse
import shutil
import sys
import textwrap
from typing import Any

from bnverify.errors import UsageError, did_you_mean


def add_parser(subparsers: Any) -> None:
    """Add the command's parser."""
    parser = subparsers.add_parser(
        "list",
        help="list the laws and their claims",
        description="List the laws by family, with their claims. Piped: one law per line.",
    )
    parser.add_argument(
        "family", metavar="FAMILY", nargs="?", help="only this family; default: all"
    )


def run(args: argparse.Namespace) -> int:
    """Print the laws."""
    from bnverify.laws import FAMILIES, LAWS

    if args.family not in {None, *FAMILIES}:
        hint = did_you_mean(args.family, FAMILIES) or f"; the families are {', '.join(FAMILIES)}"
        raise UsageError(f"no family is named {args.family!r}{hint}")
    laws = [law for law in LAWS.values() if args.family in {None, law.family}]
    if not sys.stdout.isatty():  # for grep and cut
        for law in laws:
            print(law.family, law.name, law.claim, sep="\t")
        return 0
    width = shutil.get_terminal_size().columns
    for family in FAMILIES:
        own = [law for law in laws if law.family == family]
        if not own:
            continue
        print(f"{family} ({len(own)})")
        for law in own:
            print(f"  {law.name}")
            print(textwrap.fill(law.claim, width, initial_indent="    ", subsequent_indent="    "))
        print()
    parallel = sum(law.family == "parallel" for law in laws)
    total = f"{len(laws) - parallel} laws" if len(laws) > parallel else ""
    devices = f"{parallel} for a step on several devices (bnverify.Parallel)" if parallel else ""
    print(textwrap.fill(", and ".join(filter(None, (total, devices))), width))
    print("For details of one: bnverify explain LAW")
    return 0
