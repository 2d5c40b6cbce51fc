"""The command line. It imports jax and Hypothesis only when a command needs them.

Exit status: 0 all laws hold, 1 a law is violated, 2 the command or its target cannot be used, 3 an
internal error, 130 interrupted, 141 the reader of the output has closed the pipe.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Any, NoReturn

from bnverify import __version__, commands
from bnverify.errors import UsageError, first_line

INTERRUPTED = 130  # 128 + SIGINT, as shells report it
UNREAD = 141  # 128 + SIGPIPE
SHELLS = ("bash", "zsh", "tcsh")


class Parser(argparse.ArgumentParser):
    """An argument parser that reports errors in one line."""

    def error(self, message: str) -> NoReturn:
        """Raise a UsageError."""
        raise UsageError(f"{message} (see {self.prog} --help)")


class PrintCompletion(argparse.Action):
    """Prints the completion script for a shell and exits."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> NoReturn:
        """Print the script for the shell in ``values``."""
        import shtab

        print(shtab.complete(parser, shell=values))
        parser.exit()


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status.

    Args:
        argv: the arguments; None: ``sys.argv[1:]``.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # characters that the terminal lacks become "?"
            stream.reconfigure(errors="replace")
    try:
        args = build_parser().parse_args(argv)
        status: int = args.run(args)
        sys.stdout.flush()
    except UsageError as error:
        return _say(f"bnverify: {error}", 2)
    except KeyboardInterrupt:
        return _say("bnverify: interrupted", INTERRUPTED)
    except BrokenPipeError:
        # Python flushes stdout again at exit, which would fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return UNREAD
    except Exception as error:  # noqa: BLE001 - any other error is an internal one
        where = _keep_traceback()
        return _say(f"bnverify: internal error: {first_line(error)}; traceback in {where}", 3)
    return status


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands; see :mod:`bnverify.commands`."""
    parser = Parser(
        prog="bnverify",
        description="Verify training steps that split params from batch_stats.",
        epilog="exit status: 0 all laws hold, 1 a law is violated, 2 the command or target cannot be "
        "used, 3 internal error",
    )
    parser.add_argument("--version", action="version", version=f"bnverify {__version__}")
    parser.add_argument(
        "--print-completion",
        action=PrintCompletion,
        choices=SHELLS,
        help="print the completion script for this shell, and exit",
    )
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for module in iter_modules(commands.__path__):
        command = import_module(f"{commands.__name__}.{module.name}")
        command.add_parser(subparsers)
        subparsers.choices[module.name].set_defaults(run=command.run)
    return parser


def _say(message: str, status: int) -> int:
    print(" ".join(message.split()), file=sys.stderr)
    return status


def _keep_traceback() -> Path:
    from bnverify.compile_cache import cache_root

    text = traceback.format_exc()
    name = f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.txt"
    for folder in (cache_root() / "errors", Path(tempfile.gettempdir())):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text, encoding="utf-8")
        except OSError:
            continue
        return folder / name
    return Path(os.devnull)
