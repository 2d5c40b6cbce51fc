"""``bnverify list``: the laws."""

from __future__ import annotations

import argparse
import shutil
import sys
import textwrap
from typing import Any


def add_parser(subparsers: Any) -> None:
    """Add the command's parser."""
    subparsers.add_parser(
        "list",
        help="name the laws and what each claims",
        description="Name the laws, by family, and what each claims. Piped: one law a line.",
    )


def run(args: argparse.Namespace) -> int:
    """Print the laws."""
    from bnverify.laws import FAMILIES, LAWS

    if not sys.stdout.isatty():  # for grep and cut
        for law in LAWS.values():
            print(law.family, law.name, law.claim, sep="\t")
        return 0
    width = shutil.get_terminal_size().columns
    for family in FAMILIES:
        print(family)
        for law in (law for law in LAWS.values() if law.family == family):
            print(f"  {law.name}")
            print(textwrap.fill(law.claim, width, initial_indent="    ", subsequent_indent="    "))
        print()
    print("More on one of them: bnverify explain LAW")
    return 0
