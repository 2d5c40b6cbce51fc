"""``bnverify compare``: report what changed between a recording and its replay."""

from __future__ import annotations

import argparse
import time
from typing import Any

from bnverify import arguments


def add_parser(subparsers: Any) -> None:
    """Add the command's parser."""
    parser = subparsers.add_parser(
        "compare",
        help="report what changed between a recording and its replay",
        description="Classify every difference between a recording and its replay: api, structure, "
        "dtype, initialisation, rounding or meaning. Exit status 1 if the policy rejects one.",
    )
    parser.add_argument("old", metavar="OLD", help="from bnverify record -o OLD")
    parser.add_argument("new", metavar="NEW", help="from bnverify record --replay OLD -o NEW")
    add_report_arguments(parser)


def add_report_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of all commands that judge an upgrade."""
    arguments.add_report(parser)
    parser.add_argument(
        "--policy",
        metavar="FILE",
        help="accepted differences; default: bnverify.toml or pyproject.toml in the current directory",
    )


def run(args: argparse.Namespace) -> int:
    """Compare, report and return the exit status."""
    from bnverify.report import formats
    from bnverify.upgrade import recording
    from bnverify.upgrade.compare import compare
    from bnverify.upgrade.policy import judge

    started = time.perf_counter()
    policy = arguments.settle(args, file=args.policy)
    outputs = arguments.outputs(args)
    comparison = compare(recording.read(args.old), recording.read(args.new))
    judgement = judge(comparison, policy, seconds=time.perf_counter() - started)
    formats.write([judgement], outputs, arguments.verbosity(args))
    return 0 if judgement.ok else 1
