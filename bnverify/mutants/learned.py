"""What audits have shown, kept as data: how each mistake looks, and what notices each fault.

    bnverify audit --profile quick --json audit.json
    python -m bnverify.mutants.learned audit.json [OTHER.json ...]

rewrites ``bnverify/signatures.json``, from which ``bnverify.diagnose`` learns, and
``bnverify/mutants/expected.json``, to which later audits are held.
"""

from __future__ import annotations

import json
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from bnverify.laws import STEP_LAWS
from bnverify.mutants import MUTANTS

Finding = Mapping[str, Any]
"""One of the findings in the JSON of ``bnverify audit``."""


def signatures(findings: Iterable[Finding]) -> dict[str, Any]:
    """Return mistake -> {"faults": how many, "broken": {law: by how many of them}}.

    A finding without a broken law says nothing about how a mistake looks and is not counted.
    """
    faults: Counter[str] = Counter()
    broken: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for finding in findings:
        laws = [law for law in finding["laws"] if law in STEP_LAWS]
        if laws:
            mistake = MUTANTS[finding["mutant"]].mistake
            faults[mistake] += 1
            broken[mistake].update(laws)
    return {
        mistake: {"faults": faults[mistake], "broken": dict(sorted(broken[mistake].items()))}
        for mistake in sorted(faults)
    }


def expected(audits: Sequence[Iterable[Finding]]) -> dict[str, list[str]]:
    """Return fault -> the laws that noticed it in each audit that had it, where there are any."""
    laws: dict[str, set[str]] = {}
    for findings in audits:
        for finding in findings:
            name, noticed = finding["mutant"], {law for law in finding["laws"] if law in STEP_LAWS}
            laws[name] = laws.get(name, noticed) & noticed
    return {
        name: [law for law in STEP_LAWS if law in laws[name]] for name in MUTANTS if laws.get(name)
    }


def main(files: Sequence[str]) -> None:
    """Rewrite the data from the audits in ``files``."""
    audits = [json.loads(Path(file).read_text(encoding="utf-8"))["findings"] for file in files]
    learned = {
        ("bnverify", "signatures.json"): signatures(each for one in audits for each in one),
        ("bnverify.mutants", "expected.json"): expected(audits),
    }
    for (package, name), data in learned.items():
        target = Path(str(resources.files(package).joinpath(name)))
        target.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
