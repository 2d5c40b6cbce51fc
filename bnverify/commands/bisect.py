"""``bnverify bisect``: since which release of a package does a training step differ?"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from bnverify import arguments
from bnverify.commands.compare import add_report_arguments
from bnverify.commands.gate import add_upgrade_arguments, project_directory
from bnverify.errors import UsageError
from bnverify.upgrade.policy import KINDS

if TYPE_CHECKING:
    from bnverify.upgrade.bisect import Found, Tried


def add_parser(subparsers: Any) -> None:
    """Add the command's parser."""
    parser = subparsers.add_parser(
        "bisect",
        help="find the release of a package that changed a training step",
        description="Find the first release of a package between two versions that changes the "
        "gate's verdict, in as few environments as possible. Exit status 1 where there is one.",
    )
    add_upgrade_arguments(parser)
    parser.add_argument(
        "--package", metavar="NAME", required=True, help="the package whose releases are tried"
    )
    parser.add_argument(
        "--with",
        dest="beside",
        metavar="REQ",
        action="append",
        default=[],
        help="a requirement to hold, as flax==0.12.6; repeatable",
    )
    parser.add_argument(
        "--class",
        dest="kind",
        choices=KINDS,
        help="find the first difference of this class; default: whatever the policy forbids",
    )
    add_report_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Bisect, report and return the exit status."""
    from bnverify.report import formats
    from bnverify.upgrade.bisect import bisect

    project = project_directory(args)
    policy = arguments.settle(args, file=args.policy)
    outputs = arguments.outputs(args)
    with arguments.lines(args) as tell:
        found = bisect(
            args.target,
            args.package,
            _version(args.old, args.package),
            _version(args.new, args.package),
            policy,
            beside=args.beside,
            kind=args.kind,
            project=project,
            seed=args.seed,
            time_limit=args.time_limit,
            tell=tell,
        )
    if found is None:
        print(f"{args.package} {args.new} changes nothing that was asked for")
        return 0
    assert found.first.judgement is not None
    if any(each.format == "terminal" and each.file is None for each in outputs):
        _tell(found)
    formats.write([found.first.judgement], outputs, arguments.verbosity(args))
    return 1


def _version(text: str, package: str) -> str:
    """Return the version in ``0.9.2`` or ``jax==0.9.2``."""
    name, sign, version = text.rpartition("==")
    from packaging.version import InvalidVersion, Version

    wrong = UsageError(f"give --from and --to as versions of {package}, got {text!r}")
    if sign and name.strip() != package:
        raise wrong
    try:
        Version(version)
    except InvalidVersion:
        raise wrong from None
    return version.strip()


def _tell(found: Found) -> None:
    count = len(found.releases)
    print(f"{found.package}: {count} releases, {len(found.tried)} tried beside the oldest")
    for tried in found.tried:
        print(f"  {tried.version:12} {_outcome(tried)}")
    print(f"unchanged up to {found.last}, changed from {found.first.version} on")
    if found.between:
        print(f"unavailable between them: {', '.join(found.between)}")
    print()


def _outcome(tried: Tried) -> str:
    if tried.judgement is None:
        return f"passed over: {' '.join(tried.why.split())[:160]}"
    word = "changed" if tried.changed else "unchanged"
    versions = tried.judgement.comparison.new["versions"]
    beside = ", ".join(f"{name} {versions[name]}" for name in ("jax", "flax", "optax"))
    return f"{word}: {tried.judgement.headline()} ({beside})"
