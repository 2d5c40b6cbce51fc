"""``bnverify check``: check a training step against the laws."""

from __future__ import annotations

import argparse
import contextlib
import gc
import os
import sys
import threading
from typing import TYPE_CHECKING, Any

from bnverify import arguments, target
from bnverify.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bnverify.evidence import Report
    from bnverify.profile import Shard

TIME_LIMIT = 120.0
"""The default time limit in seconds; importing and tracing a large model takes about ten."""


def add_parser(subparsers: Any) -> None:
    """Add the command's parser."""
    parser = subparsers.add_parser(
        "check",
        help="check a training step against the laws",
        description="Check a training step against the laws.",
    )
    arguments.add_target(parser)
    arguments.add_profile(parser)
    arguments.add_report(parser)
    for option, verb in (("--select", "check only"), ("--ignore", "skip")):
        parser.add_argument(
            option,
            metavar="LAW",
            action="append",
            default=[],
            help=f"{verb} this law or family; for several use commas or repeat the option",
        )
    arguments.add_seed(parser)
    parser.add_argument(
        "--proofs",
        action="store_true",
        help="only read the traced step, without running it: takes a second or two",
    )
    parser.add_argument("--fail-fast", action="store_true", help="stop after the first violation")
    parser.add_argument(
        "--leaves", action="store_true", help="report dependencies by leaf instead of by tree"
    )
    parser.add_argument("--shard", metavar="K/N", help="check only the K-th of N parts of the laws")
    arguments.add_time_limit(parser, TIME_LIMIT, "importing the target and tracing it")


def run(args: argparse.Namespace) -> int:
    """Check the target, print the report and return the exit status."""
    from bnverify.profile import Shard

    arguments.settle(args)
    outputs = arguments.outputs(args)
    shard = Shard.parse(args.shard) if args.shard else Shard()
    # Whatever the target prints must not end up in a report that a machine reads.
    plain = all(each.format == "terminal" or each.file for each in outputs)
    with contextlib.nullcontext() if plain else contextlib.redirect_stdout(sys.stderr):
        report, laws, interrupted = _check(args, shard)
    report = report if args.leaves else report.by_trees()
    from bnverify.report import formats

    text = shard.stamp(report.to_json(), laws) if args.shard else report.to_json()
    formats.write([report], outputs, arguments.verbosity(args), json=text)
    if interrupted:
        sys.stdout.flush()
        raise KeyboardInterrupt
    return 0 if report.ok else 1


def _check(args: argparse.Namespace, shard: Shard) -> tuple[Report, list[str], bool]:
    """Return the report, the names of the laws of all shards, and whether the check was interrupted."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # all results are about the CPU backend
    from bnverify import compat

    compat.compile_quickly()
    # A step may import modules from its directory whenever it is called.
    with target.importable(target.directory(args.target)):
        with _time_limit(args.time_limit, f"loading {args.target}"):
            what = target.load(args.target)

        from bnverify.check import Check, Finished, choose
        from bnverify.model import Parallel
        from bnverify.report.progress import progress

        select, ignore = arguments.names(args.select), arguments.names(args.ignore)
        laws = choose(select, ignore, parallel=isinstance(what, Parallel))
        own = shard.take(laws)
        if not own:
            raise UsageError("no law is left to check")
        # All that was imported lives as long as the process: the collector need not go through it.
        gc.freeze()
        check = Check(
            what,
            args.profile,
            select=own,
            proofs_only=args.proofs,
            target=target.anywhere(args.target),
        )
        report = None
        with contextlib.nullcontext() if args.quiet else progress(what.name) as listener:
            try:
                for event in check.events(args.seed, fail_fast=args.fail_fast):
                    if listener is not None:
                        listener(event)
                    if isinstance(event, Finished):
                        report = event.report
            except KeyboardInterrupt:
                if report is None:
                    raise
                return report, laws, True
            except Exception as error:
                if target.user_line(error):  # raised by the target's code, not by bnverify
                    raise target.refused(error, args.target) from None
                raise
    assert report is not None
    return report, laws, False


@contextlib.contextmanager
def _time_limit(seconds: float, doing: str) -> Iterator[None]:
    """If the block takes longer, print the line that is being executed and exit with status 2."""

    def end() -> None:
        at = target.running_line(threading.main_thread())
        sys.stderr.write(f"bnverify: {doing} took more than {seconds:g} s{at}\n")
        sys.stderr.flush()
        os._exit(2)  # an exception could be caught by the code that hangs

    timer = threading.Timer(min(seconds, threading.TIMEOUT_MAX), end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
