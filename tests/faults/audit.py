"""Check the faults of the catalogue against the laws, and show which laws detect which faults.

``python -m tests.faults`` is the command.
"""

from __future__ import annotations

import json
import statistics
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any
from xml.sax.saxutils import escape

from bnverify.check import Check
from bnverify.errors import first_line
from bnverify.evidence import Report
from bnverify.laws import STEP_LAWS
from bnverify.profile import Profile, ProfileName
from tests.faults.catalogue import EXPECTED, FAULTS, Fault, learned


@dataclass(frozen=True)
class Finding:
    """The result for one fault.

    Attributes:
        fault: its name.
        family: its family.
        laws: the laws that it violates.
        refusal: the error with which jax or flax refuses it; empty if it runs.
        seconds: how long the check took.
        shape: (N, D) of the smallest counterexample; None if no case is needed.
        diagnosed: whether the first violated law is reported with the fault's own mistake.
        survives: the reason why no law needs to detect it.
        lost: the laws that should detect it but do not.
        failure: the error of the check itself; empty if there is none.
    """

    fault: str
    family: str
    laws: tuple[str, ...]
    refusal: str
    seconds: float
    shape: tuple[int, int] | None
    diagnosed: bool
    survives: str
    lost: tuple[str, ...] = ()
    failure: str = ""

    @property
    def killed(self) -> bool:
        """Whether a law detects it, or the libraries refuse it."""
        return bool(self.laws or self.refusal)

    @property
    def reason(self) -> str:
        """Why no law detects the fault."""
        failed = f"the check itself failed: {self.failure}" if self.failure else ""
        return self.survives or failed or "a gap: no law detects it"


@dataclass(frozen=True)
class Audit:
    """The results for a catalogue."""

    findings: tuple[Finding, ...]

    @property
    def survivors(self) -> tuple[Finding, ...]:
        """The faults that no law detects."""
        return tuple(finding for finding in self.findings if not finding.killed)

    @property
    def unexplained(self) -> tuple[Finding, ...]:
        """The survivors without a reason."""
        return tuple(finding for finding in self.survivors if not finding.survives)

    @property
    def lost(self) -> dict[str, tuple[str, ...]]:
        """Fault -> the laws that should detect it but do not."""
        return {finding.fault: finding.lost for finding in self.findings if finding.lost}

    @property
    def ok(self) -> bool:
        """Whether every fault is detected, by every law that should, or survives for a stated reason."""
        return not self.unexplained and not self.lost

    @property
    def summary(self) -> str:
        """The counts in one line."""
        total, survive = len(self.findings), len(self.survivors)
        seconds = statistics.median(finding.seconds for finding in self.findings)
        named = sum(finding.diagnosed for finding in self.findings)
        return (
            f"{total - survive} of {total} faults killed, {survive} survive, {len(self.unexplained)} of "
            f"them unexplained; {named} named by their mistake; median {seconds:.1f} s"
        )

    def killers(self) -> list[str]:
        """Return the laws that detect any fault, those that detect most first."""
        kills: dict[str, int] = {}
        for finding in self.findings:
            for law in finding.laws:
                kills[law] = kills.get(law, 0) + 1
        return sorted(kills, key=lambda law: (-kills[law], law))

    def alone(self) -> dict[str, list[str]]:
        """Return law -> the faults that only this law detects."""
        kills: dict[str, list[str]] = {}
        for finding in self.findings:
            if len(finding.laws) == 1:
                kills.setdefault(finding.laws[0], []).append(finding.fault)
        return kills

    def to_json(self) -> str:
        """Return the findings as JSON text."""
        data = {
            "faults": len(self.findings),
            "killed": sum(finding.killed for finding in self.findings),
            "median_seconds": round(statistics.median(f.seconds for f in self.findings), 3),
            "findings": [asdict(finding) for finding in self.findings],
            "alone": self.alone(),
        }
        return json.dumps(data, indent=2) + "\n"

    @classmethod
    def from_json(cls, texts: Iterable[str]) -> Audit:
        """Return several audits as one; if two contain the same fault, the last one counts."""
        found = {each["fault"]: each for text in texts for each in json.loads(text)["findings"]}

        def finding(each: dict[str, Any]) -> Finding:
            lists = {name: tuple(each[name]) for name in ("laws", "lost")}
            shape = tuple(each["shape"]) if each["shape"] else None
            return Finding(**{**each, **lists, "shape": shape})

        return cls(tuple(map(finding, found.values())))


