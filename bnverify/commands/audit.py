"""``bnverify audit``: which faults the laws notice, or a user's own tests would miss."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from bnverify import arguments
from bnverify.errors import UsageError, did_you_mean
from bnverify.report import formats
from bnverify.shard import Shard

if TYPE_CHECKING:
    from bnverify.mutants.audit import Audit
    from bnverify.mutants.catalogue import Mutant
    from bnverify.mutants.transplant import Transplant
    from bnverify.mutants.users_tests import TestsAudit

T = TypeVar("T")


def add_parser(subparsers: Any) -> None:
    """Add the command's parser."""
    parser = subparsers.add_parser(
        "audit",
        help="find the faults that the laws, or your own tests, would miss",
        description="Check that the laws notice every fault of the catalogue; with --tests, run your "
        "own tests once for each fault, inserted into your own step at import.",
    )
    parser.add_argument(
        "--select",
        dest="faults",  # not "select", which a project's settings use for laws
        metavar="NAME",
        action="append",
        default=[],
        help="only this fault or family; for several use commas or repeat the option",
    )
    arguments.add_profile(parser)
    arguments.add_seed(parser)
    arguments.add_report(parser)
    parser.add_argument("--shard", metavar="K/N", help="only part K of N of the faults")
    parser.add_argument("--picture", metavar="FILE", help="write the matrix to FILE as SVG")
    parser.add_argument(
        "--tests", metavar="CMD", help="a command that runs your tests, such as 'pytest my_tests'"
    )
    parser.add_argument(
        "--target",
        metavar="T",
        action="append",
        default=[],
        dest="targets",
        help="with --tests: module:name or path/file.py:name of your step, evaluation, or "
        "bnverify.Subject; repeatable",
    )


def run(args: argparse.Namespace) -> int:
    """Audit, report, and return 1 if a fault was missed, else 0."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # all results are about the CPU backend
    arguments.settle(args)
    if args.tests is None and args.targets:
        raise UsageError("--target needs --tests: it says where in your code the faults go")
    return _users_tests(args) if args.tests is not None else _catalogue(args)


def _catalogue(args: argparse.Namespace) -> int:
    from bnverify.mutants import MUTANTS, audit
    from bnverify.report import audit as screen

    families = {mutant.family for mutant in MUTANTS.values()}
    names = _names(args.faults, {*MUTANTS, *families})
    chosen = [m for m in MUTANTS.values() if not names or {m.name, m.family} & set(names)]
    mine = _mine(args, chosen)
    if not mine:
        raise UsageError("no fault is left to audit; widen --select or --shard")
    outputs = arguments.outputs(args)
    found: Audit = audit.audit(
        mine,
        args.profile,
        seed=args.seed,
        listener=None if args.quiet else screen.progress(len(mine)),
    )
    _write(args, outputs, found, chosen)
    if args.picture:
        formats.save(Path(args.picture), screen.draw(found), "--picture")
    return 1 if found.unexplained or found.lost else 0


def _users_tests(args: argparse.Namespace) -> int:
    from bnverify.mutants.transplant import TRANSPLANTS
    from bnverify.mutants.users_tests import audit_tests
    from bnverify.report import audit as screen

    if not args.targets:
        raise UsageError("--tests needs --target: where in your code the faults go")
    for target in args.targets:
        if ":" not in target:
            raise UsageError(f"--target {target!r} is not module:name or path/file.py:name")
    names = _names(args.faults, TRANSPLANTS)
    chosen = [fault for name, fault in TRANSPLANTS.items() if not names or name in names]
    mine = _mine(args, chosen)
    if args.picture:
        raise UsageError("--picture cannot be used with --tests: it draws faults and laws")
    outputs = arguments.outputs(args)
    found: TestsAudit = audit_tests(
        args.tests,
        args.targets,
        mine,
        listener=None if args.quiet else screen.tests_progress(len(mine)),
    )
    _write(args, outputs, found, chosen)
    return 1 if found.of("missed") else 0


def _mine(args: argparse.Namespace, faults: list[T]) -> list[T]:
    """Return the part of the faults that belongs to ``--shard``."""
    return Shard.parse(args.shard).take(faults) if args.shard else faults


def _write(
    args: argparse.Namespace,
    outputs: Sequence[formats.Output],
    found: Audit | TestsAudit,
    faults: Sequence[Mutant | Transplant],
) -> None:
    """Write the findings; the JSON of a shard includes what `bnverify merge` needs."""
    text = found.to_json()
    if args.shard:
        from bnverify.check import versions

        text = Shard.parse(args.shard).stamp(
            text,
            [fault.name for fault in faults],
            versions=versions(),
            profile=args.profile,
            seed=args.seed,
        )
    formats.write([found], outputs, arguments.verbosity(args), json=text)


def _names(given: Sequence[str], known: Any) -> list[str]:
    names = arguments.names(given)
    for name in names:
        if name not in known:
            raise UsageError(f"no fault is named {name!r}{did_you_mean(name, known)}")
    return names
