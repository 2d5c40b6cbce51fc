"""How long a user waits for the first counterexample: faults of the catalogue, a process for each.

    python -m benchmarks.first_counterexample --every 5

Run it from the root of the checkout. Each process is `bnverify check --fail-fast` on one fault, from
its start to its end: imports, proofs, compiling and simplifying included. A line for each fault that a
law finds: the seconds, the law, and the case; then the median. The cache of compiled programs is the
user's own, so that a second run is a warm one.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.faults import FAULTS, Fault

ROOT = Path(__file__).resolve().parent.parent
SOURCE = "from tests.faults import FAULTS\n\nwrong = FAULTS[{name!r}].make\n"


def first(fault: Fault, folder: Path) -> tuple[float, dict[str, Any] | None]:
    """Return the seconds of a check that stops at a violation, and that violation; None: no law's."""
    (folder / "step.py").write_text(SOURCE.format(name=fault.name))
    command = ["check", "step.py:wrong", "--fail-fast", "--json", "report.json"]
    report = folder / "report.json"
    report.unlink(missing_ok=True)
    began = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "bnverify", *command],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        check=False,
    )
    seconds = time.perf_counter() - began
    results = json.loads(report.read_text())["results"] if report.exists() else []
    return seconds, next((each for each in results if each["status"] == "violated"), None)


def main() -> int:
    """Run and print; return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--every", type=int, default=1, help="one fault in so many")
    options = parser.parse_args()
    waited = []
    with tempfile.TemporaryDirectory() as folder:
        for fault in list(FAULTS.values())[:: options.every]:
            if fault.survives or fault.tolerated or fault.raises:
                continue  # there is no counterexample to wait for
            seconds, violation = first(fault, Path(folder))
            said = "nothing found"
            if violation is not None:
                waited.append(seconds)
                case = re.search(r"Case\.of\(.*\)", violation["counterexample"] or "")
                said = f"{violation['law']} {case[0] if case else 'by proof'}"
            print(f"{seconds:5.1f} s  {fault.name}: {said}", flush=True)
    median = f": {statistics.median(waited):.1f} s" if waited else ""
    print(f"median of {len(waited)} faults{median}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
