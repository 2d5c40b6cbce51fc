"""The stacked engine at full speed, and a million cases without a false alarm.

    python benchmarks/volume.py [--rows 2 --features 2] [--block 1024] [--seconds 10]

runs one warm shape of the reference step two ways in turns, both two blocks at once: the raw step
(initialise, train, evaluate, under jit and vmap, nothing checked) and the engine (the same, its
re-runs, its rounding noise and every numeric law that stacked cases can be held to). It prints
cases per second of both, and how many steps and evaluations the laws ask of the engine for each
that the raw step makes: no check of all laws on each case can be faster than that.

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
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from bnverify.engine import proof
from bnverify.engine.budget import AT_ONCE, Budget, Fixed
from bnverify.engine.judge import Judge, exemption, judged, shown_by, static_facts
from bnverify.engine.verify import Checker
from bnverify.engine.volume import NEEDS, Volume
from bnverify.jaxpr.noise import ROWS

from bnverify import reference
from bnverify.case import Domain
from bnverify.laws import LAWS, Law
from bnverify.profile import Profile
from bnverify.shapes import TINY_SHAPES, shape_pool
from bnverify.stacks import stacked_cases
from bnverify.subject import Subject


def stacked_laws(subject: Subject, reading: proof.Reading) -> list[Law]:
    """Return the laws that a check of ``subject`` would hold stacked cases to."""
    shown = shown_by(subject, reading.abstract, reading.probe)
    unproved = (law for law in LAWS.values() if proof.prove_influence(law, reading) is None)
    return judged((law for law in unproved if exemption(law, subject, shown) is None), NEEDS)


def rate(blocks: Iterator[Any], block: int, seconds: float) -> float:
    """Return cases per second of an iterator that runs a ``block`` of them at each step."""
    next(blocks)  # compiles
    done, started = 0, time.perf_counter()
    while time.perf_counter() - started < seconds:
        next(blocks)
        done += 1
    return done * block / (time.perf_counter() - started)


def at_once(run: Callable[[], Any]) -> Iterator[Any]:
    """Yield what ``run`` gives again and again, as many calls at once as the engine makes."""
    yield run()
    with ThreadPoolExecutor(AT_ONCE) as pool:
        running = deque(pool.submit(run) for _ in range(AT_ONCE))
        while True:
            yield running.popleft().result()
            running.append(pool.submit(run))


def one_shape(shape: tuple[int, int], block: int, seconds: float) -> None:
    """Print the rates of the raw step and of the engine on one shape."""
    subject = reference.sgd()
    reading = proof.read(subject)
    laws = stacked_laws(subject, reading)
    judge = Judge(
        subject, static_facts(subject, reading.abstract), Fixed(subject, block, sys.maxsize)
    )
    volume = Volume(subject, laws, judge, domain=Domain())
    rng = np.random.default_rng(0)
    cases = stacked_cases(rng, shape, block, Domain())

    @jax.jit
    @jax.vmap
    def raw(seed: Any, x: Any, y: Any, lr: Any) -> Any:
        state, _ = subject.step(subject.init(seed, x), x, y, lr)
        return subject.evaluate(state, x, y)

    def raw_run() -> None:
        jax.block_until_ready(raw(cases.seed, cases.x, cases.y, cases.lr))

    found = {
        "raw step": rate(at_once(raw_run), block, seconds),
        "engine": rate(volume.blocks(shape, sys.maxsize, rng), block, seconds),
    }
    needs = {need for law in laws for need in law.needs}
    steps = 1 + sum(need.startswith("step:") for need in needs)
    evaluations = 1 + sum(need.startswith("eval:") for need in needs) + shape[0]  # each row alone
    print(f"shape {shape}, {len(laws)} laws, blocks of {block}, {AT_ONCE} at once")
    for name, value in found.items():
        print(f"  {name:9} {value:12,.0f} cases/second")
    print(f"  the engine runs at 1/{found['raw step'] / found['engine']:.0f} of the raw step")
    print(f"  and makes {steps} steps and {evaluations} evaluations for each of its one of both,")
    print(f"  besides {1 + ROWS} of both in float64")


def many_cases(cases: int, shapes: int, block: int) -> int:
    """Check ``cases`` over ``shapes`` shapes from nothing compiled; return the exit status."""
    subject = reference.sgd()
    budget = Budget(subject, block)
    round_of_all = sum(budget.block(shape) for shape in shape_pool(0, size=shapes))
    further = shapes - len(TINY_SHAPES)
    blocks = math.ceil(cases / round_of_all)
    profile = Profile("many", shapes=further, blocks=blocks, block=block, examples=0)
    with tempfile.TemporaryDirectory() as cache:
        os.environ["BNVERIFY_CACHE"] = cache
        report = Checker(subject, profile).run(0)
    print(f"{report.cases:,} cases of {shapes} shapes in {report.seconds:,.0f} s, cold")
    for evidence in report.violated:
        print(f"violated: {evidence.law}: {evidence.reason}\n{evidence.counterexample}")
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
