"""bnverify beside the naive rival: cases a second, cold and warm.

    python benchmarks/throughput.py [--profile ci] [--examples 60]

A case is one generated input on which the step ran and everything claimed was checked: all laws for
bnverify, four assertions for the rival. Cold is a fresh process with an empty cache of compiled
programs. Warm is what the next run sees: for bnverify a second process that finds the cache of the
first; for the rival, which keeps none, a second run in the same process, with everything it compiled
still in memory. bnverify runs with the settings of ``bnverify check``. Importing the libraries, the same
for both, is not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent


class Run(NamedTuple):
    """One measured run."""

    cases: int
    seconds: float
    laws: int

    @property
    def rate(self) -> float:
        """Cases a second."""
        return self.cases / self.seconds


def measure_bnverify(profile: str) -> list[Run]:
    """Check the reference once, in this process."""
    from bnverify import reference, verify
    from bnverify.compat import compile_quickly

    compile_quickly()
    report = verify(reference.sgd(), profile)
    if not report.ok:  # the time counts all the same
        print("bnverify found a violation in the reference: see `bnverify check`", file=sys.stderr)
    checked = [each for each in report.results if each.status != "exempt"]
    return [Run(report.cases, report.seconds, len(checked))]


def measure_rival(examples: int) -> list[Run]:
    """Run the rival twice in this process, on different examples."""
    import naive_rival

    return [Run(*naive_rival.run(examples, random_seed=seed), laws=4) for seed in (0, 1)]


def in_a_fresh_process(contender: str, amount: str, cache: str) -> list[Run]:
    """Start this file again to measure one contender."""
    environment = os.environ | {
        "BNVERIFY_CACHE": cache,
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")]),
    }
    command = [sys.executable, __file__, "--measure", contender, amount]
    done = subprocess.run(
        command, env=environment, check=False, stdout=subprocess.PIPE, text=True, cwd=HERE
    )
    if done.returncode:  # it has said why
        sys.exit(done.returncode)
    return [Run(*run) for run in json.loads(done.stdout.splitlines()[-1])]


def show(contender: str, temperature: str, run: Run) -> None:
    """Print one line of the table."""
    print(
        f"{contender:10} {temperature:5} {run.cases:8,} {run.seconds:9.1f} "
        f"{run.rate:12,.1f} {run.laws:6}",
        flush=True,
    )


def main() -> None:
    """Measure both and print the table and the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--profile", default="ci", help="how much bnverify does (default: ci)")
    parser.add_argument("--examples", type=int, default=60, help="of the rival (default: 60)")
    parser.add_argument("--measure", nargs=2, metavar=("CONTENDER", "AMOUNT"), help="internal")
    options = parser.parse_args()
    if options.measure:
        contender, amount = options.measure
        runs = measure_rival(int(amount)) if contender == "rival" else measure_bnverify(amount)
        print(json.dumps(runs))
        return
    print(f"{'':10} {'':5} {'cases':>8} {'seconds':>9} {'cases/second':>12} {'claims':>6}")
    with tempfile.TemporaryDirectory() as cache:
        rival = in_a_fresh_process("rival", str(options.examples), cache)
        show("rival", "cold", rival[0])
        show("rival", "warm", rival[1])
        ours: list[Run] = []
        for temperature in ("cold", "warm"):
            ours += in_a_fresh_process("bnverify", options.profile, cache)
            show("bnverify", temperature, ours[-1])
    for temperature, theirs, mine in zip(("cold", "warm"), rival, ours, strict=True):
        print(f"bnverify is {mine.rate / theirs.rate:,.0f} times the rival, {temperature}")


if __name__ == "__main__":
    main()
