"""Over the catalogue of faults: how often is the mistake that is named first the fault's own?

    python -m benchmarks.naming                      from the recorded evidence, in a second
    python -m benchmarks.naming --run other.jsonl    record anew: checks every fault, some minutes

Run it from the root of the checkout. The evidence of a fault is a line of JSON: the laws that it
breaks, what can reach what in its step, and what the numbers of its violations say
(``bnverify.clues``). A recording that was interrupted goes on where it stopped: faults that are in the
file already are left as they are. Where a line says that a fault was not "checked", its broken laws are
those of ``expected.json`` and only general cases were read; a recording checks it, and the later of two
lines counts. Faults that no law notices, and those that JAX or Flax refuses, have no name to be right
or wrong. Exit status 1 below 90 %.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from bnverify.check import Check
from bnverify.diagnose import Findings, causes, findings_of
from bnverify.errors import first_line
from tests.faults import FAULTS, Fault

RECORDED = Path(__file__).with_name("naming.jsonl")
REQUIRED = 0.9

Evidence = Mapping[str, Any]
"""One line of the file."""


def read(path: Path) -> dict[str, Evidence]:
    """Return fault -> its evidence."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return {line["fault"]: line for line in map(json.loads, lines)}


def checked(fault: Fault, profile: str) -> Evidence:
    """Return the evidence of one fault.

    Raises:
        Exception: whatever the check raises over a fault that need not be refused.
    """
    try:
        check = Check(fault.make(), profile, ignore=("life", "parallel"))
        report = check.run()
    except Exception as error:
        if fault.raises not in {kind.__name__ for kind in type(error).__mro__}:
            raise
        return {"fault": fault.name, "refused": first_line(error)}
    # As before it was diagnosed: what has a diagnosis is not asked about again.
    results = [replace(each, cause=None) for each in report.results]
    known = findings_of(results, report.influence)
    return {
        "fault": fault.name,
        "broken": known.broken,
        "flows": known.flows,
        "clues": known.clues,
    }


def record(path: Path, profile: str) -> None:
    """Check the faults that are not in the file, and add a line for each."""
    known = {fault for fault, line in read(path).items() if line.get("checked", True)}
    for fault in (each for each in FAULTS.values() if each.name not in known):
        started = time.perf_counter()
        line = json.dumps(checked(fault, profile))
        with path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        print(f"{fault.name}, {time.perf_counter() - started:.0f} s", flush=True)


def named(evidence: Evidence) -> str:
    """Return the mistake that a report names first: at the first broken law; "" where none is."""
    if not evidence.get("broken"):
        return ""
    known = Findings(tuple(evidence["broken"]), evidence["flows"], evidence["clues"])
    return causes(known)[known.broken[0]].mistake


def misnamed(lines: Mapping[str, Evidence]) -> dict[str, str]:
    """Return fault -> the mistake that is named first, of those that are not called by their own."""
    names = {fault: named(line) for fault, line in lines.items() if fault in FAULTS}
    return {f: name for f, name in names.items() if name and name != FAULTS[f].mistake}


def lost(lines: Mapping[str, Evidence]) -> dict[str, list[str]]:
    """Return fault -> the laws that are expected to notice it and did not."""
    found = {
        fault: [law for law in FAULTS[fault].expected if law not in line["broken"]]
        for fault, line in lines.items()
        if fault in FAULTS and "broken" in line and line.get("checked", True)
    }
    return {fault: laws for fault, laws in found.items() if laws}


def main() -> int:
    """Print how often the first name is right, and where it is not; return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--run", metavar="FILE", type=Path, help="record into FILE, and read that")
    parser.add_argument("--profile", default="quick", help="how much to check; default: quick")
    options = parser.parse_args()
    path = options.run or RECORDED
    if options.run:
        record(path, options.profile)
    lines = read(path)
    noticed = [fault for fault, line in lines.items() if fault in FAULTS and line.get("broken")]
    wrong = misnamed(lines)
    for fault, name in wrong.items():
        print(f"{fault}: {FAULTS[fault].mistake}, named {name}")
    for fault, laws in lost(lines).items():
        print(f"{fault}: no longer noticed by {', '.join(laws)}")
    counts = Counter(FAULTS[fault].mistake for fault in noticed)
    right = len(noticed) - len(wrong)
    print(
        f"{right} of {len(noticed)} faults ({right / len(noticed):.1%}), of {len(counts)} mistakes, are "
        f"first called by their own; {len(lines) - len(noticed)} more break no law or are refused, "
        f"{len(FAULTS) - len(lines)} are not recorded"
    )
    return 0 if right >= REQUIRED * len(noticed) else 1


if __name__ == "__main__":
    sys.exit(main())
