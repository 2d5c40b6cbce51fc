"""Options that several commands share, and their defaults from the project's configuration file.

Importing this module reads no file and imports nothing heavy.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from bnverify import target
from bnverify.profile import PROFILES
from bnverify.report.formats import FORMATS, Output, parse

if TYPE_CHECKING:
    from collections.abc import Callable

    from bnverify.upgrade.policy import Policy


# Values.


def whole(text: str) -> int:
    """Parse a whole number of at least 0."""
    number = int(text) if text.strip().lstrip("+-").isdecimal() else -1
    if number < 0:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 0, got {text!r}")
    return number


def seconds(text: str) -> float:
    """Parse a number of seconds greater than 0; "inf" means no limit."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not number > 0:
        raise argparse.ArgumentTypeError(f"must be more than 0 seconds, got {text!r}")
    return number


def names(given: Sequence[str] | str) -> list[str]:
    """Return the names in an option that may be repeated and may list several, separated by commas."""
    texts = [given] if isinstance(given, str) else given
    return [name.strip() for text in texts for name in text.split(",") if name.strip()]


# Options.


def add_target(parser: argparse.ArgumentParser) -> None:
    """Add the TARGET argument."""
    parser.add_argument(
        "target",
        metavar="TARGET",
        nargs="?",
        help="package.module:name or path/file.py:name of a Subject, a function that returns one, or "
        "a function of (seed, x_batch, y_batch, lr); default: bnverify's reference step",
    )


def add_profile(parser: argparse.ArgumentParser) -> None:
    """Add ``--profile``."""
    parser.add_argument("--profile", choices=list(PROFILES), help="how much to do; default: ci")


def add_seed(parser: argparse.ArgumentParser) -> None:
    """Add ``--seed``."""
    parser.add_argument(
        "--seed", metavar="N", type=whole, default=0, help="the seed of all cases; default: 0"
    )


def add_time_limit(parser: argparse.ArgumentParser, default: float, what: str) -> None:
    """Add ``--time-limit``, in seconds."""
    parser.add_argument(
        "--time-limit",
        metavar="S",
        type=seconds,
        default=default,
        help=f"seconds that {what} may take; default: {default:g}",
    )


def add_report(parser: argparse.ArgumentParser) -> None:
    """Add ``--format``, ``--output``, ``--json``, ``--verbose`` and ``--quiet``."""
    parser.add_argument(
        "--format",
        metavar="FORMAT[=FILE]",
        action="append",
        default=[],
        help=f"{', '.join(FORMATS)}; default: terminal; may be repeated, each with a FILE",
    )
    parser.add_argument(
        "-o", "--output", metavar="FILE", help="write the report to FILE, not to standard output"
    )
    parser.add_argument(
        "--json", metavar="FILE", help="also write the report to FILE as JSON; - is standard output"
    )
    more = parser.add_mutually_exclusive_group()
    more.add_argument(
        "-v", "--verbose", action="store_true", help="print everything, not only what is wrong"
    )
    more.add_argument("-q", "--quiet", action="store_true", help="print only the verdict")


# Applying them.


def settle(args: argparse.Namespace, *, file: str | None = None) -> Policy:
    """Return the project's configuration, and fill in its defaults for missing arguments.

    Args:
        args: the parsed arguments, changed in place.
        file: the configuration file; None: bnverify.toml or pyproject.toml of the current
            directory, if there is one.

    Raises:
        UsageError: the file cannot be used.
    """
    from bnverify.upgrade import policy

    found = policy.load(Path(file)) if file else policy.find(Path.cwd())
    if hasattr(args, "target") and args.target is None:
        args.target = found.target or target.REFERENCE
    if hasattr(args, "profile") and args.profile is None:
        args.profile = found.profile or "ci"
    for name in ("select", "ignore", "format"):
        if not getattr(args, name, True):
            setattr(args, name, names(getattr(found, name)))
    return found


def outputs(args: argparse.Namespace) -> list[Output]:
    """Return the outputs of the report: each a format and a file, or standard output.

    Raises:
        UsageError: a format is unknown, a file cannot be written, or two go to standard output.
    """
    return parse(args.format, output=args.output, json=args.json)


def verbosity(args: argparse.Namespace) -> int:
    """Return the verbosity for the renderers: -1 quiet, 0 normal, 1 verbose."""
    return int(args.verbose) - int(args.quiet)


@contextmanager
def lines(args: argparse.Namespace) -> Iterator[Callable[[str], None]]:
    """Yield a function that reports progress: one line on standard error, rewritten on a terminal."""
    terminal = sys.stderr.isatty()

    def tell(doing: str) -> None:
        if not getattr(args, "quiet", False):
            sys.stderr.write(f"\r\033[K{doing} ..." if terminal else f"{doing}\n")
            sys.stderr.flush()

    try:
        yield tell
    finally:
        if terminal:
            sys.stderr.write("\r\033[K")
