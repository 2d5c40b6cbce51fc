"""What is known about each law after a check, and the report that sums it up."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from importlib import import_module
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

from bnverify.laws import LAWS
from bnverify.laws.mismatch import Mismatch
from bnverify.mistakes import MISTAKES, Mistake
from bnverify.model import Case

Status: TypeAlias = Literal["proved", "held", "violated", "untriggered", "exempt"]

READ_ONLY = "only the traced step was read"
"""Why a law that needs cases is untriggered where none are run."""

DEVICES = 4
"""How many simulated devices show a violation of a law about many."""


class Call(NamedTuple):
    """One thing that happens in the life of a state.

    Attributes:
        name: a method of :class:`bnverify.Life`.
        argument: what the method takes: a batch, the name of a way, or nothing.
    """

    name: str
    argument: Case | str | None = None


@dataclass(frozen=True)
class Counterexample:
    """What shows a violation: a case, or a history of calls. Its script is rendered from it.

    Attributes:
        law: the broken law.
        case: the case that breaks it; None for a law of structure, which every case breaks, and for
            a history.
        target: what ``bnverify.load`` is given; None: the reader puts the subject in.
        history: what happens to a state until a law about its life is broken; else empty.
        devices: whether it takes many devices to show.
    """

    law: str
    case: Case | None = None
    target: str | None = None
    history: tuple[Call, ...] = ()
    devices: bool = False

    @property
    def script(self) -> str:
        """A script that shows the violation when it is pasted into Python and run."""
        if self.history:
            return self._history_script()
        any_case = "bnverify.Case.of(seed=0, x=[[1.0]], y=[0.0], lr=0.1)"
        shown = self.case.code() if self.case is not None else any_case
        before = ""
        if self.devices:
            flag = f"--xla_force_host_platform_device_count={DEVICES}"
            before = f'import os\n\n# before jax is imported\nos.environ["XLA_FLAGS"] = "{flag}"\n'
        return (
            f"{before}import bnverify\n{_numpy(shown)}\n"
            f"subject = {self._loaded}\n"
            f"case = {shown}\n"
            f"bnverify.replay(subject, case, law={self.law!r})\n"
        )

    def __str__(self) -> str:
        """Return the script, which is what a person wants to see of it."""
        return self.script

    @property
    def _loaded(self) -> str:
        if self.target is None:
            return "...  # the subject that was verified"
        return f"bnverify.load({self.target!r})"

    def _history_script(self) -> str:
        names: dict[str, str] = {}
        lines = []
        for name, argument in self.history:
            shown = "" if argument is None else repr(argument)
            if isinstance(argument, Case):
                shown = names.setdefault(argument.code(), f"case_{len(names)}")
            lines.append(f"life.{name}({shown})")
        given = [f"{name} = {code}" for code, name in names.items()]
        subject = [f"subject = {self._loaded}", "life = bnverify.Life(subject)"]
        script = "\n".join([*given, *subject, *lines])
        return f"import bnverify\n{_numpy(script)}\n{script}\n"

    def to_json(self) -> dict[str, Any]:
        """Return it as data for JSON; ``from_json`` reads it."""
        history = [
            [name, argument.to_json() if isinstance(argument, Case) else argument]
            for name, argument in self.history
        ]
        case = self.case.to_json() if self.case is not None else None
        return {**asdict(self), "case": case, "history": history}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Counterexample:
        """Return the counterexample that ``to_json`` wrote."""
        history = tuple(
            Call(name, Case.from_json(argument) if isinstance(argument, Mapping) else argument)
            for name, argument in data["history"]
        )
        case = Case.from_json(data["case"]) if data["case"] is not None else None
        return cls(**{**data, "case": case, "history": history})


@dataclass(frozen=True)
class Cause:
    """The likely cause of a violation: a known mistake, and what showed that it was made.

    Attributes:
        mistake: its name, a key of ``bnverify.mistakes.MISTAKES``, which has its title and its fix.
        seen: what it was recognised by, in one clause; empty where only the broken law suggests it.

    Raises:
        ValueError: no mistake has that name.
    """

    mistake: str
    seen: str = ""

    def __post_init__(self) -> None:
        if self.mistake not in MISTAKES:
            raise ValueError(f"no mistake is named {self.mistake!r}")

    @property
    def known(self) -> Mistake:
        """All that is known about the mistake: its title, fix, source and code."""
        return MISTAKES[self.mistake]

    @property
    def statement(self) -> str:
        """What was done, and in parentheses what showed it."""
        title = self.known.title
        return f"{title} ({self.seen})" if self.seen else title

    def __str__(self) -> str:
        """Return the mistake in one line: what was done, how to fix it, where users met it."""
        source = f" Seen at {self.known.source}" if self.known.source else ""
        return f"{self.mistake}: {self.statement}. Fix: {self.known.fix}.{source}"

    def to_json(self) -> dict[str, str]:
        """Return it as data for JSON, with what ``MISTAKES`` says of the mistake."""
        known = self.known
        return {**asdict(self), "title": known.title, "fix": known.fix, "source": known.source}

    @classmethod
    def from_json(cls, data: Mapping[str, str]) -> Cause:
        """Return the cause that ``to_json`` wrote; title and fix are looked up again."""
        return cls(data["mistake"], data["seen"])


def _numpy(code: str) -> str:
    return "import numpy as np\n" if "np." in code else ""


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
        reason: one line, what the status rests on; of a violation, what was seen.
        counterexample: what shows the violation.
        cause: the likely mistake; None where none is known. ``diagnosis`` is its text.
        shape: (N, D) of the counterexample; None where any case shows it.
        example: the case that shows what some case must, as an expression to be pasted.
        clues: what the numbers of violating cases say, see ``bnverify.clues``; as JSON holds it.
        mismatch: the entry at which the counterexample is furthest off; None where no single value
            is to blame.
        failed: how many of ``cases`` broke the law.
        line: ``path:line`` in the user's code that a violation leads to, where the trace knows it.
        path: how an input reaches an output that must not depend on it: the input, the operations
            between them with their lines, the output; empty where no such dependency was traced.
        hint: what to declare where the step breaks the law by design; empty where nothing is known.
    """

    law: str
    family: str
    status: Status
    cases: int = 0
    residual: float | None = None
    reason: str = ""
    counterexample: Counterexample | None = None
    cause: Cause | None = None
    shape: tuple[int, int] | None = None
    example: str | None = None
    clues: Mapping[str, Any] = field(default_factory=dict)
    mismatch: Mismatch | None = None
    failed: int = 0
    line: str | None = None
    path: tuple[str, ...] = ()
    hint: str = ""

    @classmethod
    def of(cls, law: str, status: Status, **known: Any) -> Evidence:
        """Return evidence for a law, by its name; see the attributes."""
        return cls(law, LAWS[law].family, status, **known)

    @property
    def diagnosis(self) -> str | None:
        """The likely mistake and its fix in one line; None where no common mistake is known."""
        return str(self.cause) if self.cause is not None else None

    @property
    def further(self) -> str:
        """What led to a violation: the path of a forbidden flow, and what to declare if it is meant."""
        path = " -> ".join(self.path)
        if len(self.path) == 2:
            path = f"{self.path[0]} is {self.path[1]}, unchanged"
        return "; ".join(filter(None, (path, self.hint[:1].upper() + self.hint[1:])))

    @property
    def extent(self) -> str:
        """In how many cases it was seen; empty where no number of cases says anything."""
        if not self.failed or LAWS[self.law].kind == "witness":
            return ""
        return f"in {self.failed:,} of {self.cases:,} cases"

    def to_json(self) -> dict[str, Any]:
        """Return the public JSON form; a residual that is not finite is the string "inf".

        "counterexample" is the script, "replay" the same as data; "diagnosis" is the text of "cause".
        """
        data = {name: value for name, value in vars(self).items() if name != "counterexample"}
        if self.residual is not None and not math.isfinite(self.residual):
            data["residual"] = "inf"
        shown = self.counterexample
        data["counterexample"] = shown.script if shown else None
        data["replay"] = shown.to_json() if shown else None
        data["mismatch"] = self.mismatch.to_json() if self.mismatch else None
        data["cause"] = self.cause.to_json() if self.cause else None
        data["diagnosis"] = self.diagnosis
        data["path"] = list(self.path)
        return data

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Evidence:
        """Return the evidence that ``to_json`` wrote."""
        known = {name: data[name] for name in data if name not in {"replay", "diagnosis"}}
        known["residual"] = math.inf if data["residual"] == "inf" else data["residual"]
        known["shape"] = tuple(data["shape"]) if data["shape"] is not None else None
        replay = data["replay"]
        known["counterexample"] = Counterexample.from_json(replay) if replay else None
        wrong = data.get("mismatch")
        known["mismatch"] = Mismatch.from_json(wrong) if wrong else None
        known["cause"] = Cause.from_json(data["cause"]) if data["cause"] else None
        known["path"] = tuple(data["path"])
        return cls(**known)

    def __str__(self) -> str:
        """Return the law, what was seen, the likely mistake and the script that shows it."""
        parts = [f"{self.law}: {LAWS[self.law].claim}", self.reason]
        if self.further:
            parts.append(self.further)
        if self.diagnosis:
            parts.append(f"Likely cause: {self.diagnosis}")
        text = "\n".join(parts)
        if self.counterexample:
            text += f"\nTo reproduce:\n\n{self.counterexample.script.rstrip()}"
        return text


