"""The catalogue of faults against many seeds: each must be killed with every one.

    python -m benchmarks.kills --seeds 20
    python -m benchmarks.kills --seeds 20 --profile ci --shard 1/2

Run it from the root of the checkout. A line for each fault: whether it was killed with every seed, and
the seconds it took; then how many were. Exit status 1 where the seeds do not agree.
"""

from __future__ import annotations

import argparse
import sys
import time

from bnverify.check import Check
from bnverify.errors import first_line
from bnverify.profile import PROFILES, Shard
from tests.faults import FAULTS, Fault


def survived(fault: Fault, profile: str, seeds: range) -> list[int]:
    """Return the seeds with which no law noticed the fault, nor jax or flax refused it."""
    check = Check(fault.make(), profile, ignore=("life",))
    try:
        return [seed for seed in seeds if not check.run(seed, fail_fast=True).violated]
    except Exception as error:
        kinds = {kind.__name__ for kind in type(error).__mro__}
        if fault.raises not in kinds:
            print(f"{fault.name}: the check failed: {first_line(error)}", flush=True)
            raise
        return []


def main() -> int:
    """Run and print; return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=20, help="checks of each fault")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--profile", choices=PROFILES, default="ci")
    parser.add_argument("--shard", type=Shard.parse, help="K/N: the K-th of N parts")
    options = parser.parse_args()
    seeds = range(options.first, options.first + options.seeds)
    faults = list(FAULTS.values())
    if options.shard:
        faults = options.shard.take(faults)
    started, killed, differing = time.perf_counter(), 0, 0
    for fault in faults:
        began = time.perf_counter()
        alive = survived(fault, options.profile, seeds)
        killed += not alive
        said = "killed"
        if len(alive) == len(seeds):
            said = f"lives: {fault.survives or fault.tolerated or 'no reason is given'}"
        elif alive:
            differing += 1
            said = f"lives with seeds {', '.join(map(str, alive))}"
        print(f"{fault.name} {said}, {time.perf_counter() - began:.0f} s", flush=True)
    seconds = time.perf_counter() - started
    print(f"{killed} of {len(faults)} faults killed with every seed, {seconds:.0f} s")
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
