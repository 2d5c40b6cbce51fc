"""Compare a recording with its replay: each difference and its class.

    comparison = compare(read("old.bnv"), read("new.bnv"))

Imports no jax: comparing needs neither of the two environments.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from bnverify.errors import UsageError
from bnverify.upgrade import witness
from bnverify.upgrade.policy import KINDS, Difference
from bnverify.upgrade.values import distances, explanation

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from bnverify.upgrade.recording import Recording
    from bnverify.upgrade.values import Distance

GOOD = ("proved", "held")
_TREES = ("state", "after", "loss", "grads", "eval_loss")

SIGMAS = 6.0
"""Two means over seeds differ if they are this many standard errors apart (chance: 1 in 5e8)."""

LAST_PLACES = 16
"""Initial values agree within this many ulps of the leaf's largest value.

A random bit pattern becomes a number through a dozen elementary functions, each accurate to one or
two ulps.
"""

_AVERAGES = ("mean", "mean square", "mean fourth power")
_SEEDS = 512  # equals `record.SEEDS`, which cannot be imported without jax


@dataclass(frozen=True)
class Comparison:
    """Two recordings compared.

    Attributes:
        subject: the recorded subject's name.
        old: the recording's manifest.
        new: the replay's manifest.
        differences: what changed, in the order of `KINDS`, largest first.
        distances: leaf -> how far its values are apart.
        costs: new / old for each cost measured on both sides.
        notes: further information for the reader.
    """

    subject: str
    old: Mapping[str, Any]
    new: Mapping[str, Any]
    differences: tuple[Difference, ...]
    distances: Mapping[str, Distance]
    costs: Mapping[str, float]
    notes: tuple[str, ...] = ()

    def of(self, kind: str) -> tuple[Difference, ...]:
        """Return the differences of one class."""
        return tuple(each for each in self.differences if each.kind == kind)


def compare(old: Recording, new: Recording) -> Comparison:
    """Return what changed from `old` to `new`, its replay.

    Raises:
        UsageError: `new` is not a replay of `old`, so values cannot be compared.
    """
    _check(old, new)
    far = distances(old, new) if new.manifest["shapes"] else {}
    found = [*_api(new), *_trees(old, new)]
    if new.manifest["shapes"]:
        found += [*_initial_values(old, new), *_values(old, new, far)]
        found += [*_laws(old, new), *_influence(old, new)]
    found.sort(key=lambda each: (KINDS.index(each.kind), -_rank(each.size)))
    return Comparison(
        subject=new.manifest["subject"],
        old=old.manifest,
        new=new.manifest,
        differences=tuple(found),
        distances=far,
        costs=_costs(old, new),
        notes=tuple(_notes(old, new, far)),
    )


def _check(old: Recording, new: Recording) -> None:
    shapes = new.manifest["shapes"]
    if new.digest == old.digest or (
        new.manifest["replays"] == old.digest and shapes == old.manifest["shapes"][: len(shapes)]
    ):
        return
    if old.manifest["replays"] == new.digest:
        raise UsageError(f"{old.source} is a replay of {new.source}; swap the two files")
    raise UsageError(
        f"{new.source} is not a replay of {old.source}; make one in the new environment: "
        f"bnverify record TARGET --replay {old.source} -o {new.source}"
    )


def _rank(size: float | None) -> float:
    return math.inf if size is None else size


def _api(new: Recording) -> Iterator[Difference]:
    for function, message in new.manifest["errors"].items():
        yield Difference(
            kind="api",
            subject=new.manifest["subject"],
            leaf=None,
            text=f"{function} no longer runs: {message}",
            witness=witness.of_error(new.manifest["target"]),
        )


def _trees(old: Recording, new: Recording) -> Iterator[Difference]:
    """Yield leaves that are new, missing or of another shape or dtype; each leaf once."""
    subject, seen = new.manifest["subject"], set()
    for index in range(len(new.manifest["trees"])):
        for tree in _TREES:
            before, after = old.leaves(index, tree), new.leaves(index, tree)
            name = "" if tree == "state" else " after the step"
            for leaf in {**before, **after}:
                if leaf in seen:
                    continue
                text, kind = _leaf_change(before.get(leaf), after.get(leaf))
                if text:
                    seen.add(leaf)
                    yield Difference(kind=kind, subject=subject, leaf=leaf, text=f"{text}{name}")
            found = [r.manifest["trees"][index].get(tree) for r in (old, new)]
            containers = [each and each["containers"] for each in found]
            if containers[0] != containers[1] and f"{tree}()" not in seen and tree != "after":
                seen.add(f"{tree}()")
                text = f"the containers of {tree} changed: {_containers(*containers)}"
                yield Difference(kind="structure", subject=subject, leaf=None, text=text)


def _containers(old: str | None, new: str | None) -> str:
    """Return which containers there are more or fewer of; if none, the old and the new nesting."""
    then, now = (Counter(re.findall(r"\w+(?=\()", text or "")) for text in (old, new))
    names = [name for name in {**then, **now} if then[name] != now[name]]
    counts = ", ".join(f"{name} {then[name]} -> {now[name]}" for name in names)
    return counts or f"{old} is now {new}"


def _leaf_change(before: Any, after: Any) -> tuple[str, Any]:
    if after is None:
        return "is missing", "structure"
    if before is None:
        return "is new", "structure"
    if before[1] != after[1]:
        return f"had shape {list(before[1])}, now has {list(after[1])}", "structure"
    if before[0] != after[0]:
        return f"was {before[0]}, is now {after[0]}", "dtype"
    return "", "structure"


def _initial_values(old: Recording, new: Recording) -> Iterator[Difference]:
    """Yield differences between the states that `init` makes from the same seeds."""
    subject = new.manifest["subject"]
    for leaf in _initial_leaves(old, new):
        differs, ulps = _initial_difference(old, new, leaf, "init")
        if not differs:
            continue
        name = f"init/{leaf}"
        if ulps <= LAST_PLACES:
            text = f"initial values agree within {ulps:.0f} ulps"
            yield Difference(kind="rounding", subject=subject, leaf=name, text=text)
            continue
        changed = _distribution(old, new, leaf)
        if changed is not None:
            size, moment, text = changed
            yield Difference(
                kind="meaning",
                subject=subject,
                leaf=name,
                size=size,
                text=f"initial values have a different distribution: {text}",
                witness=witness.of_draws(old, new, leaf, moment, _SEEDS, SIGMAS),
            )
            continue
        yield Difference(
            kind="initialisation", subject=subject, leaf=name, text=_why_initial(old, new, leaf)
        )


def _initial_leaves(old: Recording, new: Recording) -> list[str]:
    if not new.manifest["shapes"]:
        return []
    before, after = old.under("shape0/init"), new.under("shape0/init")
    return [leaf for leaf in before if leaf in after]


def _initial_difference(
    old: Recording, new: Recording, leaf: str, which: str
) -> tuple[bool, float]:
    """Return whether initial values differ, and by how many ulps of the leaf's largest value."""
    ulps, differs = 0.0, False
    for shape in range(len(new.manifest["shapes"])):
        before = old.arrays[f"shape{shape}/init/{leaf}"]
        after = new.arrays.get(f"shape{shape}/{which}/{leaf}")
        if after is None or before.shape != after.shape:
            continue
        left, right = before.astype(np.float64), after.astype(np.float64)
        same = (left == right) | (np.isnan(left) & np.isnan(right))
        if same.all():
            continue
        differs = True
        if before.dtype.kind != "f" or not np.isfinite(left - right).all():
            return True, np.inf
        ulp = np.finfo(before.dtype).eps * max(np.abs(left).max(), np.finfo(before.dtype).tiny)
        ulps = max(ulps, float(np.abs(left - right).max() / ulp))
    return differs, ulps


