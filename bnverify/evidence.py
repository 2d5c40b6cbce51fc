"""What is known about each law after a check, and the report that sums it up."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, TypeAlias, get_args

Status: TypeAlias = Literal["proved", "held", "violated", "untriggered", "exempt"]


@dataclass(frozen=True)
class Evidence:
    """What is known about one law.

    Attributes:
        law: its name.
        family: its family.
        status: "proved": for every value and size named in ``reason``, from an abstract trace;
            "held": in ``cases`` cases; "violated": by ``counterexample``; "untriggered":
            no case reached its precondition; "exempt": it does not apply, ``reason`` says why.
        cases: how many cases reached the law's precondition.
        residual: the worst error in units of the error allowed; None where none was measured, or
            the worst was not confirmed.
        reason: one line, what the status rests on.
        counterexample: a script that shows the violation when pasted and run.
        diagnosis: the likely mistake and its mend.
        shape: (N, D) of the counterexample; None where any case shows it.
        example: the case that shows what some case must, as an expression to be pasted.
    """

    law: str
    family: str
    status: Status
    cases: int = 0
    residual: float | None = None
    reason: str = ""
    counterexample: str | None = None
    diagnosis: str | None = None
    shape: tuple[int, int] | None = None
    example: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the public JSON form; a residual that is not finite is the string "inf"."""
        data = asdict(self)
        if self.residual is not None and not math.isfinite(self.residual):
            data["residual"] = "inf"
        return data

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Evidence:
        """Return the evidence that ``to_json`` wrote."""
        residual = math.inf if data["residual"] == "inf" else data["residual"]
        shape = tuple(data["shape"]) if data["shape"] is not None else None
        return cls(**{**data, "residual": residual, "shape": shape})


@dataclass(frozen=True)
class Report:
    """The outcome of a check.

    Attributes:
        subject: its name.
        profile: the name of the profile.
        seed: from which every case of this check was drawn.
        results: one evidence for each law, in the order of the laws.
        cases: how many cases were run.
        seconds: how long the check took, imports not included.
        versions: package name -> version.
        influence: what may reach what, empty where not traced: "matrix", output tree -> input
            trees; "leaves", the same of leaves, named ``params/Dense_0/kernel``; "scope" and
            "proved", of what sizes and how; "unknown", primitives read conservatively.
        notes: what a reader should know besides: primitives read conservatively, how many
            cases had no digits to compare.
    """

    subject: str
    profile: str
    seed: int
    results: tuple[Evidence, ...]
    cases: int
    seconds: float
    versions: Mapping[str, str]
    influence: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether no law is violated."""
        return not self.violated

    @property
    def violated(self) -> tuple[Evidence, ...]:
        """The laws that are violated."""
        return tuple(result for result in self.results if result.status == "violated")

    @property
    def verdict(self) -> str:
        """The outcome in a few words."""
        if self.violated:
            return f"{len(self.violated)} of {len(self.results)} laws violated"
        unreached = sum(result.status == "untriggered" for result in self.results)
        return f"none violated, {unreached} not reached" if unreached else "all hold"

    @property
    def counts(self) -> str:
        """How many laws have each status, of how many cases, and how long it took."""
        seen = Counter(result.status for result in self.results)
        laws = ", ".join(f"{seen[status]} {status}" for status in get_args(Status) if seen[status])
        return f"{laws}; {self.cases:,} cases in {self.seconds:.1f} s"

    def __str__(self) -> str:
        """Return the verdict, and of each violated law why and what it usually is."""
        lines = [f"{self.subject}: {self.verdict}", self.counts]
        for result in self.violated:
            lines.append(f"violated: {result.law}: {result.reason}")
            lines += [f"  usually {result.diagnosis}"] if result.diagnosis else []
        return "\n".join(lines)

    def __getitem__(self, law: str) -> Evidence:
        """Return the evidence for ``law``."""
        for result in self.results:
            if result.law == law:
                return result
        raise KeyError(law)

    def by_trees(self) -> Report:
        """Return the report without what reaches each leaf: of a large model, most of it."""
        kept = {name: flows for name, flows in self.influence.items() if name != "leaves"}
        return replace(self, influence=kept)

    def to_json(self) -> str:
        """Return the report as a JSON text; the field names are public."""
        data = {
            "bnverify": self.versions.get("bnverify", ""),
            "versions": dict(self.versions),
            "subject": self.subject,
            "profile": self.profile,
            "seed": self.seed,
            "ok": self.ok,
            "seconds": round(self.seconds, 3),
            "cases": self.cases,
            "results": [result.to_json() for result in self.results],
            "influence": dict(self.influence),
            "notes": list(self.notes),
        }
        return json.dumps(data, indent=2, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Report:
        """Return the report that ``to_json`` wrote; what it adds for other readers is left out."""
        names = ("subject", "profile", "seed", "cases", "seconds", "versions", "influence")
        results = tuple(Evidence.from_json(each) for each in data["results"])
        known = {name: data[name] for name in names}
        return cls(**known, results=results, notes=tuple(data["notes"]))
