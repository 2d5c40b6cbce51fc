"""``bnverify gate``: does an upgrade of jax, flax or optax change the training step?"""

from __future__ import annotations

import argparse
import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bnverify import target
from bnverify.commands.compare import add_report_arguments, read_policy
from bnverify.unusable import Unusable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_REQUIREMENT = "a requirements file, a list as jax==0.9.2,flax==0.12.6, installed, or latest"


def add_parser(subparsers: Any) -> None:
    """Add the command's parser."""
    parser = subparsers.add_parser(
        "gate",
        help="say what an upgrade of jax, flax or optax does to a training step",
        description="Make two environments, record the step in one, replay it in the other, and "
        "say what changed. Exit status 1 if the policy forbids it.",
    )
    add_upgrade_arguments(parser)
    add_report_arguments(parser)


def add_upgrade_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what the gate and the bisection both take."""
    parser.add_argument(
        "target",
        metavar="TARGET",
        nargs="?",
        default=target.REFERENCE,
        help="package.module:name or path/file.py:name; default: the reference",
    )
    parser.add_argument(
        "--from", dest="old", metavar="REQ", required=True, help=f"the old releases: {_REQUIREMENT}"
    )
    parser.add_argument("--to", dest="new", metavar="REQ", required=True, help="the new releases")
    parser.add_argument(
        "--project",
        metavar="DIR",
        help="the project to install with both; default: the one that TARGET lies in",
    )
    parser.add_argument(
        "--seed", metavar="N", type=int, default=0, help="the seed of all cases; default: 0"
    )
    parser.add_argument(
        "--time-limit",
        metavar="S",
        type=float,
        default=1800.0,
        help="seconds that one recording may take; default: 1800",
    )


def check_upgrade_arguments(args: argparse.Namespace) -> Path | None:
    """Refuse impossible arguments, and return the project's directory.

    Raises:
        Unusable: naming the argument.
    """
    if args.seed < 0:
        raise Unusable(f"--seed must be at least 0, got {args.seed}")
    if not args.time_limit > 0:
        raise Unusable(f"--time-limit must be more than 0 seconds, got {args.time_limit}")
    if args.project is None:
        return None
    project = Path(args.project).resolve()
    if not project.is_dir():
        raise Unusable(f"--project {args.project} is not a directory")
    return project


@contextlib.contextmanager
def progress() -> Iterator[Callable[[str], None]]:
    """Yield what to tell of progress: one line on standard error, where that is a terminal."""
    terminal = sys.stderr.isatty()

    def tell(doing: str) -> None:
        if terminal:
            sys.stderr.write(f"\r\033[K{doing} ...")
            sys.stderr.flush()

    try:
        yield tell
    finally:
        if terminal:
            sys.stderr.write("\r\033[K")


def run(args: argparse.Namespace) -> int:
    """Judge the upgrade, report and return the exit status."""
    from bnverify.show import formats
    from bnverify.upgrade.gate import gate

    project = check_upgrade_arguments(args)
    outputs = formats.parse(args.format)
    policy = read_policy(args.policy)
    with progress() as tell:
        judgement = gate(
            args.target,
            args.old,
            args.new,
            policy,
            project=project,
            seed=args.seed,
            time_limit=args.time_limit,
            tell=tell,
        )
    formats.write([judgement], outputs)
    return 0 if judgement.ok else 1
