"""``bnverify gate``: check whether an upgrade of jax, flax or optax changes the training step."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from bnverify import arguments
from bnverify.commands.compare import add_report_arguments
from bnverify.errors import UsageError

_REQUIREMENT = "a requirements file, a list such as jax==0.9.2,flax==0.12.6, installed, or latest"


def add_parser(subparsers: Any) -> None:
    """Add the command's parser."""
    parser = subparsers.add_parser(
        "gate",
        help="report what an upgrade of jax, flax or optax does to a training step",
        description="Create two environments, record the step in one, replay it in the other, and "
        "report what changed. Exit status 1 if the policy rejects it.",
    )
    add_upgrade_arguments(parser)
    add_report_arguments(parser)


def add_upgrade_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments shared by gate and bisect."""
    arguments.add_target(parser)
    parser.add_argument(
        "--from", dest="old", metavar="REQ", required=True, help=f"the old releases: {_REQUIREMENT}"
    )
    parser.add_argument("--to", dest="new", metavar="REQ", required=True, help="the new releases")
    parser.add_argument(
        "--project",
        metavar="DIR",
        help="the project to install in both; default: the one that contains TARGET",
    )
    arguments.add_seed(parser)
    arguments.add_time_limit(parser, 1800.0, "one recording")


def project_directory(args: argparse.Namespace) -> Path | None:
    """Return the directory given by ``--project``, or None.

    Raises:
        UsageError: it is not a directory.
    """
    if args.project is None:
        return None
    project = Path(args.project).resolve()
    if not project.is_dir():
        raise UsageError(f"--project {args.project} is not a directory")
    return project


def run(args: argparse.Namespace) -> int:
    """Judge the upgrade, report and return the exit status."""
    from bnverify.report import formats
    from bnverify.upgrade.gate import gate

    project = project_directory(args)
    policy = arguments.settle(args, file=args.policy)
    outputs = arguments.outputs(args)
    with arguments.lines(args) as progress:
        judgement = gate(
            args.target,
            args.old,
            args.new,
            policy,
            project=project,
            seed=args.seed,
            time_limit=args.time_limit,
            progress=progress,
        )
    formats.write([judgement], outputs, arguments.verbosity(args))
    return 0 if judgement.ok else 1