def audit(
    faults: Iterable[Fault],
    profile: ProfileName | Profile = "quick",
    *,
    seed: int = 0,
    listener: Callable[[Finding], None] | None = None,
) -> Audit:
    """Check each of ``faults`` against the laws.

    Args:
        faults: of the catalogue.
        profile: how much to do for each.
        seed: the seed of all cases.
        listener: called with each finding.
    """
    findings = []
    for fault in faults:
        finding = examine(fault, profile, seed)
        findings.append(finding)
        if listener is not None:
            listener(finding)
    return Audit(tuple(findings))


def examine(fault: Fault, profile: ProfileName | Profile, seed: int) -> Finding:
    """Return the result for one fault."""
    started = time.perf_counter()
    refusal = failure = ""
    report: Report | None = None
    try:
        report = Check(fault.make(), profile, ignore=("life", "parallel")).run(seed)
    except Exception as error:  # noqa: BLE001 - a fault may raise anything
        kinds = {kind.__name__ for kind in type(error).__mro__}
        if fault.raises in kinds:
            refusal = first_line(error)
        else:  # an error of the check itself detects nothing
            failure = first_line(error)
    broken = report.violated if report else ()
    shapes = [evidence.shape for evidence in broken if evidence.shape is not None]
    return Finding(
        fault=fault.name,
        family=fault.family,
        laws=tuple(evidence.law for evidence in broken),
        refusal=refusal,
        seconds=time.perf_counter() - started,
        shape=min(shapes, key=lambda shape: (shape[0] * shape[1], shape), default=None),
        diagnosed=any(e.cause and e.cause.mistake == fault.mistake for e in broken[:1]),
        survives=fault.survives or fault.tolerated,
        lost=tuple(sorted(set(fault.expected) - {evidence.law for evidence in broken})),
        failure=failure,
    )


def expected(audits: Sequence[Iterable[Mapping[str, Any]]]) -> dict[str, list[str]]:
    """Return fault -> the laws that detected it in every audit that contains it, if there are any.

    Args:
        audits: the findings of each audit, as in its JSON.
    """
    laws: dict[str, set[str]] = {}
    for findings in audits:
        for finding in findings:
            name, noticed = finding["fault"], {law for law in finding["laws"] if law in STEP_LAWS}
            laws[name] = laws.get(name, noticed) & noticed
    return {
        name: [law for law in STEP_LAWS if law in laws[name]] for name in FAULTS if laws.get(name)
    }


def learn(texts: Iterable[str]) -> None:
    """Update ``expected.json``, the results that later audits must find, from the JSON of audits.

    Entries for faults that no audit contains remain.
    """
    audits = [json.loads(text)["findings"] for text in texts]
    had = {finding["fault"] for findings in audits for finding in findings}
    laws = {**{f: laws for f, laws in learned().items() if f not in had}, **expected(audits)}
    found = {name: laws[name] for name in FAULTS if name in laws}
    EXPECTED.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


# As text.

NAME = 50  # columns for a fault's name


