"""What audits have shown, kept as data: which laws notice each fault.

    bnverify audit --profile quick --json audit.json
    python -m bnverify.mutants.learned audit.json [OTHER.json ...]

rewrites ``bnverify/mutants/expected.json``, to which later audits are held.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from bnverify.laws import STEP_LAWS
from bnverify.mutants import MUTANTS

Finding = Mapping[str, Any]
"""One of the findings in the JSON of ``bnverify audit``."""


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
    target = Path(str(resources.files("bnverify.mutants").joinpath("expected.json")))
    target.write_text(json.dumps(expected(audits), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