def _distribution(old: Recording, new: Recording, leaf: str) -> tuple[float, int, str] | None:
    """Return by how many standard errors the averages over seeds differ, which one, and as text."""
    before, after = old.arrays.get(f"draws/{leaf}"), new.arrays.get(f"draws/{leaf}")
    if before is None or after is None or before.shape != (2, 3) or after.shape != (2, 3):
        return None
    means, spread = (before[0], after[0]), before[1] + after[1]
    with np.errstate(all="ignore"):
        error = np.sqrt(spread / _SEEDS)
        # Constant initialisers have no spread, so any change beyond rounding counts.
        floor = 2.0**-20 * np.maximum(np.abs(before[0]), np.abs(after[0]))
        apart = np.abs(means[0] - means[1]) / np.maximum(np.maximum(error, floor), 1e-300)
    worst = int(np.nanargmax(apart))
    if not apart[worst] > SIGMAS:
        return None
    words = f"{_AVERAGES[worst]} was {means[0][worst]:.4g}, is now {means[1][worst]:.4g}"
    return None if not np.isfinite(apart[worst]) else (float(apart[worst]), worst, words)


def _why_initial(old: Recording, new: Recording, leaf: str) -> str:
    flag = "jax_threefry_partitionable"
    then, now = old.manifest["flags"].get(flag), new.manifest["flags"].get(flag)
    text = "different random numbers from the same seed, with the same distribution"
    recorded = any(
        f"shape{s}/same_stream/{leaf}" in new.arrays for s in range(len(new.manifest["shapes"]))
    )
    if then != now and recorded:
        differs, ulps = _initial_difference(old, new, leaf, "same_stream")
        if not differs or ulps <= LAST_PLACES:
            return f"{text}; the only cause is {flag}, which was {then} and is now {now}"
    return text


