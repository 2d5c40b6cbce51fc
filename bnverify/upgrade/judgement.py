"""A comparison and what the policy makes of it: what every renderer shows."""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bnverify.upgrade import policy as policies
from bnverify.upgrade.difference import KINDS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bnverify.upgrade.compare import Comparison
    from bnverify.upgrade.difference import Difference
    from bnverify.upgrade.policy import Policy, Verdict

PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")


@dataclass(frozen=True)
class Judgement:
    """One upgrade, judged.

    Attributes:
        comparison: what changed.
        verdict: what the policy makes of it.
        old: what the old side was asked to be, for titles.
        new: likewise the new side.
        seconds: that getting here took.
    """

    comparison: Comparison
    verdict: Verdict
    old: str
    new: str
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        """Whether the upgrade may pass."""
        return self.verdict.ok

    def moved(self) -> dict[str, tuple[str, str]]:
        """Return package -> (old version, new version) of the packages whose version moved."""
        then, now = self.comparison.old["versions"], self.comparison.new["versions"]
        return {
            name: (then.get(name, "-"), now.get(name, "-"))
            for name in PACKAGES
            if then.get(name) != now.get(name)
        }

    def marked(self) -> Iterator[tuple[str, Difference, str]]:
        """Yield (mark, difference, why accepted), the failing first; marks as in JSON."""
        for difference in self.verdict.failing:
            yield "failing", difference, ""
        for difference, entry in self.verdict.accepted:
            yield "accepted", difference, f"{entry.reason} (until {entry.expires})"
        for difference in self.verdict.reported:
            yield "reported", difference, ""

    def headline(self) -> str:
        """Return the verdict in one line."""
        if self.verdict.failing:
            kinds = sorted({d.kind for d in self.verdict.failing}, key=KINDS.index)
            count = len(self.verdict.failing)
            return f"{count} difference{'s' if count > 1 else ''} not accepted: {', '.join(kinds)}"
        if self.verdict.exceeded:
            return "a cost is beyond its bound"
        told = self.comparison.differences
        if not told:
            return "nothing changed, to the last bit"
        if self.verdict.accepted:
            return f"{len(self.verdict.accepted)} differences, all accepted by the policy"
        if all(d.kind == "rounding" for d in told):
            return "nothing but rounding"
        kinds = sorted({d.kind for d in told if d.kind != "rounding"})
        return f"the step did not change; {', '.join(kinds)} did"

    def to_json(self) -> dict[str, Any]:
        """Return the public JSON form."""
        old, new = self.comparison.old, self.comparison.new
        verdict = self.verdict
        return {
            "bnverify": new["bnverify"],
            "subject": self.comparison.subject,
            "ok": self.ok,
            "verdict": self.headline(),
            "from": {"asked": self.old, "python": old["python"], "versions": old["versions"]},
            "to": {"asked": self.new, "python": new["python"], "versions": new["versions"]},
            "differences": [
                {**difference.to_json(), "mark": mark, "accepted": why}
                for mark, difference, why in self.marked()
            ],
            "stale": [entry.reason for entry in verdict.stale],
            "expired": [entry.reason for entry in verdict.expired],
            "exceeded": [
                {"cost": cost, "ratio": ratio, "bound": bound}
                for cost, ratio, bound in verdict.exceeded
            ],
            "costs": dict(self.comparison.costs),
            "notes": list(self.comparison.notes),
            "seconds": round(self.seconds, 3),
        }


def judge(
    comparison: Comparison,
    policy: Policy,
    *,
    old: str = "",
    new: str = "",
    seconds: float = 0.0,
    today: dt.date | None = None,
) -> Judgement:
    """Return the comparison with what the policy makes of it.

    Args:
        comparison: what changed.
        policy: from `policy.find` or `policy.load`.
        old: what the old side was asked to be; by default its releases of jax and flax.
        new: likewise.
        seconds: taken so far.
        today: decides which acceptances hold; by default the day it is.
    """
    day = today or dt.datetime.now(tz=dt.UTC).date()
    verdict = policies.apply(policy, comparison.differences, day, comparison.costs)
    sides = (comparison.old["versions"], comparison.new["versions"])
    names = [f"jax {v.get('jax', '?')}, flax {v.get('flax', '?')}" for v in sides]
    return Judgement(comparison, verdict, old or names[0], new or names[1], seconds)
