"""Stacked cases at full speed, and a million cases without a false alarm.

    python benchmarks/volume.py [--rows 2 --features 2] [--block 1024] [--seconds 10]

runs one warm shape of the reference step two ways: the raw step (initialise, train, evaluate, under jit
and vmap, nothing checked) and a check (the same, its re-runs, its rounding noise and every numeric law
that stacked cases can be held to). It prints cases per second of both, and how many steps and
evaluations the laws ask for each that the raw step makes: no check of all laws on each case can be
faster than that.

    python benchmarks/volume.py --cases 1000000 [--shapes 12]

checks that many cases over that many shapes, from an empty cache of compiled programs, and exits 1
if any law objects.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from bnverify import proof, reference
from bnverify.check import Check
from bnverify.jaxpr.rounding import ROWS
from bnverify.laws import STEP_LAWS, Law
from bnverify.model import Domain, Subject
from bnverify.profile import Profile
from bnverify.runs import Runner
from bnverify.shapes import TINY_SHAPES
from bnverify.stacks import stacked_cases


def stacked_laws(subject: Subject, reading: proof.Reading) -> list[Law]:
    """Return the laws that a check of ``subject`` would hold stacked cases to."""
    assert reading.abstract is not None
    shown = proof.capabilities(subject, reading.abstract, reading.probe)
    return [
        law
        for law in STEP_LAWS.values()
        if law.kind != "structure"
        and proof.exemption(law, subject, shown) is None
        and proof.prove_influence(law, reading) is None
    ]


def rate(run: Callable[[], Any], block: int, seconds: float) -> float:
    """Return cases per second of a function that runs a ``block`` of them at each call."""
    run()  # compiles
    done, started = 0, time.perf_counter()
    while time.perf_counter() - started < seconds:
        run()
        done += 1
    return done * block / (time.perf_counter() - started)


def one_shape(shape: tuple[int, int], block: int, seconds: float) -> None:
    """Print the rates of the raw step and of a check on one shape."""
    subject = reference.sgd()
    reading = proof.read(subject)
    plan = Profile("one shape", block=block)
    runner = Runner(reading.tracer(subject), reading.abstract, stacked_laws(subject, reading), plan)
    cases = stacked_cases(np.random.default_rng(0), shape, block, Domain())

    @jax.jit
    @jax.vmap
    def raw(seed: Any, x: Any, y: Any, lr: Any) -> Any:
        state, _ = subject.step(subject.init(seed, x), x, y, lr)
        return subject.evaluate(state, x, y)

    def raw_run() -> None:
        jax.block_until_ready(raw(cases.seed, cases.x, cases.y, cases.lr))

    found = {
        "raw step": rate(raw_run, block, seconds),
        "check": rate(lambda: runner.residuals(cases), block, seconds),
    }
    laws = runner.affordable(shape)
    needs = {need for law in laws for need in law.observes}
    steps = 1 + sum(need.startswith("step:") for need in needs)
    evaluations = 1 + sum(need.startswith("eval:") for need in needs) + shape[0]  # each row alone
    print(f"shape {shape}, {len(laws)} laws, blocks of {block}")
    for name, value in found.items():
        print(f"  {name:9} {value:12,.0f} cases/second")
    print(f"  the check runs at 1/{found['raw step'] / found['check']:.0f} of the raw step")
    print(f"  and makes {steps} steps and {evaluations} evaluations for each of its one of both,")
    print(f"  besides {1 + ROWS} of both in float64")


def many_cases(cases: int, shapes: int, block: int) -> int:
    """Check ``cases`` over ``shapes`` shapes from nothing compiled; return the exit status."""
    further = shapes - len(TINY_SHAPES)
    blocks = math.ceil(cases / (shapes * block))
    profile = Profile("many", shapes=further, blocks=blocks, block=block, examples=0)
    with tempfile.TemporaryDirectory() as cache:
        os.environ["BNVERIFY_CACHE"] = cache
        report = Check(reference.sgd(), profile, ignore=("life",)).run(0)
    print(f"{report.cases:,} cases of {shapes} shapes in {report.seconds:,.0f} s, cold")
    for evidence in report.violated:
        print(f"violated: {evidence}")
    return 1 if report.violated else 0


def main() -> int:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--features", type=int, default=2)
    parser.add_argument("--block", type=int, default=1024, help="cases in a stack")
    parser.add_argument("--seconds", type=float, default=10, help="for each of the two")
    parser.add_argument("--cases", type=int, help="check so many, instead of measuring one shape")
    parser.add_argument("--shapes", type=int, default=12, help="with --cases")
    options = parser.parse_args()
    if options.cases:
        return many_cases(options.cases, options.shapes, options.block)
    one_shape((options.rows, options.features), options.block, options.seconds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