def text(audit: Audit) -> str:
    """Return the summary, the matrix, the faults that only one law detects, and the survivors."""
    laws, alone = audit.killers(), audit.alone()
    lines = [audit.summary, "", "faults and the laws that detect them", *matrix(audit), ""]
    for number, law in enumerate(laws, 1):
        kills = sum(law in finding.laws for finding in audit.findings)
        only = f", alone {len(alone[law])}" if law in alone else ""
        lines.append(f" {number:>2} {law}: {kills}{only}")
    for law, names in alone.items():
        lines += ["", *textwrap.wrap(f"{law} alone kills: {', '.join(names)}", 99)]
    if not audit.ok or audit.survivors:
        lines.append("")
    lines += [f"survives: {finding.fault}: {finding.reason}" for finding in audit.survivors]
    lines += [
        f"lost: {fault} is no longer detected by {', '.join(names)}"
        for fault, names in audit.lost.items()
    ]
    return "\n".join(lines) + "\n"


def matrix(audit: Audit) -> Iterator[str]:
    """Yield the lines of the matrix: a column for each law, its number written downwards."""
    laws = audit.killers()
    numbers = [f"{number:>2}" for number in range(1, len(laws) + 1)]
    for digit in range(2):
        yield " " * (NAME + 2) + "".join(number[digit] for number in numbers).rstrip()
    family = ""
    for finding in sorted(audit.findings, key=lambda each: each.family):
        if finding.family != family:
            family = finding.family
            yield family
        cells = "".join("x" if law in finding.laws else "." for law in laws)
        if finding.refusal:
            cells = f"refused: {finding.refusal}"[:60]
        elif not finding.laws:
            cells = "survives"
        size = "" if finding.shape is None else f" {finding.shape[0]}x{finding.shape[1]}"
        yield f"  {finding.fault[:NAME]:<{NAME}}{cells}{size} {finding.seconds:.1f}s"


# As a picture: SVG without external resources.

CELL = 9
LEFT, TOP = 320, 300
INK, HIT, ALONE, MISS, GAP = "#222222", "#3b6ea8", "#c2410c", "#eef1f5", "#b91c1c"


def picture(audit: Audit) -> str:
    """Return the picture: a row for each fault, a column for each law that detects any.

    A square means that the law detects the fault, a darker one with a cross that no other law does; the rows of
    survivors are struck through. The picture can be read without colours.
    """
    laws = audit.killers()
    rows = sorted(audit.findings, key=lambda finding: (finding.family, -len(finding.laws)))
    width, height = LEFT + CELL * len(laws) + 20, TOP + CELL * len(rows) + 40
    parts = [
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
            f'viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="8" '
            f'fill="{INK}">'
        ),
        f"<title>{escape(audit.summary)}</title>",
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        f'<text x="10" y="20" font-size="12">{escape(audit.summary)}</text>',
    ]
    for column, law in enumerate(laws):
        x = LEFT + CELL * column + CELL - 2
        parts.append(f'<text transform="translate({x},{TOP - 4}) rotate(-90)">{escape(law)}</text>')
    for row, finding in enumerate(rows):
        y = TOP + CELL * row
        parts.append(
            f'<text x="{LEFT - 6}" y="{y + CELL - 2}" text-anchor="end">'
            f"{escape(finding.fault)}</text>"
        )
        parts += [
            _cell(LEFT + CELL * column, y, hit=law in finding.laws, alone=len(finding.laws) == 1)
            for column, law in enumerate(laws)
        ]
        if not finding.killed:
            middle = y + CELL / 2
            parts.append(
                f'<line x1="{LEFT}" y1="{middle}" x2="{LEFT + CELL * len(laws)}" y2="{middle}" '
                f'stroke="{GAP}"/>'
            )
    return "\n".join([*parts, "</svg>"]) + "\n"


def _cell(x: int, y: int, *, hit: bool, alone: bool) -> str:
    fill = (ALONE if alone else HIT) if hit else MISS
    square = f'<rect x="{x}" y="{y}" width="{CELL - 1}" height="{CELL - 1}" fill="{fill}"/>'
    if not (hit and alone):
        return square
    end = CELL - 2
    return (
        f'{square}<path d="M{x + 1} {y + 1} L{x + end} {y + end} M{x + end} {y + 1} '
        f'L{x + 1} {y + end}" stroke="#ffffff"/>'
    )
