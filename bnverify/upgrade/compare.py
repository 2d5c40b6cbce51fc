"""What changed between a recording and its replay: each difference, with its class.

    comparison = compare(read("old.bnv"), read("new.bnv"))

Imports no jax: a comparison needs none of the environments compared.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bnverify.unusable import Unusable
from bnverify.upgrade import initials, witness
from bnverify.upgrade.difference import KINDS, Difference
from bnverify.upgrade.motion import explanation
from bnverify.upgrade.values import distances

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from bnverify.upgrade.recorded import Recorded
    from bnverify.upgrade.values import Distance

GOOD = ("proved", "held")
_TREES = ("state", "after", "loss", "grads", "eval_loss")


@dataclass(frozen=True)
class Comparison:
    """Two recordings side by side.

    Attributes:
        subject: what was recorded.
        old: the first recording's manifest.
        new: the replay's.
        differences: what changed, in the order of ``KINDS``, the largest first.
        distances: leaf -> how far apart its values are.
        costs: new / old of each cost that both sides measured.
        notes: what a reader should know besides.
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


def compare(old: Recorded, new: Recorded) -> Comparison:
    """Return what changed from ``old`` to ``new``, its replay.

    Raises:
        Unusable: they are not a recording and its replay, so values cannot be compared.
    """
    _check(old, new)
    far = distances(old, new) if new.manifest["shapes"] else {}
    found = [*_api(new), *_trees(old, new)]
    if new.manifest["shapes"]:
        found += [*initials.differences(old, new), *_values(old, new, far)]
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


def _check(old: Recorded, new: Recorded) -> None:
    if new.manifest["replays"] == old.digest or new.digest == old.digest:
        return
    if old.manifest["replays"] == new.digest:
        raise Unusable(
            f"{old.source} is a replay of {new.source}: compare them the other way round"
        )
    raise Unusable(
        f"{new.source} is no replay of {old.source}; make one in the new environment with "
        f"bnverify record --replay {old.source} -o {new.source}"
    )


def _rank(size: float | None) -> float:
    return math.inf if size is None else size


def _api(new: Recorded) -> Iterator[Difference]:
    for function, message in new.manifest["errors"].items():
        yield Difference(
            kind="api",
            subject=new.manifest["subject"],
            leaf=None,
            text=f"{function} no longer runs: {message}",
            witness=witness.of_error(new.manifest["target"]),
        )


def _trees(old: Recorded, new: Recorded) -> Iterator[Difference]:
    """Yield leaves that came, went or changed type, each once, whatever the shape."""
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
            containers = [
                r.manifest["trees"][index].get(tree, {}).get("containers") for r in (old, new)
            ]
            if containers[0] != containers[1] and f"{tree}()" not in seen and tree != "after":
                seen.add(f"{tree}()")
                text = f"the containers of {tree} changed: {_containers(*containers)}"
                yield Difference(kind="structure", subject=subject, leaf=None, text=text)


def _containers(old: str | None, new: str | None) -> str:
    """Return which kinds of container became more or fewer, or that they were arranged otherwise."""
    then, now = (Counter(re.findall(r"\w+(?=\()", text or "")) for text in (old, new))
    names = [name for name in {**then, **now} if then[name] != now[name]]
    counts = ", ".join(f"{name} {then[name]} -> {now[name]}" for name in names)
    return counts or f"{old} is now {new}"


def _leaf_change(before: Any, after: Any) -> tuple[str, Any]:
    if after is None:
        return "is gone", "structure"
    if before is None:
        return "is new", "structure"
    if before[1] != after[1]:
        return f"had shape {list(before[1])} and has {list(after[1])}", "structure"
    if before[0] != after[0]:
        return f"was {before[0]} and is {after[0]}", "dtype"
    return "", "structure"


def _values(old: Recorded, new: Recorded, far: Mapping[str, Distance]) -> Iterator[Difference]:
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
                text=f"differs by at most {place.size:.2g} times the rounding noise",
            )
            continue
        shown = distance.simplest
        at = list(shown.element) if shown.element else ""
        far_apart = (
            "beyond any rounding" if math.isinf(place.size) else f"{place.size:.3g} times the noise"
        )
        rows, features = old.manifest["shapes"][shown.shape]
        text = (
            f"{leaf}{at} was {shown.old:.9g} and is {shown.new:.9g}, allowed {shown.allowed:.2g} "
            f"(step {shown.step + 1} of a batch of {rows} x {features}); at worst {far_apart}"
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


def _laws(old: Recorded, new: Recorded) -> Iterator[Difference]:
    for law, now in new.manifest["laws"].items():
        then = old.manifest["laws"].get(law)
        if then is None or then["status"] not in GOOD or now["status"] != "violated":
            continue
        residual = now["residual"]
        off = f", off by {residual:.3g} times the error allowed" if residual else ""
        yield Difference(
            kind="meaning",
            subject=new.manifest["subject"],
            leaf=None,
            size=residual,
            text=f"the law {law} was {then['status']} and is violated{off}",
        )


def _influence(old: Recorded, new: Recorded) -> Iterator[Difference]:
    """Yield what reaches what anew, or no longer, where both sides know it for all values."""
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


def _costs(old: Recorded, new: Recorded) -> dict[str, float]:
    before, after = old.manifest["costs"], new.manifest["costs"]
    return {name: after[name] / before[name] for name in after if before.get(name)}


def _notes(old: Recorded, new: Recorded, far: Mapping[str, Distance]) -> Iterator[str]:
    for side, recorded in (("old", old), ("new", new)):
        for note in recorded.manifest["notes"]:
            yield f"{side}: {note}"
    if old.manifest["machine"] != new.manifest["machine"]:
        yield "recorded on two kinds of processor, which may round differently"
    for flag, then in old.manifest["flags"].items():
        now = new.manifest["flags"].get(flag)
        if now != then and None not in {now, then}:
            yield f"{flag} was {then}, is {now}"
    unknown = sum(distance.unknown for distance in far.values())
    if unknown:
        yield f"{unknown} values differ where neither side's rounding could be read; not judged"
    blind = [leaf for leaf, d in far.items() if d.total and not d.compared]
    if blind:
        yield "no case left digits to compare in " + ", ".join(blind)
