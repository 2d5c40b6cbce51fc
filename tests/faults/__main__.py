"""Check the faults of the catalogue against the laws; run it from the root of the checkout.

    python -m tests.faults --profile quick
    python -m tests.faults --shard 1/2 --json one.json
    python -m tests.faults --read one.json two.json

Prints a matrix with a row for each fault and a column for each law that detects at least one; the number of
faults that each law detects, and those that no other law detects; and the surviving faults, with the reason.
The exit status is 1 if a fault survives without a reason, or if a law no longer detects a fault that it
detected in every earlier audit. ``--learn`` stores the results in ``tests/faults/expected.json`` for later
audits.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # all results are about the CPU backend

from bnverify.errors import UsageError, did_you_mean
from bnverify.profile import PROFILES, Shard
from tests.faults import FAULTS, Fault, audit


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command."""
    description, _, rest = (__doc__ or "").partition("\n")
    found = argparse.ArgumentParser(
        "python -m tests.faults",
        description=description,
        epilog=rest,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    found.add_argument("--select", metavar="NAME", nargs="+", help="only these faults or families")
    found.add_argument(
        "--profile", choices=PROFILES, default="ci", help="how much to do; default: ci"
    )
    found.add_argument("--seed", type=int, default=0, help="the seed of all cases; default: 0")
    found.add_argument("--shard", metavar="K/N", help="only the K-th of N parts of the faults")
    found.add_argument(
        "--read",
        metavar="FILE",
        type=Path,
        nargs="+",
        help="check nothing; show files written by --json",
    )
    found.add_argument("--json", metavar="FILE", type=Path, help="write the findings to FILE")
    found.add_argument("--picture", metavar="FILE", type=Path, help="draw the matrix as SVG")
    found.add_argument("--learn", action="store_true", help="store the results for later audits")
    return found


def chosen(names: Sequence[str] | None, shard: str | None) -> list[Fault]:
    """Return the faults to check.

    Raises:
        UsageError: there is no fault of a name, or no fault is left.
    """
    known = {*FAULTS, *(fault.family for fault in FAULTS.values())}
    for name in names or ():
        if name not in known:
            raise UsageError(f"no fault or family is named {name!r}{did_you_mean(name, known)}")
    found = [f for f in FAULTS.values() if names is None or {f.name, f.family} & set(names)]
    found = Shard.parse(shard).take(found) if shard else found
    if not found:
        raise UsageError("no fault is left to audit")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return the exit status."""
    options = parser().parse_args(arguments)
    try:
        if options.read:
            texts = [file.read_text(encoding="utf-8") for file in options.read]
            found = audit.Audit.from_json(texts)
        else:
            faults = chosen(options.select, options.shard)
            done = iter(range(1, len(faults) + 1))

            def tell(finding: audit.Finding) -> None:
                what = "noticed" if finding.killed else "missed"
                told = f"{next(done)}/{len(faults)} {finding.fault}: {what}"
                print(told, file=sys.stderr, flush=True)

            found = audit.audit(faults, options.profile, seed=options.seed, listener=tell)
            texts = [found.to_json()]
        print(audit.text(found), end="")
        if options.json:
            options.json.write_text(found.to_json(), encoding="utf-8")
        if options.picture:
            options.picture.write_text(audit.picture(found), encoding="utf-8")
    except (UsageError, OSError) as error:
        parser().error(str(error))
    if options.learn:
        audit.learn(texts)
    return 0 if found.ok else 1


if __name__ == "__main__":
    sys.exit(main())
