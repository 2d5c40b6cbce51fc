"""``bnverify merge``: merge the shards of a check or an audit into one report."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bnverify import arguments
from bnverify.errors import UsageError, cause

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bnverify.merge import Merged


def add_parser(subparsers: Any) -> None:
    """Add the command's parser."""
    parser = subparsers.add_parser(
        "merge",
        help="merge the shard reports of a check or an audit into one",
        description="Merge the JSON files of all shards of one `check`, or of one `audit`, into one "
        "report; the exit status is that of an unsharded run.",
    )
    parser.add_argument(
        "files", metavar="FILE", nargs="+", help="written by --shard K/N --json FILE"
    )
    arguments.add_report(parser)


def run(args: argparse.Namespace) -> int:
    """Merge the files, report, and return the exit status."""
    from bnverify.merge import merge
    from bnverify.report import formats

    outputs = arguments.outputs(args)
    merged = merge(_texts(args.files))
    formats.write([merged], outputs, arguments.verbosity(args))
    return _status(merged)


def _texts(names: Sequence[str]) -> dict[str, str]:
    texts = {}
    for name in names:
        if name in texts:
            raise UsageError(f"{name} is given twice")
        try:
            texts[name] = Path(name).read_text(encoding="utf-8")
        except OSError as error:
            raise UsageError(f"{name} cannot be read: {cause(error)}") from None
        except UnicodeDecodeError:
            raise UsageError(f"{name} is not JSON: it is not UTF-8") from None
    return texts


def _status(merged: Merged) -> int:
    from bnverify.evidence import Report

    ok = merged.ok if isinstance(merged, Report) else not merged.of("missed")
    return 0 if ok else 1
