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
        name: its name in reports and options.
        family: the family it belongs to.
        kind: what ``check`` returns, and how the law is judged:
            "structure": ``check`` reads the traced step and returns a list of differences: the trees
            of its abstract run, which may prove the law, or the facts that an analysis of the trace
            found ("look", "retraced");
            "residual": ``check`` takes a stacked transition of K cases and returns, (K,), the error
            divided by the tolerance; ``UNTRIGGERED`` where the precondition is not met;
            "witness": the same, but one case with residual 0 is enough ("changing batch_stats
            changes the eval loss"), so all cases are judged together;
            "life", "parallel": no ``check``; judged by running histories of a state, or the step
            on several devices.
        claim: the law in one sentence.
        derivation: the formula and how its tolerance is derived; empty for an exact claim.
        check: the law itself, a function of a Transition.
        observes: what is needed besides the step itself: names that ``observe`` runs, "noise" and
            others that ``judge`` reads from the traced arithmetic, "look" and "retraced" from
            ``proof``.
        capabilities: what a Subject must provide; without it the law is exempt.
        must_not_reach: (output tree, input tree) pairs. The law is proved if the jaxpr has no path
            from the input to the output of any pair.
        returns_unchanged: (output tree, input tree) pairs. The law is proved if the jaxpr returns
            the input itself.
        must_reach: (output tree, input tree) pairs of a witness law. It is violated if the jaxpr
            has no path for one of them.
        must_change: trees that a witness law requires the step to change. It is violated if the
            jaxpr returns one of them unchanged.
        never: for a witness law, the violation in one clause: "changing x never changed the loss".
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
"""The laws that are functions of a Transition: all except the families "life" and "parallel"."""


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
    """Register a function of a Transition as a law; see :class:`Law` for the arguments.

    The function's name is the law's name, the first paragraph of its docstring the claim, the rest
    the derivation.

    Raises:
        ValueError: a law of that name exists.
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
    """Return ``check`` with its residual broadcast to one float64 per case, (K,)."""

    @wraps(check)
    def residuals(t: Transition) -> Any:
        with np.errstate(all="ignore"):  # the laws mask non-finite values themselves
            return xp.broadcast_to(wide(check(t)), t.case.seed.shape)

    return residuals


def beyond_one_step(
    family: Literal["life", "parallel"],
    name: str,
    claim: str,
    *,
    mistakes: Iterable[str],
    source: str,
    derivation: str = "",
) -> None:
    """Register a law that takes more than one transition to judge; see :class:`Law`.

    Raises:
        ValueError: a law of that name exists.
    """
    _register(Law(name, family, family, claim, derivation, mistakes=tuple(mistakes), source=source))
