"""What can be known of a step without running it: its structure and what reaches what."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from bnverify.case import Case
from bnverify.evidence import Evidence
from bnverify.jaxpr import Abstract, Influence, Run, TraceError, Traces, influence, trace_subject
from bnverify.laws import Law
from bnverify.lazy import jax
from bnverify.observe import Calls, observe
from bnverify.subject import Subject
from bnverify.transition import Transition

PROBED = "by a momentum probe, since the optimizer's own state is empty"


@dataclass(frozen=True)
class Traced:
    """A subject and its traces."""

    subject: Subject
    traces: Traces

    @property
    def abstract(self) -> Transition:
        """The first traced run, whose leaves have shapes and dtypes, no values."""
        return _abstract(self.traces.runs[0])

    @cached_property
    def transitions(self) -> list[Transition]:
        """Each traced run, with what the optimizer's init gives for params alone."""
        return [
            _abstract(run)._replace(facts=_expected_opt_state(self.subject, run.before.params))
            for run in self.traces.runs
        ]


@dataclass(frozen=True)
class Reading:
    """A subject as its traces show it.

    Attributes:
        traced: the subject with its traces; None where it does not trace.
        influence: what may reach what; None likewise.
        refusal: why it does not trace; empty where it does.
        probe: the same step around SGD with momentum, where the subject's own optimizer keeps
            no state and another can stand in for it.
        ran: where it does not trace, one run of it; None where it does not run either.
    """

    traced: Traced | None
    influence: Influence | None
    refusal: str = ""
    probe: Traced | None = None
    ran: Transition | None = None

    @property
    def abstract(self) -> Transition | None:
        """A transition whose leaves have shapes and dtypes, and values only where it was run."""
        return self.ran if self.traced is None else self.traced.abstract


def read(subject: Subject) -> Reading:
    """Return ``subject`` as its traces show it; nothing is compiled."""
    try:
        traces = trace_subject(subject)
    except TraceError as error:
        return Reading(None, None, refusal=str(error), ran=_run(subject))
    probe = None
    if not jax.tree_util.tree_leaves(traces.runs[0].before.opt_state):
        probe = _probe(subject)
    return Reading(Traced(subject, traces), influence(traces), probe=probe)


def _run(subject: Subject) -> Transition | None:
    """Return one run of a subject, uncompiled; None where it raises."""
    width = subject.features[0] if subject.features else 3
    x = np.linspace(-1, 1, 4 * width, dtype=np.float32).reshape(4, width)
    case = Case.of(0, x, x[:, 0], 0.1)
    try:
        t = observe(Calls(subject, "eager"), case, ())
    except Exception:  # noqa: BLE001 - whatever a user's code raises
        return None
    return t._replace(facts=_expected_opt_state(subject, t.before.params))


def _probe(subject: Subject) -> Traced | None:
    if subject.with_optimizer is None:
        return None
    probe = subject.with_optimizer(_momentum)
    try:
        return Traced(probe, trace_subject(probe))
    except TraceError:  # the probe only adds evidence
        return None


def _momentum(lr: Any) -> Any:
    import optax

    return optax.sgd(lr, momentum=0.9)


def _abstract(run: Run) -> Transition:
    return Transition(
        case=None,  # type: ignore[arg-type] # an abstract transition has no values
        before=run.before,
        after=run.after,
        info=run.info,
        eval_loss=run.eval_loss,
        reruns={},
        evals={},
        facts={},
    )


def _expected_opt_state(subject: Subject, params: Any) -> dict[str, Any]:
    if subject.optimizer is None:
        return {}
    optimizer = subject.optimizer
    shaped, lr = jax.tree_util.tree_map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype),
        (params, Abstract((), np.dtype(np.float32))),
    )
    shapes = jax.eval_shape(lambda params, lr: optimizer(lr).init(params), shaped, lr)
    return {"expected_opt_state": shapes}


def judge_structure(law: Law, reading: Reading) -> Evidence:
    """Return the evidence for a law of structure from the traces."""
    traced, note = reading.traced, ""
    if "opt_state" in law.requires and reading.probe is not None:
        traced, note = reading.probe, f"; {PROBED}"
    if traced is None:
        if reading.ran is None:
            return Evidence(law.name, law.family, "untriggered", reason=reading.refusal)
        lines = law.check(reading.ran)
        scope = f"in one run, since it does not trace: {reading.refusal}"
        if lines:
            return Evidence(law.name, law.family, "violated", 1, reason=f"{lines[0]} [{scope}]")
        return Evidence(law.name, law.family, "held", 1, reason=scope)
    traces = traced.traces
    for transition in traced.transitions:
        lines = law.check(transition)
        if lines:
            more = f" (and {len(lines) - 1} more)" if len(lines) > 1 else ""
            return Evidence(
                law.name,
                law.family,
                "violated",
                cases=1,
                reason=f"{lines[0]}{more} [{traces.scope}{note}]",
            )
    status, why = ("proved", "") if traces.proved else ("held", f": {traces.narrowed}")
    return Evidence(
        law.name,
        law.family,
        status,  # type: ignore[arg-type] # one of the two literals above
        cases=0 if traces.proved else 1,
        reason=f"{traces.scope}{note}{why}",
    )


def prove_influence(law: Law, reading: Reading) -> Evidence | None:
    """Return a proof that nothing the law forbids can flow, or None where there is none.

    A flow in the matrix is no violation: it may cancel. Running decides.
    """
    flows = reading.influence
    if flows is None or not flows.proved or not law.forbids:
        return None
    absent = [output for output, _ in law.forbids if output not in flows.matrix]
    if absent or forbidden(law, flows):
        return None
    return Evidence(
        law.name,
        law.family,
        "proved",
        reason=f"all values, {flows.scope}: " + ", ".join(f"no {i} -> {o}" for o, i in law.forbids),
    )


def forbidden(law: Law, flows: Influence) -> list[tuple[str, str]]:
    """Return the (output, input) pairs that ``law`` forbids and the step may have.

    An evaluation that hands back the very leaf it was given lets nothing else flow into it.
    """
    return [
        (output, source)
        for output, source in law.forbids
        if source in flows.matrix.get(output, frozenset())
    ]


def explain(law: Law, reading: Reading) -> str:
    """Return the way of a forbidden flow in words; empty where there is none."""
    if reading.influence is None:
        return ""
    for output, source in forbidden(law, reading.influence):
        return reading.influence.explain(source, output)
    return ""
