"""``bnverify record``: a recording of a training step, or the replay of one."""

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
        help="record a training step, to compare it with after an upgrade",
        description="Record a training step's cases, states and outputs in a file; or replay a "
        "recording made in another environment in this one.",
    )
    arguments.add_target(parser)
    parser.add_argument("-o", "--output", metavar="FILE", required=True, help="the recording")
    parser.add_argument("--replay", metavar="OLD", help="a recording to run again here")
    arguments.add_seed(parser)
    parser.add_argument(
        "--costs", action="store_true", help="measure times too; every recording differs then"
    )
    parser.add_argument("--no-laws", action="store_true", help="leave the laws' verdicts out")


def run(args: argparse.Namespace) -> int:
    """Write the recording and return the exit status."""
    from bnverify.upgrade import recording
    from bnverify.upgrade.record import record

    if args.target is None:  # the gate names one, and needs no project's file
        arguments.settle(args)
    if not Path(args.output).resolve().parent.is_dir():
        raise UsageError(f"--output {args.output} cannot be written: no such directory")
    old = recording.read(args.replay) if args.replay else None
    made = record(args.target, seed=args.seed, old=old, costs=args.costs, laws=not args.no_laws)
    recording.write(args.output, made.manifest, made.arrays)
    return 0
