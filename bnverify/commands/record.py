"""``bnverify record``: record a training step, or replay a recording."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from bnverify import arguments
from bnverify.errors import UsageError


def add_parser(subparsers: Any) -> None:
    """Add the command's parser."""
    parser = subparsers.add_parser(
        "record",
        help="record a training step for comparison after an upgrade",
        description="Record a training step's cases, states and results in a file, or replay a "
        "recording from another environment in this one.",
    )
    arguments.add_target(parser)
    parser.add_argument("-o", "--output", metavar="FILE", required=True, help="the file to write")
    parser.add_argument("--replay", metavar="OLD", help="the recording to replay")
    arguments.add_seed(parser)
    parser.add_argument(
        "--costs", action="store_true", help="also measure times, which differ from run to run"
    )
    parser.add_argument("--no-laws", action="store_true", help="do not judge the laws")


def run(args: argparse.Namespace) -> int:
    """Write the recording, and return the exit status."""
    from bnverify.upgrade import recording
    from bnverify.upgrade.record import record

    if args.target is None:  # the gate gives a target, and needs no settings
        arguments.settle(args)
    if not Path(args.output).resolve().parent.is_dir():
        raise UsageError(f"--output {args.output} cannot be written: no such directory")
    old = recording.read(args.replay) if args.replay else None
    made = record(args.target, seed=args.seed, old=old, costs=args.costs, laws=not args.no_laws)
    recording.write(args.output, made.manifest, made.arrays)
    return 0
