"""What a law is, and the registry of all laws."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import wraps
from typing import Any, Literal, TypeAlias

import numpy as np

from bnverify.laws.arithmetic import wide, xp
from bnverify.model import Transition
from bnverify.profile import Family

Kind: TypeAlias = Literal["structure", "residual", "witness", "life", "parallel"]
Check: TypeAlias = Callable[[Transition], Any]


def _more_than_one_transition(t: Transition) -> Any:
    del t
    raise TypeError("this law is judged by running histories or devices, not on a transition")


@dataclass(frozen=True)
class Law:
    """A claim about every training step.

    Attributes:
        name: how reports and options call it.
        family: the family it belongs to.
        kind: what ``check`` gives, and how the law is judged:
            "structure": ``check`` reads trees of shapes, of one case, and returns the differences,
            so the law can be proved from an abstract trace;
            "residual": ``check`` takes a stacked transition of K cases and returns the error over
            the error allowed, (K,), ``UNTRIGGERED`` below the law's precondition;
            "witness": likewise, but the law asks only that some case shows the residual 0
            ("changing the statistics changes the evaluation"), so all cases are judged together;
            "life", "parallel": no ``check``: judged by running histories of a state, or a step
            on many devices.
        claim: the law in one sentence.
        derivation: formula and bound, where the claim needs any.
        check: the law itself, a function of a Transition.
        observes: what ``observe`` must run for it; "noise" for the step's rounding.
        capabilities: what a Subject must show; without it the law is exempt.
        must_not_reach: (output tree, input tree) pairs: proved where the jaxpr shows no such flow.
        returns_unchanged: (output tree, input tree) pairs: proved where the jaxpr hands back the very values.
        must_reach: pairs of a witness law: the case that shows it shows these flows.
        must_change: trees of a witness law that a step must change: handed back, they violate it.
        never: of a witness law, what happened where no case shows it, in one clause.
        mistakes: names in ``bnverify.mistakes``, the most likely first.
        source: where the claim comes from.
    """

    name: str
    family: Family
    kind: Kind
    claim: str
    derivation: str = ""
    check: Check = _more_than_one_transition
    observes: tuple[str, ...] = ()
    capabilities: tuple[str, ...] = ()
    must_not_reach: tuple[tuple[str, str], ...] = ()
    returns_unchanged: tuple[tuple[str, str], ...] = ()
    must_reach: tuple[tuple[str, str], ...] = ()
    must_change: tuple[str, ...] = ()
    never: str = ""
    mistakes: tuple[str, ...] = ()
    source: str = ""


LAWS: dict[str, Law] = {}
"""All laws by name, in the order of reports."""

STEP_LAWS: dict[str, Law] = {}
"""Those that are functions of a Transition: all but the families "life" and "parallel"."""


def _register(law: Law) -> None:
    if law.name in LAWS:
        raise ValueError(f"two laws are named {law.name}")
    LAWS[law.name] = law
    if law.kind not in {"life", "parallel"}:
        STEP_LAWS[law.name] = law


def law(
    family: Family,
    *,
    kind: Literal["structure", "residual", "witness"] = "residual",
    observes: Iterable[str] = (),
    capabilities: Iterable[str] = (),
    must_not_reach: Iterable[tuple[str, str]] = (),
    returns_unchanged: Iterable[tuple[str, str]] = (),
    must_reach: Iterable[tuple[str, str]] = (),
    must_change: Iterable[str] = (),
    never: str = "",
    mistakes: Iterable[str] = (),
    source: str = "",
) -> Callable[[Check], Check]:
    """Register a function of a Transition as the law of its name; see :class:`Law`.

    The first paragraph of its docstring is the claim, the rest the derivation.

    Raises:
        ValueError: another law has that name.
    """

    def register(check: Check) -> Check:
        claim, _, derivation = (inspect.getdoc(check) or "").partition("\n\n")
        _register(
            Law(
                check.__name__,
                family,
                kind,
                claim.replace("\n", " "),
                derivation,
                check if kind == "structure" else _for_each_case(check),
                tuple(observes),
                tuple(capabilities),
                tuple(must_not_reach),
                tuple(returns_unchanged),
                tuple(must_reach),
                tuple(must_change),
                never,
                tuple(mistakes),
                source,
            )
        )
        return check

    return register


def _for_each_case(check: Check) -> Check:
    """Return ``check`` with a residual, float64, for each case, also where one serves them all."""

    @wraps(check)
    def residuals(t: Transition) -> Any:
        with np.errstate(all="ignore"):  # what is not finite is settled by the masks
            return xp.broadcast_to(wide(check(t)), t.case.seed.shape)

    return residuals


def beyond_one_step(
    family: Literal["life", "parallel"],
    name: str,
    claim: str,
    *,
    mistakes: Iterable[str],
    source: str,
) -> None:
    """Register a law that no single transition can show; see :class:`Law`.

    Raises:
        ValueError: another law has that name.
    """
    _register(Law(name, family, family, claim, mistakes=tuple(mistakes), source=source))
