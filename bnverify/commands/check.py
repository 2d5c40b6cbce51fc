"""``bnverify check``: hold a training step to the laws."""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import sys
from typing import TYPE_CHECKING, Any

from bnverify import deadline, target
from bnverify.neighbours import importable
from bnverify.profile import PROFILES
from bnverify.shard import Shard
from bnverify.show import files
from bnverify.unusable import Unusable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bnverify.evidence import Report


def add_parser(subparsers: Any) -> None:
    """Add the command's parser."""
    parser = subparsers.add_parser(
        "check",
        help="hold a training step to the laws",
        description="Hold a training step to the laws.",
    )
    parser.add_argument(
        "target",
        metavar="TARGET",
        nargs="?",
        default=target.REFERENCE,
        help="package.module:name or path/file.py:name: a Subject, a function that makes one, or "
        "a function of (seed, x_batch, y_batch, lr); default: the reference",
    )
    parser.add_argument(
        "--profile", choices=list(PROFILES), default="ci", help="how much to do; default: ci"
    )
    parser.add_argument(
        "--json", metavar="FILE", help="write the report to FILE as JSON; - is standard output"
    )
    for option, verb in (("--select", "check only"), ("--ignore", "leave out")):
        parser.add_argument(
            option,
            metavar="LAW",
            action="append",
            default=[],
            help=f"{verb} this law or family; several: commas, or the option again",
        )
    parser.add_argument(
        "--seed", metavar="N", type=_whole, default=0, help="the seed of all cases; default: 0"
    )
    parser.add_argument("--proofs", action="store_true", help="read the traced step, run nothing")
    parser.add_argument(
        "--fail-fast",
        action="store_true",
        help="stop at the first proofs or cases that show one wrong",
    )
    parser.add_argument(
        "--leaves",
        action="store_true",
        help="say of each leaf what may reach it, not only of each tree; in the JSON too",
    )
    parser.add_argument("--shard", metavar="K/N", help="check only the K-th of N parts of the laws")
    parser.add_argument(
        "--time-limit",
        metavar="S",
        type=_seconds,
        default=deadline.DEFAULT,
        help="seconds that importing the target, or one call of its Python code, may take; "
        f"default: {deadline.DEFAULT:g}",
    )


def run(args: argparse.Namespace) -> int:
    """Check the target, show what was seen and return the exit status."""
    files.check_writable(args.json)
    # What a target prints must not end up in the JSON.
    to_stderr = contextlib.redirect_stdout(sys.stderr)
    with to_stderr if args.json == "-" else contextlib.nullcontext():
        report, whole = _verify(args)
        report = report if args.leaves else report.by_trees()
        from bnverify.show import terminal

        terminal.show(report)
    text = report.to_json()
    files.write(args.json, Shard.parse(args.shard).stamp(text, whole) if args.shard else text)
    return 0 if report.ok else 1


def _verify(args: argparse.Namespace) -> tuple[Report, list[str]]:
    """Return the report, and the names of all that the shards of it together are about."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # every claim is about the CPU backend
    from bnverify import compat

    compat.compile_quickly()
    with importable(target.directory(args.target)):
        what = target.load(args.target, time_limit=args.time_limit)

        from bnverify.check import choose, guarded, verify
        from bnverify.parallel.subject import Parallel
        from bnverify.show import terminal

        select, ignore = _names(args.select), _names(args.ignore)
        try:
            laws = choose(select, ignore, parallel=isinstance(what, Parallel))
        except ValueError as error:
            raise Unusable(str(error)) from None
        own = Shard.parse(args.shard).take(laws) if args.shard else laws
        if not own:
            raise Unusable("no law is left to check")
        with terminal.progress(what.name) as listener:
            try:
                report = verify(
                    guarded(what, args.time_limit),
                    args.profile,
                    seed=args.seed,
                    select=own,
                    proofs_only=args.proofs,
                    fail_fast=args.fail_fast,
                    target=args.target,
                    listener=listener,
                )
            except deadline.OverTime as error:
                raise target.TargetError(str(error)) from None
            except Exception as error:
                if target.user_line(error):  # it comes out of the target's code, not out of ours
                    raise target.refused(error, args.target) from None
                raise
    return report, laws


def _names(given: Sequence[str]) -> list[str]:
    return [name.strip() for text in given for name in text.split(",") if name.strip()]


def _whole(text: str) -> int:
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"must be at least 0, got {number}")
    return number


def _seconds(text: str) -> float:
    seconds = float(text)
    if not seconds > 0 or math.isnan(seconds):
        raise argparse.ArgumentTypeError(f"must be more than 0 seconds, got {text}")
    return seconds
