"""Kill the gate at random moments, run it again, and look for what it left.

    python benchmarks/killed_gate.py --from pins/jax-0.4.38.txt --to pins/jax-0.10.2.txt

Each time from an empty cache: the gate is started, killed with SIGKILL at a moment drawn between its
start and the seconds that a whole run took, and run again to its end. Checked: no process goes on;
the second run gives the verdict of a run that nobody disturbed; nothing half-written lies in the
cache or among temporary files. Linux alone, for it reads /proc. Exit status 1 where a check fails.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bnverify.upgrade import recording

GRACE = 10.0  # seconds in which what was started must have ended


def start(args: argparse.Namespace, home: Path, out: int) -> subprocess.Popen[bytes]:
    """Start the gate with an empty cache of its own, or with what a killed one left."""
    (home / "tmp").mkdir(parents=True, exist_ok=True)
    env = {**os.environ, "BNVERIFY_CACHE": str(home / "cache"), "TMPDIR": str(home / "tmp")}
    command = [sys.executable, "-m", "bnverify", "gate", *args.target, "--format", "json"]
    command += ["--from", args.old, "--to", args.new]
    return subprocess.Popen(command, env=env, stdout=out, stderr=subprocess.PIPE)


def verdict(args: argparse.Namespace, home: Path) -> tuple[Any, float]:
    """Run the gate to its end, and return what it says, less times, and the seconds it took."""
    started = time.monotonic()
    process = start(args, home, subprocess.PIPE)
    out, err = process.communicate()
    if process.returncode not in {0, 1}:
        raise SystemExit(f"the gate failed: {err.decode()}")
    told = json.loads(out)
    for varying in ("seconds", "costs"):
        told.pop(varying)
    return told, time.monotonic() - started


def alive(home: Path) -> list[str]:
    """Return the command lines of the processes that work for a gate in this place."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = entry.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if str(home) in line:
            found.append(line)
    return found


def left(home: Path) -> list[str]:
    """Return what should not lie in the cache, nor among temporary files."""
    cache = home / "cache" / "upgrade"
    found = [*(cache / "work").iterdir(), *(home / "tmp").iterdir()]
    for file in (cache / "recordings").iterdir():
        recording.read(file)
    return list(map(str, found))


def main() -> int:
    """Print a line a kill."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("target", nargs="*", help="default: the reference")
    parser.add_argument("--from", dest="old", required=True, metavar="REQ")
    parser.add_argument("--to", dest="new", required=True, metavar="REQ")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    root = Path(tempfile.mkdtemp(prefix="killed-gate-"))
    rng, wrong = random.Random(args.seed), 0
    try:
        expected, whole = verdict(args, root / "whole")
        print(f"undisturbed: {expected['verdict']}, {whole:.0f} s", flush=True)
        for number in range(args.kills):
            home = root / str(number)
            process = start(args, home, subprocess.DEVNULL)
            moment = rng.uniform(0, whole)
            time.sleep(moment)
            process.send_signal(signal.SIGKILL)
            process.communicate()
            until = time.monotonic() + GRACE
            while (going := alive(home)) and time.monotonic() < until:
                time.sleep(0.05)
            gone = time.monotonic() - until + GRACE
            told, seconds = verdict(args, home)
            rest = left(home)
            problems = [f"goes on: {line}" for line in going]
            problems += [f"left: {path}" for path in rest]
            problems += [] if told == expected else [f"another verdict: {told['verdict']}"]
            wrong += bool(problems)
            print(
                f"killed after {moment:.1f} s, all ended after {gone:.2f} s, "
                f"again in {seconds:.0f} s: " + ("; ".join(problems) or "the same, nothing left"),
                flush=True,
            )
            shutil.rmtree(home)
    finally:
        shutil.rmtree(root, ignore_errors=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
