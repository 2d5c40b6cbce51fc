"""``bnverify bisect``: find the release of a package that changed a training step."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from bnverify import arguments
from bnverify.commands.compare import add_report_arguments
from bnverify.commands.gate import add_upgrade_arguments, project_directory
from bnverify.errors import UsageError
from bnverify.upgrade.policy import KINDS

if TYPE_CHECKING:
    from bnverify.upgrade.bisect import Bisection, Trial


def add_parser(subparsers: Any) -> None:
    """Add the command's parser."""
    parser = subparsers.add_parser(
        "bisect",
        help="find the release of a package that changed a training step",
        description="Find the first release of a package between two versions that changes the "
        "gate's verdict, with as few environments as possible. Exit status 1 if there is one.",
    )
    add_upgrade_arguments(parser)
    parser.add_argument(
        "--package", metavar="NAME", required=True, help="the package whose releases are tried"
    )
    parser.add_argument(
        "--with",
        dest="extra",
        metavar="REQ",
        action="append",
        default=[],
        help="a requirement for every environment, such as flax==0.12.6; repeatable",
    )
    parser.add_argument(
        "--class",
        dest="kind",
        choices=KINDS,
        help="find the first difference of this class; default: any that the policy rejects",
    )
    add_report_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Bisect, report and return the exit status."""
    from bnverify.report import formats
    from bnverify.upgrade.bisect import bisect

    project = project_directory(args)
    policy = arguments.settle(args, file=args.policy)
    outputs = arguments.outputs(args)
    with arguments.lines(args) as progress:
        found = bisect(
            args.target,
            args.package,
            _version(args.old, args.package),
            _version(args.new, args.package),
            policy,
            extra=args.extra,
            kind=args.kind,
            project=project,
            seed=args.seed,
            time_limit=args.time_limit,
            progress=progress,
        )
    if found is None:
        what = f"{args.kind} difference" if args.kind else "difference that the policy rejects"
        print(f"no {what} between {args.package} {args.old} and {args.new}")
        return 0
    assert found.first.judgement is not None
    if any(each.format == "terminal" and each.file is None for each in outputs):
        _print(found)
    formats.write([found.first.judgement], outputs, arguments.verbosity(args))
    return 1


def _version(text: str, package: str) -> str:
    """Return the version in ``0.9.2`` or ``jax==0.9.2``."""
    name, sign, version = text.rpartition("==")
    from packaging.version import InvalidVersion, Version

    wrong = UsageError(f"--from and --to must be versions of {package}, got {text!r}")
    if sign and name.strip() != package:
        raise wrong
    try:
        Version(version)
    except InvalidVersion:
        raise wrong from None
    return version.strip()


def _print(found: Bisection) -> None:
    count = len(found.releases)
    print(f"{found.package}: {count} releases, {len(found.tried)} compared with the oldest")
    for trial in found.tried:
        print(f"  {trial.version:12} {_outcome(trial)}")
    print(f"unchanged up to {found.last}, changed since {found.first.version}")
    if found.between:
        print(f"unavailable between them: {', '.join(found.between)}")
    print()


def _outcome(trial: Trial) -> str:
    if trial.judgement is None:
        return f"unavailable: {' '.join(trial.why.split())[:160]}"
    word = "changed" if trial.changed else "unchanged"
    versions = trial.judgement.comparison.new["versions"]
    named = ", ".join(f"{name} {versions[name]}" for name in ("jax", "flax", "optax"))
    return f"{word}: {trial.judgement.headline()} ({named})"
