"""Where ``--json FILE`` and its kin end up."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from bnverify.unusable import Unusable, cause


def check_writable(file: str | None) -> None:
    """Refuse a file that cannot be written before an hour of checking, not after.

    Args:
        file: what ``--json`` was given; None: nothing.

    Raises:
        Unusable: it is a directory, or lies in none that can be written to.
    """
    if file in {None, "-"}:
        return
    assert file is not None
    path = Path(file)
    if path.is_dir():
        raise Unusable(f"--json {file} is a directory")
    if not os.access(path.parent, os.W_OK):
        raise Unusable(f"--json {file} cannot be written: no such directory, or not yours")


def write(file: str | None, text: str, option: str = "--json") -> None:
    """Write ``text``, whole or not at all.

    Args:
        file: where; "-": standard output; None: nowhere.
        text: what.
        option: where the file was named.

    Raises:
        Unusable: it cannot be written.
    """
    if file == "-":
        sys.stdout.write(text)
    elif file is not None:
        from bnverify import atomic_file

        try:
            atomic_file.write(Path(file), text.encode())
        except OSError as error:
            raise Unusable(f"{option} {file} cannot be written: {cause(error)}") from None
