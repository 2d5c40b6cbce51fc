"""What a law is, and the registry of all laws."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from bnverify.transition import Transition

Family: TypeAlias = Literal[
    "structure", "influence", "statistics", "update", "evaluation", "metamorphic"
]
Kind: TypeAlias = Literal["structure", "residual", "witness"]

UNTRIGGERED = -1.0
"""The residual of a case that does not reach a law's precondition. Errors are never negative."""


@dataclass(frozen=True)
class Law:
    """A claim about every training step.

    Attributes:
        name: the claim.
        family: the family it belongs to.
        kind: "structure": ``check`` reads trees of shapes and returns the differences, so it
            can be proved from an abstract trace; "residual": ``check`` returns the error over
            the error allowed, a scalar, ``UNTRIGGERED`` below its precondition; "witness":
            likewise, but the law asks only that some case shows the residual 0 ("changing the
            statistics changes the evaluation"), so it is judged over all cases together.
        check: the law itself, a function of a Transition.
        needs: what ``observe`` must run for it; "noise" for the step's rounding.
        requires: the attributes of a Subject without which it is exempt.
        forbids: (output tree, input tree) pairs: proved where the jaxpr shows no such flow.
        demands: pairs of a witness law: the case that shows it shows these flows.
        mistakes: names in ``bnverify.mistakes``, the likeliest first.
        source: where the claim comes from.
    """

    name: str
    family: Family
    kind: Kind
    check: Callable[[Transition], Any]
    needs: tuple[str, ...] = ()
    requires: tuple[str, ...] = ()
    forbids: tuple[tuple[str, str], ...] = ()
    demands: tuple[tuple[str, str], ...] = ()
    mistakes: tuple[str, ...] = ()
    source: str = ""

    @property
    def claim(self) -> str:
        """The law in one sentence."""
        return (self.check.__doc__ or "").strip().split("\n\n")[0].replace("\n", " ")

    @property
    def derivation(self) -> str:
        """What the docstring says after the claim: formula and bound."""
        return "\n\n".join((self.check.__doc__ or "").strip().split("\n\n")[1:])


LAWS: dict[str, Law] = {}


def law(
    family: Family,
    *,
    kind: Kind = "residual",
    needs: Iterable[str] = (),
    requires: Iterable[str] = (),
    forbids: Iterable[tuple[str, str]] = (),
    demands: Iterable[tuple[str, str]] = (),
    mistakes: Iterable[str] = (),
    source: str = "",
) -> Callable[[Callable[[Transition], Any]], Callable[[Transition], Any]]:
    """Register a function of a Transition as the law of its name; see :class:`Law`."""

    def register(check: Callable[[Transition], Any]) -> Callable[[Transition], Any]:
        name = check.__name__
        if name in LAWS:
            raise ValueError(f"two laws are named {name}")
        LAWS[name] = Law(
            name,
            family,
            kind,
            check,
            tuple(needs),
            tuple(requires),
            tuple(forbids),
            tuple(demands),
            tuple(mistakes),
            source,
        )
        return check

    return register