def _values(old: Recording, new: Recording, far: Mapping[str, Distance]) -> Iterator[Difference]:
    subject = new.manifest["subject"]
    for leaf, distance in far.items():
        place = distance.worst
        if place is None:
            continue
        if distance.simplest is None:
            yield Difference(
                kind="rounding",
                subject=subject,
                leaf=leaf,
                size=place.size,
                text=f"differs by at most {place.size:.2g}x the rounding noise",
            )
            continue
        shown = distance.simplest
        at = list(shown.element) if shown.element else ""
        far_apart = (
            "more than any rounding" if math.isinf(place.size) else f"{place.size:.3g}x the noise"
        )
        rows, features = old.manifest["shapes"][shown.shape]
        text = (
            f"{leaf}{at}: was {shown.old:.9g}, is now {shown.new:.9g}, allowed ± {shown.allowed:.2g} "
            f"(step {shown.step + 1}, batch of {rows} x {features}); at worst {far_apart}"
        )
        moves = leaf in old.before(shown.shape, shown.step)
        words = explanation(old, new, leaf) if moves else ""
        yield Difference(
            kind="meaning",
            subject=subject,
            leaf=leaf,
            size=place.size if math.isfinite(place.size) else None,
            text=f"{text}; {words}" if words else text,
            witness=witness.of_value(old, new, shown),
            explanation=words,
        )


def _laws(old: Recording, new: Recording) -> Iterator[Difference]:
    for law, now in new.manifest["laws"].items():
        then = old.manifest["laws"].get(law)
        if then is None or then["status"] not in GOOD or now["status"] != "violated":
            continue
        residual = now["residual"]
        off = f"; the error is {residual:.3g}x the tolerance" if residual else ""
        yield Difference(
            kind="meaning",
            subject=new.manifest["subject"],
            leaf=None,
            size=residual,
            text=f"law {law} was {then['status']}, is now violated{off}",
        )


def _influence(old: Recording, new: Recording) -> Iterator[Difference]:
    """Yield data flows that are new or gone, if both sides have proved theirs."""
    sides = [each.manifest["influence"] for each in (old, new)]
    if not all(side.get("proved") and not side.get("unknown") for side in sides):
        return
    before, after = (side["matrix"] for side in sides)
    for output in before:
        if output not in after:
            continue
        came = sorted(set(after[output]) - set(before[output]))
        went = sorted(set(before[output]) - set(after[output]))
        for sources, words in ((came, "may now depend on"), (went, "no longer depends on")):
            if sources:
                yield Difference(
                    kind="meaning",
                    subject=new.manifest["subject"],
                    leaf=output,
                    text=f"{output} {words} {', '.join(sources)}",
                )


def _costs(old: Recording, new: Recording) -> dict[str, float]:
    before, after = old.manifest["costs"], new.manifest["costs"]
    return {name: after[name] / before[name] for name in after if before.get(name)}


def _notes(old: Recording, new: Recording, far: Mapping[str, Distance]) -> Iterator[str]:
    for side, recorded in (("old", old), ("new", new)):
        for note in recorded.manifest["notes"]:
            yield f"{side}: {note}"
    if old.manifest["machine"] != new.manifest["machine"]:
        yield "recorded on different kinds of processor, which may round differently"
    for flag, then in old.manifest["flags"].items():
        now = new.manifest["flags"].get(flag)
        if now != then and None not in {now, then}:
            yield f"{flag} was {then}, is now {now}"
    unknown = sum(distance.unknown for distance in far.values())
    if unknown:
        yield f"{unknown} values differ whose rounding noise is unknown on both sides; not judged"
    blind = [leaf for leaf, d in far.items() if d.total and not d.compared]
    if blind:
        yield "rounding noise leaves nothing to compare in " + ", ".join(blind)