class Violation(AssertionError):
    """A law that does not hold.

    Args:
        evidence: what is known about it.
        note: what the message should say besides.

    Attributes:
        evidence: as given.
    """

    def __init__(self, evidence: Evidence, note: str = "") -> None:
        self.evidence = evidence
        super().__init__(f"{evidence}\n\n{note}" if note else str(evidence))


@dataclass(frozen=True, repr=False)
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
        unreached = [each.reason for each in self.results if each.status == "untriggered"]
        if unreached and set(unreached) == {READ_ONLY}:
            return f"nothing violated in the trace; {len(unreached)} laws need cases to be run"
        return f"none violated, {len(unreached)} not reached" if unreached else "all hold"

    @property
    def counts(self) -> str:
        """How many laws have each status, of how many cases, and how long it took."""
        seen = Counter(result.status for result in self.results)
        laws = ", ".join(f"{seen[status]} {status}" for status in get_args(Status) if seen[status])
        return f"{laws}; {self.cases:,} cases in {self.seconds:.1f} s"

    def __repr__(self) -> str:
        """Return the verdict in one line: an interactive session shows no wall of results."""
        return f"<Report {self.subject}: {self.verdict}; {self.counts}>"

    def _repr_html_(self) -> str:
        """Return the report as a notebook shows it."""
        # By name: data is below what draws it, and a notebook finds the drawing by this method alone.
        drawn: str = import_module("bnverify.report.html").fragment(self)
        return drawn

    def __str__(self) -> str:
        """Return the verdict, and of each violated law why and what it usually is."""
        lines = [f"{self.subject}: {self.verdict}", self.counts]
        for result in self.violated:
            lines.append(f"violated: {result.law}: {result.reason}")
            lines += [f"  {result.further}"] if result.further else []
            lines += [f"  likely cause: {result.diagnosis}"] if result.diagnosis else []
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
