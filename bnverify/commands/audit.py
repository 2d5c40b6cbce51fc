"""``bnverify audit``: which faults in a user's own step the user's own tests would miss."""

from __future__ import annotations

import argparse
import os
from typing import Any

from bnverify import arguments
from bnverify.errors import UsageError, did_you_mean
from bnverify.profile import Shard
from bnverify.report import formats


def add_parser(subparsers: Any) -> None:
    """Add the command's parser."""
    parser = subparsers.add_parser(
        "audit",
        help="find the faults that your own tests would miss",
        description="Run your own tests once for each of some twenty faults, inserted into your own "
        "step at import.",
    )
    parser.add_argument(
        "--tests",
        metavar="CMD",
        required=True,
        help="a command that runs your tests, such as 'pytest my_tests'",
    )
    parser.add_argument(
        "--target",
        metavar="T",
        action="append",
        required=True,
        dest="targets",
        help="module:name or path/file.py:name of your step, evaluation, or bnverify.Subject; "
        "repeatable",
    )
    parser.add_argument(
        "--select",
        dest="faults",  # not "select", which a project's settings use for laws
        metavar="NAME",
        action="append",
        default=[],
        help="only this fault; for several use commas or repeat the option",
    )
    arguments.add_report(parser)
    parser.add_argument("--shard", metavar="K/N", help="only part K of N of the faults")


def run(args: argparse.Namespace) -> int:
    """Audit, report, and return 1 if a fault was missed, else 0."""
    from bnverify.audit.faults import FAULTS
    from bnverify.audit.run import audit
    from bnverify.check import versions
    from bnverify.report.audit import progress

    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # all results are about the CPU backend
    arguments.settle(args)
    for target in args.targets:
        if ":" not in target:
            raise UsageError(f"--target {target!r} is not module:name or path/file.py:name")
    names = arguments.names(args.faults)
    for name in names:
        if name not in FAULTS:
            raise UsageError(f"no fault is named {name!r}{did_you_mean(name, FAULTS)}")
    chosen = [fault for name, fault in FAULTS.items() if not names or name in names]
    shard = Shard.parse(args.shard) if args.shard else None
    mine = shard.take(chosen) if shard else chosen
    if not mine:
        raise UsageError("no fault is left to audit; widen --select or --shard")
    outputs = arguments.outputs(args)
    found = audit(
        args.tests,
        args.targets,
        mine,
        listener=None if args.quiet else progress(len(mine)),
    )
    text = found.to_json()
    if shard:
        text = shard.stamp(text, [fault.name for fault in chosen], versions=versions())
    formats.write([found], outputs, arguments.verbosity(args), json=text)
    return 1 if found.of("missed") else 0
