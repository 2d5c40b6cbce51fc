"""Compare every adjacent pair of the pinned releases, and write a table of what each one changed.

    python benchmarks/compatibility.py -o changes.md

Environments and recordings are cached, so an interrupted run continues where it stopped. The first
run creates an environment for each file in pins/, and needs a package index.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections import Counter
from pathlib import Path

from packaging.version import Version

from bnverify.errors import UsageError
from bnverify.upgrade.compare import Comparison, compare
from bnverify.upgrade.environments import Environment, Workspace, parse, resolve, workspace
from bnverify.upgrade.gate import Recordings
from bnverify.upgrade.policy import KINDS
from bnverify.upgrade.recording import Recording
from bnverify.upgrade.sources import locate

ROOT = Path(__file__).parents[1]
MODELS = {
    "reference": "bnverify.reference:sgd",
    "linen": f"{ROOT / 'benchmarks' / 'compatibility_targets.py'}:linen",
    "nnx": f"{ROOT / 'benchmarks' / 'compatibility_targets.py'}:nnx",
}

HEAD = """# What each release changed

Written by `python benchmarks/compatibility.py`: each set of releases in `pins/` compared with the one
before, for the reference step, for a linen model with BatchNorm, and for the same model in nnx. The step is
recorded with the older releases and replayed with the newer ones, from the same states.

- *rounding* is followed by the largest difference in units of rounding noise; up to 1 it is rounding.
- *initialisation*: the same seed gives different initial values, from the same distribution.
- *structure*, *dtype*, *meaning* and *api* are what a gate fails for by default.

| from | to |"""


def pins() -> list[Path]:
    """Return the files in pins/, the oldest jax first."""
    return sorted(ROOT.glob("pins/jax-*.txt"), key=lambda p: Version(p.stem.removeprefix("jax-")))


def described(comparison: Comparison) -> str:
    """Return a cell: each class of differences that occurs, briefly described."""
    parts = []
    counts = Counter(d.kind for d in comparison.differences)
    for kind in KINDS:
        found = comparison.of(kind)
        if kind == "rounding" and found:
            worst = max((d.size or 0.0) for d in found)
            parts.append(f"rounding {worst:.2f}")
        elif kind == "initialisation" and found:
            parts.append("initialisation")
        elif found:
            parts.append(f"**{kind}** ({counts[kind]}): {found[0].text}"[:160].replace("|", "\\|"))
    return "; ".join(parts) or "nothing, to the bit"


def column(model: str, files: list[Path], work: Workspace) -> list[str]:
    """Return the cells of one model, one for each adjacent pair."""
    recordings = Recordings(locate(MODELS[model]), work, laws=False)
    cells, before = [], None
    for file in files:
        environment = resolve(parse(str(file)), work)
        if before is not None:
            cells.append(cell(recordings, before, environment))
            print(f"{model} {file.stem}: {cells[-1]}", flush=True)
        before = recorded(recordings, environment)
    return cells


def recorded(recordings: Recordings, environment: Environment) -> Recording | str:
    """Return the recording in an environment, or the error message if it fails."""
    try:
        return recordings.record(environment)
    except UsageError as error:
        return str(error)


def cell(recordings: Recordings, before: Recording | str, environment: Environment) -> str:
    """Return the cell that compares a recording with a replay in an environment."""
    if isinstance(before, str):
        return "could not be recorded with the older releases"
    try:
        return described(compare(before, recordings.replay(environment, before)))
    except UsageError as error:
        print(error, file=sys.stderr)
        return "could not be recorded"


def main() -> int:
    """Write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--model", choices=MODELS, action="append", help="default: all")
    args = parser.parse_args()
    models, files = args.model or list(MODELS), pins()
    names = []
    for file in files:
        lines = dict(x.split("==") for x in file.read_text().split() if "==" in x)
        names.append(f"jax {lines['jax']}, flax {lines['flax']}")
    with workspace() as work:
        columns = [column(model, files, work) for model in models]
    text = HEAD + "".join(f" {model} |" for model in models) + "\n|---|---|" + "---|" * len(models)
    for index, (old, new) in enumerate(itertools.pairwise(names)):
        text += f"\n| {old} | {new} |" + "".join(f" {cells[index]} |" for cells in columns)
    args.output.write_text(text + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
