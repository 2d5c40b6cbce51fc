"""``bnverify check``: check a training step against the laws."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from typing import TYPE_CHECKING, Any

from bnverify import arguments, deadline, target
from bnverify.errors import UsageError
from bnverify.neighbours import importable
from bnverify.shard import Shard

if TYPE_CHECKING:
    from collections.abc import Callable

    from bnverify.check import Event, Listener
    from bnverify.evidence import Evidence, Report


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
    parser.add_argument("--shard", metavar="K/N", help="check only part K of N of the laws")
    what = "importing the target, or one call of its Python code,"
    arguments.add_time_limit(parser, arguments.TIME_LIMIT, what)


def run(args: argparse.Namespace) -> int:
    """Check the target, report, and return the exit status."""
    arguments.settle(args)
    outputs = arguments.outputs(args)
    # Keep what the target prints out of machine-readable output.
    plain = all(each.format == "terminal" or each.file for each in outputs)
    with contextlib.nullcontext() if plain else contextlib.redirect_stdout(sys.stderr):
        report, whole, interrupted = _verify(args)
    report = report if args.leaves else report.by_trees()
    from bnverify.report import formats

    text = report.to_json()
    text = Shard.parse(args.shard).stamp(text, whole) if args.shard else text
    formats.write([report], outputs, arguments.verbosity(args), json=text)
    if interrupted:
        sys.stdout.flush()
        raise KeyboardInterrupt
    return 0 if report.ok else 1


def _verify(args: argparse.Namespace) -> tuple[Report, list[str], bool]:
    """Return the report, the names of the laws of all shards, and whether it was interrupted."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # all results are about the CPU backend
    from bnverify import compat

    compat.compile_quickly()
    with importable(target.directory(args.target)):
        what = target.load(args.target, time_limit=args.time_limit)

        from bnverify.check import choose, guarded, verify
        from bnverify.parallel.subject import Parallel
        from bnverify.report.progress import progress

        select, ignore = arguments.names(args.select), arguments.names(args.ignore)
        try:
            laws = choose(select, ignore, parallel=isinstance(what, Parallel))
        except ValueError as error:
            raise UsageError(str(error)) from None
        own = Shard.parse(args.shard).take(laws) if args.shard else laws
        if not own:
            raise UsageError("no law is left to check; widen --select, --ignore or --shard")
        shown = contextlib.nullcontext(_discard) if args.quiet else progress(what.name)
        with shown as listener:
            partial = _PartialReport(listener)
            try:
                report = verify(
                    guarded(what, args.time_limit),
                    args.profile,
                    seed=args.seed,
                    select=own,
                    proofs_only=args.proofs,
                    fail_fast=args.fail_fast,
                    target=target.anywhere(args.target),
                    listener=partial.listen,
                )
            except KeyboardInterrupt:
                if not partial.evidence:
                    raise
                return partial.report(what.name, args), laws, True
            except deadline.OverTime as error:
                raise target.TargetError(str(error)) from None
            except Exception as error:
                if target.user_line(error):  # raised by the target's code, not by bnverify
                    raise target.refused(error, args.target) from None
                raise
    return report, laws, False


def _discard(event: Event) -> None:
    """Ignore the event."""


class _PartialReport:
    """Collects the results of a check, in case it is interrupted.

    Args:
        listener: receives every event as well.

    Attributes:
        evidence: law -> its evidence so far.
    """

    def __init__(self, listener: Listener) -> None:
        self.evidence: dict[str, Evidence] = {}
        self._listener: Callable[[Event], None] = listener
        self._laws: tuple[str, ...] = ()
        self._cases, self._begun = 0, time.perf_counter()

    def listen(self, event: Event) -> None:
        """Handle one event."""
        from bnverify.check import LawJudged, PhaseStarted, Started

        if isinstance(event, Started):
            self._laws = event.laws
        elif isinstance(event, PhaseStarted):
            self._cases = event.cases
        elif isinstance(event, LawJudged):
            self.evidence[event.evidence.law] = event.evidence
        self._listener(event)

    def report(self, name: str, args: argparse.Namespace) -> Report:
        """Return a report of the results so far; the other laws are untriggered."""
        from bnverify.check import versions
        from bnverify.diagnose import diagnosed
        from bnverify.evidence import Evidence, Report

        reason = "interrupted"
        results = [
            self.evidence.get(law) or Evidence.of(law, "untriggered", reason=reason)
            for law in self._laws
        ]
        return Report(
            name,
            args.profile,
            args.seed,
            tuple(diagnosed(results, {})),
            self._cases,
            time.perf_counter() - self._begun,
            versions(),
            notes=("interrupted: these are the results up to then",),
        )
