"""Recording a training step: its cases, its states, everything that comes out, how far it rounds.

    python -m bnverify.upgrade.recording TARGET -o FILE [--replay OLD]

Cases are drawn by NumPy from a seed, the same everywhere. A first recording starts each case from
the state that ``init`` makes and goes on for a few steps. A replay, in another environment, takes
the cases *and the state before every step* from the old recording: so a changed random stream is
told apart from a changed step, and an error made in one step is not carried into the next. It
records what its own ``init`` makes of the same seeds beside.

Needs jax, flax, optax and NumPy alone: Python 3.10 and jax 0.4.13 do. Where the laws can run they are
recorded too.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bnverify import target as targets
from bnverify.compile_cache import machine
from bnverify.lifetime.checkpoint import subject_of
from bnverify.neighbours import importable
from bnverify.unusable import Unusable
from bnverify.upgrade import recorded, recording_file
from bnverify.upgrade.recorder import Recorder, flags

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bnverify.upgrade.recorded import Recorded

PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")


def versions() -> dict[str, str]:
    """Return the versions that a step depends on."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "unknown"
    return found


def record(
    target: str,
    *,
    seed: int = 0,
    old: Recorded | None = None,
    costs: bool = False,
    laws: bool = True,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the manifest and the arrays of a recording, for ``recording_file.write``.

    Args:
        target: as on the command line; see ``bnverify.target.load``.
        seed: from which the cases are drawn; a replay takes the old one's.
        old: the recording to replay. What fails in a replay is part of it.
        costs: whether to measure times: they make every recording another.
        laws: whether to judge the laws where they can be.

    Raises:
        Unusable: the target cannot be loaded or does not run.
    """
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # every claim is about the CPU backend
    if old is not None:
        seed = old.manifest["seed"]
    made: Recorder | None = None
    name, errors = target, {}
    with importable(targets.directory(target)):
        try:
            subject = subject_of(targets.load(target))
        except Unusable as error:
            if old is None:
                raise
            name, errors = old.manifest["subject"], {"target": str(error)}
        else:
            name = subject.name
            made = Recorder(subject, seed, old, costs=costs, laws=laws)
            made.make()
            errors = made.errors
    if errors and old is None:
        function, message = next(iter(errors.items()))
        raise Unusable(f"{target}: {function} raises {message}")
    manifest = {
        "content": recorded.VERSION,
        "bnverify": _own_version(),
        "target": target,
        "subject": name,
        "seed": seed,
        "cases": made.cases if made else 0,
        "steps": made.steps if made and not errors else 0,
        "shapes": made.shapes if made and not errors else [],
        "trees": made.trees if made and not errors else [],
        "versions": versions(),
        "python": platform.python_version(),
        "machine": machine(),
        "flags": flags(),
        "errors": errors,
        "laws": made.laws if made else {},
        "influence": made.influence if made else {},
        "costs": made.costs if made else {},
        "notes": made.notes if made else [],
        "replays": old.digest if old else "",
    }
    return manifest, made.arrays if made and not errors else {}


def _own_version() -> str:
    try:
        return metadata.version("bnverify")
    except metadata.PackageNotFoundError:  # run from a source tree
        return "unknown"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that ``bnverify record`` and this module's own command share."""
    parser.add_argument(
        "target",
        metavar="TARGET",
        nargs="?",
        default=targets.REFERENCE,
        help="package.module:name or path/file.py:name; default: the reference",
    )
    parser.add_argument("-o", "--output", metavar="FILE", required=True, help="the recording")
    parser.add_argument(
        "--replay", metavar="OLD", help="a recording to run again here, from its states"
    )
    parser.add_argument(
        "--seed", metavar="N", type=int, default=0, help="the seed of all cases; default: 0"
    )
    parser.add_argument(
        "--costs", action="store_true", help="measure times; every recording is another then"
    )
    parser.add_argument("--no-laws", action="store_true", help="leave the laws' verdicts out")


def run(args: argparse.Namespace) -> int:
    """Make the recording that the arguments ask for, and return the exit status."""
    if args.seed < 0:
        raise Unusable(f"--seed must be at least 0, got {args.seed}")
    if not Path(args.output).resolve().parent.is_dir():
        raise Unusable(f"--output {args.output} cannot be written: no such directory")
    try:
        old = recorded.read(args.replay) if args.replay else None
        manifest, arrays = record(
            args.target, seed=args.seed, old=old, costs=args.costs, laws=not args.no_laws
        )
        recording_file.write(args.output, manifest, arrays)
    except recording_file.RecordingError as error:
        raise Unusable(str(error)) from None
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Record, as ``python -m bnverify.upgrade.recording``: without the other commands' imports."""
    parser = argparse.ArgumentParser(prog="python -m bnverify.upgrade.recording")
    add_arguments(parser)
    try:
        return run(parser.parse_args(argv))
    except Unusable as error:
        sys.stderr.write(f"bnverify: {error}\n")
        return 2


if __name__ == "__main__":
    raise SystemExit(main())
