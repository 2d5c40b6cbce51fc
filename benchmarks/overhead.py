"""What does a check cost, beside compiling and running the step that it checks?

For each subject, in fresh processes with empty caches: the CPU seconds of a quick check, over those of
compiling and running the subject's own ``init``, ``step`` and ``evaluate`` with ``jax.jit(jax.vmap(...))``
and the defaults of XLA and Python, at 1, 2, 3 and 8 rows of 64 cases. The check runs with the settings of
``bnverify check``. Both are measured after the target was loaded. Then a second check, with the compiled
programs of the first in JAX's own cache, and the ci profile.

    python benchmarks/overhead.py [--subjects TARGET ...] [--no-ci]

prints for each subject the seconds, the three ratios, and the names of the programs that the quick check
compiled which are not the subject's own: there are none.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import os
import re
import subprocess
import sys
import tempfile
import time
from typing import Any

SUBJECTS = (
    "bnverify.zoo:mlp",
    "bnverify.zoo:mlp_nnx",
    "bnverify.zoo:resnet",
    "bnverify.zoo:vit",
    "bnverify.reference:sgd",
)
ROWS = (1, 2, 3, 8)
CASES = 64

COMPILED = re.compile(r"Finished XLA compilation of (?:jit\()?(\S+?)\)? in")


def compiled_names() -> list[str]:
    """Return a list that the names of all programs compiled from now on are appended to."""
    import jax

    names: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            found = COMPILED.search(record.getMessage())
            if found:
                names.append(found[1])

    jax.config.update("jax_log_compiles", True)
    logger = logging.getLogger("jax")
    logger.addHandler(Handler())
    logger.propagate = False
    return names


def check(target: str, profile: str) -> dict[str, Any]:
    """Return the CPU seconds of a check of ``target``, and what it compiled."""
    from bnverify import load
    from bnverify.check import verify
    from bnverify.compat import compile_quickly

    compile_quickly()
    subject = load(target)
    gc.freeze()
    names = compiled_names()
    began = time.process_time()
    report = verify(subject, profile)
    return {
        "seconds": time.process_time() - began,
        "programs": names,
        "ok": report.ok,
        "cases": report.cases,
    }


def own(target: str) -> dict[str, Any]:
    """Return the CPU seconds of compiling and running the subject's functions alone."""
    import jax
    import numpy as np

    from bnverify import load

    subject = load(target)
    width = subject.features[0] if subject.features else 4
    rng = np.random.default_rng(0)
    began = time.process_time()
    for rows in ROWS:
        seed = np.arange(CASES, dtype=np.int32)
        x = rng.standard_normal((CASES, rows, width)).astype(np.float32)
        y = rng.standard_normal((CASES, rows)).astype(np.float32)
        lr = np.full(CASES, 0.1, np.float32)
        state = jax.jit(jax.vmap(subject.init))(seed, x)
        after, _ = jax.jit(jax.vmap(subject.step))(state, x, y, lr)
        jax.block_until_ready(jax.jit(jax.vmap(subject.evaluate))(after, x, y))
    return {"seconds": time.process_time() - began}


def measured(what: str, target: str, cache: str) -> dict[str, Any]:
    """Return what a fresh process says of ``target``."""
    done = subprocess.run(
        [sys.executable, __file__, "--measure", what, target],
        env={**os.environ, "JAX_PLATFORMS": "cpu", "BNVERIFY_CACHE": cache},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def loop() -> float:
    """Return the CPU seconds of ten million additions: how fast this machine is at this minute."""
    began, total = time.process_time(), 0
    for number in range(10**7):
        total += number
    return time.process_time() - began


def main() -> None:
    """Measure each subject and print a line for it."""
    parser = argparse.ArgumentParser(description="What does a check cost beside the step itself?")
    parser.add_argument("--subjects", nargs="+", default=SUBJECTS, metavar="TARGET")
    parser.add_argument("--no-ci", action="store_true", help="leave out the ci profile")
    parser.add_argument("--measure", nargs=2, metavar=("WHAT", "TARGET"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        what, target = options.measure
        print(json.dumps(own(target) if what == "own" else check(target, what)))
        return
    print("| subject | loop s | own s | quick s | ratio | again | ci | programs, our own |")
    print("|---|---|---|---|---|---|---|---|")
    for target in options.subjects:
        with tempfile.TemporaryDirectory(prefix="bnverify-") as cache, \
             tempfile.TemporaryDirectory(prefix="bnverify-") as other:  # fmt: skip
            alone = measured("own", target, other)["seconds"]
            quick = measured("quick", target, cache)
            again = measured("quick", target, cache)["seconds"]
            ci = float("nan") if options.no_ci else measured("ci", target, other)["seconds"]
        ours = [name for name in quick["programs"] if "bnverify" in name]
        print(
            f"| {target} | {loop():.2f} | {alone:.1f} | {quick['seconds']:.1f} "
            f"| {quick['seconds'] / alone:.2f} | {again / alone:.2f} | {ci / alone:.2f} "
            f"| {len(quick['programs'])}, {len(ours)} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
