"""Correct subjects against many seeds: no law may object to one.

    python -m benchmarks.false_alarms --seeds 20
    python -m benchmarks.false_alarms --seeds 100 --subjects reference:sgd control:handwritten

Run it from the root of the checkout. A line for each subject: how many runs, cases and seconds, and
what was wrong. Exit status 1 where a law was violated in any run, and 2 where a name is no subject's.
"""

from __future__ import annotations

import argparse
import fnmatch
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from bnverify import Report, Subject, load, reference, zoo
from bnverify.check import Check
from bnverify.profile import PROFILES
from tests.faults import CONTROLS
from tests.faults.libraries import LOOP_CONTROLS

ROOT = Path(__file__).parents[1]
FLAX_EXAMPLES = ("imagenet", "guide", "nnx_guide", "mnist")
"""Functions of ``tests/adapters/test_flax_examples.py``."""


def loaded(file: Path, name: str) -> Subject:
    """Return a subject of a file; other files may have modules beside them of the same names."""
    beside = {path.stem for path in file.parent.glob("*.py")}
    for module in beside & set(sys.modules):
        del sys.modules[module]
    subject = load(f"{file}:{name}")
    assert isinstance(subject, Subject)
    return subject


def subjects() -> dict[str, Callable[[], Subject]]:
    """Return the name of every correct subject there is, and what makes it."""
    found: dict[str, Callable[[], Subject]] = {
        f"reference:{make.__name__}": make for make in reference.VARIANTS
    }
    found |= {f"zoo:{name}": getattr(zoo, name) for name in zoo.SUBJECTS}
    found |= {f"control:{name}": control.make for name, control in CONTROLS.items()}
    found |= {f"loop:{name}": make for name, make in LOOP_CONTROLS.items()}
    for file in sorted(ROOT.glob("examples/*/check.py")):
        found[f"example:{file.parent.name}"] = partial(loaded, file, "subject")
    flax = ROOT / "tests/adapters/test_flax_examples.py"
    found |= {f"example:flax_{name}": partial(loaded, flax, name) for name in FLAX_EXAMPLES}
    return found


def chosen(patterns: list[str]) -> dict[str, Callable[[], Subject]]:
    """Return the subjects that any of ``patterns`` names, or all of them."""
    every = subjects()
    if not patterns:
        return every
    for pattern in patterns:
        if not fnmatch.filter(every, pattern):
            print(f"no subject is named {pattern!r}; there are {', '.join(every)}", file=sys.stderr)
            raise SystemExit(2)
    wanted = {name for pattern in patterns for name in fnmatch.filter(every, pattern)}
    return {name: make for name, make in every.items() if name in wanted}


def alarms(reports: list[Report]) -> Iterator[str]:
    """Yield what the reports hold against the subject, a line for each law."""
    violated: dict[str, list[Report]] = {}
    for report in reports:
        for evidence in report.results:
            if evidence.status == "violated":
                violated.setdefault(evidence.law, []).append(report)
    for law, runs in violated.items():
        (first,) = [e for e in runs[0].results if e.law == law]
        seeds = ", ".join(str(run.seed) for run in runs)
        case = next(
            iter(
                re.findall(
                    r"Case.of\(.*\)", first.counterexample.script if first.counterexample else ""
                )
            ),
            "",
        )
        yield f"{law} with seeds {seeds}: {first.reason} {case}"


def line(name: str, reports: list[Report]) -> str:
    """Return what the runs of one subject come to."""
    statuses = Counter(evidence.status for evidence in reports[-1].results)
    seconds = sum(report.seconds for report in reports)
    cases = sum(report.cases for report in reports)
    seen = ", ".join(f"{count} {status}" for status, count in statuses.items())
    return f"{name:<36} {len(reports)} runs {cases} cases {seconds:.0f} s: {seen}"


def main() -> int:
    """Run and print; return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=20, help="runs of each subject")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--profile", choices=PROFILES, default="quick")
    parser.add_argument("--subjects", nargs="*", default=[], help="names or patterns; all else")
    options = parser.parse_args()
    status = 0
    for name, make in chosen(options.subjects).items():
        check = Check(make(), options.profile)
        seeds = range(options.first, options.first + options.seeds)
        reports = [check.run(seed) for seed in seeds]
        print(line(name, reports), flush=True)
        for text in alarms(reports):
            status = 1
            print(f"  {text}", flush=True)
    return status


if __name__ == "__main__":
    raise SystemExit(main())
