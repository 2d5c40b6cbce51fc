"""The evidence on the life of a state: lives lived, and what breaks in one made small."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from bnverify import compile_cache
from bnverify.broken import Broken
from bnverify.evidence import Evidence
from bnverify.lifetime.applies import exemption, refused, shape_of
from bnverify.lifetime.calls import Call
from bnverify.lifetime.checkpoint import Lived, subject_of
from bnverify.lifetime.claims import CLAIMS
from bnverify.lifetime.life import Life, Record, ways
from bnverify.lifetime.lives import drawn, scripted
from bnverify.lifetime.programs import Programs
from bnverify.lifetime.shorten import shorten
from bnverify.profile import PROFILES, Profile, named
from bnverify.subject import Subject


def check_life(
    lived: Subject | Lived,
    profile: str | Profile = "ci",
    seed: int = 0,
    *,
    select: Collection[str] = (),
    target: str | None = None,
) -> list[Evidence]:
    """Hold the life of a state to its claims and return what is known about each.

    Args:
        lived: a Subject, or a Lived with its own way to save and restore.
        profile: how much to do: two scripted lives for each way to save, and twice as many drawn
            ones as the profile has explicit examples.
        seed: from which the lives are drawn; the same seed gives the same evidence.
        select: names of claims, or one name; empty: all.
        target: how counterexample scripts name the subject.

    Raises:
        ValueError: the profile or a claim is unknown, or the step does not trace with a batch of
            2, 4 or 24 rows.
    """
    names = [select] if isinstance(select, str) else select
    for name in names:
        if name not in CLAIMS:
            raise ValueError(f"no claim about the life of a state is named {name!r}")
    return Lives(lived, named(profile), names or CLAIMS, target).run(seed)


class Lives:
    """Checks of the life of a state, as many as are asked, of programs compiled once.

    Args:
        lived: a Subject, or a Lived with its own way to save and restore.
        plan: how much to do.
        select: the names of the claims.
        target: how counterexample scripts name the subject.

    Attributes:
        cases: how many lives the last check lived.

    Raises:
        Untraceable: the step does not trace at any of the shapes tried.
    """

    def __init__(
        self,
        lived: Subject | Lived,
        plan: Profile,
        select: Collection[str],
        target: str | None,
    ) -> None:
        self._lived = lived
        self._subject = subject_of(lived)
        self._plan = plan
        self._asked = [name for name in CLAIMS if name in select]
        self._target = target
        self._shape = shape_of(self._subject)
        self._programs = Programs(self._subject)
        self._forget()

    def _forget(self) -> None:
        self._record = Record()
        self._broken: dict[str, Broken] = {}
        self._refusals: dict[str, str] = {}
        self.cases = 0

    def run(self, seed: int) -> list[Evidence]:
        """Live all the lives, those that are drawn from ``seed``, and return what is known."""
        compile_cache.enable()
        self._forget()
        for calls in self._lives(seed):
            self.cases += 1
            # A claim that is broken is not asked again: behind it others may be broken too.
            while (found := self._live(calls, self._record)) is not None:
                self._broken[found.claim.name] = self._short(calls, found)
        return [self._evidence(name) for name in self._asked]

    def _evidence(self, name: str) -> Evidence:
        """Return what is known about one claim."""
        claim, cases = CLAIMS[name], self._record.seen[name]
        if name in self._broken:
            return self._broken[name].evidence(cases)
        if (reason := exemption(name, self._subject, self._programs, self._shape)) is not None:
            return claim.evidence("exempt", reason=reason)
        missing = "; ".join(self._refusals.values())
        if not cases:
            return claim.evidence("untriggered", reason=missing or "no life reached it")
        folded = name == "statistics_fold_each_batch_once"
        residual = self._record.worst if folded else None
        return claim.evidence("held", cases=cases, residual=residual, reason=missing)

    def _lives(self, seed: int) -> Iterator[Sequence[Call]]:
        quick = []
        for way in ways(self._lived):
            if way == "orbax" and self._plan.examples <= PROFILES["quick"].examples:
                continue
            reason = refused(self._lived, way, self._programs, self._shape)
            if reason is not None:
                self._refusals[way] = reason
                continue
            if way != "orbax":  # it takes tenths of a second each time
                quick.append(way)
            yield from scripted(way, self._shape)
        yield from drawn(seed, 2 * self._plan.examples, quick, self._shape)

    def _live(self, calls: Sequence[Call], record: Record | None) -> Broken | None:
        """Return what breaks in a life, if anything does."""
        life = Life(
            self._lived,
            programs=self._programs,
            ignore=set(CLAIMS) - set(self._asked) | set(self._broken),
            record=record,
            name=self._target,
        )
        try:
            life.live(calls)
        except Broken as found:
            return found
        return None

    def _short(self, calls: Sequence[Call], found: Broken) -> Broken:
        """Return the same violation in a life as short as can be."""
        shortest = found

        def breaks(fewer: Sequence[Call]) -> bool:
            nonlocal shortest
            try:
                seen = self._live(fewer, None)
            except ValueError:  # nothing was saved that could be restored
                return False
            if seen is None or (seen.claim, seen.mistake) != (found.claim, found.mistake):
                return False
            shortest = seen
            return True

        shorten(calls, breaks)
        return shortest
