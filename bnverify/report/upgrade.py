"""An upgrade's report as plain text for a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING, TextIO

from bnverify.report.symbols import in_ascii, symbols
from bnverify.upgrade.policy import KINDS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bnverify.upgrade.policy import Judgement

EXPLAINED = {
    "api": "code that no longer runs",
    "structure": "tree structures or shapes",
    "dtype": "dtypes of leaves",
    "initialisation": "initial values from the same seed",
    "rounding": "values, within the rounding noise of both sides",
    "meaning": "values, beyond the rounding noise; or laws",
}
UNITS = {"compile_time": "s", "run_time": "s", "program_size": "instructions"}
_SHOWN = 8  # differences of one class; the rest is only counted


def render(judgement: Judgement, stream: TextIO | None = None, verbosity: int = 0) -> str:
    """Return the verdict, and what changed.

    Args:
        judgement: the upgrade's judgement.
        stream: the destination, for its encoding; None: a file.
        verbosity: -1: the verdict only; 1: with the script that reproduces the first difference.
    """
    signs = symbols(getattr(stream, "encoding", None) or "utf-8")
    ok, bad = signs.status["held"], signs.status["violated"]
    text_lines = list(lines(judgement, ok=ok, bad=bad, script=verbosity > 0))
    text = "\n".join(text_lines[:1] if verbosity < 0 else text_lines) + "\n"
    return text if signs.unicode else in_ascii(text)


def lines(judgement: Judgement, ok: str, bad: str, *, script: bool) -> Iterator[str]:
    """Yield the report's lines.

    Args:
        judgement: the upgrade's judgement.
        ok: the sign for accepted differences.
        bad: the sign for failing ones.
        script: whether to include the script that reproduces the first difference.
    """
    comparison, verdict = judgement.comparison, judgement.verdict
    yield f"{ok if judgement.ok else bad} {comparison.subject}: {judgement.headline()}"
    yield f"  from {judgement.old} to {judgement.new}"
    versions = judgement.changed_versions()
    yield "  " + (
        ", ".join(f"{name} {a} -> {b}" for name, (a, b) in versions.items()) or "the same releases"
    )
    failing = {id(d) for d in verdict.failing}
    accepted = {id(d): entry for d, entry in verdict.accepted}
    for kind in KINDS:
        found = comparison.of(kind)
        if not found:
            continue
        yield ""
        sign = bad if any(id(d) in failing for d in found) else ok
        yield f"{sign} {kind}: {EXPLAINED[kind]}"
        if kind == "rounding":
            yield f"    {_rounding(judgement)}"
            continue
        for difference in found[:_SHOWN]:
            leaf = difference.leaf or ""
            text = difference.text
            named = text if not leaf or text.startswith(leaf) else f"{leaf}: {text}"
            yield f"    {named}"
            entry = accepted.get(id(difference))
            if entry:
                yield f"      accepted until {entry.expires}: {entry.reason}"
        if len(found) > _SHOWN:
            yield f"    and {len(found) - _SHOWN} more"
    yield from _costs(judgement)
    for entry in verdict.stale:
        yield f"accepted, but no longer occurs: {entry.kind} {entry.leaf or ''}: {entry.reason}"
    for entry in verdict.expired:
        yield f"acceptance expired on {entry.expires}: {entry.kind}: {entry.reason}"
    for note in comparison.notes:
        yield f"note: {note}"
    shown = next((d for d in verdict.failing if d.witness), None)
    if shown is not None and shown.witness:
        yield ""
        if script:
            yield f"To reproduce {shown.leaf or 'it'}, save this script and run it on both sides:"
            yield ""
            yield shown.witness.rstrip()
        else:
            yield f"For a script that reproduces {shown.leaf or 'it'}, use -v or --format html"


def _rounding(judgement: Judgement) -> str:
    found = judgement.comparison.of("rounding")
    sized = [d for d in found if d.size is not None]
    if not sized:
        return f"{len(found)} leaves, by a few ulps"
    worst = max(sized, key=lambda d: d.size or 0.0)
    return f"{len(found)} leaves, at most {worst.size:.2g}x the noise ({worst.leaf})"


def _costs(judgement: Judgement) -> Iterator[str]:
    old, new = judgement.comparison.old["costs"], judgement.comparison.new["costs"]
    bounds = {cost: bound for cost, _, bound in judgement.verdict.exceeded}
    if not judgement.comparison.costs:
        return
    yield ""
    for cost, ratio in judgement.comparison.costs.items():
        beyond = f", above the bound of {bounds[cost]:g}x" if cost in bounds else ""
        name, unit = cost.replace("_", " "), UNITS[cost]
        yield f"{name}: {old[cost]:.3g} -> {new[cost]:.3g} {unit}, {ratio:.2f}x{beyond}"
