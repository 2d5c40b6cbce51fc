"""The results of a check: the evidence for each law, counterexamples, and the report."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from importlib import import_module
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

from bnverify.laws import LAWS
from bnverify.laws.life import ANOTHER_PROCESS
from bnverify.laws.mismatch import Mismatch
from bnverify.mistakes import MISTAKES, Mistake
from bnverify.model import Case

Status: TypeAlias = Literal["proved", "held", "violated", "untriggered", "exempt"]

READ_ONLY = "only the traced step was read"
"""The reason why a law that needs cases is untriggered if only proofs are read."""

DEVICES = 4
"""The number of simulated devices in a counterexample of the family "parallel"."""


class Call(NamedTuple):
    """One event in the history of a state.

    Attributes:
        name: a method of :class:`bnverify.Life`.
        argument: its argument: a case, the name of a way to save or copy, or None.
    """

    name: str
    argument: Case | str | None = None


@dataclass(frozen=True)
class Counterexample:
    """A case or a history that violates a law, as data; ``script`` renders it.

    Attributes:
        law: the violated law.
        case: the violating case; None for a history, and for a law of structure, which every case
            violates.
        target: the argument of ``bnverify.load``; None: the script has a placeholder.
        history: the calls that lead to a violation of a law of the family "life"; else empty.
        devices: whether several devices are needed.
    """

    law: str
    case: Case | None = None
    target: str | None = None
    history: tuple[Call, ...] = ()
    devices: bool = False

    @property
    def script(self) -> str:
        """A Python script that reproduces the violation."""
        if self.history:
            return self._history_script()
        if self.law == ANOTHER_PROCESS:
            named = f"select=[{self.law!r}], target={self.target!r}"
            return f"import bnverify\n\nprint(bnverify.verify({self._loaded}, {named}))\n"
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
        """Return the script."""
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
        """Return a dict for JSON; ``from_json`` reads it."""
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
    """The likely cause of a violation: a known mistake, and how it was recognised.

    Attributes:
        mistake: its name, a key of ``bnverify.mistakes.MISTAKES``, which has its title and fix.
        seen: what it was recognised by, in one clause; empty if only the violated law suggests it.

    Raises:
        ValueError: there is no mistake of that name.
    """

    mistake: str
    seen: str = ""

    def __post_init__(self) -> None:
        if self.mistake not in MISTAKES:
            raise ValueError(f"no mistake is named {self.mistake!r}")

    @property
    def known(self) -> Mistake:
        """The mistake, with its title, fix, source and code."""
        return MISTAKES[self.mistake]

    @property
    def statement(self) -> str:
        """The title of the mistake and, in parentheses, what it was recognised by."""
        title = self.known.title
        return f"{title} ({self.seen})" if self.seen else title

    def __str__(self) -> str:
        """Return the mistake in one line: its title, its fix and where users have met it."""
        source = f" Seen at {self.known.source}" if self.known.source else ""
        return f"{self.mistake}: {self.statement}. Fix: {self.known.fix}.{source}"

    def to_json(self) -> dict[str, str]:
        """Return a dict for JSON, with title, fix and source of the mistake."""
        known = self.known
        return {**asdict(self), "title": known.title, "fix": known.fix, "source": known.source}

    @classmethod
    def from_json(cls, data: Mapping[str, str]) -> Cause:
        """Return the cause that ``to_json`` wrote; title, fix and source are looked up again."""
        return cls(data["mistake"], data["seen"])


def _numpy(code: str) -> str:
    return "import numpy as np\n" if "np." in code else ""


@dataclass(frozen=True)
class Evidence:
    """The result of a check for one law.

    Attributes:
        law: the name of the law.
        family: the family of the law.
        status: "proved": for all values and the sizes in ``reason``, from an abstract trace;
            "held": in all ``cases`` cases; "violated": by ``counterexample``; "untriggered": no
            case met the precondition; "exempt": the law does not apply, for ``reason``.
        cases: the number of cases that met the law's precondition.
        residual: the largest error divided by its tolerance; None if none was measured, or if the
            largest was not confirmed.
        reason: what the status is based on, in one line.
        counterexample: a case or history that violates the law.
        cause: the likely mistake; None if none is known. ``diagnosis`` is its text.
        shape: (N, D) of the counterexample; None if every case is one.
        example: for a witness law that held, the witness as a Python expression.
        clues: what the numbers of violating cases say; see ``bnverify.clues``. JSON types only.
        mismatch: the entry with the largest error in the counterexample; None if there is no such
            entry.
        failed: how many of ``cases`` violated the law.
        line: ``path:line`` of the user's code behind the violation; None if it is unknown.
        path: how an output depends on an input that must not affect it: the input, the operations
            in between with their lines, the output; empty if no such dependency was traced.
        hint: what to declare if the step violates the law by design; empty if nothing is known.
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
        """Return evidence for the law of this name; ``known`` are further attributes."""
        return cls(law, LAWS[law].family, status, **known)

    def __repr__(self) -> str:
        """Return the status and its reason in one line, for interactive sessions."""
        known = filter(None, (self.reason, self.extent))
        return f"<Evidence {self.law}: {', '.join((self.status, *known))}>"

    @property
    def diagnosis(self) -> str | None:
        """The likely mistake and its fix in one line; None if no mistake is known."""
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
        """In how many cases the law was violated, in words; empty for a witness law."""
        if not self.failed or LAWS[self.law].kind == "witness":
            return ""
        return f"in {self.failed:,} of {self.cases:,} cases"

    def to_json(self) -> dict[str, Any]:
        """Return the public JSON form, a dict; a residual that is not finite is the string "inf".

        "counterexample" is the script and "replay" its data; "diagnosis" is the text of "cause".
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
        """Return the law, the reason, the likely cause and the script that reproduces a violation."""
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
    """A law is violated.

    Args:
        evidence: the evidence for the law.
        note: a remark to add to the message.

    Attributes:
        evidence: as given.
    """

    def __init__(self, evidence: Evidence, note: str = "") -> None:
        self.evidence = evidence
        super().__init__(f"{evidence}\n\n{note}" if note else str(evidence))


@dataclass(frozen=True, repr=False)
class Report:
    """The result of a check.

    Attributes:
        subject: the name of the subject.
        profile: the name of the profile.
        seed: the seed of all cases.
        results: one evidence for each law, in the order of the laws.
        cases: the number of cases run.
        seconds: the duration of the check, without imports.
        versions: package name -> version.
        influence: which inputs may affect which outputs; empty if the step was not traced. "matrix":
            output tree -> input trees; "leaves": the same for leaves, named
            ``params/Dense_0/kernel``; "scope": the sizes; "proved": whether for all of them;
            "unknown": primitives for which every input is assumed to affect every output.
        notes: further remarks, one line each.
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
        """The number of laws with each status, of cases and of seconds, in one line."""
        seen = Counter(result.status for result in self.results)
        laws = ", ".join(f"{seen[status]} {status}" for status in get_args(Status) if seen[status])
        return f"{laws}; {self.cases:,} cases in {self.seconds:.1f} s"

    def __repr__(self) -> str:
        """Return the verdict in one line, for interactive sessions."""
        return f"<Report {self.subject}: {self.verdict}; {self.counts}>"

    def _repr_html_(self) -> str:
        """Return the report as HTML, for notebooks."""
        # Imported by name: this module must not depend on bnverify.report, which renders it.
        drawn: str = import_module("bnverify.report.html").fragment(self)
        return drawn

    def __str__(self) -> str:
        """Return the verdict, and for each violated law the reason and the likely cause."""
        lines = [f"{self.subject}: {self.verdict}", self.counts]
        for result in self.violated:
            lines.append(f"violated: {result.law}: {result.reason}")
            lines += [f"  {result.further}"] if result.further else []
            lines += [f"  likely cause: {result.diagnosis}"] if result.diagnosis else []
        return "\n".join(lines)

    def __getitem__(self, law: str) -> Evidence:
        """Return the evidence for ``law``.

        Raises:
            KeyError: the law was not checked.
        """
        for result in self.results:
            if result.law == law:
                return result
        raise KeyError(law)

    def by_trees(self) -> Report:
        """Return the report without the dependencies of each leaf, most of it for a large model."""
        kept = {name: flows for name, flows in self.influence.items() if name != "leaves"}
        return replace(self, influence=kept)

    def to_json(self) -> str:
        """Return the report as JSON text; the field names are public."""
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
        """Return the report that ``to_json`` wrote, parsed; redundant fields are ignored."""
        names = ("subject", "profile", "seed", "cases", "seconds", "versions", "influence")
        results = tuple(Evidence.from_json(each) for each in data["results"])
        known = {name: data[name] for name in names}
        return cls(**known, results=results, notes=tuple(data["notes"]))
